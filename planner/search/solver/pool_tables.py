"""The least seconds of the roles that share a pool, by the pool's size: each role has the layouts
that fit next to the leanest ones of the others."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from planner.search.solver.layout_table import columns_of
from planner.search.solver.problem import Problem, sync_path
from planner.search.solver.role_tables import ActorKey, CallSets, RoleTable, RoleTables, SizeSteps
from planner.search.solver.rollout_table import ALONE, RolloutTable, level_of
from planner.search.space.arrays import Array, Levels, Mask, Pools, Sizes
from planner.search.space.placements import PlacementFamily
from planner.search.space.size_boxes import NEVER
from planner.spec.cluster import Device


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
            steps = len(problem.ranks(key.kind))
            pool = self._pool(key)
            self._fill_seconds(self.seconds[number, :, :steps], pool)
            self.room[number, :steps] = pool.room_of_engine()
        self._load = self._loads()

    def numbers(self, keys: Sequence[PoolKey]) -> list[int]:
        """The numbers of some pools."""
        return [self._number[key] for key in keys]

    def _pool(self, key: PoolKey) -> "_Pool":
        problem = self._problem
        roles = [role for role in problem.trained_or_inferred if role in key.roles]
        generates = "rollout" in key.roles
        tables = []
        for role in roles:
            actor = key.actor if role == "actor" else None
            tables.append(self._roles.of(role, key.kind, actor, generates))
        memory = [table.memory for table in tables]
        return _Pool(
            device=problem.device(key.kind),
            roles=roles,
            tables=tables,
            leanest=np.array(memory).reshape(-1, len(problem.ranks(key.kind)), 2),
            engine=self._leanest_engine[key.kind] if generates else np.zeros(2),
            allowed=problem.allowed(bool(roles), generates, key.kind),
        )

    def _fill_seconds(self, seconds: Array, pool: "_Pool") -> None:
        """Fill in the least seconds [call sets, steps, S + 1] of a pool."""
        seconds[:] = 0.0
        too_small = np.flatnonzero(~pool.fits())
        for number, role in enumerate(pool.roles):
            columns = self._call_sets.columns_of_role(role)
            seconds[columns] = pool.least(number)
            seconds[np.array(columns)[:, None], too_small] = NEVER
        if not pool.roles:
            seconds[:, too_small] = NEVER

    def _loads(self) -> Array:
        """Seconds [pools, steps] of all calls of a pool together, each role's in one layout. They
        fall with the size; after the last step they are below everything, so that a search for a
        size that suffices ends there."""
        whole = [
            self._call_sets.column(self._problem.calls_of(role))
            for role in self._problem.trained_or_inferred
        ]
        seconds = np.minimum(self.seconds[:, whole].sum(axis=1), NEVER)
        load = self._problem.objective.of_parts.of_bounds(seconds)
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


class _Pool(NamedTuple):
    """The roles of one pool that train or infer, with their tables. `leanest` [roles, steps, 2] are
    the least resident bytes and the least surplus of any of a role's layouts, and `engine` [2]
    those of any engine (0 if the rollout is not on the pool). A GPU has `allowed` bytes for all of
    them together: the residents, and the surplus of the one that runs."""

    device: Device
    roles: list[str]
    tables: list[RoleTable]
    leanest: Array
    engine: Array
    allowed: int

    def _resident(self) -> Array:
        """The resident bytes [steps] of all roles and the engine, each at its leanest."""
        return np.asarray(self.leanest[:, :, 0].sum(axis=0) + self.engine[0])

    def fits(self) -> Mask:
        """Whether all of them fit [steps], each at its leanest."""
        surplus = np.maximum(self.leanest[:, :, 1].max(axis=0, initial=0.0), self.engine[1])
        return np.asarray(self._resident() + surplus <= self.allowed)

    def least(self, role: int) -> Array:
        """The least seconds [sets of the role's calls, steps, S + 1] of one of the roles.

        While it runs itself, it may take what the residents of the others leave. While another role
        runs, its own resident bytes have to leave room for that one's surplus too. No layout is
        faster than the fastest that meets the first condition, and none is faster than the fastest
        that meets the second one; so the slower of the two bounds those that meet both."""
        table = self.tables[role]
        others = self._resident() - self.leanest[role, :, 0]
        surpluses = np.delete(self.leanest[:, :, 1], role, axis=0)
        surplus = np.maximum(surpluses.max(axis=0, initial=0.0), self.engine[1])
        while_running = level_of(self.allowed - others, self.device)
        while_idle = level_of(self.allowed - others - surplus, self.device)
        step = np.arange(len(others))
        running = table.running[:, step, while_running]
        idle = table.idle[:, step, while_idle]
        return np.asarray(np.maximum(running, idle))

    def room_of_engine(self) -> Levels | int:
        """The level of memory [steps] that the roles leave to an engine."""
        if not self.roles:
            return ALONE
        others = self._resident() - self.engine[0]
        return level_of(self.allowed - others, self.device)


def _leanest(table: RolloutTable) -> Array:
    """The least resident bytes and the least surplus [2] of any engine."""
    engines = np.column_stack([table.size, table.slots])
    _, rows = np.unique(engines, axis=0, return_index=True)
    least = np.full(2, NEVER)
    for row in rows.tolist():
        for offload in table.offloads(shared=True):
            least = np.minimum(least, columns_of(table.memory(row, offload))[:2])
    return least
