"""What goes to an engine and comes from it while sequences stream: each begins when it is given and
leaves when it has ended, whatever the others do."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from executor.data.requests import Ints, Requests, Rows
from planner.spec.data import Sampler


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """A sequence that an engine is to begin, or to go on with: `response` are the tokens that it
    has. `number` names it, `key` fixes its randomness, `max_tokens` are those of the whole
    response. If it is `exact`, it ends there and nowhere else."""

    number: int
    prompt: Ints
    response: Ints
    key: tuple[int, ...]
    max_tokens: int
    exact: bool
    sampler: Sampler

    def __len__(self) -> int:
        """Its tokens, with those of the prompt."""
        return len(self.prompt) + len(self.response)

    def with_more(self, tokens: Sequence[int], at_most: int | None = None) -> "Unfinished":
        """The same with more tokens, to go on up to so many if not to its end."""
        response = np.concatenate([self.response, np.array(tokens, dtype=np.int32)])
        most = self.max_tokens if at_most is None else min(at_most, self.max_tokens)
        return replace(self, response=response, max_tokens=most)


def unfinished(requests: Requests, sampler: Sampler, first: int = 0) -> list[Unfinished]:
    """The sequences that are asked for, none of which has begun, numbered from `first` on."""
    nothing = np.zeros(0, dtype=np.int32)
    columns = (requests.keys, requests.max_tokens, requests.exact)
    rows = zip(requests.prompts(), *(column.tolist() for column in columns), strict=True)
    return [
        Unfinished(
            number=number,
            prompt=prompt,
            response=nothing,
            key=tuple(key),
            max_tokens=most,
            exact=exact,
            sampler=sampler,
        )
        for number, (prompt, key, most, exact) in enumerate(rows, start=first)
    ]


class Drawn(NamedTuple):
    """What one decoding step made of a sequence."""

    number: int
    tokens: list[int]
    log_probs: list[float]
    ended: bool


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Tokens in a row of one sequence, sampled by one version of the weights, with the log-probs
    that they were sampled with."""

    number: int
    version: int
    tokens: Ints
    log_probs: NDArray[np.float32]
    ended: bool


@dataclass(frozen=True, kw_only=True)
class Stretches:
    """Stretches as arrays `[n]`, with their tokens and log-probs end to end: so they travel fast,
    however many there are."""

    numbers: Rows
    versions: Ints
    ended: NDArray[np.bool_]
    counts: Ints
    tokens: Ints
    log_probs: NDArray[np.float32]

    def __iter__(self) -> Iterator[Stretch]:
        ends = np.cumsum(self.counts).tolist()
        columns = self.numbers, self.versions, self.ended, self.counts
        rows = zip(*(column.tolist() for column in columns), ends, strict=True)
        for number, version, ended, count, end in rows:
            yield Stretch(
                number=number,
                version=version,
                tokens=self.tokens[end - count : end],
                log_probs=self.log_probs[end - count : end],
                ended=ended,
            )


@dataclass(kw_only=True)
class Collected:
    """Collects what decoding steps make."""

    _made: dict[tuple[int, int], tuple[list[int], list[float]]] = field(default_factory=dict)
    _ended: set[int] = field(default_factory=set)

    def add(self, version: int, drawn: Sequence[Drawn]) -> None:
        """Add what a step made with the weights of a version."""
        for number, tokens, log_probs, ended in drawn:
            mine = self._made.setdefault((number, version), ([], []))
            mine[0].extend(tokens)
            mine[1].extend(log_probs)
            if ended:
                self._ended.add(number)

    def stretches(self) -> "Stretches":
        """The last one of a sequence that has ended says so."""
        newest = dict(self._made.keys())
        ended = [n in self._ended and newest[n] == version for n, version in self._made]
        counts = [len(tokens) for tokens, _ in self._made.values()]
        every, total = itertools.chain.from_iterable, sum(counts)
        return Stretches(
            numbers=np.array([number for number, _ in self._made], dtype=np.int64),
            versions=np.array([version for _, version in self._made], dtype=np.int32),
            ended=np.array(ended, dtype=np.bool_),
            counts=np.array(counts, dtype=np.int32),
            tokens=np.fromiter(every(made[0] for made in self._made.values()), np.int32, total),
            log_probs=np.fromiter(
                every(made[1] for made in self._made.values()), np.float32, total
            ),
        )
