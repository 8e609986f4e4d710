"""The layouts of the rollout that are worth trying at a placement."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from planner.predict.objective import with_mean
from planner.search.solver.layout_table import columns_of
from planner.search.solver.placement import Placement
from planner.search.solver.rollout_table import RolloutTable
from planner.search.solver.threshold import Threshold
from planner.search.space.arrays import Array, Indices
from planner.spec.plan import RolloutRole

QUICK_LAYOUTS = 3  # layouts of the rollout that a quick plan tries
# Layouts that a quick plan simulates to find those: their floors may be far below what they take.
QUICK_SIMULATIONS = 9


class RolloutOption(NamedTuple):
    """A layout of the rollout at a placement, the memory [3] of an engine on each GPU, and the
    `least` seconds [calls, S] of all calls with it: of generation and of host calls exact, of the
    others what no layout that fits next to such an engine undercuts."""

    layout: RolloutRole
    memory: Array
    least: Array


def worth_trying(
    placement: Placement, threshold: Threshold, quick: bool = False
) -> Iterator[RolloutOption]:
    """The layouts of the rollout that may lead below the threshold, the fastest generation first.

    The caller tries each of them before it asks for the next one, and what it finds lowers the
    threshold meanwhile. Layouts with a slot for every sequence come before those with a queue,
    which take long to simulate, and those before layouts that preempt. A layout is only simulated
    where no floor rules it out. With `quick` only the first few are tried."""
    problem, table = placement.problem, placement.rollout_table
    rows = _rows_below(placement, threshold)
    generation = problem.objective.of_parts.of(table.seconds[rows])
    rows = rows[np.lexsort((generation, table.effort[rows]))]
    if quick:
        rows = _quickest(table, rows)
    tried: list[int] = []
    for row in rows.tolist():
        if any(_outdone(table, row, other) for other in tried):
            continue
        if quick and len(tried) == QUICK_LAYOUTS:
            break
        for offload in placement.offloads:
            option = _simulated(placement, threshold, row, offload)
            if option is not None:
                tried.append(row)
                yield option


def _quickest(table: RolloutTable, rows: Indices) -> Indices:
    """The rows that a quick plan looks at: without a queue, if there are any."""
    direct = rows[~table.queued[rows]]
    return direct[:QUICK_SIMULATIONS] if len(direct) else rows[:QUICK_LAYOUTS]


def _simulated(
    placement: Placement, threshold: Threshold, row: int, offload: bool
) -> RolloutOption | None:
    """A row with its generation simulated; None if it is ruled out on the way there."""
    problem, table = placement.problem, placement.rollout_table
    memory, moves = columns_of(table.memory(row, offload)), table.moves(row, offload)
    least = least_seconds(placement, memory, offload)
    if least is None:
        return None
    problem.fill_in_generation(least, table.seconds[row] + moves)
    while threshold.bound(with_mean(least)[None])[0] < threshold.seconds:
        if table.done(row):
            pools = tuple(f"p{i}" for i in placement.generating)
            return RolloutOption(table.layout(row, pools, offload), memory, least)
        table.advance(row)
        problem.fill_in_generation(least, table.seconds[row] + moves)
    return None


def _outdone(table: RolloutTable, row: int, tried: int) -> bool:
    """Whether a row that has been tried is no slower in any scenario, has engines of the same size
    and needs no more memory."""
    if row == tried or table.size[tried] != table.size[row]:
        return False
    leaner = table.percent[tried] <= table.percent[row]
    return bool(leaner and (table.seconds[tried] <= table.seconds[row]).all())


# --- what rules rows out before anything is simulated ---


def any_below(placement: Placement, threshold: Threshold) -> bool:
    """Whether some layout of the rollout may lead below the threshold, by a look at the layouts of
    each role alone."""
    return len(_rows_below(placement, threshold)) > 0


def _rows_below(placement: Placement, threshold: Threshold) -> Indices:
    """The rows of the rollout table with which the least seconds of each other call are below the
    threshold; none if some role has no layout with which all of its calls are."""
    problem, table = placement.problem, placement.rollout_table
    rows = placement.rollout_rows
    none = rows[:0]
    # What fits beside an engine that is awake fits beside it asleep too.
    least = least_seconds(placement, np.zeros(3), asleep=True)
    if least is None:
        return none
    durations = np.repeat(least[None], len(rows), axis=0)
    problem.fill_in_generation(durations, table.seconds[rows])
    rows = rows[threshold.bound_by_rates(with_mean(durations)) < threshold.seconds]
    if not len(rows):
        return none
    problem.fill_in_generation(least, table.seconds[rows].min(axis=0))
    if threshold.bound(with_mean(least)[None])[0] >= threshold.seconds:
        return none
    return rows if _each_role_may_be_below(placement, threshold, least) else none


def _each_role_may_be_below(placement: Placement, threshold: Threshold, least: Array) -> bool:
    """Whether each role has a layout with which all of its own calls together stay below the
    threshold, if the other calls take their `least` seconds [calls, S]."""
    problem, rates = placement.problem, threshold.rates
    if not np.isfinite(threshold.seconds) or not problem.objective.linear:
        return True
    for role, layouts in placement.layouts.items():
        own = [problem.row[call] for call in problem.calls_of(role)]
        others = np.delete(rates, own, axis=1) @ np.delete(least, own, axis=0).mean(axis=1)
        periods = (rates[:, own] @ layouts.means + others[:, None]).max(axis=0)
        if not (periods < threshold.seconds).any():
            return False
    return True


def least_seconds(placement: Placement, engine: Array, asleep: bool) -> Array | None:
    """Seconds [calls, S] that no layouts of the other roles undercut next to an engine of such
    memory [3], which sleeps or not; 0 for generation. None if some role has no layout that fits."""
    problem = placement.problem
    least = np.zeros((len(problem.calls), problem.model.scenarios))
    for pool in range(len(placement.structure)):
        for role, fits in fitting_layouts(placement, pool, engine, asleep).items():
            if not len(fits):
                return None
            durations = placement.layouts[role].seconds
            for call, seconds in zip(problem.calls_of(role), durations, strict=True):
                least[problem.row[call]] = seconds[fits].min(axis=0)
    for row, seconds in problem.host_seconds.items():
        least[row] = seconds
    return least


def fitting_layouts(
    placement: Placement, pool: int, engine: Array, asleep: bool
) -> dict[str, Indices]:
    """The layouts of each role of a pool that fit next to an engine of this memory [3], which
    sleeps or not, and the leanest layout of each other role."""
    held = placement.held(pool)
    memory = [placement.beside(role, asleep).memory for role in held]
    of_roles = [table[:, :2].min(axis=0, initial=np.inf) for table in memory]
    leanest = np.array([placement.engine_on(pool, engine)[:2], *of_roles])
    allowed = placement.allowed(pool)
    found = {}
    for number, role in enumerate(held):
        others = np.delete(leanest, number + 1, axis=0)
        resident = memory[number][:, 0] + others[:, 0].sum()
        surplus = np.maximum(memory[number][:, 1], others[:, 1].max())
        found[role] = np.flatnonzero(resident + surplus <= allowed)
    return found
