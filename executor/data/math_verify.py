"""The reward that is known by name: whether an answer is mathematically the same as the one given
(`math-verify`, an optional package)."""

import importlib.util
from typing import Any

from planner.spec.errors import UserError

PACKAGE = "math_verify"


def check_math_verify() -> None:
    """Raise UserError if its package is missing."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise UserError(
            "reward function 'math-verify': its package is not installed; pip install "
            "'splitplan[math]'"
        )


def verified(prompts: list[str], responses: list[str], answers: list[Any]) -> list[float]:
    """1 for a response whose last answer is the same mathematical object as the one wanted, else
    0."""
    import math_verify

    del prompts
    found = []
    for response, answer in zip(responses, answers, strict=True):
        # The limits of its own need signals, and a process of ours has a limit already.
        wanted = math_verify.parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
        given = math_verify.parse(response, parsing_timeout=None)
        found.append(float(math_verify.verify(wanted, given, timeout_seconds=None)))
    return found
