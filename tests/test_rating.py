"""What becomes of the scores of several rewards."""

import numpy as np
import pytest

from executor.data.rating import add_up, soft_overlong, weighable
from planner.spec.rewards import Overlong, RewardFunction

FIRST = np.array([1, 3, -8, np.nan], dtype=np.float32)
SECOND = np.array([0.5, 0, 0.25, 1], dtype=np.float32)
LENGTHS = np.array([10, 7, 5, 9])


def function(name: str, **more: object) -> RewardFunction:
    return RewardFunction(function=f"r.py:{name}", **more)


def test_rewards_are_bounded_weighed_and_added() -> None:
    """0.5 clip(first) + 2 second + the penalty; the fourth sample has no first score."""
    rewards = [
        function("a", weight=0.5, clip=(-2, 2)),
        function("b", weight=2),
        Overlong(overlong_buffer=4),
    ]
    total, means = add_up(rewards, {0: FIRST, 1: SECOND}, LENGTHS, 10)
    np.testing.assert_allclose(total[:3], [0.5 + 1 - 1, 1 + 0 - 0.25, -1 + 0.5 + 0])
    assert np.isnan(total[3])
    # Means of what was given, over the samples that have one.
    assert means == {
        "score/r.py:a": pytest.approx(-4 / 3),
        "score/r.py:b": 0.4375,
        "score/overlong": pytest.approx((-1 - 0.25 - 0 - 0.75) / 4),
    }


def test_a_single_reward_stays_what_it_is() -> None:
    total, means = add_up([function("a")], {0: FIRST}, LENGTHS, 10)
    np.testing.assert_array_equal(total, FIRST)
    assert means == {}


def test_a_normalised_reward_has_mean_0_and_deviation_1() -> None:
    scores = weighable(function("a", normalize=True, clip=(-2, 2)), FIRST)
    # Clipped: 1, 2, -2, with mean 1/3 and deviation sqrt(26/9).
    expected = (np.array([1, 2, -2]) - 1 / 3) / (np.sqrt(26 / 9) + 1e-6)
    np.testing.assert_allclose(scores[:3], expected, rtol=1e-6)
    alike = weighable(function("a", normalize=True), np.full(3, 7, dtype=np.float32))
    np.testing.assert_array_equal(alike, 0)


def test_a_penalty_on_length_may_begin_at_the_first_token() -> None:
    assert soft_overlong(np.array([0, 4, 8]), 8, 8).tolist() == [0.0, -0.5, -1.0]
