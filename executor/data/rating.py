"""One score of several rewards: what becomes of each, and their sum."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from executor.data.requests import Ints
from planner.spec.rewards import Overlong, Weighed

Ratings = NDArray[np.float32]
TINY = 1e-6  # beside a standard deviation


def add_up(
    rewards: Sequence[Weighed], rated: Mapping[int, Ratings], lengths: Ints, longest: int
) -> tuple[Ratings, dict[str, float]]:
    """The scores `[B]` of a batch, and the mean of each reward by its name, where there are
    several: as it was given, over the samples that it scored. `rated` has them by the rewards'
    numbers, without penalties on length, which are told by the responses' `lengths [B]` and the
    `longest` one that is allowed. NaN for samples that some reward gave none."""
    total, means = np.zeros(len(lengths), dtype=np.float32), dict[str, float]()
    for number, reward in enumerate(rewards):
        if isinstance(reward, Overlong):
            scores = soft_overlong(lengths, longest, reward.overlong_buffer)
        else:
            scores = rated[number]
        total += np.float32(reward.weight) * weighable(reward, scores)
        if len(rewards) > 1 and np.isfinite(scores).any():
            means[f"score/{reward.label}"] = float(np.nanmean(scores, dtype=np.float64))
    return total, means


def weighable(reward: Weighed, scores: Ratings) -> Ratings:
    """A reward's scores `[B]` in its bounds and, if it normalises, as (x - mean) / (standard
    deviation + 1e-6) over the samples that have one."""
    if reward.clip is not None:
        scores = np.clip(scores, *reward.clip)
    if reward.normalize and np.isfinite(scores).any():
        exact = scores.astype(np.float64)
        scores = (exact - np.nanmean(exact)) / (np.nanstd(exact) + TINY)
    return scores.astype(np.float32)


def soft_overlong(lengths: Ints, longest: int, buffer: int) -> Ratings:
    """DAPO's soft overlong punishment `[B]` (Yu et al. 2025, arXiv:2503.14476, eq. 13): 0 up to
    `longest - buffer` tokens, then ((longest - buffer) - length) / buffer, -1 at `longest`.

    >>> soft_overlong(np.array([6, 8, 9, 10]), longest=10, buffer=2).tolist()
    [0.0, 0.0, -0.5, -1.0]
    """
    beyond = lengths - (longest - buffer)
    return (-np.clip(beyond, 0, buffer) / buffer + 0.0).astype(np.float32)
