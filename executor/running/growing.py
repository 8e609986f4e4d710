"""Batches whose sequences are in flight: what each has so far. It is kept on the controller: so any
engine can go on with a sequence, and a checkpoint holds it."""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from executor.data.batch import Generated
from executor.data.requests import Ints, Requests
from executor.rollout.streaming import Stretch, Unfinished
from planner.spec.data import Sampler

Kept = dict[str, NDArray[Any]]
# Told of rows whose responses have finished, and of these.
OnRows = Callable[[list[int], list[Ints]], None]


class Growing:
    """A sequence with what has been made of it. `row` is its place in the batch."""

    def __init__(self, batch: "GrowingBatch", row: int, begun: Unfinished) -> None:
        self.batch, self.row, self._begun = batch, row, begun
        self.number, self.ended, self.count = begun.number, False, 0
        self._stretches: list[Stretch] = []

    def add(self, stretch: Stretch) -> None:
        self._stretches.append(stretch)
        self.count += len(stretch.tokens)

    @property
    def tokens(self) -> Ints:
        return np.concatenate([self._begun.response, *(s.tokens for s in self._stretches)])

    @property
    def log_probs(self) -> NDArray[np.float32]:
        none = np.zeros(0, dtype=np.float32)
        return np.concatenate([none, *(stretch.log_probs for stretch in self._stretches)])

    @property
    def versions(self) -> Ints:
        none = np.zeros(0, dtype=np.int32)
        parts = [np.full(len(s.tokens), s.version, dtype=np.int32) for s in self._stretches]
        return np.concatenate([none, *parts])

    def unfinished(self, at_most: int | None = None) -> Unfinished:
        """The sequence as an engine goes on with it, up to so many tokens if not to its end."""
        return self._begun.with_more(self.tokens.tolist(), at_most)

    def is_whole(self, eos: Sequence[int]) -> bool:
        """Whether it has its last token: an engine may have stopped earlier, where it was to."""
        last = int(self._stretches[-1].tokens[-1]) if self._stretches else None
        by_itself = last in eos and not self._begun.exact
        return by_itself or self.count >= self._begun.max_tokens


class GrowingBatch:
    """The sequences of a step (`step` is None for those of an evaluation), numbered from `first`
    on. `tell` is told of those that finish."""

    def __init__(
        self,
        requests: Requests,
        sampler: Sampler,
        *,
        first: int,
        step: int | None = None,
        tell: OnRows | None = None,
    ) -> None:
        self.step, self.tell, self.since = step, tell, time.perf_counter()
        keys, exact = requests.keys.tolist(), requests.exact.tolist()
        self.growing = [
            Growing(
                self,
                row,
                Unfinished(
                    number=first + row,
                    prompt=prompt,
                    response=np.zeros(0, dtype=np.int32),
                    key=tuple(keys[row]),
                    max_tokens=int(requests.max_tokens[row]),
                    exact=exact[row],
                    sampler=sampler,
                ),
            )
            for row, prompt in enumerate(requests.prompts())
        ]
        self.left = len(self.growing)

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
            versions = arrays["versions"][end - length : end]
            cuts = [0, *(np.flatnonzero(np.diff(versions)) + 1), len(versions)]
            for begin, stop in itertools.pairwise(cuts):
                if stop == begin:
                    continue
                own = slice(end - length + begin, end - length + stop)
                each.add(
                    Stretch(
                        number=each.number,
                        version=int(versions[begin]),
                        tokens=arrays["tokens"][own],
                        log_probs=arrays["log_probs"][own],
                        ended=False,
                    )
                )
            each.ended = bool(arrays["ended"][each.row])
        self.left = sum(not each.ended for each in self.growing)
