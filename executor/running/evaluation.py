"""The figures of an evaluation: mean score, pass@k and the majority's score."""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from executor.data.prompts import UNNAMED
from planner.spec.data import EvaluationSet

NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?|[-+]?\.\d+")
BOXED = r"\boxed{"


def equal(responses: Sequence[str], answers: Sequence[Any]) -> NDArray[np.float32]:
    """1 for a response that is its answer but for space around it, else 0. An answer that is no
    text is compared as JSON."""
    texts = [each if isinstance(each, str) else json.dumps(each) for each in answers]
    pairs = zip(responses, texts, strict=True)
    return np.array([given.strip() == wanted.strip() for given, wanted in pairs], dtype=np.float32)


def figures(
    settings: EvaluationSet,
    scores: NDArray[np.float32],
    responses: Sequence[str],
    by_rewards: bool,
) -> dict[str, float]:
    """The figures of an evaluation, by the names that they have in the metrics. There are
    `settings.samples` scores for each prompt, in a row; those that are NaN, of samples that got
    none, do not count, and are not right."""
    mean = float(np.nanmean(scores)) if np.isfinite(scores).any() else math.nan
    if settings.name == UNNAMED:
        return {"evaluation_score" if by_rewards else "exact_match": mean}
    found, n = {"score" if by_rewards else "exact_match": mean}, settings.samples
    of_prompts = scores.reshape(-1, n)
    right = np.nan_to_num(of_prompts, nan=-np.inf) >= settings.passing
    found |= {f"pass@{k}": pass_at(k, right) for k in _powers(n)}
    if n > 2:
        found[f"majority@{n}"] = _of_majority(of_prompts, responses)
    return {f"evaluation/{settings.name}/{name}": figure for name, figure in found.items()}


def _powers(n: int) -> list[int]:
    """1, 2, 4, ... below n, and n."""
    return [*(2**power for power in range(n.bit_length()) if 2**power < n), n]


def pass_at(k: int, right: NDArray[np.bool_]) -> float:
    """The chance that one of k responses is right, from n of each prompt `[prompts, n]`: the mean
    over prompts of 1 - C(n - c, k) / C(n, k), where c are right (Chen et al. 2021,
    arXiv:2107.03374)."""
    n = right.shape[1]
    ways = math.comb(n, k)
    missed = [math.comb(n - int(count), k) / ways for count in right.sum(1)]
    return 1.0 - sum(missed) / len(missed)


def _of_majority(scores: NDArray[np.float32], responses: Sequence[str]) -> float:
    """The mean over prompts of the score of the answer that most of its responses give, the
    earliest of several (Wang et al. 2022, arXiv:2203.11171)."""
    n = scores.shape[1]
    found = []
    for prompt, of_prompt in enumerate(scores):
        given = [final_answer(text) for text in responses[prompt * n : (prompt + 1) * n]]
        ((most, _),) = Counter(given).most_common(1)
        mine = of_prompt[[answer == most for answer in given]]
        found.append(float(np.nanmean(mine)) if np.isfinite(mine).any() else 0.0)
    return float(np.mean(found))


def final_answer(response: str) -> str:
    r"""What a response answers: the content of its last \boxed{}, else its last number, else all
    of it.

    >>> final_answer(r"so 3 < 4, and it is \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    >>> final_answer("That makes 1,024.")
    '1024'
    """
    begin = response.rfind(BOXED)
    if begin >= 0:
        depth, content = 1, response[begin + len(BOXED) :]
        for place, character in enumerate(content):
            depth += (character == "{") - (character == "}")
            if depth == 0:
                return content[:place].strip()
    numbers = NUMBER.findall(response)
    return numbers[-1].replace(",", "") if numbers else response.strip()
