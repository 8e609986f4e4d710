"""The layouts that may be best on a placement, and their combinations that fit its pools and hosts
together."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.predict.cycle import undominated
from planner.predict.memory import batch_bytes
from planner.search.solver.best_program import Program, cycles_of, rates
from planner.search.solver.placement import Placement
from planner.search.solver.problem import Array, Layouts, bytes_of, together
from planner.search.solver.rollout_table import with_mean
from planner.spec.plan import RolloutRole, TrainerRole

QUICK_CHOICES = 3  # layouts of the rollout that a quick plan tries, and combinations of layouts
# Layouts of the rollout that it simulates to find those, as their floors may be far below what they
# take.
QUICK_SIMULATIONS = 9


class RolloutOption(NamedTuple):
    """A layout of the rollout, the memory of an engine on each GPU, and seconds [S] of
    `generate`."""

    layout: RolloutRole
    memory: Array
    seconds: Array


def floor_of(placement: Placement, fixed: Program | None) -> Array:
    """Rows of rates that no program is below."""
    flow, sharing = placement.problem.flow, placement.sharing
    return (
        rates(cycles_of(flow, sharing, fixed.items))
        if fixed
        else placement.problem.choices(sharing).floor
    )


def bound_of(placement: Placement, floor: Array, seconds: Array) -> Array:
    """Seconds [n] that no program is below at durations [n, calls, S + 1]."""
    objective = placement.problem.objective_of
    bound = objective((floor @ seconds).max(axis=1))
    for cut in placement.problem.cuts(placement.sharing):
        bound = np.maximum(bound, cut.bound(seconds, objective))
    return bound


def worth_trying(
    placement: Placement, floor: Array, below: Callable[[], float], quick: bool = False
) -> Iterator[tuple[RolloutOption, Array]]:
    """The rollout layouts that may lead below the threshold, and what no layouts of the other roles
    undercut beside each; the fastest generation first of those with a slot for every sequence,
    which are simulated at once, then of those with a queue (only the first few of all if `quick`),
    only where no floor rules them out."""
    problem, statistic = placement.problem, placement.problem.statistic
    table, generate = placement.engines, problem.calls.index("generate")
    rows = rows_below(placement, floor, below())
    rows = rows[np.lexsort((statistic(table.seconds[rows]), table.queued[rows]))]
    if quick:
        direct = rows[~table.queued[rows]]
        rows = (
            direct[:QUICK_SIMULATIONS] if len(direct) else rows[:QUICK_CHOICES]
        )  # queues take long to simulate
    known: list[int] = []
    for row in rows.tolist():
        if any(_outdone(placement, row, other) for other in known):
            continue
        if quick and len(known) == QUICK_CHOICES:
            break
        for offload in table.offloads(placement.shared):
            memory, moves = bytes_of(table.memory(row, offload)), table.moves(row, offload)
            least = _least(placement, memory)
            if least is None:
                continue
            least[generate] = table.seconds[row] + moves
            while bound_of(placement, floor, with_mean(least)[None])[0] < below():
                if table.simulation(row).done:
                    known.append(row)
                    layout = table.layout(
                        row, tuple(f"p{i}" for i in placement.generating), offload
                    )
                    yield RolloutOption(layout, memory, least[generate]), least
                    break
                table.advance(row)
                least[generate] = table.seconds[row] + moves


def rows_below(placement: Placement, floor: Array, limit: float) -> NDArray[np.int64]:
    """The engines with which the least that the other roles take, each call for itself, is below
    the limit; none if some role has no layout whose calls all together are."""
    problem, table = placement.problem, placement.engines
    rows, least = (
        table.rows_on(placement.engine_parts, placement.shared),
        _least(placement, np.zeros(3)),
    )
    if least is None:
        return rows[:0]
    many = np.repeat(least[None], len(rows), axis=0)
    many[:, problem.calls.index("generate")] = table.seconds[rows]
    rows = rows[problem.objective_of((floor @ with_mean(many)).max(axis=1)) < limit]
    if not len(rows):
        return rows
    least[problem.calls.index("generate")] = table.seconds[rows].min(axis=0)
    possible = bound_of(placement, floor, with_mean(least)[None])[0] < limit and _possible(
        placement, least, floor, limit
    )
    return rows if possible else rows[:0]


def _possible(placement: Placement, least: Array, floor: Array, limit: float) -> bool:
    """Whether each role has a layout with which all of its own calls together do not exceed the
    limit, if the others take their `least` seconds [C, S]."""
    problem = placement.problem
    if not np.isfinite(limit) or problem.objective == "p95":
        return True
    for role, layouts in placement.layouts.items():
        own = [problem.calls.index(call) for call in problem.calls_of(role)]
        rest = np.delete(floor, own, axis=1) @ np.delete(least, own, axis=0).mean(axis=1)
        if not ((floor[:, own] @ layouts.means + rest[:, None]).max(axis=0) < limit).any():
            return False
    return True


def _outdone(placement: Placement, row: int, known: int) -> bool:
    """Whether a row that has been simulated is no slower in any scenario and needs no more
    memory."""
    table = placement.engines
    less = table.percent[known] <= table.percent[row] and table.number[known] == table.number[row]
    return bool(row != known and less and (table.seconds[known] <= table.seconds[row]).all())


def _least(placement: Placement, engine: Array) -> Array | None:
    """Seconds [C, S] that no layouts of the other roles undercut beside an engine of such memory,
    generation apart; None if nothing fits."""
    problem = placement.problem
    least = np.zeros((len(problem.calls), problem.model.scenarios))
    for i in range(len(placement.structure)):
        for role, fits in _fitting(placement, i, engine).items():
            if not len(fits):
                return None
            for call, seconds in zip(
                problem.calls_of(role), placement.layouts[role].seconds, strict=True
            ):
                least[problem.calls.index(call)] = seconds[fits].min(axis=0)
    return _with_host(placement, least)


def _with_host(placement: Placement, least: Array) -> Array:
    """With the host's calls."""
    problem = placement.problem
    for row, name in enumerate(problem.calls):
        if not problem.flow[name].roles:
            least[row] = problem.model.host(name).seconds
    return least


def _fitting(placement: Placement, pool: int, engine: Array) -> dict[str, NDArray[np.int64]]:
    """For each role of a pool the layouts that fit beside the engine and the smallest of each other
    role."""
    held = placement.held(pool)
    sizes = [placement.layouts[role].memory for role in held]
    least = np.array(
        [
            placement.engine(pool, engine)[:2],
            *(rows[:, :2].min(axis=0, initial=np.inf) for rows in sizes),
        ]
    )
    found = {}
    for i, role in enumerate(held):
        others = np.delete(least, i + 1, axis=0)
        needed = (
            sizes[i][:, 0] + others[:, 0].sum() + np.maximum(sizes[i][:, 1], others[:, 1].max())
        )
        found[role] = np.flatnonzero(needed <= placement.allowed(pool))
    return found


def kept_layouts(
    placement: Placement, engines: RolloutOption, least: Array, floor: Array, threshold: float
) -> dict[str, Layouts]:
    """Of each role the layouts that fit and that do not by themselves exceed the threshold,
    undominated."""
    problem = placement.problem
    found = {}
    for i in range(len(placement.structure)):
        for role, fits in _fitting(placement, i, engines.memory).items():
            own = [problem.calls.index(call) for call in problem.calls_of(role)]
            layouts = placement.layouts[role]
            if (
                role == "actor" and i in placement.generating
            ):  # whose weights reach engines of its own GPUs
                fits = fits[layouts.grid.gpus[fits] >= engines.layout.tensor_parallel]
            if np.isfinite(threshold):
                rest = floor @ np.where(np.isin(np.arange(len(least)), own)[:, None], 0.0, least)
                if problem.objective != "p95":  # means first: there are fewer
                    load = floor[:, own] @ layouts.means[:, fits] + rest.mean(axis=1)[:, None]
                    fits = fits[load.max(axis=0) < threshold]
                layouts = layouts.take(fits)
                load = np.einsum("rc,cns->nrs", floor[:, own], layouts.seconds) + rest
                layouts = layouts.take(
                    np.flatnonzero(problem.statistic(load.max(axis=1)) < threshold)
                )
                columns = [layouts.memory, *layouts.seconds]
            else:
                layouts = layouts.take(fits)
                columns = [layouts.memory, layouts.means.sum(axis=0)[:, None]]
            found[role] = layouts.take(undominated(-np.concatenate(columns, axis=1)))
    return found


class LayoutCombinations(NamedTuple):
    """Combinations of layouts: of each role the rows [n] of its layouts."""

    layouts: dict[str, Layouts]
    rows: dict[str, NDArray[np.int64]]

    def __len__(self) -> int:
        return min(map(len, self.rows.values()))

    def take(self, which: NDArray[np.int64]) -> "LayoutCombinations":
        return LayoutCombinations(
            self.layouts, {role: rows[which] for role, rows in self.rows.items()}
        )


def fitting_combinations(
    placement: Placement,
    engines: RolloutOption,
    kept: dict[str, Layouts],
    floor: Array,
    threshold: float,
    rough: bool,
) -> LayoutCombinations:
    """Combinations of layouts that fit their pools and hosts: with `rough` the one with the least
    load on each pool, else all whose bound is below the threshold."""
    engine = engines.memory
    combinations = LayoutCombinations(kept, dict.fromkeys(kept, np.zeros(0, np.int64)))
    if not all(len(layouts.memory) for layouts in kept.values()):
        return combinations
    if rough:
        for i in range(len(placement.structure)):
            combinations.rows.update(_lightest(placement, i, kept, engine))
    else:
        combinations = LayoutCombinations(
            kept, _promising(placement, engines, kept, floor, threshold)
        )
    if placement.ideal or not len(combinations):
        return combinations
    held = _hosts_hold(placement, engine, combinations)
    placement.hosts_bind |= len(held) < len(combinations)
    return combinations.take(held)


def _lightest(
    placement: Placement, pool: int, kept: dict[str, Layouts], engine: Array
) -> dict[str, NDArray[np.int64]]:
    """The joint layouts of a pool's roles with the least seconds of all calls together; empty if
    none fit."""
    memory, load = placement.engine(pool, engine)[None], np.zeros(1)
    combinations = dict[str, NDArray[np.int64]]()
    for role in placement.held(pool):
        layouts = kept[role]
        own = layouts.means.sum(axis=0)
        old, new = (grid.ravel() for grid in np.mgrid[: len(load), : len(own)])
        memory, load = together(memory[old], layouts.memory[new]), load[old] + own[new]
        fits = np.flatnonzero(memory[:, 0] + memory[:, 1] <= placement.allowed(pool))
        best = fits[undominated(-np.column_stack([memory, load])[fits])] if len(fits) else fits
        combinations = {other: rows[old[best]] for other, rows in combinations.items()} | {
            role: new[best]
        }
        memory, load = memory[best], load[best]
    first = load.argmin() if len(load) else 0
    return {role: rows[first : first + 1] for role, rows in combinations.items()}


def _promising(
    placement: Placement,
    engines: RolloutOption,
    kept: dict[str, Layouts],
    floor: Array,
    threshold: float,
) -> dict[str, NDArray[np.int64]]:
    """All combinations whose bounds, by `floor` [rows, calls] and by the cuts, are below the
    threshold.

    Roles are added one by one, the busiest pool's first; those to come count with their least
    seconds and bytes."""
    problem, engine = placement.problem, engines.memory
    row = {call: i for i, call in enumerate(problem.calls)}
    means = _with_host(placement, np.zeros((len(row), problem.model.scenarios))).mean(axis=1)
    means[row["generate"]] = engines.seconds.mean()
    for role, layouts in kept.items():
        for call, seconds in zip(problem.calls_of(role), layouts.means, strict=True):
            means[row[call]] = seconds.min()
    busy = {
        role: sum(
            means[row[call]] for other in placement.held(i) for call in problem.calls_of(other)
        )
        for role, i in placement.pool_of.items()
    }
    order = sorted(kept, key=lambda role: -busy[role])
    smallest = {role: layouts.memory.min(axis=0) for role, layouts in kept.items()}
    found, combinations = means[None, :], dict[str, NDArray[np.int64]]()
    memory = np.stack([placement.engine(i, engine) for i in range(len(placement.structure))])[None]
    above, cuts = (
        (threshold, problem.cuts(placement.sharing)) if problem.objective != "p95" else (np.inf, ())
    )
    for number, role in enumerate(order):
        layouts, i = kept[role], placement.pool_of[role]
        old, new = (grid.ravel() for grid in np.mgrid[: len(found), : len(layouts.memory)])
        found, memory = found[old], memory[old]
        for call, seconds in zip(problem.calls_of(role), layouts.means, strict=True):
            found[:, row[call]] = seconds[new]
        memory[:, i] = together(memory[:, i], layouts.memory[new])
        most = memory[:, i]
        for later in order[number + 1 :]:
            if placement.pool_of[later] == i:
                most = together(most, smallest[later])
        fits = np.flatnonzero(
            (most[:, 0] + most[:, 1] <= placement.allowed(i))
            & ((found @ floor.T).max(axis=1) < above)
        )
        for cut in cuts:
            fits = fits[cut.least(found[fits]) < above]
        combinations = {other: rows[old][fits] for other, rows in combinations.items()} | {
            role: new[fits]
        }
        found, memory = found[fits], memory[fits]
    return {role: combinations[role] for role in kept}


def _hosts_hold(
    placement: Placement, engine: Array, combinations: LayoutCombinations
) -> NDArray[np.int64]:
    """The combinations for which every node's host memory holds what the pools offload and the
    batches in flight."""
    problem = placement.problem
    nodes = np.zeros((len(placement.structure) + 2, len(problem.cluster.nodes)))
    for i, parts in enumerate(placement.packing):
        for node, _, count in parts:
            nodes[i, node] = count
    nodes[-2, 0] = batch_bytes(problem.workload, problem.max_staleness)
    nodes[-1] = [node.host_memory_bytes for node in problem.cluster.nodes]
    nodes = np.unique(nodes, axis=1)  # most are alike
    pinned = np.zeros((len(combinations), len(placement.structure)))
    for role, rows in combinations.rows.items():
        pinned[:, placement.pool_of[role]] += combinations.layouts[role].memory[rows, 2]
    pinned[:, list(placement.generating)] += engine[2]
    return np.flatnonzero((pinned @ nodes[:-2] + nodes[-2] <= nodes[-1]).all(axis=1))


# --- what they take ---


def seconds_of(
    placement: Placement, engines: RolloutOption, combinations: LayoutCombinations
) -> Array:
    """Durations [calls, n, S] of every call for each combination."""
    problem = placement.problem
    row = {call: i for i, call in enumerate(problem.calls)}
    least = _with_host(placement, np.zeros((len(row), problem.model.scenarios)))
    seconds = np.repeat(least[:, None], len(combinations), axis=1)
    seconds[row["generate"]] = engines.seconds
    for role, rows in combinations.rows.items():
        for name, found in zip(
            problem.calls_of(role), combinations.layouts[role].seconds, strict=True
        ):
            seconds[row[name]] = found[rows]
    grid = combinations.layouts[
        "actor"
    ].grid  # what a sync takes does not depend on its other columns
    kinds = np.column_stack([grid.shard, grid.replicas, grid.offload])[combinations.rows["actor"]]
    _, first, which = np.unique(kinds, axis=0, return_index=True, return_inverse=True)
    actors = combinations.rows["actor"][first].tolist()
    synced = [
        _sync(placement, engines, combinations.layouts["actor"].layout(actor, "p"))
        for actor in actors
    ]
    seconds[row["sync_weights"]] = np.array(synced)[which.ravel()]
    return seconds


def _sync(placement: Placement, engines: RolloutOption, actor: TrainerRole) -> Array:
    """Seconds [S] of a weight sync."""
    home = placement.pool_of["actor"]
    return placement.problem.model.sync(
        actor,
        placement.places[home],
        engines.layout,
        [placement.places[i] for i in placement.generating],
        same_node=placement.same_node,
        shared=home in placement.generating,
    ).seconds
