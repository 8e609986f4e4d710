"""One placement: the best layouts of its roles, jointly under memory, and the best program."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from planner.search.solver.best_program import SAME, Program
from planner.search.solver.layout_combinations import (
    FEW,
    Engines,
    Picks,
    bound_of,
    floor_of,
    kept_layouts,
    picks_of,
    rows_below,
    seconds_of,
    worth_trying,
)
from planner.search.solver.placement import Site
from planner.search.solver.problem import Array, Problem
from planner.search.solver.rollout_table import with_mean
from planner.search.space.placements import Arrangement, Structure, arrangements, gpus_of
from planner.spec.plan import Gpu, RolloutRole, TrainerRole

NEAR = 0.98  # of a limit: a bound below it leaves much
AT_ONCE = 64  # combinations of layouts whose programs are bounded together


class Candidate(NamedTuple):
    """A placement with layouts and program, and its step time in seconds (the objective over the
    length scenarios)."""

    seconds: float
    structure: Structure
    pools: tuple[tuple[Gpu, ...], ...]
    trainers: dict[str, TrainerRole]
    rollout: RolloutRole
    program: Program


class Outcome(NamedTuple):
    """The best candidate of a placement, None if nothing fits or is below the limit. `filled`: no
    smaller pools could be better (see `Site.filled`)."""

    best: Candidate | None
    filled: bool


def evaluate(
    problem: Problem,
    arrangement: Arrangement | Structure,
    counts: Sequence[int],
    limit: float = np.inf,
    fixed: Program | None = None,
) -> Outcome:
    """The best layouts and program of one placement (or the best layouts for a `fixed` program). A
    structure alone is taken on the first kinds that have room."""
    if not isinstance(arrangement, Arrangement):
        placed = _first_with_room(problem, arrangement, counts)
        if placed is None:
            return Outcome(None, False)
        arrangement = placed
    site = Site(problem, arrangement, counts)
    best = _best_at(site, limit, fixed)  # which tells whether hosts bind
    return Outcome(best, site.filled)


def dismissed(
    problem: Problem,
    arrangement: Arrangement,
    counts: Sequence[int],
    limit: float,
    fixed: Program | None = None,
) -> bool:
    """Whether a look at each role's layouts alone shows that no placement of these sizes or smaller
    ones is below `limit` seconds."""
    site = Site(problem, arrangement, counts, ideal=True)
    return not len(rows_below(site, floor_of(site, fixed), limit))


def surpassed(
    problem: Problem,
    arrangement: Arrangement,
    counts: Sequence[int],
    limit: float,
    fixed: Program | None = None,
) -> bool:
    """Whether no placement of these sizes or smaller ones is below `limit` seconds, since no ideal
    one is."""
    return (
        _best_at(Site(problem, arrangement, counts, ideal=True), limit, fixed, first=True) is None
    )


def guess(
    problem: Problem,
    arrangement: Arrangement,
    counts: Sequence[int],
    limit: float,
    fixed: Program | None,
) -> Candidate | None:
    """A good plan of a placement that is below `limit` seconds, quickly: on all GPUs that a role
    can use, with the few engines that seem the fastest."""
    site = Site(problem, arrangement, counts)
    for role, layouts in site.layouts.items():
        used = layouts.grid.gpus
        site.layouts[role] = layouts.take(np.flatnonzero(used == used.max(initial=0)))
    return _best_at(site, limit, fixed, quick=True)


def _best_at(
    site: Site, limit: float, fixed: Program | None, quick: bool = False, first: bool = False
) -> Candidate | None:
    """The best candidate below `limit` seconds, or the `first` one; `quick`: of few."""
    floor, found = floor_of(site, fixed), list[Candidate]()  # each better than the one before

    def below() -> float:
        return _below(limit, found[-1] if found else None)

    for engines, least in worth_trying(site, floor, below, quick):
        loose = bool(bound_of(site, floor, with_mean(least)[None])[0] < NEAR * below())
        # First what is surely good; then all that may be better, unless that is too much to be
        # looked at quickly.
        for rough in (True, False)[not loose : 2 - (loose and quick)]:
            kept = kept_layouts(site, engines, least, floor, below())
            picks = picks_of(site, engines, kept, floor, below(), rough)
            if len(picks) and (
                better := _best_of(site, engines, picks, floor, below(), fixed, quick)
            ):
                found.append(better)
                if first:
                    return better
    return found[-1] if found else None


def _best_of(
    site: Site,
    engines: Engines,
    picks: "Picks",
    floor: Array,
    limit: float,
    fixed: Program | None,
    quick: bool,
) -> Candidate | None:
    """The best of some combinations of layouts with its best program, if it is below `limit`
    seconds; `quick`: of the few with the lowest bounds."""
    problem, best, chosen = site.problem, None, 0
    seconds = with_mean(seconds_of(site, engines, picks).swapaxes(0, 1))
    bound = problem.objective_of((floor @ seconds).max(axis=1))
    if fixed:
        n = int(bound.argmin())
        return (
            _candidate(float(bound[n]), site, engines, picks, n, fixed)
            if bound[n] < limit
            else None
        )
    looks = 0
    while (least := bound.min()) < _below(limit, best) and not (quick and looks >= FEW):
        looks += 1
        few = len(bound) <= AT_ONCE
        near = np.arange(len(bound)) if few else np.sort(np.argpartition(bound, AT_ONCE)[:AT_ONCE])
        bound[near] = bound_of(site, floor, seconds[near])
        n = int(near[bound[near].argmin()])
        if bound[n] <= least * (1 + SAME):
            found = problem.best_program(site.sharing, seconds[n], _below(limit, best))
            if found.program:
                best, chosen = _candidate(found.seconds, site, engines, picks, n, found.program), n
            bound[n] = np.inf
    if best:
        fresh = problem.freshest(site.sharing, seconds[chosen], best.program, best.seconds)
        best = best._replace(program=fresh)
    return best


def _first_with_room(
    problem: Problem, structure: Structure, counts: Sequence[int]
) -> Arrangement | None:
    found = arrangements(structure, problem.cluster)
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
    seconds: float, site: Site, engines: Engines, picks: Picks, n: int, program: Program
) -> Candidate:
    trainers = {
        role: picks.layouts[role].layout(int(rows[n]), f"p{site.pool_of[role]}")
        for role, rows in picks.rows.items()
    }
    rollout = engines.layout.model_copy(update={"pools": tuple(f"p{i}" for i in site.generating)})
    return Candidate(
        seconds, site.structure, tuple(map(gpus_of, site.spread)), trainers, rollout, program
    )
