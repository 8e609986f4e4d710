"""The best plans of a search so far, and how good a placement must be to be of interest."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from planner.search.solver.best_program import SAME
from planner.search.solver.evaluate import Candidate
from planner.search.space.arrays import Array, Families
from planner.search.space.placements import PlacementFamily, Structure
from planner.search.space.size_boxes import NEVER

MUCH_SLOWER = 0.25  # than the best plan: such plans are not shown with it
# Share of a step time by which a baseline or a runner-up may be slower than the best of its kind.
CLOSE_ENOUGH = 1e-3


class Incumbents:
    """The best candidates, sorted, one of each structure; `keep` of them at most.

    A placement is of interest if it is better than its structure's candidate and than the last one
    that is kept (or than `slowest`, while there are fewer), each time by the share `margin`."""

    def __init__(self, families: Sequence[PlacementFamily], margin: float) -> None:
        self.candidates: list[Candidate] = []
        self.keep, self.slowest, self.margin = 1, NEVER / 1e3, margin
        self._same = defaultdict[Structure, list[int]](list)  # the families of each structure
        for number, family in enumerate(families):
            self._same[family.structure].append(number)
        self._count = len(families)

    def widen(self, keep: int) -> None:
        """Keep more than the best from now on, as far as the others are not much slower."""
        self.keep = keep
        self.slowest = (1 + MUCH_SLOWER) * self.candidates[0].seconds
        self.margin = CLOSE_ENOUGH

    @property
    def best(self) -> Candidate | None:
        return self.candidates[0] if self.candidates else None

    def limits(self, number: Families) -> Array:
        """Seconds [n] that placements of these families must be below to be of interest."""
        full = len(self.candidates) == self.keep
        limits = np.full(self._count, self.candidates[-1].seconds if full else self.slowest)
        for candidate in self.candidates:
            own = self._same[candidate.structure]
            limits[own] = np.minimum(limits[own], candidate.seconds)
        return np.asarray(limits[number] * (1 - self.margin))

    def limit(self, number: int) -> float:
        """Seconds that a placement of one family must be below to be of interest."""
        return float(self.limits(np.array([number]))[0])

    def insert(self, candidate: Candidate | None) -> bool:
        """Add a candidate, after those that are as fast, in place of the one of its structure.
        Return whether it is the best now."""
        if candidate is None:
            return False
        others = [c for c in self.candidates if c.structure != candidate.structure]
        slower = [candidate.seconds < other.seconds * (1 - SAME) for other in others]
        at = slower.index(True) if True in slower else len(others)
        self.candidates = [*others[:at], candidate, *others[at:]][: self.keep]
        return self.candidates[0] is candidate
