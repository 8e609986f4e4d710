"""Where engines put sequences as they finish, for whoever goes on with them while others are still
being generated."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle

from executor.data.requests import Ints, Rows
from executor.fleet.worker import Worker

Finished = tuple[int, Ints]  # a row of the batch, and the tokens of its response


class Tray(Worker):
    """The process that holds them. What belongs together has a key."""

    def __init__(self) -> None:
        super().__init__()
        self._lying: dict[str, list[Finished]] = defaultdict(list)

    def put(self, key: str, finished: list[Finished]) -> None:
        self._lying[key] += finished

    def take(self, key: str) -> list[Finished]:
        """What has been put there since it was last asked."""
        return self._lying.pop(key, [])


@dataclass(frozen=True, kw_only=True)
class HandOver:
    """An engine's way to the tray. `rows` are those of its requests in the batch."""

    tray: ActorHandle[Any]
    key: str
    rows: Rows

    def __call__(self, numbers: Sequence[int], responses: Sequence[Sequence[int]]) -> None:
        """Hand over requests that have finished, without waiting."""
        given = zip(numbers, responses, strict=True)
        finished = [(int(self.rows[n]), np.array(tokens, dtype=np.int32)) for n, tokens in given]
        self.tray.put.remote(self.key, finished)


def taken(tray: ActorHandle[Any], key: str) -> list[Finished]:
    """What lies on a tray under a key."""
    found: list[Finished] = ray.get(tray.take.remote(key))
    return found
