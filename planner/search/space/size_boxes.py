"""Boxes of pool sizes, of many families at once, and what their sizes must meet."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.search.space.placements import PlacementFamily, Structure

NEVER = 1e18  # seconds of what does not fit


class Boxes(NamedTuple):
    """Boxes of pool sizes: the number of the family [n], sizes from `low` to `high` [n, P] (0
    where there is no pool), and the seconds that nothing in them is below [n]."""

    number: NDArray[np.int64]
    low: NDArray[np.int64]
    high: NDArray[np.int64]
    bound: NDArray[np.float64]

    def take(self, which: NDArray[np.int64] | NDArray[np.bool_]) -> "Boxes":
        return Boxes(*(column[which] for column in self))  # type: ignore[arg-type]


class SizeLimits:
    """Of each family what its sizes must meet, as arrays; `same` are the families of a
    structure, `pools` how many pools each has."""

    def __init__(self, listed: Sequence[PlacementFamily]) -> None:
        self.pools = np.array([len(a.structure) for a in listed])
        groups, most = max(len(a.limits) for a in listed), int(self.pools.max())
        self.group = np.zeros((len(listed), groups, most), dtype=np.int64)
        self.most = np.full((len(listed), groups), np.iinfo(np.int32).max)
        self.low, self.high = np.zeros((2, len(listed), most), dtype=np.int64)
        self.free = np.zeros((len(listed), most), dtype=bool)
        self.same: dict[Structure, list[int]] = {}
        for number, a in enumerate(listed):
            self.same.setdefault(a.structure, []).append(number)
            for i, (pools, limit) in enumerate(a.limits):
                self.group[number, i, list(pools)], self.most[number, i] = 1, limit
            for i in range(len(a.structure)):
                self.low[number, i] = a.given.get(i, 1)
                self.high[number, i] = a.given.get(
                    i, min(limit for pools, limit in a.limits if i in pools)
                )
                self.free[number, i] = i not in a.given

    def roots(self) -> Boxes:
        """All sizes of each family."""
        return Boxes(np.arange(len(self.low)), self.low, self.high, np.zeros(len(self.low)))

    def slack(self, number: NDArray[np.int64], low: NDArray[np.int64]) -> NDArray[np.int64]:
        """By how much each pool [n, P] may exceed `low` if the others do not; negative where `low`
        is too much."""
        group = self.group[number]
        left = self.most[number] - (group * low[:, None, :]).sum(axis=2)
        return np.asarray(np.where(group > 0, left[:, :, None], np.iinfo(np.int32).max).min(axis=1))

    def possible(self, boxes: Boxes) -> NDArray[np.bool_]:
        """Whether the largest sizes of each box can be had at once."""
        held = (self.group[boxes.number] * boxes.high[:, None, :]).sum(axis=2)
        return np.asarray((held <= self.most[boxes.number]).all(axis=1), dtype=np.bool_)


def padded(family: PlacementFamily, sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes of the pools that there are; where those of the rollout must add up to more, the first
    that may takes it."""
    found = list(sizes[: len(family.structure)])
    if family.rollout is not None:
        missing = family.rollout - sum(found[i] for i in family.generating)
        first = next(
            (i for i in family.generating if i not in family.given),
            family.generating[0],
        )
        found[first] += missing
    return tuple(found)


def halved(boxes: Boxes) -> Boxes:
    """Both halves of each box along its relatively widest side."""
    ratio = np.where(boxes.high > 0, boxes.high / np.maximum(boxes.low, 1), 0.0)
    side, at = ratio.argmax(axis=1), np.arange(len(boxes.number))
    middle = (boxes.low[at, side] + boxes.high[at, side]) // 2
    lower, upper = boxes.high.copy(), boxes.low.copy()
    lower[at, side], upper[at, side] = middle, middle + 1
    return joined(boxes._replace(high=lower), boxes._replace(low=upper))


def without_corner(bound: float, number: int, low: list[int], high: list[int]) -> Boxes:
    """A box without its largest sizes, as disjoint boxes."""
    boxes = []
    for i in range(len(low)):
        if low[i] < high[i]:
            boxes.append(([*high[:i], *low[i:]], [*high[:i], high[i] - 1, *high[i + 1 :]]))
    return Boxes(
        np.full(len(boxes), number),
        np.array([below for below, _ in boxes]),
        np.array([above for _, above in boxes]),
        np.full(len(boxes), bound),
    )


def inside(
    boxes: Boxes, number: int, low: NDArray[np.int64], high: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Which boxes are those of a family between these sizes."""
    inside = (boxes.low >= low).all(axis=1) & (boxes.high <= high).all(axis=1)
    return np.asarray((boxes.number == number) & inside)


def lowest(boxes: Boxes) -> float:
    return float(boxes.bound.min(initial=NEVER))


def joined(some: Boxes, more: Boxes) -> Boxes:
    return Boxes(*(np.concatenate(pair) for pair in zip(some, more, strict=True)))
