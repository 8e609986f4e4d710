"""Lower bounds on the step time of many placements at once, and of boxes of pool sizes.

A bound takes for each call the least seconds that any layout of its role allows on a pool of that size (one that fits
beside the pool's other roles), in each length scenario, and puts them into the rows that no program can beat
(`programs.bound_rates`). So does a second bound with the least mean seconds of each call: a period is a maximum of
sums, hence convex, and at means at most the mean of periods.

A role may leave GPUs of its pool idle, so these seconds never rise with the pool's size: what holds for the largest
sizes of a box holds for all of it.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.predict.layouts import concurrencies, engine_counts, tensor_parallels
from planner.predict.memory import RoleMemory, process_bytes, rollout_fraction, rollout_memory
from planner.predict.roofline import hand_over_seconds
from planner.search.options import CUTS, Array, Problem, bytes_of, with_mean
from planner.search.programs import Cut, Program, bound_rates, cycles_of, rates, sharing_of
from planner.search.space import Arrangement, gpus_of_kinds
from planner.spec.plan import RolloutRole

NEVER = 1e18  # seconds of what does not fit
LEVELS = 32  # of memory, in which layouts are told apart
ALONE = LEVELS + 1  # the level of an engine that shares its GPUs with no other role
AT_ONCE = 1024  # boxes that are bounded together
LOOSE = (1.01, 1.03, 1.1, 1.25, 1.5)  # times a floor of generation, which it may take


class Rows(NamedTuple):
    """Of some arrangements what their bounds need, padded to the most pools P and rows R: the table of each pool
    [n, P], the pool of each column [n, C], whether a pool generates [n, P] and has the actor, the kind that generates,
    that kind's GPUs per node, seconds of handing weights over within a node and between nodes [n, 2], and
    rates [n, R, C]."""

    table: NDArray[np.int64]
    home: NDArray[np.int64]
    generates: NDArray[np.bool_]
    acts: NDArray[np.bool_]
    kind: NDArray[np.int64]
    node: NDArray[np.int64]
    hand_over: Array
    rates: Array


class Bounds:
    """Tables of least seconds by pool size for the pools of some arrangements; all of them on the same cluster."""

    def __init__(
        self, problem: Problem, arrangements: Sequence[Arrangement], programs: Sequence[Program | None] | None = None
    ) -> None:
        self.problem, self.arrangements = problem, arrangements
        there = gpus_of_kinds(problem.cluster)
        self.kinds = tuple(there)
        most = max(there.values())
        self._made: dict[tuple[str, str], tuple[Array, Array, Array]] = {}
        pools = sorted({pool for a in arrangements for pool in zip(a.structure, a.kinds, strict=True)}, key=_named)
        self._number = {pool: number for number, pool in enumerate(pools)}
        # The steps of a pool's size at which something changes: `step[kind, n]` of n GPUs, `first[kind, step]` back.
        ranks = {kind: problem.ranks(kind) for kind in self.kinds}
        self.first = np.full((len(self.kinds), max(map(len, ranks.values())) + 1), most + 1)
        self.step = np.zeros((len(self.kinds), most + 1), dtype=np.int64)
        for number, counts in enumerate(ranks.values()):
            self.first[number, : len(counts)] = counts
            self.step[number] = np.searchsorted(counts, np.arange(most + 1), "right") - 1
        self.kind_of = np.array([self.kinds.index(kind) for _, kind in pools])
        self.room = np.zeros((len(pools), self.first.shape[1]), dtype=np.int64)  # level of memory for an engine
        # The least seconds of each call, and of all calls of a role together (one layout serves them all).
        self.roles = [role for role in problem.workload.roles if role != "rollout"]
        self.columns = (*problem.calls, *self.roles)
        self.scenarios = problem.model.scenarios + 1  # the last stands for the mean
        self.seconds = np.full((len(pools), len(self.columns), self.first.shape[1], self.scenarios), NEVER)
        for (roles, kind), number in self._number.items():
            self._fill(self.seconds[number], self.room[number], roles, kind)
        self.generation = [Generation(problem, kind, there[kind]) for kind in self.kinds]
        load = np.minimum(self.seconds[:, len(problem.calls) :].sum(axis=1), NEVER)
        self.load = self.problem.objective_of(load)  # [tables, steps]; falling, and no size is enough in the end
        for number, kind in enumerate(self.kind_of):
            self.load[number, len(ranks[self.kinds[kind]]) :] = -np.inf
        self.rows = self._rows(programs or [None] * len(arrangements))

    # --- the tables ---

    def _fill(self, table: Array, room: NDArray[np.int64], roles: frozenset[str], kind: str) -> None:
        """Least seconds [C, steps, S] of the calls of a pool's roles, and the room that they leave to an engine, by the
        steps of its size."""
        problem = self.problem
        held = [role for role in problem.workload.roles if role in roles and role != "rollout"]
        engine = self._engine(kind) if "rollout" in roles else np.zeros(2)
        allowed = problem.allowed(bool(held), "rollout" in roles, kind)
        steps = len(problem.ranks(kind))
        made = [self._role(role, kind) for role in held]
        least = np.stack([memory for _, _, memory in made]) if made else np.zeros((0, steps, 2))
        idle = least[:, :, 0].sum(axis=0) + engine[0]
        surplus = np.maximum(least[:, :, 1].max(axis=0, initial=0.0), engine[1])
        table[:] = 0.0
        own = {*held, *(call for role in held for call in problem.calls_of(role))}
        rows = [row for row, name in enumerate(self.columns) if name in own]
        for number, (role, (alone, kept, _)) in enumerate(zip(held, made, strict=True)):
            left = allowed - (idle - least[number, :, 0])
            others = np.maximum(np.delete(least[:, :, 1], number, axis=0).max(axis=0, initial=0.0), engine[1])
            levels = [_level(problem, kind, bytes_left) for bytes_left in (left, left - others)]
            at = np.arange(steps)
            found = np.maximum(alone[:, at, levels[0]], kept[:, at, levels[1]])
            for name, seconds in zip((*problem.calls_of(role), role), found, strict=True):
                table[self.columns.index(name), :steps] = seconds
        table[np.ix_(np.array(rows or range(len(table))), np.flatnonzero(idle + surplus > allowed))] = NEVER
        table[:, steps:] = NEVER
        room[:steps] = _level(problem, kind, allowed - (idle - engine[0])) if held else ALONE

    def _role(self, role: str, kind: str) -> tuple[Array, Array, Array]:
        """Of a role alone: least seconds [calls + 1, steps, levels, S] (the last of all its calls together) of the
        layouts that need at most a level of memory while they run, the same of what they keep while they idle, and the
        least memory [steps, 2]."""
        if (role, kind) not in self._made:
            problem = self.problem
            layouts, counts = problem.layouts(role, kind), problem.ranks(kind)
            step = np.searchsorted(counts, layouts.grid.gpus)
            memory = np.full((len(counts), 2), NEVER)
            np.minimum.at(memory, step, layouts.memory[:, :2])
            tables = []
            seconds = with_mean(np.concatenate([layouts.seconds, layouts.seconds.sum(axis=0)[None]]))
            for needed in (layouts.memory[:, :2].sum(axis=1), layouts.memory[:, 0]):
                tables.append(_least(seconds, step, _level(problem, kind, needed), len(counts)))
            self._made[role, kind] = tables[0], tables[1], np.minimum.accumulate(memory, axis=0)
        return self._made[role, kind]

    def _engine(self, kind: str) -> Array:
        """The least resident bytes and the least surplus of an engine on a kind of GPU."""
        problem, device = self.problem, self.problem.device(kind)
        found = [np.full(2, NEVER)]
        for split in tensor_parallels(problem.workload, device):
            engines = gpus_of_kinds(problem.cluster)[kind] // split
            for slots in concurrencies(problem.workload, split, engines, device)[:1] if engines else []:
                found += [bytes_of(memory)[:2] for memory in _engine_memory(problem, kind, split, slots)]
        return np.asarray(np.min(found, axis=0))

    def sharpen(self, number: int, sizes: NDArray[np.int64], limit: float, queues: bool = True) -> bool:
        """Simulate generation on these sizes [1, P] where that may show the bound to be no less than `limit` seconds;
        engines with `queues` too, which take longer. Whether it told more."""
        one = np.array([number])
        seconds = self._least(one, sizes, sizes)
        generate, cuts = self.problem.calls.index("generate"), self._cuts_of(number, CUTS)

        def slower(times: float) -> float:
            longer = seconds.copy()
            longer[:, generate] *= times
            return float(self._bound(longer, self.rows.rates[one], cuts)[0])

        times = next((times for times in LOOSE if slower(times) >= limit), None)
        if times is None:
            return False
        return self.generation[int(self.rows.kind[number])].sharpen(*self._engine_pools(one, sizes), times, queues)

    def refresh(self) -> None:
        """Take up what has been simulated meanwhile."""
        for generation in self.generation:
            generation.refresh()

    def fewer_engines_are_faster(self, number: int, sizes: NDArray[np.int64]) -> bool:
        """Whether generation on these sizes [1, P] may be slower than on smaller ones, as it happens to be dealt."""
        return self.generation[int(self.rows.kind[number])].falls(*self._engine_pools(np.array([number]), sizes))

    def _engine_pools(
        self, number: NDArray[np.int64], sizes: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The sizes [n, P] of the generating pools, -1 for others, and the level of memory [n] that all leave."""
        generates, table = self.rows.generates[number], self.rows.table[number]
        room = np.where(generates, self.room[table, self.step[self.kind_of[table], sizes]], ALONE)
        return np.where(generates, sizes, -1), room.min(axis=1)

    def _rows(self, programs: Sequence[Program | None]) -> Rows:
        problem = self.problem
        calls, pools = problem.calls, max(len(a.structure) for a in self.arrangements)
        columns: list[list[object]] = [[] for _ in Rows._fields]
        listed = []
        for a, program in zip(self.arrangements, programs, strict=True):
            own = zip(a.structure, a.kinds, strict=True)
            pad = [0] * (pools - len(a.structure))
            actor = next(i for i, roles in enumerate(a.structure) if "actor" in roles)
            homes = [
                next((i for i, roles in enumerate(a.structure) if role in roles), 0)
                for role in (*((problem.flow[call].roles or ("",))[0] for call in calls), *self.roles)
            ]
            kind = a.kinds[a.generating[0]]
            values: list[object] = [
                [self._number[pool] for pool in own] + pad,
                homes,
                ["rollout" in roles for roles in a.structure] + [False] * len(pad),
                [i == actor for i in range(pools)],
                self.kinds.index(kind),
                problem.node(kind) if kind == a.kinds[actor] else 0,
                [self._hand_over(a, actor, same_node=same_node) for same_node in (True, False)],
            ]
            for column, value in zip(columns, values, strict=False):
                column.append(value)
            sharing = sharing_of(problem.flow, a.structure)
            if program:
                listed.append(rates(cycles_of(problem.flow, sharing, program.items)))
            else:
                listed.append(bound_rates(problem.flow, sharing, problem.max_staleness))
        every = np.zeros((len(listed), max(map(len, listed)), len(self.columns)))
        for number, found in enumerate(listed):
            every[number, : len(found)] = self._by_role(found)
        return Rows(*(np.array(column) for column in columns[:-1]), every)  # type: ignore[call-arg]

    def _by_role(self, rates: Array) -> Array:
        """Rates [..., columns] in which roles stand for their calls where these count alike."""
        calls = self.problem.calls
        found = np.concatenate([rates, np.zeros((*rates.shape[:-1], len(self.roles)))], axis=-1)
        for number, role in enumerate(self.roles):
            own = [calls.index(call) for call in self.problem.calls_of(role)]
            alike = (rates[..., own] == rates[..., own[:1]]).all(axis=-1)
            found[..., len(calls) + number] = np.where(alike, rates[..., own[0]], 0.0)
            for call in own:
                found[..., call] = np.where(alike, 0.0, rates[..., call])
        return found

    def _hand_over(self, a: Arrangement, actor: int, *, same_node: bool) -> float:
        """Seconds that handing over the weights takes at least."""
        problem, device = self.problem, self.problem.device(a.kinds[actor])
        splits = tensor_parallels(problem.workload, problem.device(a.kinds[a.generating[0]]))
        shared = actor in a.generating
        seconds = min(
            hand_over_seconds(
                problem.workload.actor.shape, device, problem.cluster, split, same_node=same_node, shared=shared,
                separate=len(a.generating) > shared,
            )
            for split in splits
        )  # fmt: skip
        return seconds * problem.model.least_transfer_ratio(device)

    # --- bounds ---

    def of(self, number: NDArray[np.int64], low: NDArray[np.int64], high: NDArray[np.int64]) -> Array:
        """Seconds [n] that no program of arrangement `number` [n] is below on pools of sizes between `low` and `high`
        [n, P], which are 0 where there is no pool."""
        return self._bound(self._least(number, low, high), self.rows.rates[number])

    def with_cuts(self, number: int, low: NDArray[np.int64], high: NDArray[np.int64], last: int) -> Array:
        """The same of one arrangement, by the `last` few cuts of its programs alone."""
        cuts, bound = self._cuts_of(number, last), np.zeros(len(low))
        for first in range(0, len(low) if cuts else 0, AT_ONCE):
            part = slice(first, first + AT_ONCE)
            seconds = self._least(np.full(len(low[part]), number), low[part], high[part])
            bound[part] = self._bound(seconds, self.rows.rates[number], cuts)
        return bound

    def _bound(self, seconds: Array, rates: Array, cuts: Sequence[Cut] = ()) -> Array:
        """Seconds [n] that no program with these `rates` and `cuts` is below at least seconds [n, C, S + 1]."""
        objective = self.problem.objective_of
        bound = objective((rates @ seconds).max(axis=1))
        for cut in cuts:
            bound = np.maximum(bound, cut.bound(seconds, objective))
        return np.asarray(np.minimum(bound, NEVER))

    def cut(self, number: int, low: NDArray[np.int64], high: NDArray[np.int64], limit: float) -> bool:
        """Whether no program of one arrangement is below `limit` seconds with the least durations on sizes [1, P]; then
        what shows it is kept."""
        seconds = self._least(np.array([number]), low, high)[0, : len(self.problem.calls)]
        sharing = sharing_of(self.problem.flow, self.arrangements[number].structure)
        return self.problem.best_program(sharing, seconds, limit, any_below=True).program is None

    def _cuts_of(self, number: int, last: int) -> list[Cut]:
        """The last few cuts of an arrangement's programs, by role."""
        sharing = sharing_of(self.problem.flow, self.arrangements[number].structure)
        return [Cut(self._by_role(cut.rates)) for cut in self.problem.cuts(sharing)[-last:]]

    def _least(self, number: NDArray[np.int64], low: NDArray[np.int64], high: NDArray[np.int64]) -> Array:
        """Least seconds [n, C, S + 1] of the calls, and of each role's calls together."""
        rows, calls = self.rows, self.problem.calls
        at = np.arange(len(number))[:, None]
        home = rows.home[number]
        table = rows.table[number][at, home]
        step = self.step[self.kind_of[table], high[at, home]]
        seconds = self.seconds[table, np.arange(len(self.columns)), step]
        for row, name in enumerate(calls):
            if not self.problem.flow[name].roles:
                seconds[:, row] = with_mean(self.problem.model.host(name).seconds)
        seconds[:, calls.index("generate")] = self._generate(number, high)
        for name in ("sync_weights", "actor"):
            seconds[:, self.columns.index(name)] += self._handed(number, low)[:, None]
        return np.asarray(np.minimum(seconds, NEVER))

    def _generate(self, number: NDArray[np.int64], sizes: NDArray[np.int64]) -> Array:
        """Seconds [n, S + 1] with all the engines that the generating pools have room for, or any fewer."""
        found = np.full((len(number), self.scenarios), NEVER)
        pools, room = self._engine_pools(number, sizes)
        for kind, generation in enumerate(self.generation):
            of_kind = np.flatnonzero(self.rows.kind[number] == kind)
            if len(of_kind):
                found[of_kind] = generation.least(pools[of_kind], room[of_kind])
        return found

    def _handed(self, number: NDArray[np.int64], low: NDArray[np.int64]) -> Array:
        """Seconds [n] of handing over the weights; between nodes where these sizes are too many for one."""
        rows = self.rows
        gpus = np.where(rows.generates[number] | rows.acts[number], low, 0).sum(axis=1)
        return np.asarray(np.where(gpus > rows.node[number], rows.hand_over[number, 1], rows.hand_over[number, 0]))

    def may_share_a_node(
        self, number: NDArray[np.int64], low: NDArray[np.int64], high: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Whether some sizes of a box [n] hand weights over within a node, and others have to between nodes."""
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
        """The least size of each pool [n, P] whose own load allows a step below `limit` [n] seconds, if generation has
        at most all GPUs of its pools. More than there are where none does."""
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


class Generation:
    """What generation takes at least on the GPUs of a kind: tables [engine sizes, levels of memory, numbers of engines,
    S + 1] of the least seconds of all layouts that need no more of either."""

    def __init__(self, problem: Problem, kind: str, gpus: int) -> None:
        self.problem, self.kind, self.device = problem, kind, problem.device(kind)
        self.splits = [t for t in tensor_parallels(problem.workload, self.device) if t <= problem.node(kind)]
        self.counts = np.array(engine_counts(gpus, problem.workload.batch))
        self._row: dict[tuple[int, int, int], int] = {}  # (engine size, slots, engines)
        columns, most = list[tuple[int, int, int, int]](), list[int]()
        for number, split in enumerate(self.splits):
            for at, engines in enumerate(self.counts[: np.searchsorted(self.counts, gpus // split, "right")].tolist()):
                for slots in concurrencies(problem.workload, split, engines, self.device):
                    fraction = rollout_fraction(problem.workload, split, slots, self.device)
                    self._row[split, slots, engines] = len(columns)
                    columns.append((number, at, slots, round(100 * fraction)))
                most += [len(columns) - 1] if columns and columns[-1][:2] == (number, at) else []
        self._most = np.isin(np.arange(len(columns)), most)  # what an engine that shares its GPUs with no role may have
        self._number, self._at, self._slots, shares = np.array(columns).reshape(-1, 4).T.astype(np.int64)
        needed = shares / 100 * self.device.memory_bytes - process_bytes(self.device)
        self._level = _level(problem, kind, needed * (self.device.kind == "cuda"))
        self._seconds = np.full((len(columns), problem.model.scenarios), NEVER)
        self._least, self._objective = self._seconds.copy(), np.full(len(columns), NEVER)
        for number, split in enumerate(self.splits):
            rows = np.flatnonzero(self._number == number)
            engines = self.counts[self._at[rows]]
            self._seconds[rows] = problem.model.floors(split, self._slots[rows], engines, self.device)
        self._known = 0
        self._refilled(np.arange(len(columns)))

    def _refilled(self, rows: NDArray[np.int64]) -> None:
        """Make the tables anew after the seconds of some rows have changed."""
        problem, device = self.problem, self.device
        for split in {self.splits[number] for number in self._number[rows].tolist()}:
            own = rows[self._number[rows] == self.splits.index(split)]
            engines = self.counts[self._at[own]]
            self._least[own] = problem.model.generate_least(
                self._seconds[own], split, self._slots[own], engines, device
            )
        self._objective[rows] = problem.statistic(self._least[rows])
        self.exact = np.full((len(self.splits), ALONE + 1, len(self.counts), problem.model.scenarios + 1), NEVER)
        least = with_mean(self._least)
        np.minimum.at(self.exact, (self._number, self._level, self._at), least)
        np.minimum.accumulate(self.exact, axis=1, out=self.exact)
        self.exact[:, ALONE] = NEVER
        self.exact[self._number[self._most], ALONE, self._at[self._most]] = least[self._most]
        self.table = np.minimum.accumulate(self.exact, axis=2)

    def refresh(self) -> bool:
        """Take up what has been simulated meanwhile; whether that is anything new."""
        runs = self.problem.model.generations
        known = sum(run.known for run in runs.values())
        if known == self._known:
            return False
        changed = []
        for (split, slots, engines), run in runs.items():
            row = self._row.get((split, slots, engines[0][1])) if engines[0][0] == self.device else None
            if row is not None and len(engines) == 1 and (run.seconds > self._seconds[row]).any():
                self._seconds[row] = np.maximum(self._seconds[row], run.seconds)
                changed.append(row)
        self._known = known
        if changed:
            self._refilled(np.array(changed))
        return bool(changed)

    def sharpen(self, pools: NDArray[np.int64], room: NDArray[np.int64], times: float, queues: bool) -> bool:
        """Simulate, of what fits pools of these sizes [1, P], all that might be fastest (with `queues` or without them),
        until nothing is below so many `times` the least floor or something is known to be; whether that told more."""
        able_at = self._most if room[0] == ALONE else self._level <= room[0]
        rows = np.concatenate([
            np.flatnonzero((self._number == which) & (self._at <= count[0]) & able_at)
            for which, count, able in self._fitting(pools) if able[0]
        ] or [np.zeros(0, np.int64)])  # fmt: skip
        floors = self.problem.statistic(self._seconds[rows])
        queued = self._slots[rows] * self.counts[self._at[rows]] < self.problem.workload.batch  # slow to simulate
        enough = 1.001 * times * float(floors.min(initial=NEVER))
        for at in np.lexsort((floors, queued)).tolist():
            if floors[at] < enough and (queues or not queued[at]):
                split, engines = self.splits[self._number[rows[at]]], int(self.counts[self._at[rows[at]]])
                run = self.problem.model.generation(split, int(self._slots[rows[at]]), ((self.device, engines),))
                while not run.done and float(self.problem.statistic(run.seconds)) < enough:
                    run.advance()
                if float(self.problem.statistic(run.seconds)) < enough:
                    break
        return self.refresh()

    def falls(self, pools: NDArray[np.int64], room: NDArray[np.int64]) -> bool:
        """Whether fewer engines than fit pools of these sizes [1, P] may be faster."""
        return any(
            bool((self.table[which, room[0], count[0]] < self.exact[which, room[0], count[0]]).any())
            for which, count, able in self._fitting(pools) if able[0]
        )  # fmt: skip

    def _fitting(self, pools: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.bool_]]]:
        """Of each engine size which number of engines fits pools of these sizes [n, P], and whether each has one."""
        for which, split in enumerate(self.splits):
            each = np.where(pools >= 0, pools // split, 0)
            able = np.asarray(((each > 0) | (pools < 0)).all(axis=1), dtype=np.bool_)
            yield which, np.searchsorted(self.counts, each.sum(axis=1), "right") - 1, able

    def least(self, pools: NDArray[np.int64], room: NDArray[np.int64]) -> Array:
        """Seconds [n, S + 1] with the engines that fit pools of these sizes [n, P] (-1: not the rollout's), each of
        which needs one, in a level of memory [n]; or with any fewer engines."""
        found, table = np.full((len(pools), self.table.shape[3]), NEVER), self.table
        for which, count, able in self._fitting(pools):
            found = np.minimum(found, np.where(able[:, None], table[which, room, count], NEVER))
        return found


def _level(problem: Problem, kind: str, size: Any) -> NDArray[np.int64]:
    """Levels of memory that so many bytes need: what fits has no higher a level than the room."""
    share = np.asarray(size) / problem.device(kind).memory_bytes
    return np.clip(np.ceil(share * LEVELS), 0, LEVELS).astype(np.int64)


def _named(pool: tuple[frozenset[str], str]) -> tuple[list[str], str]:
    return sorted(pool[0]), pool[1]


def _least(seconds: Array, step: NDArray[np.int64], level: NDArray[np.int64], steps: int) -> Array:
    """The least seconds [calls, steps, levels, S] of rows [calls, n, S] of at most a step and at most a level."""
    found = np.full((seconds.shape[0], steps * (LEVELS + 1), seconds.shape[2]), NEVER)
    cell = step * (LEVELS + 1) + level
    order = np.argsort(cell, kind="stable")
    cells, first = np.unique(cell[order], return_index=True)
    if len(cells):
        found[:, cells] = np.minimum.reduceat(seconds[:, order], first, axis=1)
    table = found.reshape(seconds.shape[0], steps, LEVELS + 1, seconds.shape[2])
    return np.asarray(np.minimum.accumulate(np.minimum.accumulate(table, axis=1), axis=2))


def _engine_memory(problem: Problem, kind: str, tensor_parallel: int, slots: int) -> list[RoleMemory]:
    """Of an engine of that size, awake and asleep while it idles; none if it does not fit."""
    device = problem.device(kind)
    fraction = rollout_fraction(problem.workload, tensor_parallel, slots, device)
    if fraction > 1:
        return []
    on_cpu = device.kind == "cpu"
    return [
        rollout_memory(
            problem.workload,
            RolloutRole(
                engine="transformers" if on_cpu else "vllm", pools=("p",), tensor_parallel=tensor_parallel, replicas=1,
                memory_fraction=fraction, concurrency=slots, offload=offload,
            ),
            device,
        )
        for offload in ((False,) if on_cpu else (False, True))
    ]  # fmt: skip
