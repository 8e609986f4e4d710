"""Tokens whose keys and values an engine holds at a time.

An engine with n slots seldom holds n of the longest sequences: most are short, and most have only
part of their tokens so far. What it holds follows from the distribution of lengths. As long as
requests wait, every slot is busy, and its sequence has as many response tokens as steps have passed
since it started. Let a(k) be their mean k steps after the first sequences started. Either the first
one still runs, or one of length j < k has ended, and the slot is as if it had begun then:

    a(k) = k P(length >= k) + sum over j < k of P(length = j) a(k - j),

the renewal equation (Feller, An Introduction to Probability Theory and Its Applications, volume 2,
chapter XI), and the same holds for the mean square. At first all sequences are of one age: of equal
lengths an engine does hold n of the longest. Slots are independent, so n of them hold n times the
mean with a spread of the square root of n. Where no more than that is reserved, an engine that is
nevertheless full sets a sequence aside and computes it again later (vLLM calls it preemption); this
is rare enough to be left out of what generation takes. Where less is reserved, `preemption.py` says
what it takes.
"""

import math
from functools import cache
from typing import NamedTuple

import numpy as np

from planner.predict.columns import Seconds
from planner.spec.lengths import Empirical, Fixed, Lognormal, sample
from planner.spec.workload import Workload

DRAWS = 4096  # lengths that stand for a distribution
PARTS = 256  # of the longest response, in which steps are counted
WAVES = 3  # longest responses after which slots are of all ages
SPREAD = 4.0  # standard deviations above the mean: at a given step one run in 30,000 needs more
AMPLE = 2**62  # room for more tokens than there ever are
BLOCK_TOKENS = 16  # keys and values are kept in blocks, of which each sequence's last has room left


class Ages(NamedTuple):
    """Response tokens of the sequence in a slot after each part of the first sequences' time: mean
    and variance [WAVES * PARTS]."""

    mean: Seconds
    variance: Seconds


def held_tokens(workload: Workload, slots: int) -> int:
    """Tokens for which an engine with some slots needs room, so that preemption is rare: no more
    than of as many longest sequences, in whole blocks, and no less than of one."""
    slots = min(slots, workload.most_in_flight)
    ages = _ages(workload.response)
    prompts = sample(workload.prompt, DRAWS, 1)
    variance = ages.variance + prompts.var() * workload.group  # samples of a prompt share it
    mean = ages.mean + prompts.mean() + BLOCK_TOKENS
    most = float((slots * mean + SPREAD * np.sqrt(slots * variance)).max())
    longest = -(-workload.longest // BLOCK_TOKENS) * BLOCK_TOKENS
    return min(slots * longest, max(math.ceil(most), longest + BLOCK_TOKENS))


@cache
def _ages(response: Fixed | Lognormal | Empirical) -> Ages:
    drawn = sample(response, DRAWS, 0)
    width = -(-response.longest // PARTS)
    ends = np.bincount(-(-drawn // width), minlength=PARTS + 1) / DRAWS
    lasts = 1.0 - np.concatenate([[0.0], np.cumsum(ends)])  # at least so many parts
    reach = len(ends) - 1
    mean, square = np.zeros((2, reach + WAVES * PARTS))  # 0 before the start
    for now in range(1, WAVES * PARTS):
        here, tokens = reach + now, now * width
        still = lasts[min(now, reach + 1)]
        mean[here] = tokens * still + ends[1:] @ mean[here - reach : here][::-1]
        square[here] = tokens**2 * still + ends[1:] @ square[here - reach : here][::-1]
    mean, square = mean[reach:], square[reach:]
    return Ages(mean, np.maximum(square - mean**2, 0.0))
