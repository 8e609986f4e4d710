"""One placement: the best layouts of its roles, jointly under memory, and the best program."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from planner.search.solver.best_program import SAME, Program
from planner.search.solver.layout_combinations import (
    QUICK_CHOICES,
    LayoutCombinations,
    RolloutOption,
    bound_of,
    fitting_combinations,
    floor_of,
    kept_layouts,
    rows_below,
    seconds_of,
    worth_trying,
)
from planner.search.solver.placement import Placement
from planner.search.solver.problem import Array, Problem
from planner.search.solver.rollout_table import with_mean
from planner.search.space.placements import PlacementFamily, Structure, families, gpus_of
from planner.spec.plan import Gpu, RolloutRole, TrainerRole

MUCH_LEFT = 0.98  # of a limit: a bound below it leaves much
PROGRAMS_AT_ONCE = 64  # combinations of layouts whose programs are bounded together


class Candidate(NamedTuple):
    """A placement with layouts and program, and its step time in seconds (the objective over the
    length scenarios)."""

    seconds: float
    structure: Structure
    pools: tuple[tuple[Gpu, ...], ...]
    trainers: dict[str, TrainerRole]
    rollout: RolloutRole
    program: Program


class Evaluation(NamedTuple):
    """The best candidate of a placement, None if nothing fits or is below the limit. `filled`: no
    smaller pools could be better (see `Placement.filled`)."""

    best: Candidate | None
    filled: bool


def evaluate(
    problem: Problem,
    family: PlacementFamily | Structure,
    counts: Sequence[int],
    limit: float = np.inf,
    fixed: Program | None = None,
) -> Evaluation:
    """The best layouts and program of one placement (or the best layouts for a `fixed` program). A
    structure alone is taken on the first kinds that have room."""
    if not isinstance(family, PlacementFamily):
        placed = _first_with_room(problem, family, counts)
        if placed is None:
            return Evaluation(None, False)
        family = placed
    placement = Placement(problem, family, counts)
    best = _best_at(placement, limit, fixed)  # which tells whether hosts bind
    return Evaluation(best, placement.filled)


def dismissed(
    problem: Problem,
    family: PlacementFamily,
    counts: Sequence[int],
    limit: float,
    fixed: Program | None = None,
) -> bool:
    """Whether a look at each role's layouts alone shows that no placement of these sizes or smaller
    ones is below `limit` seconds."""
    placement = Placement(problem, family, counts, ideal=True)
    return not len(rows_below(placement, floor_of(placement, fixed), limit))


def surpassed(
    problem: Problem,
    family: PlacementFamily,
    counts: Sequence[int],
    limit: float,
    fixed: Program | None = None,
) -> bool:
    """Whether no placement of these sizes or smaller ones is below `limit` seconds, since no ideal
    one is."""
    return (
        _best_at(Placement(problem, family, counts, ideal=True), limit, fixed, first=True) is None
    )


def guess(
    problem: Problem,
    family: PlacementFamily,
    counts: Sequence[int],
    limit: float,
    fixed: Program | None,
) -> Candidate | None:
    """A good plan of a placement that is below `limit` seconds, quickly: on all GPUs that a role
    can use, with the few rollout that seem the fastest."""
    placement = Placement(problem, family, counts)
    for role, layouts in placement.layouts.items():
        used = layouts.grid.gpus
        placement.layouts[role] = layouts.take(np.flatnonzero(used == used.max(initial=0)))
    return _best_at(placement, limit, fixed, quick=True)


def _best_at(
    placement: Placement,
    limit: float,
    fixed: Program | None,
    quick: bool = False,
    first: bool = False,
) -> Candidate | None:
    """The best candidate below `limit` seconds, or the `first` one; `quick`: of few."""
    floor, found = floor_of(placement, fixed), list[Candidate]()  # each better than the one before

    def below() -> float:
        return _below(limit, found[-1] if found else None)

    for rollout, least in worth_trying(placement, floor, below, quick):
        loose = bool(bound_of(placement, floor, with_mean(least)[None])[0] < MUCH_LEFT * below())
        # First what is surely good; then all that may be better, unless that is too much to be
        # looked at quickly.
        for rough in (True, False)[not loose : 2 - (loose and quick)]:
            kept = kept_layouts(placement, rollout, least, floor, below())
            combinations = fitting_combinations(placement, rollout, kept, floor, below(), rough)
            if len(combinations) and (
                better := _best_of(placement, rollout, combinations, floor, below(), fixed, quick)
            ):
                found.append(better)
                if first:
                    return better
    return found[-1] if found else None


def _best_of(
    placement: Placement,
    rollout: RolloutOption,
    combinations: "LayoutCombinations",
    floor: Array,
    limit: float,
    fixed: Program | None,
    quick: bool,
) -> Candidate | None:
    """The best of some combinations of layouts with its best program, if it is below `limit`
    seconds; `quick`: of the few with the lowest bounds."""
    problem, best, chosen = placement.problem, None, 0
    seconds = with_mean(seconds_of(placement, rollout, combinations).swapaxes(0, 1))
    bound = problem.objective_of((floor @ seconds).max(axis=1))
    if fixed:
        n = int(bound.argmin())
        return (
            _candidate(float(bound[n]), placement, rollout, combinations, n, fixed)
            if bound[n] < limit
            else None
        )
    looks = 0
    while (least := bound.min()) < _below(limit, best) and not (quick and looks >= QUICK_CHOICES):
        looks += 1
        few = len(bound) <= PROGRAMS_AT_ONCE
        near = (
            np.arange(len(bound))
            if few
            else np.sort(np.argpartition(bound, PROGRAMS_AT_ONCE)[:PROGRAMS_AT_ONCE])
        )
        bound[near] = bound_of(placement, floor, seconds[near])
        n = int(near[bound[near].argmin()])
        if bound[n] <= least * (1 + SAME):
            found = problem.best_program(placement.sharing, seconds[n], _below(limit, best))
            if found.program:
                best, chosen = (
                    _candidate(found.seconds, placement, rollout, combinations, n, found.program),
                    n,
                )
            bound[n] = np.inf
    if best:
        fresh = problem.freshest(placement.sharing, seconds[chosen], best.program, best.seconds)
        best = best._replace(program=fresh)
    return best


def _first_with_room(
    problem: Problem, structure: Structure, counts: Sequence[int]
) -> PlacementFamily | None:
    found = families(structure, problem.cluster)
    return next(
        (
            a
            for a in found
            if all(sum(counts[i] for i in pools) <= most for pools, most in a.limits)
        ),
        None,
    )


def _below(limit: float, best: Candidate | None) -> float:
    """What a step time must be below to count as better."""
    return min(limit, best.seconds if best else np.inf) * (1 - SAME)


def _candidate(
    seconds: float,
    placement: Placement,
    rollout: RolloutOption,
    combinations: LayoutCombinations,
    n: int,
    program: Program,
) -> Candidate:
    trainers = {
        role: combinations.layouts[role].layout(int(rows[n]), f"p{placement.pool_of[role]}")
        for role, rows in combinations.rows.items()
    }
    generating = rollout.layout.model_copy(
        update={"pools": tuple(f"p{i}" for i in placement.generating)}
    )
    return Candidate(
        seconds,
        placement.structure,
        tuple(map(gpus_of, placement.packing)),
        trainers,
        generating,
        program,
    )
