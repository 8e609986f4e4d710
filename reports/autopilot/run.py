"""Shows what the autopilot does on two cores: a run that begins under the worst baseline, and whose
responses become three times as long half-way, beside a run of the longer responses under the plan
that a search with hindsight gives.

python reports/autopilot/run.py --out autopilot [--steps 100]
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from make import BATCH, GROUP, LONG, SEED, make

from executor.data.order import Shuffled

HINDSIGHT_STEPS, SETTLING = 30, 2
SHARES = (10, 25, 50)  # of the steps: the shorter ones say what a step takes on a busy host
TASK, WORST = "task", "worst.json"


def plan(out: Path, *words: str) -> None:
    """One command, in the directory of the results."""
    subprocess.run([sys.executable, "-P", "-m", "planner", *words], cwd=out, check=True)


def lines_of(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def run_with_autopilot(out: Path, steps: int) -> None:
    make(out / TASK, steps)
    job = ("--cluster", "local", "--workload", f"{TASK}/workload.toml")
    plan(out, "baseline", "standalone", *job, "--out", WORST)
    told = ("--samples", str(BATCH), "--samples-every", "1")
    plan(out, "execute", WORST, "--autopilot", "--name", "autopilot", *told)


def run_with_hindsight(out: Path) -> None:
    """The longer responses are known: they are measured, searched with, and run."""
    make(out / "longer", HINDSIGHT_STEPS, short=LONG)
    job = ("--cluster", "local", "--workload", "longer/workload.toml")
    plan(out, "profile", *job, "--minutes", "2", "--out", "profile.json")
    plan(out, "search", *job, "--profile", "profile.json", "--out", "hindsight.json")
    plan(out, "execute", "hindsight.json", "--name", "hindsight")


def check_ledger(out: Path, steps: int) -> None:
    """Each step was done once, with the prompts that are its own, each answered as often as it
    should be."""
    run = out / "runs" / "autopilot"
    assert [line["step"] for line in lines_of(run, "metrics.jsonl")] == list(range(steps))
    rows = [json.loads(line)["prompt"] for line in (out / TASK / "train.jsonl").open()]
    said = Counter((line["step"], line["prompt"]) for line in lines_of(run, "samples.jsonl"))
    asked, order = BATCH // GROUP, Shuffled([len(rows)], [1.0], SEED)
    expected = Counter[tuple[int, str]]()
    for step in range(steps):
        places = order.places(step * asked, (step + 1) * asked)
        expected.update((step, rows[row]) for _, row in places for _ in range(GROUP))
    assert said == expected


def result(out: Path, steps: int) -> dict[str, Any]:
    """The seconds of all steps, and percentiles of those of longer responses: with the autopilot
    before and behind its last switch, and with hindsight. The first two steps of a start do not
    count."""
    of_run = {
        name: [line.get("seconds") for line in lines_of(out / "runs" / name, "metrics.jsonl")]
        for name in ("autopilot", "hindsight")
    }
    timeline = json.loads((out / "runs" / "autopilot" / "timeline.json").read_text())
    half, seconds = steps // 2, of_run["autopilot"]
    switched = max((d["steps_done"] for d in timeline["decisions"] if d["switches"]), default=0)
    parts = {
        "before": seconds[half : max(half, switched)],
        "behind": seconds[max(half, switched) + SETTLING :],
        "hindsight": of_run["hindsight"][SETTLING:],
    }
    found = {
        name: dict(zip(SHARES, np.percentile(part, SHARES).round(3).tolist(), strict=True))
        for name, part in parts.items()
        if part
    }
    return {"percentiles": found, "decisions": timeline["decisions"], "seconds": of_run}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    run_with_autopilot(asked.out, asked.steps)
    check_ledger(asked.out, asked.steps)
    run_with_hindsight(asked.out)
    found = result(asked.out, asked.steps)
    (asked.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: x for key, x in found.items() if key != "seconds"}, indent=1))


if __name__ == "__main__":
    main()
