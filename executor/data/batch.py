"""A batch of sequences, and how it is spread over engines, ranks and micro-batches."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from executor.data.requests import MINIBATCHES, Ints, Requests, Rows, pad, permutation


@dataclass(frozen=True, kw_only=True)
class Generated:
    """An engine's answer to its requests, end to end: `lengths [n]`, and `[sum of lengths]` the
    `tokens`, their `log_probs` and the versions of the weights that sampled them."""

    lengths: Ints
    tokens: Ints
    log_probs: NDArray[np.float32]
    weights_versions: Ints


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """A batch: right-padded `tokens [B, T]` (prompt, then response), lengths `[B]`, and of the
    response tokens (R is the longest response) the log-probs `[B, R]` under which they were sampled
    and the versions `[B, R]` of the weights that sampled them."""

    tokens: Ints
    prompt_lengths: Ints
    response_lengths: Ints
    log_probs: NDArray[np.float32]
    weights_versions: Ints

    @property
    def width(self) -> int:
        return int(self.log_probs.shape[1])

    @property
    def lengths(self) -> Ints:
        return self.prompt_lengths + self.response_lengths

    @property
    def mask(self) -> NDArray[np.bool_]:
        """True on real response tokens, `[B, R]`."""
        return np.arange(self.width) < self.response_lengths[:, None]

    def ended(self, eos: Sequence[int]) -> NDArray[np.bool_]:
        """Whether the response ends with one of these tokens, `[B]`. False for truncated and for
        empty responses."""
        last = self.tokens[np.arange(len(self.lengths)), self.lengths - 1]
        return (self.response_lengths > 0) & np.isin(last, eos)

    def take(self, rows: Rows) -> "Sequences":
        return Sequences(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def segments(self, row: int) -> list[tuple[int, int]]:
        """The versions of the weights that sampled a response, in order, with the tokens of each;
        for an empty one the version that began it, with none."""
        versions = self.weights_versions[row].tolist()
        sampled = versions[: self.response_lengths[row]]
        found = [(version, len(list(run))) for version, run in groupby(sampled)]
        return found or [(versions[0], 0)]

    @property
    def mean_segments(self) -> float:
        """The versions that a response has tokens of, on average."""
        changes = (np.diff(self.weights_versions, axis=1) != 0) & self.mask[:, 1:]
        return 1.0 + float(changes.sum(1).mean())

    def responses(self) -> list[Ints]:
        rows = zip(self.tokens, self.prompt_lengths, self.response_lengths, strict=True)
        return [tokens[p : p + r] for tokens, p, r in rows]


def collate(requests: Requests, shares: Sequence[Rows], made: Sequence[Generated]) -> Sequences:
    """One batch in the order of the requests; `shares[i]` are the rows that engine i was given."""
    count = len(requests)
    lengths = np.zeros(count, dtype=np.int32)
    for rows, generated in zip(shares, made, strict=True):
        lengths[rows] = generated.lengths
    width = max(1, int(lengths.max()))
    responses, versions = (np.zeros((count, width), dtype=np.int32) for _ in range(2))
    log_probs = np.zeros((count, width), dtype=np.float32)
    for rows, generated in zip(shares, made, strict=True):
        responses[rows] = pad(generated.tokens, generated.lengths, width)
        log_probs[rows] = pad(generated.log_probs, generated.lengths, width)
        versions[rows] = pad(generated.weights_versions, generated.lengths, width)
    longest = int((requests.lengths + lengths).max())
    tokens = pad(requests.tokens, requests.lengths, longest)
    tokens += pad(
        responses[np.arange(width) < lengths[:, None]], lengths, longest, begin=requests.lengths
    )
    return Sequences(
        tokens=tokens,
        prompt_lengths=requests.lengths,
        response_lengths=lengths,
        log_probs=log_probs,
        weights_versions=versions,
    )


# --- spreading ---


def assign(prompt_lengths: Ints, engines: int, budget: int, group: int = 1) -> list[Rows]:
    """Give each request, in order, to the engine with the fewest outstanding tokens. Return the
    rows of each engine.

    A request counts with its prompt and a `budget` of response tokens, the same for all: nobody may
    know how long a response will be. The requests of a `group` have one prompt, which an engine
    computes once: they go to one engine, as far as it has less than its even share of all requests.

    >>> [rows.tolist() for rows in assign(np.array([4, 4, 4, 4, 4, 4]), 2, 9, group=2)]
    [[0, 1, 4], [2, 3, 5]]
    """
    count = len(prompt_lengths)
    most = count if group == 1 else -(-count // engines)
    outstanding = [0] * engines
    rows: list[list[int]] = [[] for _ in range(engines)]
    for begin in range(0, count, group):
        left = list(range(begin, min(begin + group, count)))
        while left:
            open_ones = [number for number in range(engines) if len(rows[number]) < most]
            engine = min(open_ones, key=lambda number: outstanding[number])
            taken = left[: most - len(rows[engine])]
            rows[engine] += taken
            outstanding[engine] += int(prompt_lengths[taken].sum()) + len(taken) * budget
            left = left[len(taken) :]
    return [np.array(share, dtype=np.int64) for share in rows]


def minibatches(count: int, size: int, *key: int, group: int = 1) -> list[Rows]:
    """The rows of a batch in minibatches of `size`, by a permutation of its groups that the key
    (seed, step, epoch) fixes: formed before anything is spread over ranks, so that placement does
    not change the mathematics."""
    groups = permutation(count // group, *key, MINIBATCHES)
    return np.split((groups[:, None] * group + np.arange(group)).ravel(), count // size)


def spread(rows: Rows, lengths: Ints, ranks: int, micro_batch_tokens: int) -> list[list[Rows]]:
    """Rows over ranks, and within each rank into micro-batches of at most `micro_batch_tokens`
    tokens (or a single sequence), both balanced by tokens. Every rank gets the same number of
    micro-batches, some perhaps empty: their collectives must match."""
    shares = _balance(rows, lengths, ranks)
    parts = max(1, -(-max(int(lengths[share].sum()) for share in shares) // micro_batch_tokens))
    while True:
        micro = [_balance(share, lengths, parts) for share in shares]
        if all(
            len(part) < 2 or lengths[part].sum() <= micro_batch_tokens
            for share in micro
            for part in share
        ):
            return micro
        parts += 1


def _balance(rows: Rows, lengths: Ints, parts: int) -> list[Rows]:
    """Distribute the longest first, each to the part with the fewest tokens."""
    longest_first = rows[np.argsort(-lengths[rows], kind="stable")]
    load = [(0, part) for part in range(parts)]
    found: list[list[int]] = [[] for _ in range(parts)]
    for row, length in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        tokens, part = load[0]
        found[part].append(row)
        heapq.heapreplace(load, (tokens + length, part))
    return [np.array(part, dtype=np.int64) for part in found]


def join(
    shares: Sequence[list[Rows]],
    outputs: Sequence[list[NDArray[np.float32]]],
    shape: tuple[int, ...],
) -> Any:
    """Put the ranks' outputs per micro-batch, each `[rows, columns]` or `[rows]`, into one array of
    `shape`."""
    whole = np.zeros(shape, dtype=np.float32)
    for micro_batches, results in zip(shares, outputs, strict=True):
        for rows, result in zip(micro_batches, results, strict=True):
            if result.ndim == 1:
                whole[rows] = result[: len(rows)]
            else:
                whole[rows, : result.shape[1]] = result[: len(rows)]
    return whole
