"""Many layouts at once: an array has one entry (a row) for each layout, and one layout is an array
of length one."""

from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from planner.spec.plan import Offload, TrainerRole

Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]
Seconds = NDArray[np.float64]
Column = int | Integers | Booleans  # one value for all layouts, or [n]

OFFLOADS: tuple[Offload, ...] = ("none", "optimizer", "all")


class Grid(NamedTuple):
    """Layouts of a trained or inference role as columns [n]; `offload` indexes OFFLOADS."""

    shard: Integers
    replicas: Integers
    micro_batch_tokens: Integers
    recompute: Booleans
    offload: Integers

    @classmethod
    def of(cls, layout: TrainerRole) -> Self:
        """The grid that holds one layout.

        >>> layout = TrainerRole(pools=("a",), shard=2, micro_batch_tokens=64, offload="all")
        >>> Grid.of(layout).shard, Grid.of(layout).offload
        (array([2]), array([2]))
        """
        return cls(
            np.array([layout.shard]),
            np.array([layout.replicas]),
            np.array([layout.micro_batch_tokens]),
            np.array([layout.recompute]),
            np.array([OFFLOADS.index(layout.offload)]),
        )

    @property
    def gpus(self) -> Integers:
        return self.shard * self.replicas

    @property
    def weights_offloaded(self) -> Booleans:
        return np.asarray(self.offload == OFFLOADS.index("all"))

    @property
    def optimizer_offloaded(self) -> Booleans:
        return np.asarray(self.offload != OFFLOADS.index("none"))

    def take(self, rows: Integers | slice) -> "Grid":
        return Grid(*(column[rows] for column in self))  # type: ignore[arg-type]

    def layout(self, row: int, pool: str) -> TrainerRole:
        return TrainerRole(
            pools=(pool,),
            shard=int(self.shard[row]),
            replicas=int(self.replicas[row]),
            micro_batch_tokens=int(self.micro_batch_tokens[row]),
            recompute=bool(self.recompute[row]),
            offload=OFFLOADS[self.offload[row]],
        )
