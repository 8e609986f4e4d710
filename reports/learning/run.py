"""Train the small task with sequences that are k = 0, 1, 2 and 4 updates old, with the decoupled
objective and without it, three seeds each: 24 runs, N at a time, each with a Ray of its own on two
cores. Writes results.csv into --out.

    python reports/learning/run.py --out learning --at-once 1

Runs that have been made are not made again, so an interrupted study is gone on with by the same
command. To go on a large host use as many at once as it has pairs of cores, less a few for the
controllers."""

import argparse
import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from planner.spec.files import write_atomic
from planner.spec.plan import Plan
from planner.spec.timeline import Timeline
from planner.spec.workload_file import load_workload

HERE = Path(__file__).resolve().parent
STALENESS, OBJECTIVES, SEEDS = (0, 1, 2, 4), ("decoupled", "plain"), (0, 1, 2)
ATTEMPTS = 2  # Rays that start at the same moment may grasp for the same port
STAGGER_SECONDS = 0.5
KEPT = (
    "step",
    "score",
    "reward",
    "exact_match",
    "kl",
    "staleness",
    "importance/mean",
    "importance/p99",
    "importance/max",
    "importance/effective_share",
    "actor/clip_share",
    "actor/cap_share",
    "actor/approx_kl",
    "importance/staleness_kl",
    "actor/grad_norm",
)


class Run(NamedTuple):
    k: int
    objective: str
    seed: int

    def __str__(self) -> str:
        return f"k{self.k}-{self.objective}-{self.seed}"


def all_runs() -> Iterator[Run]:
    """Seed by seed, so that runs that are compared run beside each other."""
    return (
        Run(k, objective, seed) for seed in SEEDS for k in STALENESS for objective in OBJECTIVES
    )


def plan_of(run: Run, task: Path) -> Plan:
    """The plan of a staleness, for this seed. `plain` takes the rollout's log-probs as the proximal
    ones: PPO's ratio is then that to the policy that sampled, nothing is recomputed, and no
    importance weight is left."""
    plan = json.loads((HERE / f"k{run.k}.json").read_text())
    changes = {"seed": run.seed, "max_staleness": run.k}
    if run.objective == "plain":
        changes["proximal"] = "rollout"
        plan["program"] = [item for item in plan["program"] if item.get("call") != "old_logprobs"]
    workload = load_workload(task / "workload.toml").model_dump() | changes
    del plan["schema"]
    return Plan.model_validate(plan | {"name": str(run), "workload": workload, "predicted": None})


def train(run: Run, out: Path, steps: int) -> None:
    """In a process of its own: do a run and keep what is drawn of it."""
    from executor.running.execute import execute
    from executor.running.options import RunOptions

    options = RunOptions(steps=steps, save_every=0, max_restarts=0)
    shutil.rmtree(out / "runs" / str(run), ignore_errors=True)
    plan = plan_of(run, out / "task")
    path = execute(plan, name=str(run), runs=out / "runs", options=options)
    write_atomic(out / "done" / f"{run}.json", json.dumps(list(kept(run, path))))
    shutil.rmtree(path)


def kept(run: Run, path: Path) -> Iterator[dict[str, Any]]:
    """A row per step. `seconds`: from the start of the first call to the end of the step's update
    of the actor."""
    spans = Timeline.read(path / "timeline.json").spans
    began = min(span.start for span in spans)
    ends = {span.step: span.end - began for span in spans if span.call == "update_actor"}
    for line in (path / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        yield {
            **run._asdict(),
            "seconds": ends[metrics["step"]],
            **{name: metrics.get(name) for name in KEPT},
        }


def in_process(run: Run, number: int, at_once: int, out: Path, steps: int) -> str:
    """The outcome of a run, in a line."""
    if (out / "done" / f"{run}.json").exists():
        return "was there"
    if number < at_once:
        time.sleep(number * STAGGER_SECONDS)
    command = [sys.executable, __file__, "--out", str(out), "--steps", str(steps)]
    command += ["--runs", str(run), "--in-process"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }  # a process has a core
    log = out / "logs" / f"{run}.txt"
    for _ in range(ATTEMPTS):
        began = time.monotonic()
        with log.open("w") as file:
            code = subprocess.run(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT
            ).returncode
        if code == 0:
            return f"{time.monotonic() - began:.0f} s"
    return f"failed, see {log}"


def write_table(out: Path) -> None:
    """Of all runs that have been made."""
    rows = [row for run in all_runs() for row in _rows(out / "done" / f"{run}.json")]
    if not rows:
        sys.exit("no run has been made")
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {
                name: f"{value:.5g}" if isinstance(value, float) else value
                for name, value in row.items()
            }
        )
    write_atomic(out / "results.csv", text.getvalue())


def _rows(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--at-once", type=int, default=1, help="runs at a time, each on two cores")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--runs", nargs="+", help="only these, such as k1-plain-0")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = options.out.resolve()
    runs = [run for run in all_runs() if not options.runs or str(run) in options.runs]
    if options.in_process:
        return train(runs[0], out, options.steps)
    for directory in ("logs", "done", "runs"):
        (out / directory).mkdir(parents=True, exist_ok=True)
    if not (out / "task").exists():
        from executor.digits.task import make

        make(out / "task")
    arguments = [
        (run, number, options.at_once, out, options.steps) for number, run in enumerate(runs)
    ]
    with ThreadPoolExecutor(options.at_once) as pool:
        for run, outcome in zip(
            runs, pool.map(lambda each: in_process(*each), arguments), strict=True
        ):
            print(f"{run}: {outcome}", flush=True)
    write_table(out)


if __name__ == "__main__":
    main()
