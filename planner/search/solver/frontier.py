"""The boxes of a search that may still hold something of interest, and how their bounds rise."""

from collections.abc import Callable, Sequence

import numpy as np

from planner.search.solver.best_program import SAME, Cut
from planner.search.solver.bounds import Bounds
from planner.search.solver.incumbents import Incumbents
from planner.search.solver.threshold import Cuts, with_cut
from planner.search.space.arrays import Mask
from planner.search.space.placements import PlacementFamily, Structure
from planner.search.space.size_boxes import (
    BOXES_AT_ONCE,
    Boxes,
    SizeLimits,
    halved,
    inside,
    joined,
)


class Frontier:
    """All that is left of the space: every placement that is not in one of these boxes is known to
    be no better than the incumbents. So the lowest bound of the boxes bounds the search, at any
    time; a search that is interrupted relies on it, and boxes are only taken out once what replaces
    them is in.

    `open` boxes are to be halved. `leaves` are boxes whose largest sizes can be had at once: a
    placement, with all smaller ones. Leaves that had their quick plan are `parked`.

    `cuts` are what is known about the programs of each structure."""

    def __init__(
        self, families: Sequence[PlacementFamily], bounds: Bounds, incumbents: Incumbents
    ) -> None:
        self.families, self.bounds, self.incumbents = families, bounds, incumbents
        self.limits = SizeLimits(families)
        self.cuts: dict[Structure, Cuts] = {}
        self._cut_families = set[int]()  # whose boxes are bounded by the cuts too
        self.open = self.leaves = self.parked = self._no_boxes()
        self.add(self.limits.roots())

    def start_again(self) -> None:
        """Open the whole space again, for incumbents of which more are kept now."""
        self.open = self._no_boxes()
        self.add(self.limits.roots())

    def _no_boxes(self) -> Boxes:
        return self.limits.roots().take(np.zeros(0, dtype=np.int64))

    @property
    def lowest(self) -> float:
        """Seconds that nothing in the boxes is below."""
        return min(self.open.lowest, self.leaves.lowest, self.parked.lowest)

    # --- boxes come and go ---

    def add(self, boxes: Boxes) -> None:
        """Add boxes, as far as they may hold something of interest."""
        leaves, others = self._leaves_of(boxes)
        self.leaves = joined(self.leaves, leaves)
        self.open = joined(self.open, others)

    def halve_lowest(self) -> None:
        """Replace the open boxes with the lowest bounds by their halves."""
        lowest, rest = self.open.sorted().split(BOXES_AT_ONCE)
        leaves, others = self._leaves_of(halved(lowest))
        self.leaves = joined(self.leaves, leaves)
        self.open = joined(rest, others)

    def _leaves_of(self, boxes: Boxes) -> tuple[Boxes, Boxes]:
        """The boxes that may hold something of interest, tightened and bounded: leaves, and those
        that have to be halved."""
        boxes = self.sharper(self.tightened(boxes))
        boxes = boxes.take(self.is_below(boxes))
        are_leaves = self.limits.possible(boxes) & ~self.bounds.may_share_a_node(boxes)
        return boxes.take(are_leaves), boxes.take(~are_leaves)

    def drop_dominated(self) -> None:
        """Drop the boxes that hold nothing of interest any more."""
        self._keep(self.is_below)

    def drop_inside(self, hull: Boxes) -> None:
        """Drop the boxes inside one box of the same family."""
        self._keep(lambda boxes: ~inside(boxes, hull))

    def _keep(self, wanted: Callable[[Boxes], Mask]) -> None:
        self.open = self.open.take(wanted(self.open))
        self.leaves = self.leaves.take(wanted(self.leaves))
        self.parked = self.parked.take(wanted(self.parked))

    def near(self, leaf: Boxes) -> Boxes:
        """The leaves of the family of one of them, parked or not, those with similar sizes
        first."""
        leaves = joined(self.leaves, self.parked)
        leaves = leaves.take(leaves.number == leaf.number[0])
        distance = np.abs(leaves.high - leaf.high).max(axis=1)
        return leaves.take(np.argsort(distance, kind="stable"))

    # --- bounds ---

    def is_below(self, boxes: Boxes) -> Mask:
        """Which boxes may hold something of interest, by their bounds."""
        return np.asarray(boxes.bound < self.incumbents.limits(boxes.number))

    def sharper(self, boxes: Boxes) -> Boxes:
        """Boxes with their bounds made again: by the rates, and where that does not rule them out
        by the cuts of the families that have been cut."""
        boxes = boxes._replace(bound=np.maximum(boxes.bound, self.bounds.of(boxes)))
        below = self.is_below(boxes)
        for number in self._cut_families.intersection(boxes.number[below].tolist()):
            rows = np.flatnonzero(below & (boxes.number == number))
            boxes = self._bounded_by(boxes, rows, self.known_cuts(self.families[number]))
        return boxes

    def cut(self, leaf: Boxes, cut: Cut) -> bool:
        """Bound all boxes of a leaf's family by a new cut. Return whether that raised the bound of
        the leaf itself."""
        number = int(leaf.number[0])
        family = self.families[number]
        self.learn(family, with_cut(self.known_cuts(family), cut))
        self._cut_families.add(number)

        def raised(boxes: Boxes) -> Boxes:
            rows = np.flatnonzero(self.is_below(boxes) & (boxes.number == number))
            return self._bounded_by(boxes, rows, (cut,)) if len(rows) else boxes

        self.open, self.leaves = raised(self.open), raised(self.leaves)
        self.parked = raised(self.parked)
        return bool(raised(leaf).bound[0] > leaf.bound[0] * (1 + SAME))

    def _bounded_by(self, boxes: Boxes, rows: np.ndarray, cuts: Cuts) -> Boxes:
        """Boxes with the bounds of some rows, all of one family, raised by cuts."""
        bound = boxes.bound.copy()
        bound[rows] = np.maximum(bound[rows], self.bounds.by_cuts(boxes.take(rows), cuts))
        return boxes._replace(bound=bound)

    def known_cuts(self, family: PlacementFamily) -> Cuts:
        """The cuts of the programs of a family's structure."""
        return self.cuts.get(family.structure, ())

    def learn(self, family: PlacementFamily, cuts: Cuts) -> None:
        """Take over the cuts that are known now of a family's structure."""
        self.cuts[family.structure] = cuts

    # --- sizes ---

    def tightened(self, boxes: Boxes) -> Boxes:
        """Boxes without sizes that are too small to be below the limit, that leave too few GPUs for
        the other pools, or that are no better than a smaller one. What one of these rules takes
        away lets the others take more, so they are applied twice."""
        for _ in range(2):
            least = self.bounds.smallest(boxes, self.incumbents.limits(boxes.number))
            low = np.where(boxes.high > 0, np.maximum(boxes.low, least), 0)
            high = np.minimum(boxes.high, low + self.limits.slack(boxes.number, low))
            boxes = boxes._replace(low=low, high=high)
            boxes = boxes.take(np.flatnonzero((low <= high).all(axis=1)))
        generates = self.bounds.table.generates[boxes.number]
        may_shrink = self.limits.free[boxes.number] & ~generates
        snapped = np.maximum(boxes.low, self.bounds.snapped(boxes))
        return boxes._replace(high=np.where(may_shrink, snapped, boxes.high))

    def steepest(self, box: Boxes) -> Boxes:
        """The leaf that is found by halving a box again and again, always into the half with the
        lower bound; none if both are too slow."""
        while len(box.bound) and not self.limits.possible(box)[0]:
            halves = self.sharper(self.tightened(halved(box)))
            box, _ = halves.take(self.is_below(halves)).sorted().split(1)
        return box
