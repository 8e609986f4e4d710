"""Branch and bound over boxes of pool sizes, of all structures at once."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from planner.search.solver.best_program import SAME, Program
from planner.search.solver.bounds import Bounds
from planner.search.solver.evaluate import (
    Candidate,
    Trial,
    Verdict,
    evaluate,
    guess,
    ruled_out_by_ideal,
    ruled_out_by_roles,
)
from planner.search.solver.incumbents import CLOSE_ENOUGH, Incumbents
from planner.search.solver.problem import Problem
from planner.search.solver.threshold import Cuts, with_cut
from planner.search.space.arrays import Mask
from planner.search.space.pins import Restrict
from planner.search.space.placements import PlacementFamily, Structure, families, structures
from planner.search.space.size_boxes import (
    BOXES_AT_ONCE,
    NEVER,
    Boxes,
    SizeLimits,
    halved,
    hull_of,
    inside,
    joined,
    sizes_of,
    without_corner,
)

# Placements to evaluate for each runner-up: these are good, and not proven to be next.
PLACEMENTS_PER_RUNNER_UP = 4
TRIES = 3  # quick plans of a family in vain before no more are made
# Leaves parked in vain before a parked one is settled: what is learned there may rule out others.
PATIENCE = 8
LEAVES_TOGETHER = 8  # leaves of a family that are ruled out together at first

Test = Callable[[Trial], Verdict]


class Solution(NamedTuple):
    """What a search found: the best candidate and good ones of other structures, the best first;
    the seconds that no plan of the space is below; how many placements were evaluated; when (of
    time.perf_counter) the best was proven; and whether the search was ended before its time."""

    best: tuple[Candidate, ...]
    bound: float
    evaluated: int
    proven: float = 0.0
    ended: bool = False


def solve(
    problem: Problem, keep: int, restrict: Restrict | None = None, deadline: float = np.inf
) -> Solution:
    """Find the best plan, and good ones of other structures, `keep` in all; none if nothing fits.
    `restrict` adds limits to the sizes of a family, or refuses it. The search ends with what it has
    at the `deadline` (of time.perf_counter) or on Ctrl-C."""
    several_nodes = len(problem.cluster.nodes) > 1
    listed = [
        family._replace(within=within)
        for structure in structures(problem.workload.roles)
        for family in families(structure, problem.cluster)
        for within in ((True, False) if several_nodes else (None,))
    ]
    if restrict is not None:
        listed = [met for family in listed if (met := restrict(family)) is not None]
    return best_of_families(problem, listed, keep, deadline=deadline)


def best_of_families(
    problem: Problem,
    listed: Sequence[PlacementFamily],
    keep: int,
    programs: Sequence[Program] | None = None,
    deadline: float = np.inf,
) -> Solution:
    """Solve for these families only. If there are `programs`, each family has only its own, and the
    best is found to within a thousandth."""
    if not listed:
        return Solution((), 0.0, 0)
    solver = Solver(problem, listed, programs, deadline)
    ended = False
    try:
        solver.branch()
    except (_TimeUp, KeyboardInterrupt):
        ended = True
    bound, proven = solver.bound, time.perf_counter()
    if solver.incumbents.best and keep > 1 and not ended:
        with contextlib.suppress(_TimeUp, KeyboardInterrupt):
            solver.widen(keep)
            solver.branch(most=solver.evaluated + PLACEMENTS_PER_RUNNER_UP * keep)
    best = tuple(solver.incumbents.candidates)
    return Solution(best, bound, solver.evaluated, proven, ended)


class _TimeUp(Exception):
    pass


@dataclass
class Frontier:
    """The boxes that may still hold something of interest. `open` ones are to be halved. `leaves`
    are boxes whose largest sizes can be had at once: placements, with smaller ones. Leaves that had
    their quick plan are `parked`."""

    open: Boxes
    leaves: Boxes
    parked: Boxes

    @property
    def bound(self) -> float:
        return min(self.open.lowest, self.leaves.lowest, self.parked.lowest)

    def keep(self, wanted: Callable[[Boxes], Mask]) -> None:
        """Drop all boxes but the wanted ones."""
        self.open = self.open.take(wanted(self.open))
        self.leaves = self.leaves.take(wanted(self.leaves))
        self.parked = self.parked.take(wanted(self.parked))

    def replace(self, sharper: Callable[[Boxes], Boxes]) -> None:
        """Replace all boxes by the same with sharper bounds."""
        self.open, self.leaves = sharper(self.open), sharper(self.leaves)
        self.parked = sharper(self.parked)


class Solver:
    """One search. It owns what it finds and learns: the `incumbents`, the `frontier`, and the
    `cuts` of the programs of each structure."""

    def __init__(
        self,
        problem: Problem,
        listed: Sequence[PlacementFamily],
        programs: Sequence[Program] | None,
        deadline: float,
    ) -> None:
        self.problem, self.families = problem, listed
        self.programs, self.deadline = programs, deadline
        self.incumbents = Incumbents(listed, CLOSE_ENOUGH if programs else SAME)
        self.cuts: dict[Structure, Cuts] = {}
        self.cut_families = set[int]()  # whose boxes are bounded by the cuts too
        self.evaluated = 0
        self.guessed = Counter[int]()  # quick plans of a family since one was the best
        self.in_vain = 0  # quick plans since one was the best, or since a parked leaf was settled
        # How many leaves of a family a test is made for at once.
        self.together: dict[tuple[int, Test], int] = {}
        self.bounds, self.size_limits = Bounds(problem, listed, programs), SizeLimits(listed)
        roots = self.size_limits.roots()
        none = roots.take(np.zeros(0, dtype=np.int64))
        self.frontier = Frontier(none, none, none)
        self._open(roots)

    def widen(self, keep: int) -> None:
        """Look for the best plans of other structures too, as far as they are not much slower."""
        self.incumbents.widen(keep)
        self.frontier.open = self.frontier.open.take(np.zeros(0, dtype=np.int64))
        self._open(self.size_limits.roots())

    @property
    def bound(self) -> float:
        """Seconds that no plan is below, at any time of the search."""
        best = self.incumbents.best
        found = min(self.frontier.bound, best.seconds if best else NEVER)
        return found if found < NEVER / 1e3 else 0.0

    def branch(self, most: float = np.inf) -> None:
        """Halve the boxes with the lowest bounds until none is below the best; evaluate placements
        in the order of their bounds, as soon as no box has a lower one. Evaluate at most `most`
        placements in all. Raises _TimeUp at the deadline."""
        while self.evaluated < most:
            if time.perf_counter() > self.deadline:
                raise _TimeUp
            self.frontier.keep(self._is_below)
            opened, leaf = self.frontier.open.lowest, self.frontier.leaves.lowest
            nothing_below = min(opened, leaf) >= NEVER
            if nothing_below and not len(self.frontier.parked.bound):
                break
            if nothing_below or self.in_vain >= PATIENCE:
                self._settle()
            elif leaf <= opened or (leaf < NEVER and not self.incumbents.best):
                self._park()
            else:
                self._guess_inside()
                lowest, self.frontier.open = self.frontier.open.sorted().split(BOXES_AT_ONCE)
                self._open(halved(lowest))

    # --- leaves ---

    def _park(self) -> None:
        """Put the leaf that has the lowest bound aside after a quick plan, unless no program can be
        better there."""
        leaves = self.frontier.leaves
        pools = self.size_limits.pools[leaves.number]
        order = np.lexsort((leaves.number, pools, leaves.bound))
        leaf = leaves.take(order[:1])
        number = int(leaf.number[0])
        if self.incumbents.best and self._simulate(leaf, queues=False):
            self.frontier.leaves = self._sharper(leaves)
        elif not self._cut(leaf) and not self._rule_out(leaf, ruled_out_by_roles):
            self.frontier.leaves = self.frontier.leaves.take(order[1:])
            self.frontier.parked = joined(self.frontier.parked, leaf)
            if self.guessed[number] < TRIES:
                self.in_vain += 1
                self._guess(leaf)
            else:  # no more quick plans here: settle a leaf next
                self.in_vain += PATIENCE

    def _settle(self) -> None:
        """Take the parked leaf that has the lowest bound further: by a cut, by the simulation of
        queues, by its ideal placement; and if none of these rules it out, find its best plan."""
        self.in_vain = 0
        if not len(self.frontier.parked.bound):
            return
        order = np.argsort(self.frontier.parked.bound, kind="stable")
        leaf = self.frontier.parked.take(order[:1])
        if self._cut(leaf):
            return
        if self._simulate(leaf, queues=True):
            self.frontier.parked = self._sharper(self.frontier.parked)
            return
        proof = self.incumbents.keep == 1 and not self.programs  # only the best needs one
        if proof and self._rule_out(leaf, ruled_out_by_ideal):
            return
        self.frontier.parked = self.frontier.parked.take(order[1:])
        self._evaluate(leaf)

    def _simulate(self, leaf: Boxes, queues: bool) -> bool:
        """Simulate generation on a leaf where that may rule it out. Return whether it told more."""
        number = int(leaf.number[0])
        cuts = self._known_cuts(self.families[number])
        return self.bounds.sharpen(leaf, self.incumbents.limit(number), cuts, queues)

    def _cut(self, leaf: Boxes) -> bool:
        """Look for a program at the least durations of a leaf, and bound all boxes of its family by
        the cut that this leaves. Return whether the leaf's own bound is higher now."""
        if self.programs or not self.incumbents.best:
            return False
        number = int(leaf.number[0])
        family = self.families[number]
        cut = self.bounds.cut(leaf, self.incumbents.limit(number))
        self._learn(family, with_cut(self._known_cuts(family), cut))
        self.cut_families.add(number)
        self.frontier.replace(lambda boxes: self._bounded_by(boxes, number, (cut,)))
        raised = self._bounded_by(leaf, number, (cut,))
        return bool(raised.bound[0] > leaf.bound[0] * (1 + SAME))

    def _rule_out(self, leaf: Boxes, test: Test) -> bool:
        """Whether a test rules out a leaf, and with it some leaves of its family near it.

        The test is made for the hull of these leaves: if no placement as large in every pool is
        better than the best, none of them is. The next time it is made for twice as many leaves; if
        it fails, for half as many, down to this leaf alone."""
        number = int(leaf.number[0])
        leaves = joined(self.frontier.leaves, self.frontier.parked)
        leaves = leaves.take(leaves.number == number)
        distance = np.abs(leaves.high - leaf.high).max(axis=1)
        leaves = leaves.take(np.argsort(distance, kind="stable"))
        count = min(len(leaves.number), self.together.get((number, test), LEAVES_TOGETHER))
        if self.families[number].rollout is not None:  # sizes that must add up to something
            count = 1
        while count:
            hull = hull_of(leaves.take(np.arange(count)))
            alike = count == 1 or not self.bounds.may_share_a_node(hull)[0]
            if alike and self._holds(test, hull):
                self._drop(hull)
                self.together[number, test] = 2 * count
                return True
            count //= 2
        self.together[number, test] = 1
        return False

    def _drop(self, hull: Boxes) -> None:
        """Drop the boxes inside one box of the same family."""
        self.frontier.keep(lambda boxes: ~inside(boxes, hull))

    def _holds(self, test: Test, box: Boxes) -> bool:
        """Whether a test rules out the largest sizes of a box."""
        trial = self._trial(box)
        verdict = test(trial)
        self._learn(trial.family, verdict.cuts)
        return verdict.ruled_out

    def _evaluate(self, leaf: Boxes) -> None:
        """Find the best plan of a leaf. Where smaller sizes may be better (`Evaluation.filled`),
        open the rest of the box too."""
        self.evaluated += 1
        trial = self._trial(leaf)
        found = evaluate(trial)
        self._learn(trial.family, found.cuts)
        self.incumbents.insert(found.best)
        is_below = bool(self._is_below(leaf)[0])
        if is_below and not found.filled and (leaf.low < leaf.high).any():
            self._open(without_corner(leaf))

    def _trial(self, box: Boxes) -> Trial:
        """The largest sizes of one box, as a placement that has to beat the incumbents."""
        number = int(box.number[0])
        family = self.families[number]
        return Trial(
            self.problem,
            family,
            sizes_of(family, box.high[0]),
            self.incumbents.limit(number),
            self.programs[number] if self.programs else None,
            self._known_cuts(family),
        )

    # --- quick plans ---

    def _guess(self, leaf: Boxes) -> bool:
        """Find a quick plan of a leaf. Return whether it is the best now."""
        number = int(leaf.number[0])
        self.evaluated += 1
        self.guessed[number] += 1
        trial = self._trial(leaf)
        found = guess(trial)
        self._learn(trial.family, found.cuts)
        is_best = self.incumbents.insert(found.best)
        if is_best:
            self.in_vain = self.guessed[number] = 0
        return is_best

    def _guess_inside(self) -> None:
        """Find a quick plan of the family that has the lowest open box of those without one, inside
        that box; and another one as long as they get better, or as their simulations show that
        other sizes are."""
        boxes = self.frontier.open
        new = boxes.take(~np.isin(boxes.number, list(self.guessed)))
        if not len(new.bound):
            return
        box, _ = new.sorted().split(1)
        self.guessed[int(box.number[0])] = 0
        for _ in range(TRIES):
            leaf = self._steepest(box)
            if not len(leaf.bound):
                break
            is_best = self._guess(leaf)
            if not is_best and self._sharper(leaf).bound[0] <= leaf.bound[0] * (1 + SAME):
                break

    def _steepest(self, box: Boxes) -> Boxes:
        """The leaf that is found by halving a box again and again, always into the half with the
        lower bound; none if both are too slow."""
        while len(box.bound) and not self.size_limits.possible(box)[0]:
            halves = self._sharper(self._tightened(halved(box)))
            box, _ = halves.take(self._is_below(halves)).sorted().split(1)
        return box

    # --- cuts ---

    def _known_cuts(self, family: PlacementFamily) -> Cuts:
        """The cuts of the programs of a family's structure."""
        return self.cuts.get(family.structure, ())

    def _learn(self, family: PlacementFamily, cuts: Cuts) -> None:
        """Take over the cuts that were learned about a family's structure."""
        self.cuts[family.structure] = cuts

    # --- boxes ---

    def _is_below(self, boxes: Boxes) -> Mask:
        """Which boxes may hold something of interest, by their bounds."""
        return np.asarray(boxes.bound < self.incumbents.limits(boxes.number))

    def _open(self, boxes: Boxes) -> None:
        """Tighten and bound boxes, and add those that may hold something of interest to the
        frontier."""
        boxes = self._sharper(self._tightened(boxes))
        boxes = boxes.take(self._is_below(boxes))
        single = self.size_limits.possible(boxes) & ~self.bounds.may_share_a_node(boxes)
        self.frontier.leaves = joined(self.frontier.leaves, boxes.take(single))
        self.frontier.open = joined(self.frontier.open, boxes.take(~single))

    def _sharper(self, boxes: Boxes) -> Boxes:
        """Boxes with their bounds made again, by the rates, and where that does not rule them out
        by the cuts of the families that have been cut."""
        bound = np.maximum(boxes.bound, self.bounds.of(boxes))
        boxes = boxes._replace(bound=bound)
        below = self._is_below(boxes)
        for number in self.cut_families.intersection(boxes.number[below].tolist()):
            cuts = self._known_cuts(self.families[number])
            boxes = self._bounded_by(boxes, number, cuts, below)
        return boxes

    def _bounded_by(
        self, boxes: Boxes, number: int, cuts: Cuts, below: Mask | None = None
    ) -> Boxes:
        """Boxes with the bounds of one family raised by cuts, where they are `below` the limit."""
        below = self._is_below(boxes) if below is None else below
        rows = np.flatnonzero(below & (boxes.number == number))
        if not len(rows):
            return boxes
        bound = boxes.bound.copy()
        bound[rows] = np.maximum(bound[rows], self.bounds.by_cuts(boxes.take(rows), cuts))
        return boxes._replace(bound=bound)

    def _tightened(self, boxes: Boxes) -> Boxes:
        """Boxes without sizes that are too small to be below the limit, that leave too few GPUs for
        the other pools, or that are no better than a smaller one. What one of these rules takes
        away lets the others take more, so they are applied twice."""
        for _ in range(2):
            least = self.bounds.smallest(boxes, self.incumbents.limits(boxes.number))
            low = np.where(boxes.high > 0, np.maximum(boxes.low, least), 0)
            high = np.minimum(boxes.high, low + self.size_limits.slack(boxes.number, low))
            boxes = boxes._replace(low=low, high=high)
            boxes = boxes.take(np.flatnonzero((low <= high).all(axis=1)))
        generates = self.bounds.table.generates[boxes.number]
        may_shrink = self.size_limits.free[boxes.number] & ~generates
        snapped = np.maximum(boxes.low, self.bounds.snapped(boxes))
        return boxes._replace(high=np.where(may_shrink, snapped, boxes.high))
