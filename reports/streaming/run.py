"""A job with a long tail on two cores, with weights at boundaries and in flight: measured against
predicted, one run after the other on a machine that does nothing else. Predicted are the same steps
that are measured, with the lengths that they have.

    taskset -c 0,1 python reports/streaming/run.py --out streaming

It takes three to four minutes, of which the profile takes one. The best plan of each kind is
searched with that profile. `--staleness 1 2 4` tries several for the plan in flight."""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from planner.predict.forecast import forecast_of
from planner.predict.profile import Profile
from planner.spec.files import write_atomic
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


def predicted_and_measured(file: Path, out: Path) -> tuple[float, float]:
    """Seconds of a step."""
    shutil.rmtree(out / "runs" / file.stem, ignore_errors=True)
    options = ["--name", file.stem, "--runs", str(out / "runs")]
    plan("execute", str(file), *options, "--steps", str(STEPS), "--save-every", "0")
    timeline = Timeline.read(out / "runs" / file.stem / "timeline.json")
    profile = Profile.read(out / "profile.json")
    predicted = forecast_of(Plan.read(file), timeline, [profile])
    return step_seconds(predicted), step_seconds(timeline)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", default="2", help="for the profile, at most")
    parser.add_argument("--staleness", type=int, nargs="+", default=[4])
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    plan(
        *("profile", "--cluster", "local", "--gpus", str(CORES), "--minutes", options.minutes),
        *("--workload", str(HERE / "long-tail.toml"), "--out", str(out / "profile.json")),
    )
    kinds = [("boundary", max(options.staleness))]
    kinds += [("in_flight", staleness) for staleness in options.staleness]
    rows = []
    for kind, staleness in kinds:
        file = best(kind, staleness, out)
        rows.append((f"{kind}, k ≤ {staleness}", *predicted_and_measured(file, out)))
    write_atomic(out / "run.md", "\n".join(table(rows)) + "\n")
    print((out / "run.md").read_text())


def table(rows: list[tuple[str, float, float]]) -> Iterator[str]:
    """Of plans, with their predicted and measured seconds; the first is what others compare to."""
    _, base_predicted, base_measured = rows[0]
    yield "| plan | s a step, predicted | measured | off by | ratio, predicted | measured |"
    yield "|---|---:|---:|---:|---:|---:|"
    for name, predicted, found in rows:
        seconds = f"{predicted:.3f} | {found:.3f} | {predicted / found - 1:+.0%}"
        ratios = f"{predicted / base_predicted:.2f} | {found / base_measured:.2f}"
        yield f"| {name} | {seconds} | {ratios} |"


if __name__ == "__main__":
    main()
