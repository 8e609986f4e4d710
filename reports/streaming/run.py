"""A job with a long tail on two cores, with weights at boundaries and in flight: measured against
predicted, one run after the other on a machine that does nothing else.

    python reports/streaming/run.py --out streaming

It takes about ten minutes, of which the profile takes most. The best plan of each kind is searched
with that profile."""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from planner.spec.plan import Plan
from planner.spec.timeline import Timeline, step_seconds

HERE = Path(__file__).resolve().parent
CORES, STEPS = 2, 40


def plan(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "planner.cli", *arguments], check=True)


def best(kind: str, staleness: int, out: Path) -> Path:
    """The best plan of a kind with so much staleness at most."""
    file = out / f"{kind}-{staleness}.json"
    settings = ["--set", f"sync={kind}", "--max-staleness", str(staleness)]
    plan(
        *("search", "--cluster", "local", "--gpus", str(CORES)),
        *("--workload", str(HERE / "long-tail.toml"), "--profile", str(out / "profile.json")),
        *(*settings, "--out", str(file)),
    )
    return file


def measured(file: Path, out: Path) -> float:
    """Seconds of a step."""
    shutil.rmtree(out / "runs" / file.stem, ignore_errors=True)
    options = ["--name", file.stem, "--runs", str(out / "runs")]
    plan("execute", str(file), *options, "--steps", str(STEPS), "--save-every", "0")
    return step_seconds(Timeline.read(out / "runs" / file.stem / "timeline.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", default="6", help="for the profile")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    plan(
        *("profile", "--cluster", "local", "--gpus", str(CORES), "--minutes", options.minutes),
        *("--workload", str(HERE / "long-tail.toml"), "--out", str(out / "profile.json")),
    )
    rows = []
    for kind, staleness in (("boundary", 4), ("in_flight", 1), ("in_flight", 2), ("in_flight", 4)):
        file = best(kind, staleness, out)
        predicted = Plan.read(file).predicted
        assert predicted is not None
        rows.append((f"{kind}, k ≤ {staleness}", predicted.step_seconds, measured(file, out)))
    base = rows[0][2]
    print("| plan | s a step, predicted | measured | off by | of the boundary's |")
    print("|---|---|---|---|---|")
    for name, forecast, found in rows:
        off = forecast / found - 1
        print(f"| {name} | {forecast:.2f} | {found:.2f} | {off:+.0%} | {found / base:.2f} |")


if __name__ == "__main__":
    main()
