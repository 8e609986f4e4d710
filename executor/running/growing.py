"""Batches whose sequences are in flight: what each has so far. It is kept on the controller: so any
engine can go on with a sequence, and a checkpoint holds it."""

import time
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from executor.data.batch import Generated
from executor.data.prompts import Prompts
from executor.data.requests import Ints
from executor.rollout.streaming import Stretch, Unfinished, unfinished
from planner.spec.data import Sampler

Kept = dict[str, NDArray[Any]]
# Told of rows whose responses have finished, and of these.
OnRows = Callable[[list[int], list[Ints]], None]


class Growing:
    """A sequence with what has been made of it. `row` is its place in the batch; those of one
    prompt are a `group`. `deaths` of engines that had it have come since its last token."""

    def __init__(
        self, batch: "GrowingBatch", row: int, begun: Unfinished, group: tuple[int, int]
    ) -> None:
        self.batch, self.row, self._begun, self.group = batch, row, begun, group
        self.number, self.ended, self.deaths = begun.number, False, 0
        # Compact, and cheap to add to: a long response comes in thousands of stretches.
        self._tokens, self._log_probs, self._versions = array("i"), array("f"), array("i")

    def add(self, stretch: Stretch) -> None:
        self.deaths = 0
        versions = np.full(len(stretch.tokens), stretch.version, dtype=np.int32)
        self.extend(stretch.tokens, stretch.log_probs, versions)

    def extend(self, tokens: Ints, log_probs: NDArray[np.float32], versions: Ints) -> None:
        self._tokens.frombytes(tokens.tobytes())
        self._log_probs.frombytes(log_probs.tobytes())
        self._versions.frombytes(versions.tobytes())

    @property
    def count(self) -> int:
        return len(self._tokens)

    @property
    def tokens(self) -> Ints:
        return np.array(self._tokens, dtype=np.int32)

    @property
    def log_probs(self) -> NDArray[np.float32]:
        return np.array(self._log_probs, dtype=np.float32)

    @property
    def versions(self) -> Ints:
        return np.array(self._versions, dtype=np.int32)

    def unfinished(self, at_most: int | None = None) -> Unfinished:
        """The sequence as an engine goes on with it, up to so many tokens if not to its end."""
        return self._begun.with_more(self.tokens.tolist(), at_most)

    def is_whole(self, at_most: int | None, eos: Sequence[int]) -> bool:
        """Whether it has its last token, where an engine has ended it: it was to go on up to so
        many."""
        if at_most is None or self.count != at_most or self.count == self._begun.max_tokens:
            return True
        return not self._begun.exact and self._tokens[-1] in eos


class GrowingBatch:
    """The sequences of a step (`step` is None for those of an evaluation), numbered from `first`
    on. `tell` is told of those that finish."""

    def __init__(
        self,
        prompts: Prompts,
        sampler: Sampler,
        *,
        first: int,
        step: int | None = None,
        tell: OnRows | None = None,
    ) -> None:
        self.step, self.tell, self.since = step, tell, time.perf_counter()
        self.prompts, requests = prompts, prompts.requests
        _, prompt_of = requests.distinct()
        begun = unfinished(requests, sampler, first)
        self.growing = [
            Growing(self, row, sequence, (first, int(prompt_of[row])))
            for row, sequence in enumerate(begun)
        ]
        self.left = len(self.growing)
        self.ends: list[float] = []  # of sequences, by the clock of `since`

    @property
    def tokens(self) -> int:
        """Tokens of all responses so far."""
        return sum(growing.count for growing in self.growing)

    def generated(self) -> Generated:
        """All responses so far."""
        parts = [(each.tokens, each.log_probs, each.versions) for each in self.growing]
        tokens, log_probs, versions = (np.concatenate(part) for part in zip(*parts, strict=True))
        lengths = np.array([each.count for each in self.growing], dtype=np.int32)
        return Generated(
            lengths=lengths, tokens=tokens, log_probs=log_probs, weights_versions=versions
        )

    def arrays(self) -> Kept:
        """What a checkpoint keeps of it; prompts can be had again."""
        made = self.generated()
        return {
            "lengths": made.lengths,
            "tokens": made.tokens,
            "log_probs": made.log_probs,
            "versions": made.weights_versions,
            "ended": np.array([each.ended for each in self.growing]),
        }

    def restore(self, arrays: Kept) -> None:
        """Give the sequences what a checkpoint has of them."""
        ends = np.cumsum(arrays["lengths"])
        for each, end, length in zip(self.growing, ends, arrays["lengths"], strict=True):
            own = slice(end - length, end)
            each.extend(*(arrays[name][own] for name in ("tokens", "log_probs", "versions")))
            each.ended = bool(arrays["ended"][each.row])
        self.left = sum(not each.ended for each in self.growing)
        self.ends = [self.since] * (len(self.growing) - self.left)  # at the latest


def named(sequences: Sequence[Growing]) -> str:
    """The prompts of some sequences, by the lines that they are in."""
    rows: dict[GrowingBatch, list[int]] = {}
    for growing in sequences:
        rows.setdefault(growing.batch, []).append(growing.row)
    found = [batch.prompts.named(np.array(own)) for batch, own in rows.items()]
    return " and ".join(found)
