"""Which engine has which sequences of a stream."""

import numpy as np
from conftest import make_workload

from executor.data.prompts import Synthetic
from executor.running.growing import Growing, GrowingBatch
from executor.running.shares import Shares

WORKLOAD = make_workload(
    samples_per_prompt=4, critic=None, algorithm={"advantage": "grpo"}, batch=16
)


def of_step(step: int | None, first: int) -> list[Growing]:
    """Four samples of each of four prompts."""
    prompts = Synthetic(WORKLOAD).step(step or 0)
    return GrowingBatch(prompts, WORKLOAD.sampler, first=first, step=step).growing


def any_one(growing: Growing) -> bool:
    return True


def numbers(growing: list[Growing]) -> list[int]:
    return [each.number for each in growing]


def test_the_earliest_step_goes_first_and_evaluations_before_it() -> None:
    shares = Shares(engines=1, room=48)
    for step, first in ((1, 0), (0, 16), (None, 32)):
        shares.wait(of_step(step, first))
    assert numbers(shares.take(0, any_one)) == [*range(32, 48), *range(16, 32), *range(16)]


def test_all_samples_of_a_prompt_go_to_one_engine() -> None:
    shares = Shares(engines=3, room=48)
    shares.wait(of_step(0, 0))
    taken = [numbers(shares.take(engine, any_one)) for engine in range(3)]
    assert taken == [[*range(8)], [*range(8, 16)], []]
    for number in range(3):
        shares.release(0, number)
    shares.wait(of_step(1, 16))
    assert numbers(shares.take(2, any_one)) == [*range(16, 28)]


def test_an_engine_takes_what_it_has_room_for() -> None:
    shares = Shares(engines=2, room=5)
    shares.wait(of_step(0, 0))
    assert numbers(shares.take(0, any_one)) == [*range(8)]
    assert shares.take(0, any_one) == []
    assert numbers(shares.take(1, lambda growing: growing.row % 2 == 0)) == [8, 10, 12, 14]


def test_engines_that_are_left_share_all_that_there_is() -> None:
    shares = Shares(engines=2, room=48)
    shares.wait(of_step(0, 0))
    shares.take(0, any_one)
    assert len(shares.take(1, any_one)) == 8
    shares.take_back(0)
    shares.away.add(0)
    assert numbers(shares.take(1, any_one)) == [*range(8)]
    assert np.array_equal(numbers(shares.take_back(1)), [*range(8, 16), *range(8)])
