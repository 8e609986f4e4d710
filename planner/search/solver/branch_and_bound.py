"""Branch and bound over boxes of pool sizes, of all structures at once."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
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
from planner.search.solver.frontier import Frontier
from planner.search.solver.incumbents import CLOSE_ENOUGH, Incumbents
from planner.search.solver.problem import Problem
from planner.search.space.pins import Restrict
from planner.search.space.placements import PlacementFamily, families, structures
from planner.search.space.size_boxes import (
    NEVER,
    Boxes,
    hull_of,
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
IsOver = Callable[[int], bool]  # of the placements evaluated so far: whether to end the search


class SolverResult(NamedTuple):
    """What a search found: the best candidate and good ones of other structures, the best first;
    the seconds that no plan of the space is below; how many placements were evaluated; when (of
    time.perf_counter) the best was proven; and whether the search was ended before its time."""

    best: tuple[Candidate, ...]
    bound: float
    evaluated: int
    proven: float = 0.0
    ended: bool = False


def solve(
    problem: Problem,
    keep: int,
    restrict: Restrict | None = None,
    is_over: IsOver = lambda evaluated: False,
    known: Candidate | None = None,
) -> SolverResult:
    """Find the best plan, and good ones of other structures, `keep` in all; none if nothing fits.
    `restrict` adds limits to the sizes of a family, or refuses it. A plan that is `known` already
    has to be beaten. The search ends with what it has when it `is_over`, which is asked before each
    step, or on Ctrl-C."""
    several_nodes = len(problem.cluster.nodes) > 1
    listed = [
        family._replace(within=within)
        for structure in structures(problem.workload.roles)
        for family in families(structure, problem.cluster)
        for within in ((True, False) if several_nodes else (None,))
    ]
    if restrict is not None:
        listed = [met for family in listed if (met := restrict(family)) is not None]
    return best_of_families(problem, listed, keep, is_over=is_over, known=known)


def best_of_families(
    problem: Problem,
    listed: Sequence[PlacementFamily],
    keep: int,
    programs: Sequence[Program] | None = None,
    is_over: IsOver = lambda evaluated: False,
    known: Candidate | None = None,
) -> SolverResult:
    """Solve for these families only. If there are `programs`, each family has only its own, and the
    best is found to within a thousandth."""
    if not listed:
        return SolverResult((), 0.0, 0)
    solver = Solver(problem, listed, programs, is_over)
    solver.incumbents.insert(known)
    ended = False
    try:
        solver.branch()
    except (_Over, KeyboardInterrupt):
        ended = True
    bound, proven = solver.bound, time.perf_counter()
    if solver.incumbents.best and keep > 1 and not ended:
        with contextlib.suppress(_Over, KeyboardInterrupt):
            solver.widen(keep)
            solver.branch(most=solver.evaluated + PLACEMENTS_PER_RUNNER_UP * keep)
    best = tuple(solver.incumbents.candidates)
    return SolverResult(best, bound, solver.evaluated, proven, ended)


class _Over(Exception):
    pass


class Solver:
    """One search over families of placements. It owns what it finds and learns: the `incumbents`,
    and the `frontier` with the cuts of the programs."""

    def __init__(
        self,
        problem: Problem,
        listed: Sequence[PlacementFamily],
        programs: Sequence[Program] | None,
        is_over: IsOver,
    ) -> None:
        self.problem, self.families = problem, listed
        self.programs, self.is_over = programs, is_over
        self.bounds = Bounds(problem, listed, programs)
        self.incumbents = Incumbents(listed, CLOSE_ENOUGH if programs else SAME)
        self.frontier = Frontier(listed, self.bounds, self.incumbents)
        self.evaluated = 0
        self.guessed = Counter[int]()  # quick plans of a family since one was the best
        self.in_vain = 0  # quick plans since one was the best, or since a parked leaf was settled
        # How many leaves of a family a test is made for at once.
        self.together: dict[tuple[int, Test], int] = {}

    def widen(self, keep: int) -> None:
        """Look for the best plans of other structures too, as far as they are not much slower."""
        self.incumbents.widen(keep)
        self.frontier.start_again()

    @property
    def bound(self) -> float:
        """Seconds that no plan is below, at any time of the search."""
        best = self.incumbents.best
        found = min(self.frontier.lowest, best.seconds if best else NEVER)
        return found if found < NEVER / 1e3 else 0.0

    def branch(self, most: float = np.inf) -> None:
        """Halve the boxes with the lowest bounds until none is below the best; evaluate placements
        in the order of their bounds, as soon as no box has a lower one. Evaluate at most `most`
        placements in all. Raises _Over when the search is over."""
        frontier = self.frontier
        while self.evaluated < most:
            if self.is_over(self.evaluated):
                raise _Over
            frontier.drop_dominated()
            opened, leaf = frontier.open.lowest, frontier.leaves.lowest
            nothing_below = min(opened, leaf) >= NEVER
            if nothing_below and not len(frontier.parked.bound):
                break
            if nothing_below or self.in_vain >= PATIENCE:
                self._settle()
            elif leaf <= opened or (leaf < NEVER and not self.incumbents.best):
                self._park()
            else:
                self._guess_inside()
                frontier.halve_lowest()

    # --- leaves ---

    def _park(self) -> None:
        """Put the leaf that has the lowest bound aside after a quick plan, unless no program can be
        better there. Of leaves that are equal the one with the fewest pools comes first."""
        frontier = self.frontier
        leaves = frontier.leaves
        pools = frontier.limits.pools[leaves.number]
        order = np.lexsort((leaves.number, pools, leaves.bound))
        leaf = leaves.take(order[:1])
        number = int(leaf.number[0])
        if self.incumbents.best and self._simulate(leaf, queues=False):
            frontier.leaves = frontier.sharper(leaves)
            return
        if self._cut(leaf) or self._rule_out(leaf, ruled_out_by_roles):
            return
        frontier.parked = joined(frontier.parked, leaf)
        frontier.leaves = frontier.leaves.take(order[1:])
        if self.guessed[number] < TRIES:
            self.in_vain += 1
            self._guess(leaf)
        else:  # no more quick plans here: settle a leaf next
            self.in_vain += PATIENCE

    def _settle(self) -> None:
        """Take the parked leaf that has the lowest bound further: by a cut, by the simulation of
        queues, by its ideal placement; and if none of these rules it out, find its best plan."""
        self.in_vain = 0
        frontier = self.frontier
        if not len(frontier.parked.bound):
            return
        order = np.argsort(frontier.parked.bound, kind="stable")
        leaf = frontier.parked.take(order[:1])
        if self._cut(leaf):
            return
        if self._simulate(leaf, queues=True):
            frontier.parked = frontier.sharper(frontier.parked)
            return
        proof = self.incumbents.keep == 1 and not self.programs  # only the best needs one
        if proof and self._rule_out(leaf, ruled_out_by_ideal):
            return
        self._evaluate(leaf)
        frontier.parked = frontier.parked.take(order[1:])

    def _simulate(self, leaf: Boxes, queues: bool) -> bool:
        """Simulate generation on a leaf where that may rule it out. Return whether it told more."""
        number = int(leaf.number[0])
        cuts = self.frontier.known_cuts(self.families[number])
        return self.bounds.sharpen(leaf, self.incumbents.limit(number), cuts, queues)

    def _cut(self, leaf: Boxes) -> bool:
        """Look for a program at the least durations of a leaf, and bound all boxes of its family by
        the cut that this leaves. Return whether the leaf's own bound is higher now."""
        if self.programs or not self.incumbents.best:
            return False
        limit = self.incumbents.limit(int(leaf.number[0]))
        return self.frontier.cut(leaf, self.bounds.cut(leaf, limit))

    def _rule_out(self, leaf: Boxes, test: Test) -> bool:
        """Whether a test rules out a leaf, and with it some leaves of its family near it.

        The test is made for the hull of these leaves: if no placement as large in every pool is
        better than the best, none of them is. The next time it is made for twice as many leaves; if
        it fails, for half as many, down to this leaf alone."""
        number = int(leaf.number[0])
        near = self.frontier.near(leaf)
        count = min(len(near.number), self.together.get((number, test), LEAVES_TOGETHER))
        if self.families[number].rollout is not None:  # sizes that must add up to something
            count = 1
        while count:
            some, _ = near.split(count)
            hull = hull_of(some)
            alike = count == 1 or not self.bounds.may_share_a_node(hull)[0]
            if alike and self._holds(test, hull):
                self.frontier.drop_inside(hull)
                self.together[number, test] = 2 * count
                return True
            count //= 2
        self.together[number, test] = 1
        return False

    def _holds(self, test: Test, box: Boxes) -> bool:
        """Whether a test rules out the largest sizes of a box."""
        trial = self._trial(box)
        verdict = test(trial)
        self.frontier.learn(trial.family, verdict.cuts)
        return verdict.ruled_out

    def _evaluate(self, leaf: Boxes) -> None:
        """Find the best plan of a leaf. Where smaller sizes may be better (`Evaluation.filled`),
        add the rest of the box to the frontier."""
        self.evaluated += 1
        trial = self._trial(leaf)
        found = evaluate(trial)
        self.frontier.learn(trial.family, found.cuts)
        self.incumbents.insert(found.best)
        may_be_better = self.frontier.is_below(leaf)[0] and not found.filled
        if may_be_better and (leaf.low < leaf.high).any():
            self.frontier.add(without_corner(leaf))

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
            self.frontier.known_cuts(family),
        )

    # --- quick plans ---

    def _guess(self, leaf: Boxes) -> bool:
        """Find a quick plan of a leaf. Return whether it is the best now."""
        number = int(leaf.number[0])
        self.evaluated += 1
        self.guessed[number] += 1
        trial = self._trial(leaf)
        found = guess(trial)
        self.frontier.learn(trial.family, found.cuts)
        is_best = self.incumbents.insert(found.best)
        if is_best:
            self.in_vain = self.guessed[number] = 0
        return is_best

    def _guess_inside(self) -> None:
        """Find a quick plan of the family that has the lowest open box of those without one, inside
        that box; and another one as long as they get better, or as their simulations show that
        other sizes are."""
        frontier = self.frontier
        new = frontier.open.take(~np.isin(frontier.open.number, list(self.guessed)))
        if not len(new.bound):
            return
        box, _ = new.sorted().split(1)
        self.guessed[int(box.number[0])] = 0
        for _ in range(TRIES):
            leaf = frontier.steepest(box)
            if not len(leaf.bound):
                break
            is_best = self._guess(leaf)
            if not is_best and frontier.sharper(leaf).bound[0] <= leaf.bound[0] * (1 + SAME):
                break
