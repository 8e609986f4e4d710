"""Seconds of calls and what they are made of: for many layouts as columns, and for one."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from planner.predict.columns import Integers, Seconds
from planner.predict.correction import Corrections, Ratios, Source
from planner.predict.likeness import Likeness, MoveCall
from planner.predict.roofline import Cost
from planner.spec.cluster import Device


class Moves(NamedTuple):
    """Seconds [n] of bringing what is offloaded to the device before a call, and back after it."""

    wake: Seconds
    offload: Seconds

    @property
    def both(self) -> Seconds:
        return self.wake + self.offload


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds [S] of a call and what they are made of: `wake` before and `offload` after it,
    `compute`, and `transfer`, communication that compute does not hide. `source` tells where the
    figure comes from (not that of the moves). One that `is_mean` is of several calls of each
    scenario, which took different times."""

    seconds: Seconds
    parts: dict[str, Seconds]
    source: Source
    is_mean: bool = False

    def with_moves(self, moves: Moves) -> "Estimate":
        """The estimate with the moves of one layout added."""
        parts, scenarios = dict(self.parts), len(self.seconds)
        for name, seconds in moves._asdict().items():
            parts[name] = parts.get(name, np.zeros(scenarios)) + seconds
        return replace(self, seconds=self.seconds + moves.both, parts=parts)

    def repeated(self, times: float) -> "Estimate":
        """The estimate for so many times the work, between the same moves."""
        work = {name: x for name, x in self.parts.items() if name not in Moves._fields}
        parts = self.parts | {name: times * x for name, x in work.items()}
        seconds = self.seconds + (times - 1) * sum(work.values(), np.zeros(len(self.seconds)))
        return replace(self, seconds=seconds, parts=parts)


@dataclass(frozen=True, kw_only=True)
class Estimates:
    """Seconds [n, S] of a call in many layouts, without moves, and the Source of each [n]."""

    compute: Seconds
    transfer: Seconds
    sources: NDArray[np.str_]

    @classmethod
    def corrected(cls, cost: Cost, ratios: Ratios) -> "Estimates":
        """The roofline's seconds times the measured ratio."""
        compute, transfer = cost.compute * ratios.values, cost.transfer * ratios.values
        return cls(compute=compute, transfer=transfer, sources=ratios.sources)

    @property
    def seconds(self) -> Seconds:
        return self.compute + self.transfer

    def only(self) -> Estimate:
        """The estimate of one layout. Parts that take no time are left out."""
        (compute,), (transfer,) = self.compute, self.transfer
        source = cast(Source, self.sources.item())
        parts = {"compute": compute, "transfer": transfer}
        parts = {name: seconds for name, seconds in parts.items() if seconds.any()}
        return Estimate(seconds=compute + transfer, parts=parts, source=source)


def moves_of(
    corrections: Corrections, like: Callable[[MoveCall], Likeness], moved: Integers, device: Device
) -> Moves:
    """Moves of `moved` bytes [n] per GPU, each as long as points that are like it took."""
    size = np.zeros((len(moved), 1))

    def seconds(call: MoveCall) -> Seconds:
        ratios = corrections.ratios(like(call), size).values[:, 0]
        return np.asarray(ratios * moved / device.host_bandwidth)

    return Moves(wake=seconds("wake"), offload=seconds("offload"))
