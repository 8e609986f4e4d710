"""Lower bounds on the step time of many placements at once, and of boxes of pool sizes.

A bound takes for each call the least seconds that any layout of its role allows on a pool of that
size (one that fits beside the pool's other roles), in each length scenario, and puts them into the
rows that no program can beat (`programs.bound_rates`). So does a second bound with the least mean
seconds of each call: a period is a maximum of sums, hence convex, and at means at most the mean of
periods.

A role may leave GPUs of its pool idle, so these seconds never rise with the pool's size: what holds
for the largest sizes of a box holds for all of it.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.search.solver.best_program import Cut, Program, bound_rates, cycles_of, rates
from planner.search.solver.problem import CUTS, Array, Problem, bytes_of
from planner.search.solver.rollout_table import ALONE, LEVELS, RolloutTable, level_of, with_mean
from planner.search.space.placements import PlacementFamily, Structure, sharing_of
from planner.search.space.size_boxes import NEVER

BOXES_AT_ONCE = 1024  # boxes that are bounded together
SLACKS = (1.01, 1.03, 1.1, 1.25, 1.5)  # times a floor of generation, which it may take


class Acting(NamedTuple):
    """What the actor's layouts depend on besides the kind of its pool: whether its shards lie
    `within` a node, and seconds of a sync per second of gathering (`Problem.gathers`)."""

    within: bool | None
    gathers: float


Pool = tuple[
    frozenset[str], str, Acting | None
]  # its roles, its kind, and more if one of them is the actor
Held = tuple[str, str, Acting | None]  # a role, its pool's kind, and more if it is the actor


class FamilyTable(NamedTuple):
    """Of some families what their bounds need, padded to the most pools P and rows R: the table
    of each pool [n, P], the pool of each column [n, C], whether a pool generates [n, P] and has the
    actor, the kind that generates, that kind's GPUs per node, seconds of handing weights over
    within a node and between nodes [n, 2], and rates [n, R, C]."""

    table: NDArray[np.int64]
    home: NDArray[np.int64]
    generates: NDArray[np.bool_]
    acts: NDArray[np.bool_]
    kind: NDArray[np.int64]
    node: NDArray[np.int64]
    hand_over: Array
    rates: Array


class Bounds:
    """Tables of least seconds by pool size for the pools of some families; all of them on the
    same cluster."""

    def __init__(
        self,
        problem: Problem,
        families: Sequence[PlacementFamily],
        programs: Sequence[Program | None] | None = None,
    ) -> None:
        self.problem, self.families = problem, families
        self.kinds = tuple(problem.there)
        most = max(problem.there.values())
        self._made: dict[Held, tuple[Array, Array, Array]] = {}
        self._rates: dict[Structure, Array] = {}
        pools = sorted({pool for a in families for pool in self._pools_of(a)}, key=_named)
        self._number = {pool: number for number, pool in enumerate(pools)}
        # The steps of a pool's size at which something changes: `step[kind, n]` of n GPUs,
        # `first[kind, step]` back.
        ranks = {kind: problem.ranks(kind) for kind in self.kinds}
        self.first = np.full((len(self.kinds), max(map(len, ranks.values())) + 1), most + 1)
        self.step = np.zeros((len(self.kinds), most + 1), dtype=np.int64)
        for number, counts in enumerate(ranks.values()):
            self.first[number, : len(counts)] = counts
            self.step[number] = np.searchsorted(counts, np.arange(most + 1), "right") - 1
        self.kind_of = np.array([self.kinds.index(kind) for _, kind, _ in pools])
        self.room = np.zeros(
            (len(pools), self.first.shape[1]), dtype=np.int64
        )  # level of memory for an engine
        # The least seconds of each call, and of calls of a role together: one layout serves them
        # all.
        self.roles = [role for role in problem.workload.roles if role != "rollout"]
        self.sets: list[tuple[str, ...]] = [(call,) for call in problem.calls]
        self.sets += [
            some for role in self.roles for some in _sets(problem.calls_of(role)) if len(some) > 1
        ]
        self._column = {calls: column for column, calls in enumerate(self.sets)}
        self.scenarios = with_mean(
            np.zeros(problem.model.scenarios)
        ).size  # the last stands for the mean
        self._engine = {kind: _least_engine(problem.rollout_table(kind)) for kind in self.kinds}
        self.seconds = np.full(
            (len(pools), len(self.sets), self.first.shape[1], self.scenarios), NEVER
        )
        for pool, number in self._number.items():
            self._fill(self.seconds[number], self.room[number], *pool)
        self.engines = [problem.rollout_table(kind) for kind in self.kinds]
        whole = [self._column[problem.calls_of(role)] for role in self.roles]
        load = np.minimum(self.seconds[:, whole].sum(axis=1), NEVER)
        self.load = self.problem.objective_of(
            load
        )  # [tables, steps]; falling, and no size is enough in the end
        for number, kind in enumerate(self.kind_of):
            self.load[number, len(ranks[self.kinds[kind]]) :] = -np.inf
        self.rows = self._rows(programs or [None] * len(families))

    # --- the tables ---

    def _fill(
        self,
        table: Array,
        room: NDArray[np.int64],
        roles: frozenset[str],
        kind: str,
        acting: Acting | None,
    ) -> None:
        """Least seconds [C, steps, S] of the calls of a pool's roles, and the room that they leave
        to an engine, by the steps of its size."""
        problem, device = self.problem, self.problem.device(kind)
        held = [role for role in problem.workload.roles if role in roles and role != "rollout"]
        engine = self._engine[kind] if "rollout" in roles else np.zeros(2)
        allowed = problem.allowed(bool(held), "rollout" in roles, kind)
        steps = len(problem.ranks(kind))
        made = [self._role(role, kind, acting if role == "actor" else None) for role in held]
        least = np.stack([memory for _, _, memory in made]) if made else np.zeros((0, steps, 2))
        idle = least[:, :, 0].sum(axis=0) + engine[0]
        surplus = np.maximum(least[:, :, 1].max(axis=0, initial=0.0), engine[1])
        table[:] = 0.0
        rows = [self._column[calls] for role in held for calls in _sets(problem.calls_of(role))]
        for number, (role, (alone, kept, _)) in enumerate(zip(held, made, strict=True)):
            left = allowed - (idle - least[number, :, 0])
            others = np.maximum(
                np.delete(least[:, :, 1], number, axis=0).max(axis=0, initial=0.0), engine[1]
            )
            levels = [level_of(bytes_left, device) for bytes_left in (left, left - others)]
            at = np.arange(steps)
            found = np.maximum(alone[:, at, levels[0]], kept[:, at, levels[1]])
            for calls, seconds in zip(_sets(problem.calls_of(role)), found, strict=True):
                table[self._column[calls], :steps] = seconds
        table[
            np.ix_(np.array(rows or range(len(table))), np.flatnonzero(idle + surplus > allowed))
        ] = NEVER
        table[:, steps:] = NEVER
        room[:steps] = level_of(allowed - (idle - engine[0]), device) if held else ALONE

    def _role(self, role: str, kind: str, acting: Acting | None) -> tuple[Array, Array, Array]:
        """Of a role alone: least seconds [sets of its calls, steps, levels, S] of the layouts that
        need at most a level of memory while they run, the same of what they keep while they idle,
        and the least memory [steps, 2]."""
        if (role, kind, acting) not in self._made:
            problem, counts = self.problem, self.problem.ranks(kind)
            layouts = problem.layouts(role, kind)
            if acting:
                layouts = layouts.of_shards(acting.within, problem.node(kind)).with_sync(
                    acting.gathers
                )
            step = np.searchsorted(counts, layouts.grid.gpus)
            memory = np.full((len(counts), 2), NEVER)
            np.minimum.at(memory, step, layouts.memory[:, :2])
            tables = []
            calls = problem.calls_of(role)
            sums = [
                sum(layouts.seconds[calls.index(call)] for call in some) for some in _sets(calls)
            ]
            seconds = with_mean(np.stack(sums))
            for needed in (layouts.memory[:, :2].sum(axis=1), layouts.memory[:, 0]):
                tables.append(
                    _least(seconds, step, level_of(needed, problem.device(kind)), len(counts))
                )
            self._made[role, kind, acting] = (
                tables[0],
                tables[1],
                np.minimum.accumulate(memory, axis=0),
            )
        return self._made[role, kind, acting]

    def sharpen(
        self, number: int, sizes: NDArray[np.int64], limit: float, queues: bool = True
    ) -> bool:
        """Simulate generation on these sizes [1, P] where that may show the bound to be no less
        than `limit` seconds; engines with `queues` too, which take longer. Whether it told more."""
        one = np.array([number])
        seconds = self._least(one, sizes, sizes)
        generate, cuts = self.problem.calls.index("generate"), self._cuts_of(number, CUTS)

        def slower(times: float) -> float:
            longer = seconds.copy()
            longer[:, generate] *= times
            return float(self._bound(longer, self.rows.rates[one], cuts)[0])

        times = next((times for times in SLACKS if slower(times) >= limit), None)
        if times is None:
            return False
        return self.engines[int(self.rows.kind[number])].sharpen(
            *self._engine_pools(one, sizes), times, queues
        )

    def refresh(self) -> None:
        """Take up what has been simulated meanwhile."""
        for engines in self.engines:
            engines.refresh()

    def _engine_pools(
        self, number: NDArray[np.int64], sizes: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The sizes [n, P] of the generating pools, -1 for others, and the level of memory [n] that
        all leave."""
        generates, table = self.rows.generates[number], self.rows.table[number]
        room = np.where(generates, self.room[table, self.step[self.kind_of[table], sizes]], ALONE)
        return np.where(generates, sizes, -1), room.min(axis=1)

    def _rows(self, programs: Sequence[Program | None]) -> FamilyTable:
        problem, pools = self.problem, max(len(a.structure) for a in self.families)
        columns: list[list[object]] = [[] for _ in FamilyTable._fields]
        known, listed = dict[tuple[Structure, tuple[str, ...]], list[object]](), list[Array]()
        roles = [(problem.flow[some[0]].roles or ("",))[0] for some in self.sets]
        for a, program in zip(self.families, programs, strict=True):
            pad = [0] * (pools - len(a.structure))
            if (a.structure, a.kinds) not in known:
                at = {role: i for i, own in reversed([*enumerate(a.structure)]) for role in own}
                kind = a.kinds[a.generating[0]]
                known[a.structure, a.kinds] = [
                    [at.get(role, 0) for role in roles],
                    ["rollout" in own for own in a.structure] + [False] * len(pad),
                    [i == at["actor"] for i in range(pools)],
                    self.kinds.index(kind),
                    problem.node(kind) if kind == a.kinds[at["actor"]] else 0,
                    [problem.hand_over(a, same_node=same_node) for same_node in (True, False)],
                ]
            values = [
                [self._number[pool] for pool in self._pools_of(a)] + pad,
                *known[a.structure, a.kinds],
            ]
            for column, value in zip(columns, values, strict=False):
                column.append(value)
            listed.append(self._rates_of(a.structure, program))
        every = np.zeros((len(listed), max(map(len, listed)), len(problem.calls)))
        for number, found in enumerate(listed):
            every[number, : len(found)] = found
        arrays = [np.array(column) for column in columns[:-1]]
        return FamilyTable(*arrays, self._by_set(every))  # type: ignore[call-arg]

    def _pools_of(self, a: PlacementFamily) -> list[Pool]:
        """What the tables of a family's pools depend on."""
        acting = Acting(a.within, self.problem.gathers(a))
        pools = zip(a.structure, a.kinds, strict=True)
        return [(roles, kind, acting if "actor" in roles else None) for roles, kind in pools]

    def _rates_of(self, structure: Structure, program: Program | None) -> Array:
        """Rates [rows, calls] that no program of a structure is below, or those of its only one."""
        if structure not in self._rates or program:
            flow, sharing = self.problem.flow, sharing_of(self.problem.flow, structure)
            if program:
                return rates(cycles_of(flow, sharing, program.items))
            self._rates[structure] = bound_rates(flow, sharing, self.problem.max_staleness)
        return self._rates[structure]

    def _by_set(self, rates: Array) -> Array:
        """Rates [..., calls] as rates [..., sets of calls] that add up to them. The calls of a role
        are taken together as far as they count alike: rates 1 and 1/2 are 1/2 of both together and
        1/2 of the first alone."""
        found = np.zeros((*rates.shape[:-1], len(self.sets)))
        found[..., : rates.shape[-1]] = rates
        for column, some in sorted(enumerate(self.sets), key=lambda one: -len(one[1])):
            if len(some) > 1:
                own = [self._column[call,] for call in some]
                alike = found[..., own].min(axis=-1)
                found[..., column] = alike
                found[..., own] -= alike[..., None]
        return found

    # --- bounds ---

    def of(
        self, number: NDArray[np.int64], low: NDArray[np.int64], high: NDArray[np.int64]
    ) -> Array:
        """Seconds [n] that no program of family `number` [n] is below on pools of sizes
        between `low` and `high` [n, P], which are 0 where there is no pool."""
        return self._bound(self._least(number, low, high), self.rows.rates[number])

    def with_cuts(
        self, number: int, low: NDArray[np.int64], high: NDArray[np.int64], last: int
    ) -> Array:
        """The same of one family, by the `last` few cuts of its programs alone."""
        cuts, bound = self._cuts_of(number, last), np.zeros(len(low))
        for first in range(0, len(low) if cuts else 0, BOXES_AT_ONCE):
            part = slice(first, first + BOXES_AT_ONCE)
            seconds = self._least(np.full(len(low[part]), number), low[part], high[part])
            bound[part] = self._bound(seconds, self.rows.rates[number], cuts)
        return bound

    def _bound(self, seconds: Array, rates: Array, cuts: Sequence[Cut] = ()) -> Array:
        """Seconds [n] that no program with these `rates` and `cuts` is below at least seconds [n,
        C, S + 1]."""
        objective = self.problem.objective_of
        bound = objective((rates @ seconds).max(axis=1))
        for cut in cuts:
            bound = np.maximum(bound, cut.bound(seconds, objective))
        return np.asarray(np.minimum(bound, NEVER))

    def cut(
        self, number: int, low: NDArray[np.int64], high: NDArray[np.int64], limit: float
    ) -> None:
        """Look for the best program of one family below `limit` seconds with the least
        durations on sizes [1, P], and keep what shows that none is better."""
        seconds = self._least(np.array([number]), low, high)[0, : len(self.problem.calls)]
        self.problem.best_program(
            sharing_of(self.problem.flow, self.families[number].structure), seconds, limit
        )

    def _cuts_of(self, number: int, last: int) -> list[Cut]:
        """The last few cuts of a family's programs, by role."""
        sharing = sharing_of(self.problem.flow, self.families[number].structure)
        return [Cut(self._by_set(cut.rates)) for cut in self.problem.cuts(sharing)[-last:]]

    def _least(
        self, number: NDArray[np.int64], low: NDArray[np.int64], high: NDArray[np.int64]
    ) -> Array:
        """Least seconds [n, C, S + 1] of the calls, and of those of a role together."""
        rows, calls = self.rows, self.problem.calls
        at = np.arange(len(number))[:, None]
        home = rows.home[number]
        table = rows.table[number][at, home]
        step = self.step[self.kind_of[table], high[at, home]]
        seconds = self.seconds[table, np.arange(len(self.sets)), step]
        for row, name in enumerate(calls):
            if not self.problem.flow[name].roles:
                seconds[:, row] = with_mean(self.problem.model.host(name).seconds)
        seconds[:, calls.index("generate")] = self._generate(number, high)
        synced = [column for column, some in enumerate(self.sets) if "sync_weights" in some]
        seconds[:, synced] += self._handed(number, low)[:, None, None]
        return np.asarray(np.minimum(seconds, NEVER))

    def _generate(self, number: NDArray[np.int64], sizes: NDArray[np.int64]) -> Array:
        """Seconds [n, S + 1] with all the engines that the generating pools have room for, or any
        fewer."""
        found = np.full((len(number), self.scenarios), NEVER)
        pools, room = self._engine_pools(number, sizes)
        for kind, engines in enumerate(self.engines):
            of_kind = np.flatnonzero(self.rows.kind[number] == kind)
            found[of_kind] = engines.least_on(pools[of_kind], room[of_kind])
        return found

    def _handed(self, number: NDArray[np.int64], low: NDArray[np.int64]) -> Array:
        """Seconds [n] of handing over the weights; between nodes where these sizes are too many for
        one."""
        rows = self.rows
        gpus = np.where(rows.generates[number] | rows.acts[number], low, 0).sum(axis=1)
        return np.asarray(
            np.where(gpus > rows.node[number], rows.hand_over[number, 1], rows.hand_over[number, 0])
        )

    def may_share_a_node(
        self, number: NDArray[np.int64], low: NDArray[np.int64], high: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Whether some sizes of a box [n] hand weights over within a node, and others have to
        between nodes."""
        near = self._handed(number, low) < self._handed(number, high)
        return np.asarray(near & (low != high).any(axis=1))

    def snapped(self, number: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        """The smallest sizes [n, P] that allow the same layouts to trained and inference roles."""
        kind = self.kind_of[self.rows.table[number]]
        return np.where(sizes > 0, self.first[kind, np.maximum(self.step[kind, sizes], 0)], 0)

    def smallest(
        self,
        number: NDArray[np.int64],
        low: NDArray[np.int64],
        high: NDArray[np.int64],
        limit: NDArray[np.float64],
    ) -> NDArray[np.int64]:
        """The least size of each pool [n, P] whose own load allows a step below `limit` [n]
        seconds, if generation has at most all GPUs of its pools. More than there are where none
        does."""
        rows = self.rows
        left = np.repeat(limit[:, None], high.shape[1], axis=1)
        if self.problem.objective != "p95":  # sums of percentiles are no percentiles of sums
            seconds = self._generate(number, high)[:, -1]
            left = left - np.where(rows.generates[number], seconds[:, None], 0.0)
            left = left - np.where(rows.acts[number], self._handed(number, low)[:, None], 0.0)
        found = np.zeros_like(high)
        tables = rows.table[number]
        for table in np.unique(tables).tolist():
            where = tables == table
            load = self.load[table]
            enough = np.searchsorted(-load, -left[where], "left")
            found[where] = self.first[self.kind_of[table]][np.minimum(enough, len(load) - 1)]
        return found


def _sets(calls: tuple[str, ...]) -> list[tuple[str, ...]]:
    """All non-empty sets of the calls of a role."""
    return [some for size in range(1, len(calls) + 1) for some in combinations(calls, size)]


def _named(pool: Pool) -> tuple[list[str], str, str]:
    return sorted(pool[0]), pool[1], str(pool[2])


def _least_engine(table: RolloutTable) -> Array:
    """The least resident bytes and the least surplus [2] of an engine."""
    _, rows = np.unique(np.column_stack([table.number, table.slots]), axis=0, return_index=True)
    found = [
        bytes_of(table.memory(row, o))[:2]
        for row in rows.tolist()
        for o in table.offloads(shared=True)
    ]
    return np.asarray(np.min([np.full(2, NEVER), *found], axis=0))


def _least(seconds: Array, step: NDArray[np.int64], level: NDArray[np.int64], steps: int) -> Array:
    """The least seconds [calls, steps, levels, S] of rows [calls, n, S] of at most a step and at
    most a level."""
    found = np.full((seconds.shape[0], steps * (LEVELS + 1), seconds.shape[2]), NEVER)
    cell = step * (LEVELS + 1) + level
    order = np.argsort(cell, kind="stable")
    cells, first = np.unique(cell[order], return_index=True)
    if len(cells):
        found[:, cells] = np.minimum.reduceat(seconds[:, order], first, axis=1)
    table = found.reshape(seconds.shape[0], steps, LEVELS + 1, seconds.shape[2])
    return np.asarray(np.minimum.accumulate(np.minimum.accumulate(table, axis=1), axis=2))
