"""Branch and bound over boxes of pool sizes, of all structures at once."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.search.solver.best_program import SAME, Program
from planner.search.solver.bounds import Bounds
from planner.search.solver.evaluate import Candidate, dismissed, evaluate, guess, surpassed
from planner.search.solver.problem import CUTS, Problem
from planner.search.space.pins import Restrict
from planner.search.space.placements import PlacementFamily, families, structures
from planner.search.space.size_boxes import (
    NEVER,
    Boxes,
    SizeLimits,
    halved,
    inside,
    joined,
    lowest,
    padded,
    without_corner,
)

MUCH_SLOWER = 0.25  # than the best plan: such plans are not shown beside it
# Of a step time: by how much a baseline or a plan beside the best may be slower than the best of
# its kind.
CLOSE_ENOUGH = 1e-3
# Placements to evaluate for each plan beside the best: these are good, and not proven to be next.
MORE = 4
TRIES = 3  # quick plans of a family in vain before no more are made
# Leaves parked in vain before a parked leaf is looked at: what is learned may rule out others.
PATIENCE = 8
TOGETHER = 8  # leaves of a family that are dismissed together at first
BOXES_AT_ONCE = 1024  # boxes that are halved together


Test = Callable[[Problem, PlacementFamily, tuple[int, ...], float, Program | None], bool]


class Solution(NamedTuple):
    """The best candidate, and good ones of other structures, the best first; the seconds that no
    plan of the space is below; how many placements were evaluated; when (of time.perf_counter) the
    best was proven; and whether the search was ended before its time."""

    best: tuple[Candidate, ...]
    bound: float
    evaluated: int
    proven: float = 0.0
    ended: bool = False


def solve(
    problem: Problem, keep: int, restrict: Restrict | None = None, deadline: float = np.inf
) -> Solution:
    """The best plan, and good ones of other structures, `keep` in all; empty if nothing fits.
    `restrict` adds what a family's sizes must meet, or refuses it. Ends with what it has at
    the `deadline` (of time.perf_counter) or on Ctrl-C."""
    ways = (True, False) if len(problem.cluster.nodes) > 1 else (None,)
    listed = [
        a._replace(within=way)
        for structure in structures(problem.workload.roles)
        for a in families(structure, problem.cluster)
        for way in ways
    ]
    if restrict is not None:
        listed = [restricted for a in listed if (restricted := restrict(a)) is not None]
    return best_of_families(problem, listed, keep, deadline=deadline)


def best_of_families(
    problem: Problem,
    listed: Sequence[PlacementFamily],
    keep: int,
    programs: Sequence[Program] | None = None,
    deadline: float = np.inf,
) -> Solution:
    """As `solve`, of these families; each with its own program if there are `programs`, and
    then but for a thousandth the best."""
    if not listed:
        return Solution((), 0.0, 0)
    run = Solver(problem, listed, programs, deadline)
    ended = False
    try:
        run.branch()  # the best plan
    except (_TimeUp, KeyboardInterrupt):
        ended = True
    bound, proven = run.bound, time.perf_counter()
    if run.best and keep > 1 and not ended:
        with contextlib.suppress(_TimeUp, KeyboardInterrupt):
            run.widen(keep)
            run.branch(most=run.evaluated + MORE * keep)
    return Solution(tuple(run.best), bound, run.evaluated, proven, ended)


class _TimeUp(Exception):
    pass


class Solver:
    """`best` is sorted. `open` boxes are to be halved; `leaves` are boxes whose largest sizes can
    be had at once; those that have had a quick plan are `parked`. The `guessed` families have
    had one; of those in `cut` it is known why some sizes have no program that is fast enough."""

    def __init__(
        self,
        problem: Problem,
        listed: Sequence[PlacementFamily],
        programs: Sequence[Program] | None,
        deadline: float,
    ) -> None:
        self.problem, self.listed, self.programs, self.deadline = (
            problem,
            listed,
            programs,
            deadline,
        )
        self.keep, self.slowest, self.near = 1, NEVER / 1e3, CLOSE_ENOUGH if programs else SAME
        self.best: list[Candidate] = []
        self.guessed, self.cut, self.evaluated = Counter[int](), set[int](), 0
        self.together = dict[
            tuple[int, Test], int
        ]()  # how many leaves of a family may be dismissed at once
        self.in_vain = 0  # quick plans since one was the best, or since a parked leaf was looked at
        self.bounds, self.size_limits = Bounds(problem, listed, programs), SizeLimits(listed)
        roots = self.size_limits.roots()
        self.leaves = self.parked = roots.take(np.zeros(0, dtype=np.int64))
        self.open = self._bounded(roots)

    def widen(self, keep: int) -> None:
        """Look for the best plans of other structures too, as far as they are not much slower."""
        self.keep, self.slowest, self.near = (
            keep,
            (1 + MUCH_SLOWER) * self.best[0].seconds,
            CLOSE_ENOUGH,
        )
        self.open = self._bounded(self.size_limits.roots())

    @property
    def bound(self) -> float:
        """Seconds that no plan is below, at any time of the search."""
        found = min(map(lowest, (self.open, self.leaves, self.parked)))
        found = min(found, self.best[0].seconds if self.best else NEVER)
        return found if found < NEVER / 1e3 else 0.0

    def branch(self, most: float = np.inf) -> None:
        """Halve the boxes with the lowest bounds until none is below the best; evaluate placements
        in the order of their bounds, as soon as no box has a lower one. Not more than `most` in
        all."""
        while self.evaluated < most:
            if time.perf_counter() > self.deadline:
                raise _TimeUp
            self.open, self.leaves, self.parked = (
                boxes.take(boxes.bound < self._limits(boxes.number))
                for boxes in (self.open, self.leaves, self.parked)
            )
            opened, leaf = lowest(self.open), lowest(self.leaves)
            if min(opened, leaf) >= NEVER and not len(self.parked.bound):
                break
            if self.in_vain >= PATIENCE or min(opened, leaf) >= NEVER:
                self._settle()
            elif leaf <= opened or (leaf < NEVER and not self.best):
                self._park()
            else:
                self._guess_inside()
                order = np.argsort(self.open.bound, kind="stable")
                halves = self._bounded(halved(self.open.take(order[:BOXES_AT_ONCE])))
                self.open = joined(self.open.take(order[BOXES_AT_ONCE:]), halves)

    def _park(self) -> None:
        """Put the leaf that has the lowest bound aside after a quick plan, unless no program can be
        better there."""
        order = np.lexsort(
            (self.leaves.number, self.size_limits.pools[self.leaves.number], self.leaves.bound)
        )
        leaf = self.leaves.take(order[:1])
        number = int(leaf.number[0])
        if self.best and self.bounds.sharpen(number, leaf.high, self._limit(number), queues=False):
            self.leaves = self._sharper(self.leaves)
        elif not self._raised(leaf) and not self._dismissed(leaf, dismissed):
            self.leaves = self.leaves.take(order[1:])
            self.parked = joined(self.parked, leaf)
            self.in_vain += 1 if self.guessed[number] < TRIES else PATIENCE
            if self.guessed[number] < TRIES:
                self._guess(leaf)

    def _settle(self) -> None:
        """Take the parked leaf that has the lowest bound further: a bound by all programs, and by
        simulated generation; and if that is as sharp as can be, its best plan."""
        self.in_vain = 0
        if not len(self.parked.bound):
            return
        order = np.argsort(self.parked.bound, kind="stable")
        number, leaf = int(self.parked.number[order[0]]), self.parked.take(order[:1])
        if self._raised(leaf):
            return
        if self.bounds.sharpen(number, leaf.high, self._limit(number)):
            self.parked = self._sharper(self.parked)
        elif (
            self.keep > 1 or self.programs or not self._dismissed(leaf, surpassed)
        ):  # only the best needs a proof
            self.parked = self.parked.take(order[1:])
            self._evaluate(leaf)

    def _dismissed(self, leaf: Boxes, test: Test) -> bool:
        """Whether a test shows that no placement as large in every pool as this leaf and those near
        it is better than the best, which dismisses all of them at once. As many are tried as this
        has lately worked for."""
        number, limit = int(leaf.number[0]), self._limit(int(leaf.number[0]))
        near = joined(self.leaves, self.parked)
        near = near.take(near.number == number)
        near = near.take(np.argsort(np.abs(near.high - leaf.high).max(axis=1), kind="stable"))
        alone = self.listed[number].rollout is not None  # sizes that must add up to something
        count = 1 if alone else min(len(near.number), self.together.get((number, test), TOGETHER))
        while count:
            few = near.take(np.arange(count))
            low, high = few.low.min(axis=0), few.high.max(axis=0)
            sizes = padded(self.listed[number], high.tolist())
            alike = (
                count == 1
                or not self.bounds.may_share_a_node(leaf.number, low[None], high[None])[0]
            )
            if alike and test(
                self.problem, self.listed[number], sizes, limit, self._program(number)
            ):
                self.open, self.leaves, self.parked = (
                    boxes.take(~inside(boxes, number, low, high))
                    for boxes in (self.open, self.leaves, self.parked)
                )
                self.together[number, test] = 2 * count
                return True
            count //= 2
        self.together[number, test] = 1
        return False

    def _raised(self, leaf: Boxes) -> bool:
        """Whether the programs of a leaf raise its bound; what shows it may raise that of others of
        its structure."""
        number = int(leaf.number[0])
        if self.programs or not self.best:
            return False
        self.bounds.cut(number, leaf.low, leaf.high, self._limit(number))
        self.cut.add(number)
        self.open, self.leaves, self.parked = (
            self._sharper(boxes, number) for boxes in (self.open, self.leaves, self.parked)
        )
        return bool(self._sharper(leaf, number).bound[0] > leaf.bound[0] * (1 + SAME))

    def _guess_inside(self) -> None:
        """A quick plan of the family that has the lowest box of those without one, inside that
        box; and another one as long as they are better, or as what was simulated shows other sizes
        to be."""
        new = self.open.take(~np.isin(self.open.number, list(self.guessed)))
        if not len(new.bound):
            return
        box = new.take(np.array([new.bound.argmin()]))
        self.guessed[int(box.number[0])] = 0
        for _ in range(TRIES):
            leaf, best = self._steepest(box), self.best[:1]
            if not len(leaf.bound):
                break
            self._guess(leaf)
            if best == self.best[:1] and self._sharper(leaf).bound[0] <= leaf.bound[0] * (1 + SAME):
                break

    def _steepest(self, box: Boxes) -> Boxes:
        """The leaf that is found by halving a box again and again, always into the half with the
        lower bound; none if both are too slow."""
        while len(box.bound) and not self.size_limits.possible(box)[0]:
            halves = self._sharper(self._tightened(halved(box)))
            halves = halves.take(halves.bound < self._limits(halves.number))
            box = halves.take(halves.bound.argsort(kind="stable")[:1])
        return box

    def _guess(self, leaf: Boxes) -> None:
        number = int(leaf.number[0])
        self.evaluated += 1
        self.guessed[number] += 1
        sizes, program = padded(self.listed[number], leaf.high[0].tolist()), self._program(number)
        best = self.best[:1]
        self._insert(guess(self.problem, self.listed[number], sizes, self._limit(number), program))
        if best != self.best[:1]:
            self.in_vain = self.guessed[number] = 0

    def _program(self, number: int) -> Program | None:
        return self.programs[number] if self.programs else None

    def _evaluate(self, leaf: Boxes) -> None:
        """Evaluate the placement of a leaf. Where smaller sizes may be better (see
        `Placement.filled`), the rest of the box is looked at too."""
        number, bound = int(leaf.number[0]), float(leaf.bound[0])
        sizes = padded(self.listed[number], leaf.high[0].tolist())
        self.evaluated += 1
        outcome = evaluate(
            self.problem, self.listed[number], sizes, self._limit(number), self._program(number)
        )
        self._insert(outcome.best)
        if bound < self._limit(number) and not outcome.filled and (leaf.low < leaf.high).any():
            rest = without_corner(bound, number, leaf.low[0].tolist(), leaf.high[0].tolist())
            self.open = joined(self.open, self._bounded(rest))
        self.bounds.refresh()

    # --- what is of interest ---

    def _limit(self, number: int) -> float:
        """Seconds that a placement must be below to be of interest: its structure's best, or the
        last one kept."""
        return float(self._limits(np.array([number]))[0])

    def _limits(self, number: NDArray[np.int64]) -> NDArray[np.float64]:
        found = np.full(
            len(self.listed), self.best[-1].seconds if len(self.best) == self.keep else self.slowest
        )
        for candidate in self.best:
            own = self.size_limits.same[candidate.structure]
            found[own] = np.minimum(found[own], candidate.seconds)
        return np.asarray(found[number] * (1 - self.near))

    def _insert(self, candidate: Candidate | None) -> None:
        """Keep the list sorted, the first found first among equals, with one entry per
        structure."""
        if candidate is None:
            return
        self.best = [c for c in self.best if c.structure != candidate.structure]
        at = next(
            (i for i, c in enumerate(self.best) if candidate.seconds < c.seconds * (1 - SAME)),
            len(self.best),
        )
        self.best.insert(at, candidate)
        del self.best[self.keep :]

    # --- boxes ---

    def _bounded(self, boxes: Boxes) -> Boxes:
        """The boxes that may hold something of interest, tightened and bounded; those that are
        placements go to the leaves."""
        boxes = self._sharper(self._tightened(boxes))
        boxes = boxes.take(boxes.bound < self._limits(boxes.number))
        single = self.size_limits.possible(boxes) & ~self.bounds.may_share_a_node(
            boxes.number, boxes.low, boxes.high
        )
        self.leaves = joined(self.leaves, boxes.take(single))
        return boxes.take(~single)

    def _sharper(self, boxes: Boxes, cut: int | None = None) -> Boxes:
        """With their bounds anew, by the cuts of their programs where that may decide; or those of
        one family by its last `cut` alone."""
        if cut is None:
            boxes = boxes._replace(
                bound=np.maximum(boxes.bound, self.bounds.of(boxes.number, boxes.low, boxes.high))
            )
        bound, near = boxes.bound.copy(), boxes.bound < self._limits(boxes.number)
        for number in self.cut if cut is None else (cut,):
            rows = np.flatnonzero((boxes.number == number) & near)
            if len(rows):
                last = CUTS if cut is None else 1
                found = self.bounds.with_cuts(number, boxes.low[rows], boxes.high[rows], last)
                bound[rows] = np.maximum(bound[rows], found)
        return boxes._replace(bound=bound)

    def _tightened(self, boxes: Boxes) -> Boxes:
        """Boxes without sizes that are too small to be below the limit, that leave too few GPUs for
        the other pools, or that are no better than a smaller one."""
        for _ in range(2):
            least = self.bounds.smallest(
                boxes.number, boxes.low, boxes.high, self._limits(boxes.number)
            )
            low = np.where(boxes.high > 0, np.maximum(boxes.low, least), 0)
            high = np.minimum(boxes.high, low + self.size_limits.slack(boxes.number, low))
            boxes = boxes._replace(low=low, high=high)
            boxes = boxes.take(np.flatnonzero((low <= high).all(axis=1)))
        free = self.size_limits.free[boxes.number] & ~self.bounds.rows.generates[boxes.number]
        high = np.where(
            free, np.maximum(boxes.low, self.bounds.snapped(boxes.number, boxes.high)), boxes.high
        )
        return boxes._replace(high=high)
