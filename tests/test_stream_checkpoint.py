"""What is left to do behind a checkpoint that has unfinished sequences; without processes."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_stream_run import STEPS, streamed

from executor.running.checkpoint import IN_FLIGHT, Checkpoint, Manifest
from executor.training.shards import entry_of


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
        directory=directory, manifest=manifest, plan=streamed(k), spans=(), metrics=b"{}\n" * 2
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
