"""How the sequences of a minibatch are dealt to ranks, and what the busiest rank then has.

Sequences are dealt longest first, back and forth, so that their numbers are even to one and tokens
nearly so. An example: lengths of 9, 5, 3 and 1 on two ranks. The first turn gives 9 and 5, the
second, back, 3 to the second rank and 1 to the first. Both have two sequences, of 10 and 8 tokens.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.predict.columns import Integers

Lengths32 = NDArray[np.int32]  # half as wide: sorting and adding up take half as long


@dataclass(frozen=True, kw_only=True)
class Work:
    """The busiest rank's tokens and squared sequence lengths in each minibatch, [S, M], or [n, S,
    M] for many layouts."""

    tokens: Integers
    squares: Integers


def shares(lengths: Integers, minibatch: int, ranks: int) -> Work:
    """The work of the busiest rank where minibatches of `lengths` [S, B] are dealt to some ranks.
    With fewer sequences than ranks some ranks idle.

    >>> work = shares(np.array([[9, 5, 3, 1]]), minibatch=4, ranks=2)
    >>> work.tokens, work.squares
    (array([[10]]), array([[82]]))
    """
    return dealt(longest_first(lengths, minibatch), ranks)


def longest_first(lengths: Integers, minibatch: int) -> Lengths32:
    """The minibatches [S, M, sequences] of `lengths` [S, B], each with its longest sequence
    first."""
    scenarios, batch = lengths.shape
    rows = lengths.astype(np.int32).reshape(scenarios, batch // minibatch, minibatch)
    return np.ascontiguousarray(np.sort(rows, axis=2)[..., ::-1])


def dealt(minibatches: Lengths32, ranks: int) -> Work:
    """The work of the busiest rank where minibatches [S, M, sequences], longest first, are dealt to
    some ranks."""
    scenarios, count, sequences = minibatches.shape
    turns = -(-sequences // ranks)
    padded = minibatches
    if turns * ranks > sequences:
        padded = np.zeros((scenarios, count, turns * ranks), dtype=np.int32)
        padded[..., :sequences] = minibatches
    by_turn = padded.reshape(scenarios, count, turns, ranks)
    # Below 2^31, since a batch has fewer tokens. Every second turn goes back.
    tokens = by_turn[:, :, ::2].sum(axis=2, dtype=np.int32)
    tokens += by_turn[:, :, 1::2].sum(axis=2, dtype=np.int32)[..., ::-1]
    busiest = tokens.argmax(axis=2)[..., None]
    turn = np.arange(turns)
    places = turn * ranks + np.where(turn % 2, ranks - 1 - busiest, busiest)
    held = np.take_along_axis(padded, places, axis=2).astype(np.int64)
    return Work(tokens=held.sum(axis=2), squares=(held**2).sum(axis=2))
