"""The least seconds of the roles that share a pool, by the pool's size: each role has the layouts
that fit next to the leanest ones of the others."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from planner.search.solver.layout_table import columns_of
from planner.search.solver.problem import Problem, sync_path
from planner.search.solver.role_tables import ActorKey, CallSets, RoleTable, RoleTables, SizeSteps
from planner.search.solver.rollout_table import ALONE, RolloutTable, level_of
from planner.search.space.arrays import Array, Levels, Pools, Sizes
from planner.search.space.placements import PlacementFamily
from planner.search.space.size_boxes import NEVER


class PoolKey(NamedTuple):
    """What the table of a pool depends on: its roles, its kind of GPU and, if the actor is one of
    the roles, the actor's key."""

    roles: frozenset[str]
    kind: str
    actor: ActorKey | None


def pool_keys(problem: Problem, family: PlacementFamily) -> list[PoolKey]:
    """The key of each pool of a family."""
    actor = ActorKey(family.within, problem.gathers(sync_path(family)))
    return [
        PoolKey(roles, kind, actor if "actor" in roles else None)
        for roles, kind in zip(family.structure, family.kinds, strict=True)
    ]


class PoolTables:
    """The tables of some pools, which are numbered.

    `kind` [pools] is the number of their kind of GPU. `seconds` [pools, call sets, steps, S + 1]
    are the least seconds of each call set (0 for calls of roles that are not on the pool, NEVER if
    the roles do not fit). `room` [pools, steps] is the level of memory that the roles leave to an
    engine."""

    def __init__(self, problem: Problem, call_sets: CallSets, keys: Iterable[PoolKey]) -> None:
        self._problem, self._call_sets = problem, call_sets
        self._roles = RoleTables(problem, call_sets)
        self.steps = SizeSteps(problem)
        kinds = list(problem.gpus)
        self._leanest_engine = {kind: _leanest(problem.rollout_table(kind)) for kind in kinds}
        ordered = sorted(set(keys), key=lambda key: (sorted(key.roles), key.kind, str(key.actor)))
        self._number = {key: number for number, key in enumerate(ordered)}
        self.kind = np.array([kinds.index(key.kind) for key in ordered])
        scenarios = problem.model.scenarios
        columns = scenarios + 1 if scenarios > 1 else 1  # see `with_mean`
        shape = len(ordered), len(call_sets.listed), self.steps.steps, columns
        self.seconds = np.full(shape, NEVER)
        self.room = np.zeros((len(ordered), self.steps.steps), dtype=np.int64)
        for number, key in enumerate(ordered):
            self._fill(self.seconds[number], self.room[number], key)
        self._load = self._loads()

    def numbers(self, keys: Sequence[PoolKey]) -> list[int]:
        """The numbers of some pools."""
        return [self._number[key] for key in keys]

    def _fill(self, seconds: Array, room: Levels, key: PoolKey) -> None:
        """Fill in the least seconds [call sets, steps, S + 1] and the room [steps] of a pool."""
        problem = self._problem
        device = problem.device(key.kind)
        steps = len(problem.ranks(key.kind))
        generates = "rollout" in key.roles
        engine = self._leanest_engine[key.kind] if generates else np.zeros(2)
        held = [role for role in problem.trained_or_inferred if role in key.roles]
        allowed = problem.allowed(bool(held), generates, key.kind)
        tables = [
            self._roles.of(role, key.kind, key.actor if role == "actor" else None) for role in held
        ]
        leanest = np.array([table.memory for table in tables]).reshape(-1, steps, 2)
        resident = leanest[:, :, 0].sum(axis=0) + engine[0]
        seconds[:] = 0.0
        for number, role in enumerate(held):
            left = allowed - (resident - leanest[number, :, 0])
            others = np.delete(leanest[:, :, 1], number, axis=0)
            surplus = np.maximum(others.max(axis=0, initial=0.0), engine[1])
            columns = self._call_sets.columns_of_role(role)
            seconds[columns, :steps] = _least_in(
                tables[number], level_of(left, device), level_of(left - surplus, device)
            )
        surplus = np.maximum(leanest[:, :, 1].max(axis=0, initial=0.0), engine[1])
        too_much = np.flatnonzero(resident + surplus > allowed)
        own = [column for role in held for column in self._call_sets.columns_of_role(role)]
        seconds[np.ix_(np.array(own or range(len(seconds))), too_much)] = NEVER
        seconds[:, steps:] = NEVER
        room[:steps] = level_of(allowed - (resident - engine[0]), device) if held else ALONE

    def _loads(self) -> Array:
        """Seconds [pools, steps] of all calls of a pool together, each role's in one layout. They
        fall with the size; after the last step they are below everything, so that a search for a
        size that suffices ends there."""
        whole = [
            self._call_sets.column(self._problem.calls_of(role))
            for role in self._problem.trained_or_inferred
        ]
        seconds = np.minimum(self.seconds[:, whole].sum(axis=1), NEVER)
        load = self._problem.objective.of_bounds(seconds)
        for number, kind in enumerate(self.kind):
            load[number, self.steps.counts[kind] :] = -np.inf
        return load

    def least(self, pools: Pools, sizes: Sizes) -> Array:
        """The least seconds [n, call sets, S + 1], of each call set on a pool [n, call sets] of a
        size [n, call sets]."""
        step = self.steps.of(self.kind[pools], sizes)
        return np.asarray(self.seconds[pools, np.arange(len(self._call_sets.listed)), step])

    def room_on(self, pools: Pools, sizes: Sizes) -> Levels:
        """The level of memory that the roles of pools of some sizes leave to an engine."""
        return np.asarray(self.room[pools, self.steps.of(self.kind[pools], sizes)])

    def snapped(self, pools: Pools, sizes: Sizes) -> Sizes:
        """The smallest sizes that allow the same layouts to trained and inference roles; 0 where
        there is no pool."""
        kind = self.kind[pools]
        step = np.maximum(self.steps.of(kind, sizes), 0)
        return np.where(sizes > 0, self.steps.first(kind, step), 0)

    def smallest(self, pools: Pools, seconds: Array) -> Sizes:
        """The smallest sizes on which the load of pools takes at most some seconds; more GPUs than
        there are if no size is enough."""
        found = np.zeros_like(pools)
        for pool in np.unique(pools).tolist():
            where = pools == pool
            load = self._load[pool]
            enough = np.searchsorted(-load, -seconds[where], "left")
            step = np.minimum(enough, len(load) - 1)
            found[where] = self.steps.first(int(self.kind[pool]), step)
        return found


def _least_in(table: RoleTable, while_running: Levels, while_idle: Levels) -> Array:
    """The least seconds [sets, steps, S + 1] of a role that has these levels of memory [steps]: so
    much while it runs, and so much while another role of the pool does."""
    step = np.arange(len(while_running))
    return np.asarray(
        np.maximum(table.running[:, step, while_running], table.idle[:, step, while_idle])
    )


def _leanest(table: RolloutTable) -> Array:
    """The least resident bytes and the least surplus [2] of any engine."""
    engines = np.column_stack([table.size, table.slots])
    _, rows = np.unique(engines, axis=0, return_index=True)
    least = np.full(2, NEVER)
    for row in rows.tolist():
        for offload in table.offloads(shared=True):
            least = np.minimum(least, columns_of(table.memory(row, offload))[:2])
    return least
