"""Learning rates of steps, by hand."""

import pytest

from executor.training.learning_rate import learning_rate
from planner.spec.algorithm import Optimizer


def rates(steps=10, count=11, **settings):
    optimizer = Optimizer(lr=1.0, **settings)
    return [learning_rate(optimizer, step, steps) for step in range(count)]


def test_it_is_constant_unless_something_is_said():
    assert rates() == [1.0] * 11


def test_it_rises_in_equal_parts_and_is_reached_at_the_last_of_them():
    assert rates(warmup_steps=4, count=6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_line_falls_over_the_steps_behind_the_warm_up():
    found = rates(schedule="linear", warmup_steps=2, min_lr_ratio=0.2, steps=10)
    # 8 steps of decay, each a tenth of lr less: 1 - 0.8 * (step - 2) / 8
    assert found == pytest.approx([0.5, 1.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])


def test_half_a_cosine():
    found = rates(schedule="cosine", steps=4, count=6)
    assert found == pytest.approx([1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0.0, 0.0])


def test_a_decay_may_have_steps_of_its_own():
    assert rates(schedule="linear", decay_steps=2, count=4) == [1.0, 0.5, 0.0, 0.0]
