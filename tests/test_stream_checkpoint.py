"""What is left to do behind a checkpoint that has unfinished sequences; without processes."""

from pathlib import Path
from threading import Event

import numpy as np
import pytest
from processes import PATIENCE
from safetensors.numpy import save_file
from test_executor_loop import Quick
from test_stream_run import STEPS, streamed

from executor.fleet.worker import Record
from executor.running.checkpoint import IN_FLIGHT, Checkpoint, Manifest
from executor.running.loop import Silent
from executor.running.run import Run
from executor.running.run_directory import RunDirectory, timeline_of
from executor.running.saving import Saver, Snapshot
from executor.training.shards import entry_of
from planner.predict.schedule import Task
from planner.spec.timeline import Timeline


def of_step_2(directory: Path, k: int) -> Checkpoint:
    """The sequences of steps 2 and 3 are in flight, and no other call of them has begun."""
    arrays = {f"stream/{step}/lengths": np.ones(8) for step in (2, 3)}
    save_file({**arrays, "stream/sampled": np.ones(1)}, directory / IN_FLIGHT)
    manifest = Manifest(
        step=2,
        done=(),
        metrics={},
        evaluations={},
        skipped={},
        roles={},
        files={IN_FLIGHT: entry_of(directory / IN_FLIGHT)},
    )
    return Checkpoint(
        directory=directory,
        manifest=manifest,
        plan=streamed(k),
        timeline=timeline_of(streamed(k), STEPS, ()),
        metrics=b"{}\n" * 2,
    )


@pytest.mark.parametrize("k", [2, 3])
def test_sequences_are_gone_on_with_where_they_may_be_as_stale(tmp_path: Path, k: int) -> None:
    left = of_step_2(tmp_path, k=2).left(streamed(k), STEPS)
    assert not left.refills and not left.differs
    again = [task for task in left.tasks if task.index not in left.ended and task.call.streams]
    assert [task.step for task in again] == [2, 3, 4, 5]


def test_sequences_are_generated_again_where_they_would_be_too_stale(tmp_path: Path) -> None:
    found = of_step_2(tmp_path, k=2)
    boundary = streamed(2).changed(sync="boundary")
    for plan in (streamed(1), boundary):
        left = found.left(plan, STEPS)
        assert left.refills
        assert left.differs.startswith("sequences in flight, of steps 2, 3, are generated again")
        made = {task.step for task in left.tasks if task.index not in left.ended}
        assert made == {2, 3, 4, 5}


class EndsInPause(Quick):
    """Generation of step 1 ends while a checkpoint is taken, which has its sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.paused = Event()

    def run(self, task: Task) -> tuple[list[Record], int]:
        if task.call.streams and task.step == 1:
            assert self.paused.wait(PATIENCE)
        return super().run(task)

    def snapshot(self, directory: Path) -> Snapshot:
        self.paused.set()
        return Snapshot(
            arrays={},
            metrics={1: {}},
            evaluations={},
            skipped={},
            kl_coef=None,
            written=lambda: [({}, {})],
        )


def test_what_ends_while_a_checkpoint_is_taken_is_in_its_timeline(tmp_path: Path) -> None:
    saver = Saver(tmp_path / "r" / "checkpoints", every=1, keep=3)
    directory = RunDirectory(tmp_path / "r", tensorboard=False)
    Run(streamed(1), 3, EndsInPause(), directory, Silent(), saver=saver).finish()
    found = tmp_path / "r" / "checkpoints" / "step-000001"
    assert ("generate", 1, 0) in Manifest.read(found / "checkpoint.json").done
    calls = [(span.call, span.step) for span in Timeline.read(found / "timeline.json").spans]
    assert calls.count(("generate", 1)) == calls.count(("generate", 0)) == 1
    whole = Timeline.read(tmp_path / "r" / "timeline.json").spans
    assert len({(span.call, span.step) for span in whole}) == len(whole)
