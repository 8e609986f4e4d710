"""The demo's job with checkpoints: for how long they stop it, and how soon it goes on from one. See
`make bench`."""

import time
from pathlib import Path

import pytest

from executor.digits.task import make
from executor.running import checkpoint
from executor.running.execute import execute, resume
from executor.running.loop import Silent
from executor.running.options import RunOptions
from planner.commands.local import local_cluster
from planner.predict.profile import load_profiles
from planner.predict.schedule import Task
from planner.search import find
from planner.spec.plan import Plan
from planner.spec.timeline import Timeline
from planner.spec.workload_file import load_workload

pytestmark = pytest.mark.bench
STEPS, EVERY = 30, 10
TRIES = 2  # the fastest counts: what else the machine does only adds
NOISE = 1.25
PROFILE = Path(__file__).parents[1] / "reports" / "demo" / "profile.json"


def options(steps: int) -> RunOptions:
    return RunOptions(steps=steps, save_every=EVERY, max_restarts=0)


class UntilTheFirstCall(Silent):
    """Seconds from here to the start of the first call."""

    def __init__(self) -> None:
        self._began, self.seconds = time.perf_counter(), 0.0

    def on_start(self, task: Task) -> None:
        self.seconds = self.seconds or time.perf_counter() - self._began


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run of the demo's job, and how long it took to start."""
    directory = tmp_path_factory.mktemp("saving")
    make(directory / "task")
    workload = load_workload(directory / "task" / "workload.toml")
    plan = find(workload, local_cluster(2), profiles=load_profiles([PROFILE])).best
    watches = [UntilTheFirstCall() for _ in range(TRIES)]
    for number, (watch, steps) in enumerate(zip(watches, (1, STEPS), strict=True)):
        run = execute(
            plan, name=f"r{number}", runs=directory, options=options(steps), progress=watch
        )
    return run, min(watch.seconds for watch in watches)


def stops(plan: Plan, timeline: Timeline) -> list[float]:
    """For how long each checkpoint held back calls that were ready."""
    found = []
    syncs = [
        span for span in timeline.spans if span.call == "sync_weights" and (span.step + 1) % 10 == 0
    ]
    for sync in syncs:
        after = [span for span in timeline.spans if span.start > sync.end and span.pools]
        firsts = [
            min((s for s in after if pool in s.pools), key=lambda s: s.start, default=None)
            for pool in plan.pools
        ]
        found += (
            [max(span.start - span.ready for span in firsts if span is not None)]
            if any(firsts)
            else []
        )
    return found


def test_saving_hardly_stops_the_trainers(saved: tuple[Path, float]) -> None:
    """At most 3% of the run at a checkpoint every 10 steps."""
    run, _ = saved
    timeline = Timeline.read(run / "timeline.json")
    held = stops(Plan.read(run / "plan.json"), timeline)
    assert len(held) == STEPS // EVERY
    whole = max(span.end for span in timeline.spans)
    shown = ", ".join(f"{1000 * seconds:.0f}" for seconds in held)
    print(
        f"saving every 10 steps stops the trainers for {shown} ms: {sum(held) / whole:.2%} of "
        f"{whole:.1f} s (aim 3%)"
    )
    assert sum(held) / whole <= 0.03


def test_a_run_goes_on_as_soon_as_it_could_start(saved: tuple[Path, float]) -> None:
    """Within the start-up and the time to read the checkpoint."""
    run, started = saved
    began = time.perf_counter()
    found = checkpoint.find(run / "checkpoints" / f"step-{STEPS - 10:06d}")
    read = time.perf_counter() - began
    watches = [UntilTheFirstCall() for _ in range(TRIES)]
    for watch in watches:
        resume(found, options=options(STEPS - 8), progress=watch)
    goes_on = min(watch.seconds for watch in watches)
    print(
        f"a start takes {started:.1f} s, reading the checkpoint {read:.2f} s, going on from it "
        f"{goes_on:.1f} s"
    )
    assert goes_on <= NOISE * started + read
