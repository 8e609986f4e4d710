"""Boxes of pool sizes, of many families of placements at once, and the limits of these sizes."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from planner.search.space.arrays import Array, Families, Indices, Mask, Sizes
from planner.search.space.placements import PlacementFamily

NEVER = 1e18  # seconds of what does not fit
BOXES_AT_ONCE = 1024  # boxes that are bounded together
UNLIMITED = np.iinfo(np.int32).max


class Boxes(NamedTuple):
    """n boxes of pool sizes: the `number` of the family, sizes from `low` to `high` (0 where the
    family has no such pool), and the `bound`: seconds that nothing in the box is below.

    A family of two pools on four GPUs has one box at first, with sizes from (1, 1) to (3, 3)."""

    number: Families
    low: Sizes
    high: Sizes
    bound: Array

    def take(self, which: Indices | Mask) -> "Boxes":
        return Boxes(self.number[which], self.low[which], self.high[which], self.bound[which])

    def sorted(self) -> "Boxes":
        """The boxes in the order of their bounds."""
        return self.take(np.argsort(self.bound, kind="stable"))

    def split(self, count: int) -> tuple["Boxes", "Boxes"]:
        """The first few boxes, and the others."""
        rows = np.arange(len(self.number))
        return self.take(rows[:count]), self.take(rows[count:])

    @property
    def lowest(self) -> float:
        """The lowest bound; NEVER if there is no box."""
        return float(self.bound.min(initial=NEVER))


class SizeLimits:
    """What the sizes of each family must meet, as arrays over the families: some of a family's
    `limits` (a group of pools has at most some GPUs), and the smallest and the largest size of each
    pool. A pool is `free` if its size is not given. `pools` is how many pools a family has."""

    def __init__(self, families: Sequence[PlacementFamily]) -> None:
        self.pools = np.array([len(family.structure) for family in families])
        count, most = len(families), int(self.pools.max())
        groups = max(len(family.limits) for family in families)
        self._in_group = np.zeros((count, groups, most), dtype=np.int64)
        self._most = np.full((count, groups), UNLIMITED)
        self._low = np.zeros((count, most), dtype=np.int64)
        self._high = np.zeros((count, most), dtype=np.int64)
        self.free = np.zeros((count, most), dtype=bool)
        for number, family in enumerate(families):
            self._add(number, family)

    def _add(self, number: int, family: PlacementFamily) -> None:
        for group, (pools, limit) in enumerate(family.limits):
            self._in_group[number, group, list(pools)] = 1
            self._most[number, group] = limit
        for pool in range(len(family.structure)):
            largest = min(limit for pools, limit in family.limits if pool in pools)
            self._low[number, pool] = family.given.get(pool, 1)
            self._high[number, pool] = family.given.get(pool, largest)
            self.free[number, pool] = pool not in family.given

    def roots(self) -> Boxes:
        """One box with all sizes for each family."""
        count = len(self.pools)
        return Boxes(np.arange(count), self._low, self._high, np.zeros(count))

    def slack(self, number: Families, low: Sizes) -> Sizes:
        """The GPUs [n, P] by which each pool may exceed `low` if the others do not. Negative where
        `low` is too much already."""
        in_group = self._in_group[number]
        held = (in_group * low[:, None, :]).sum(axis=2)
        left = self._most[number] - held
        left_to_pool = np.where(in_group > 0, left[:, :, None], UNLIMITED)  # by each of its groups
        return np.asarray(left_to_pool.min(axis=1))

    def possible(self, boxes: Boxes) -> Mask:
        """Whether the largest sizes of each box [n] can be had at once."""
        in_group = self._in_group[boxes.number]
        held = (in_group * boxes.high[:, None, :]).sum(axis=2)
        is_met = held <= self._most[boxes.number]
        return np.asarray(is_met.all(axis=1), dtype=np.bool_)


def sizes_of(family: PlacementFamily, sizes: Sizes) -> tuple[int, ...]:
    """The sizes of a family's pools, from a row of sizes [P]. Where those of the rollout must add
    up to more, its first pool whose size is not given takes the rest."""
    found = list(sizes[: len(family.structure)].tolist())
    if family.rollout is not None:
        missing = family.rollout - sum(found[pool] for pool in family.generating)
        free = [pool for pool in family.generating if pool not in family.given]
        found[(free or family.generating)[0]] += missing
    return tuple(found)


def halved(boxes: Boxes) -> Boxes:
    """Both halves of each box along its relatively widest side."""
    ratio = np.where(boxes.high > 0, boxes.high / np.maximum(boxes.low, 1), 0.0)
    widest = np.arange(len(boxes.number)), ratio.argmax(axis=1)
    middle = (boxes.low[widest] + boxes.high[widest]) // 2
    highest_of_lower = boxes.high.copy()
    highest_of_lower[widest] = middle
    lowest_of_upper = boxes.low.copy()
    lowest_of_upper[widest] = middle + 1
    lower = boxes._replace(high=highest_of_lower)
    upper = boxes._replace(low=lowest_of_upper)
    return joined(lower, upper)


def without_corner(box: Boxes) -> Boxes:
    """One box without its largest sizes, as disjoint boxes.

    From (1, 1) to (3, 3) without (3, 3) these are (1, 1) to (2, 3), and (3, 1) to (3, 2)."""
    low, high = box.low[0].tolist(), box.high[0].tolist()
    lows, highs = [], []
    for pool in range(len(low)):
        if low[pool] == high[pool]:
            continue
        # The pools before this one have their largest sizes, and this one has not.
        lows.append([*high[:pool], *low[pool:]])
        highs.append([*high[:pool], high[pool] - 1, *high[pool + 1 :]])
    count = len(lows)
    number, bound = np.repeat(box.number, count), np.repeat(box.bound, count)
    return Boxes(number, np.array(lows), np.array(highs), bound)


def inside(boxes: Boxes, hull: Boxes) -> Mask:
    """Which boxes lie inside one box of the same family."""
    within = (boxes.low >= hull.low[0]).all(axis=1) & (boxes.high <= hull.high[0]).all(axis=1)
    return np.asarray((boxes.number == hull.number[0]) & within)


def hull_of(boxes: Boxes) -> Boxes:
    """The smallest box around some boxes of one family."""
    return Boxes(
        boxes.number[:1],
        boxes.low.min(axis=0, keepdims=True),
        boxes.high.max(axis=0, keepdims=True),
        boxes.bound.min(keepdims=True),
    )


def joined(some: Boxes, more: Boxes) -> Boxes:
    return Boxes(*(np.concatenate(pair) for pair in zip(some, more, strict=True)))
