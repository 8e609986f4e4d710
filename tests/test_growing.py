"""Sequences that grow: what a checkpoint has of them is what they were."""

import numpy as np
import pytest
from conftest import make_workload

from executor.data.prompts import Synthetic
from executor.rollout.streaming import Stretch
from executor.running.growing import GrowingBatch
from planner.spec.data import Sampler

SAMPLER = Sampler(temperature=1.0)


def batch() -> GrowingBatch:
    """Of eight prompts; three have some tokens, of two versions, and one of these has ended."""
    prompts = Synthetic(make_workload()).step(0)
    found = GrowingBatch(prompts, SAMPLER, first=100, step=0)
    for row, (version, count) in enumerate([(3, 2), (3, 1), (4, 3)]):
        for each in (version, version + 1):
            tokens = np.arange(count, dtype=np.int32) + 10 * row + each
            found.growing[row].add(
                Stretch(
                    number=100 + row,
                    version=each,
                    tokens=tokens,
                    log_probs=-tokens.astype(np.float32) / 7,
                    ended=False,
                )
            )
    found.growing[1].ended = True
    found.left = 7
    return found


def test_a_batch_is_restored_as_it_was() -> None:
    was = batch()
    found = GrowingBatch(Synthetic(make_workload()).step(0), SAMPLER, first=5, step=0)
    found.restore(was.arrays())
    assert found.tokens == was.tokens == 12 and found.left == 7
    for name, array in was.arrays().items():
        assert (
            np.array_equal(found.arrays()[name], array)
            and found.arrays()[name].dtype == array.dtype
        )
    assert found.growing[2].versions.tolist() == [4, 4, 4, 5, 5, 5]
    assert found.growing[2].unfinished().response.tolist() == [24, 25, 26, 25, 26, 27]
    assert found.growing[0].unfinished().key == was.growing[0].unfinished().key


@pytest.mark.parametrize(("at_most", "whole"), [(None, True), (4, False), (5, True)])
def test_a_sequence_that_was_to_stop_is_whole_if_it_ended_before(
    at_most: int | None, whole: bool
) -> None:
    growing = batch().growing[0]  # four tokens
    assert growing.is_whole(at_most, eos=[]) is whole
