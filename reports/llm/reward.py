"""The reward of the arithmetic tasks, in the form in which verl calls it: the last number of a
response has to be the answer, by the verifier that reasoning-gym has for the task."""

import re
from functools import cache
from typing import Any

NUMBER = re.compile(r"-?\d[\d,]*")


@cache
def verifier(task: str) -> Any:
    from reasoning_gym import get_score_answer_fn

    return get_score_answer_fn(task)


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None
) -> float:
    """1 for a right answer, 0 for any other."""
    numbers = NUMBER.findall(solution_str)
    if not numbers:
        return 0.0
    score = verifier(data_source)(numbers[-1].replace(",", ""), {"answer": ground_truth})
    return 1.0 if score == 1 else 0.0
