"""Combinations of layouts, one for each role, that fit the pools and hosts of a placement
together."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from planner.predict.cycle import undominated
from planner.predict.host_memory import (
    allowed,
    batch_bytes,
    copied_bytes,
    exported_bytes,
    kept_asleep,
    processes,
)
from planner.search.solver.layout_table import LayoutTable, together
from planner.search.solver.placement import Placement
from planner.search.solver.rollout_options import RolloutOption, fitting_layouts
from planner.search.solver.threshold import Threshold
from planner.search.space.arrays import Array, Indices
from planner.spec.plan import TrainerRole

RowsOfRoles = dict[str, Indices]  # of each role the rows [n] in its layout table
KeptLayouts = dict[str, LayoutTable]  # of each role the layouts that may be part of a better plan


class LayoutCombinations(NamedTuple):
    """n combinations of layouts: of each role the `rows` [n] in its table of `layouts`, all with
    the same layout of the `rollout`."""

    rollout: RolloutOption
    layouts: KeptLayouts
    rows: RowsOfRoles

    def __len__(self) -> int:
        return min(map(len, self.rows.values()))

    def take(self, which: Indices) -> "LayoutCombinations":
        rows = {role: rows[which] for role, rows in self.rows.items()}
        return LayoutCombinations(self.rollout, self.layouts, rows)

    def simplest(self, among: Indices) -> int:
        """One of some combinations: with the least that is offloaded, and of these with the least
        load. The first on a tie."""
        offloaded, load = np.zeros((2, len(among)))
        for role, rows in self.rows.items():
            layouts, own = self.layouts[role], rows[among]
            offloaded += layouts.grid.offload[own]
            load += layouts.means.sum(axis=0)[own]
        return int(among[np.lexsort((load, offloaded))[0]])

    def trainers(self, which: int, pool_of: dict[str, int]) -> dict[str, TrainerRole]:
        """The layouts of one combination, without the rollout's."""
        trainers = {}
        for role, rows in self.rows.items():
            row = int(rows[which])
            trainers[role] = self.layouts[role].layout(row, f"p{pool_of[role]}")
        return trainers


# --- which layouts to combine ---


def kept_layouts(placement: Placement, option: RolloutOption, threshold: Threshold) -> KeptLayouts:
    """The layouts of each role that fit next to the engine and do not exceed the threshold by
    themselves, without those that others dominate."""
    kept = {}
    for pool in range(len(placement.structure)):
        asleep = option.layout.offload
        for role, fits in fitting_layouts(placement, pool, option.memory, asleep).items():
            layouts = placement.beside(role, asleep)
            if role == "actor" and pool in placement.generating:
                # Engines on the actor's own GPUs are no wider than its ranks.
                fits = fits[layouts.grid.gpus[fits] >= option.layout.tensor_parallel]
            layouts = layouts.take(fits)
            if np.isfinite(threshold.seconds):
                layouts = _below(placement, role, layouts, option, threshold)
                costs = [layouts.memory, *layouts.seconds]
            else:
                costs = [layouts.memory, layouts.means.sum(axis=0)[:, None]]
            kept[role] = layouts.take(undominated(-np.concatenate(costs, axis=1)))
    return kept


def _below(
    placement: Placement,
    role: str,
    layouts: LayoutTable,
    option: RolloutOption,
    threshold: Threshold,
) -> LayoutTable:
    """The layouts of a role that stay below the threshold if all other calls take their least
    seconds."""
    problem, rates = placement.problem, threshold.rates
    own = [problem.row[call] for call in problem.calls_of(role)]
    others = option.least.copy()
    others[own] = 0.0
    of_others = rates @ others  # [rows, S]
    if problem.objective.linear:  # means first, for there are fewer of them
        load = rates[:, own] @ layouts.means + of_others.mean(axis=1)[:, None]
        layouts = layouts.take(np.flatnonzero(load.max(axis=0) < threshold.seconds))
    load = np.einsum("rc,cns->nrs", rates[:, own], layouts.seconds) + of_others
    periods = problem.objective.of(load.max(axis=1))
    return layouts.take(np.flatnonzero(periods < threshold.seconds))


# --- one combination that is surely good ---


def lightest(placement: Placement, option: RolloutOption, kept: KeptLayouts) -> LayoutCombinations:
    """The combination with the least load on each pool; none if nothing fits."""
    rows: RowsOfRoles = {}
    for pool in range(len(placement.structure)):
        rows |= _lightest_on(placement, pool, option, kept)
    return LayoutCombinations(option, kept, {role: rows[role] for role in kept})


def _lightest_on(
    placement: Placement, pool: int, option: RolloutOption, kept: KeptLayouts
) -> RowsOfRoles:
    """The joint layouts [1] of a pool's roles with the least seconds of all their calls together;
    empty if none fit.

    Roles are added one by one. Of the combinations so far those are kept that no other one beats
    both in memory and in load."""
    memory = placement.engine_on(pool, option.memory)[None]
    load = np.zeros(1)
    rows: RowsOfRoles = {}
    for role in placement.held(pool):
        layouts = kept[role]
        before, added = _pairs(len(load), len(layouts.memory))
        memory = together(memory[before], layouts.memory[added])
        load = load[before] + layouts.means.sum(axis=0)[added]
        best = np.flatnonzero(_needed(memory) <= placement.allowed(pool))
        if len(best):
            best = best[undominated(-np.column_stack([memory, load])[best])]
        rows = {other: chosen[before[best]] for other, chosen in rows.items()}
        rows[role] = added[best]
        memory, load = memory[best], load[best]
    first = int(load.argmin()) if len(load) else 0
    return {role: chosen[first : first + 1] for role, chosen in rows.items()}


# --- all combinations that may be better ---


class _Partial(NamedTuple):
    """n combinations of the layouts of some roles: their `rows`, the mean durations [n, calls] with
    the least ones for the roles that are not yet part of them, and the memory [n, pools, 3]."""

    rows: RowsOfRoles
    means: Array
    memory: Array

    def take(self, which: Indices) -> "_Partial":
        rows = {role: rows[which] for role, rows in self.rows.items()}
        return _Partial(rows, self.means[which], self.memory[which])


def promising(
    placement: Placement, option: RolloutOption, kept: KeptLayouts, threshold: Threshold
) -> LayoutCombinations:
    """All combinations that fit and whose bounds are below the threshold.

    Roles are added one by one, those of the busiest pool first, which rule most out. For each role
    all combinations so far are joined with all of its layouts. Those that leave no memory for the
    roles to come are dropped, and then those whose bounds exceed the threshold: for the roles to
    come their least seconds count."""
    means = _least_means(placement, option, kept)
    order = _busiest_first(placement, kept, means)
    engine = [placement.engine_on(i, option.memory) for i in range(len(placement.structure))]
    partial = _Partial({}, means[None], np.stack(engine)[None])
    for number, role in enumerate(order):
        partial = _joined(placement, partial, role, kept[role])
        to_come = [kept[later] for later in _on_the_same_pool(placement, role, order[number + 1 :])]
        partial = partial.take(_that_fit(placement, partial, placement.pool_of[role], to_come))
        partial = partial.take(threshold.admits_means(partial.means))
    return LayoutCombinations(option, kept, {role: partial.rows[role] for role in kept})


def _least_means(placement: Placement, option: RolloutOption, kept: KeptLayouts) -> Array:
    """The least mean seconds [calls] of each call, each by itself."""
    problem = placement.problem
    means = np.zeros(len(problem.calls))
    for row in problem.host_seconds:
        means[row] = option.least[row].mean()
    means[problem.generate] = option.least[problem.generate].mean()
    for role, layouts in kept.items():
        for call, seconds in zip(problem.calls_of(role), layouts.means, strict=True):
            means[problem.row[call]] = seconds.min()
    return means


def _busiest_first(placement: Placement, kept: KeptLayouts, means: Array) -> list[str]:
    """The roles, those of the pool with the most work first."""
    problem = placement.problem
    busy = {}
    for role, pool in placement.pool_of.items():
        calls = [call for other in placement.held(pool) for call in problem.calls_of(other)]
        busy[role] = sum(means[problem.row[call]] for call in calls)
    return sorted(kept, key=lambda role: -busy[role])


def _on_the_same_pool(placement: Placement, role: str, others: Sequence[str]) -> list[str]:
    return [other for other in others if placement.pool_of[other] == placement.pool_of[role]]


def _joined(placement: Placement, partial: _Partial, role: str, layouts: LayoutTable) -> _Partial:
    """Every combination so far with every layout of one more role."""
    problem, pool = placement.problem, placement.pool_of[role]
    before, added = _pairs(len(partial.means), len(layouts.memory))
    joined = partial.take(before)
    for call, seconds in zip(problem.calls_of(role), layouts.means, strict=True):
        joined.means[:, problem.row[call]] = seconds[added]
    joined.memory[:, pool] = together(joined.memory[:, pool], layouts.memory[added])
    return joined._replace(rows=joined.rows | {role: added})


def _that_fit(
    placement: Placement, partial: _Partial, pool: int, to_come: Sequence[LayoutTable]
) -> Indices:
    """The combinations that leave a pool memory for the leanest layout of each role to come."""
    memory = partial.memory[:, pool]
    for layouts in to_come:
        memory = together(memory, layouts.memory.min(axis=0))
    return np.flatnonzero(_needed(memory) <= placement.allowed(pool))


def _pairs(some: int, others: int) -> tuple[Indices, Indices]:
    """All pairs of an index below `some` and one below `others`."""
    first, second = np.mgrid[:some, :others]
    return first.ravel(), second.ravel()


def _needed(memory: Array) -> Array:
    """Bytes [n] of each GPU that roles with memory [n, 3] need while the largest surplus is in
    use."""
    return memory[:, 0] + memory[:, 1]


# --- hosts ---


def hosts_hold(placement: Placement, combinations: LayoutCombinations) -> Indices:
    """The combinations with which every node's host memory holds what `host_memory` counts."""
    problem = placement.problem
    workload, stale = problem.workload, problem.max_staleness
    gpus, first = _pools_on_nodes(placement)
    fixed = np.full(gpus.shape[1], float(batch_bytes(workload, stale)))
    fixed[1:] *= gpus[:, 1:].any(axis=0)
    for pool, kind in enumerate(placement.kinds):
        generates = pool in placement.generating
        trains = bool(placement.held(pool))
        fixed += processes(trains, generates, problem.device(kind)) * gpus[pool]
    memory = [allowed(node) for node in problem.cluster.nodes]
    distinct = np.unique(np.vstack([gpus, first, fixed, memory]), axis=1)  # most nodes are alike
    pools = len(gpus)
    gpus, first = distinct[:pools], distinct[pools : 2 * pools]
    fixed, memory = distinct[-2], distinct[-1]
    pinned = np.zeros((len(combinations), pools))  # bytes of the host per GPU
    copied = np.zeros((len(combinations), len(memory)))
    exported = np.zeros(len(memory))
    for role, rows in combinations.rows.items():
        pool, layouts = placement.pool_of[role], combinations.layouts[role]
        pinned[:, pool] += layouts.memory[rows, 2]
        shard = layouts.grid.shard[rows][:, None]
        copied += copied_bytes(workload, role, shard, gpus[pool].astype(np.int64))
        exported = np.maximum(exported, exported_bytes(workload, role) * first[pool])
    asleep = combinations.rollout.memory[2] * kept_asleep(workload, stale)
    pinned[:, list(placement.generating)] += asleep
    used = pinned @ gpus + np.maximum(copied, exported) + fixed
    return np.flatnonzero((used <= memory).all(axis=1))


def _pools_on_nodes(placement: Placement) -> tuple[Array, Array]:
    """GPUs [pools, nodes] of each pool on each node, and 1 where its first rank is."""
    shape = len(placement.structure), len(placement.problem.cluster.nodes)
    gpus, first = np.zeros(shape), np.zeros(shape)
    for pool, parts in enumerate(placement.packing):
        first[pool, parts[0].node] = 1.0
        for part in parts:
            gpus[pool, part.node] = part.gpus
    return gpus, first


# --- what they take ---


def durations_of(placement: Placement, combinations: LayoutCombinations) -> Array:
    """Seconds [calls, n, S] of every call with each combination."""
    problem = placement.problem
    shape = len(problem.calls), len(combinations), problem.model.scenarios
    durations = np.zeros(shape)
    for row in problem.host_seconds:
        durations[row] = combinations.rollout.least[row]
    durations[problem.generate] = combinations.rollout.least[problem.generate]
    for role, rows in combinations.rows.items():
        of_role = combinations.layouts[role].seconds
        for call, seconds in zip(problem.calls_of(role), of_role, strict=True):
            durations[problem.row[call]] = seconds[rows]
    durations[problem.sync] = _sync_seconds(placement, combinations)
    return durations


def _sync_seconds(placement: Placement, combinations: LayoutCombinations) -> Array:
    """Seconds [n, S] of the weight sync. It is the same for layouts of the actor that differ only
    in their micro-batches and recomputation."""
    layouts, rows = combinations.layouts["actor"], combinations.rows["actor"]
    grid = layouts.grid
    alike = np.column_stack([grid.shard, grid.replicas, grid.offload])[rows]
    _, first, which = np.unique(alike, axis=0, return_index=True, return_inverse=True)
    home = placement.pool_of["actor"]
    seconds = [
        placement.problem.model.sync(
            layouts.layout(row, "p"),
            placement.places[home],
            combinations.rollout.layout,
            [placement.places[pool] for pool in placement.generating],
            same_node=placement.same_node,
            shared=home in placement.generating,
        ).seconds
        for row in rows[first].tolist()
    ]
    return np.array(seconds)[which.ravel()]
