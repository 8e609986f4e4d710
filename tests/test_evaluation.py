"""The figures of evaluations, by hand."""

import math

import numpy as np
import pytest

from executor.data.prompts import UNNAMED
from executor.running.evaluation import equal, figures, final_answer, pass_at
from planner.spec.data import EvaluationSet


def test_responses_are_compared_with_answers_of_any_kind() -> None:
    found = equal([" 4\n", "4.0", '{"a": [1, null]}', "x"], ["4", 4, {"a": [1, None]}, None])
    assert found.tolist() == [1, 0, 1, 0]


def test_pass_at_k_by_hand() -> None:
    """Of 4 responses 2, 0 and 4 are right: one of two is missed with chances 1/6, 1 and 0."""
    right = np.array([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=bool)
    assert pass_at(1, right) == pytest.approx(0.5)
    assert pass_at(2, right) == pytest.approx((5 / 6 + 0 + 1) / 3)
    assert pass_at(4, right) == pytest.approx(2 / 3)


def test_the_figures_of_a_set_with_several_samples() -> None:
    settings = EvaluationSet(name="sums", files="x", samples=3, temperature=1.0, passing=0.5)
    scores = np.array([1, 0, 0, 0.5, math.nan, 0.5], dtype=np.float32)
    responses = ["so 4", "it is 5", "5.", "7", "8", "7 it is 7"]
    found = figures(settings, scores, responses, by_rewards=True)
    assert found == {
        "evaluation/sums/score": pytest.approx(0.4),
        "evaluation/sums/pass@1": pytest.approx((1 / 3 + 2 / 3) / 2),
        "evaluation/sums/pass@2": pytest.approx((2 / 3 + 1) / 2),
        "evaluation/sums/pass@3": 1.0,
        "evaluation/sums/majority@3": pytest.approx(0.25),  # 5 is wrong, 7 scores 0.5
    }


def test_the_names_of_what_data_evaluation_gives() -> None:
    scores = np.array([1, 0], dtype=np.float32)
    plain = EvaluationSet(name=UNNAMED, files="x")
    assert figures(plain, scores, ["a", "b"], True) == {"evaluation_score": 0.5}
    assert figures(plain, scores, ["a", "b"], False) == {"exact_match": 0.5}
    none = figures(plain, np.full(2, np.nan, dtype=np.float32), ["a", "b"], True)
    assert math.isnan(none["evaluation_score"])


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("", ""),
        (" yes \n", "yes"),
        ("7 + 5 = 12.", "12"),
        ("about -1,234.50 or so", "-1234.50"),
        (r"\boxed{1} no, \boxed{\frac{1}{2}} of 3", r"\frac{1}{2}"),
        (r"\boxed{1", "1"),
    ],
)
def test_the_answer_of_a_response(response: str, answer: str) -> None:
    assert final_answer(response) == answer
