"""What goes to an engine and comes from it while sequences stream: each begins when it is given and
leaves when it has ended, whatever the others do."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from executor.data.requests import Ints
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

    def stretches(self) -> list[Stretch]:
        """The last one of a sequence that has ended says so."""
        newest = dict(self._made.keys())
        return [
            Stretch(
                number=number,
                version=version,
                tokens=np.array(tokens, dtype=np.int32),
                log_probs=np.array(log_probs, dtype=np.float32),
                ended=number in self._ended and newest[number] == version,
            )
            for (number, version), (tokens, log_probs) in self._made.items()
        ]
