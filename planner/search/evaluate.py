"""One placement: the best layouts of its roles, jointly under memory, and the best program."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.predict.cost import Place
from planner.predict.cycle import undominated
from planner.predict.memory import batch_bytes
from planner.search.engines import EngineTable, with_mean
from planner.search.options import Array, Layouts, Problem, bytes_of, together
from planner.search.programs import SAME, Program, cycles_of, rates, sharing_of
from planner.search.space import Arrangement, Part, Structure, arrangements, gpus_of, spread
from planner.spec.plan import Gpu, RolloutRole, TrainerRole

FEW = 3  # layouts of the rollout that a quick plan tries
NEAR = 0.98  # of a limit: a bound below it leaves much
AT_ONCE = 64  # combinations of layouts whose programs are bounded together


class Candidate(NamedTuple):
    """A placement with layouts and program, and its step time in seconds (the objective over the length scenarios)."""

    seconds: float
    structure: Structure
    pools: tuple[tuple[Gpu, ...], ...]
    trainers: dict[str, TrainerRole]
    rollout: RolloutRole
    program: Program


class Outcome(NamedTuple):
    """The best candidate of a placement, None if nothing fits or is below the limit. `filled`: every pool fills its
    nodes, so that no smaller pools could be better."""

    best: Candidate | None
    filled: bool


class Site:
    """A placement on real nodes, with the layouts of each role on its pool; or an `ideal` one, as if every pool filled
    nodes of its own and hosts had any memory, which no placement of these sizes or smaller ones is better than."""

    def __init__(self, problem: Problem, arrangement: Arrangement, counts: Sequence[int], ideal: bool = False) -> None:
        self.problem, self.structure, self.kinds = problem, arrangement.structure, arrangement.kinds
        self.counts, self.ideal = tuple(counts), ideal
        self.spread: tuple[tuple[Part, ...], ...] = ()
        if ideal:
            parts = [_filled(count, problem.node(kind)) for count, kind in zip(counts, self.kinds, strict=True)]
        else:
            self.spread = spread(counts, problem.cluster, arrangement.kinds)
            parts = [tuple(count for *_, count in pool) for pool in self.spread]
        self.places = tuple(
            Place(parts=found, device=problem.device(kind)) for found, kind in zip(parts, self.kinds, strict=True)
        )
        roles = [role for role in problem.workload.roles if role != "rollout"]
        self.pool_of = {role: next(i for i, pool in enumerate(self.structure) if role in pool) for role in roles}
        self.generating = arrangement.generating
        self.layouts = {
            role: problem.layouts_at(role, self.kinds[i], self.places[i]) for role, i in self.pool_of.items()
        }
        node = problem.node(self.kinds[self.pool_of["actor"]])
        handed = problem.hand_over(arrangement, same_node=self.same_node)
        self.layouts["actor"] = self.layouts["actor"].of_shards(arrangement.within, node).with_sync(handed)
        self.sharing = sharing_of(problem.flow, self.structure)

    @cached_property
    def same_node(self) -> bool:
        pools = {self.pool_of["actor"], *self.generating}
        if self.ideal:
            kinds = {self.kinds[i] for i in pools}
            return len(kinds) == 1 and sum(self.counts[i] for i in pools) <= self.problem.node(*kinds)
        return len({node for i in pools for node, *_ in self.spread[i]}) == 1

    @property
    def engines(self) -> EngineTable:
        return self.problem.engines(self.kinds[self.generating[0]])

    @property
    def shared(self) -> bool:
        """Whether engines share GPUs with other roles."""
        return any(self.held(i) for i in self.generating)

    @property
    def filled(self) -> bool:
        """Whether each pool lies on whole nodes of its kind's largest size, and what is left of it on one."""
        nodes = [self.problem.node(kind) for kind in self.kinds]
        return all(
            all(part == node for part in place.parts[:-1]) for place, node in zip(self.places, nodes, strict=True)
        )

    def held(self, pool: int) -> list[str]:
        """The trained and inference roles of a pool."""
        return [role for role, i in self.pool_of.items() if i == pool]

    def allowed(self, pool: int) -> int:
        return self.problem.allowed(bool(self.held(pool)), pool in self.generating, self.kinds[pool])

    def engine(self, pool: int, engine: Array) -> Array:
        """Bytes [3] of the engine on a GPU of a pool."""
        return engine if pool in self.generating else np.zeros(3)


def _filled(gpus: int, node: int) -> tuple[int, ...]:
    """GPUs per node of nodes that are filled one after the other."""
    return (node,) * (gpus // node) + ((gpus % node,) if gpus % node else ())


class Engines(NamedTuple):
    """A layout of the rollout, the memory of an engine on each GPU, and seconds [S] of `generate`."""

    layout: RolloutRole
    memory: Array
    seconds: Array


def evaluate(
    problem: Problem,
    arrangement: Arrangement | Structure,
    counts: Sequence[int],
    limit: float = np.inf,
    fixed: Program | None = None,
) -> Outcome:
    """The best layouts and program of one placement (or the best layouts for a `fixed` program). A structure alone is
    taken on the first kinds that have room."""
    if not isinstance(arrangement, Arrangement):
        placed = _first_with_room(problem, arrangement, counts)
        if placed is None:
            return Outcome(None, False)
        arrangement = placed
    site = Site(problem, arrangement, counts)
    return Outcome(_best_at(site, limit, fixed), site.filled)


def dismissed(problem: Problem, arrangement: Arrangement, counts: Sequence[int], limit: float) -> bool:
    """Whether a look at each role's layouts alone shows that no placement of these sizes or smaller ones is below
    `limit` seconds."""
    site = Site(problem, arrangement, counts, ideal=True)
    return not len(_rows_below(site, _floor(site, None), limit))


def ideal_seconds(problem: Problem, arrangement: Arrangement, counts: Sequence[int], limit: float) -> float:
    """What no placement of these sizes or smaller ones is below, were it not for generation that is faster on fewer
    engines; `limit` seconds if that is no less."""
    best = _best_at(Site(problem, arrangement, counts, ideal=True), limit, None)
    return best.seconds if best else limit


def guess(
    problem: Problem, arrangement: Arrangement, counts: Sequence[int], limit: float, fixed: Program | None
) -> Candidate | None:
    """A good plan of a placement that is below `limit` seconds, quickly: on all GPUs that a role can use, with engines
    that have a slot for every sequence if there are any."""
    site = Site(problem, arrangement, counts)
    for role, layouts in site.layouts.items():
        used = layouts.grid.gpus
        site.layouts[role] = layouts.take(np.flatnonzero(used == used.max(initial=0)))
    return _best_at(site, limit, fixed, quick=True)


def _floor(site: Site, fixed: Program | None) -> Array:
    """Rows of rates that no program is below."""
    flow, sharing = site.problem.flow, site.sharing
    return rates(cycles_of(flow, sharing, fixed.items)) if fixed else site.problem.choices(sharing).floor


def _bound(site: Site, floor: Array, seconds: Array) -> Array:
    """Seconds [n] that no program is below at durations [n, calls, S + 1]."""
    objective = site.problem.objective_of
    bound = objective((floor @ seconds).max(axis=1))
    for cut in site.problem.cuts(site.sharing):
        bound = np.maximum(bound, cut.bound(seconds, objective))
    return bound


def _best_at(site: Site, limit: float, fixed: Program | None, quick: bool = False) -> Candidate | None:
    floor, found = _floor(site, fixed), list[Candidate]()  # each better than the one before

    def below() -> float:
        return _below(limit, found[-1] if found else None)

    for engines, least in _worth_trying(site, floor, below, quick):
        loose = bool(_bound(site, floor, with_mean(least)[None])[0] < NEAR * below())
        # First what is surely good; then all that may be better, unless that is too much to be looked at quickly.
        for rough in (True, False)[not loose : 2 - (loose and quick)]:
            kept = _kept(site, engines, least, floor, below())
            picks = _picks(site, engines, kept, floor, below(), rough)
            if len(picks) and (better := _best_of(site, engines, picks, floor, below(), fixed, quick)):
                found.append(better)
    return found[-1] if found else None


def _best_of(
    site: Site, engines: Engines, picks: "Picks", floor: Array, limit: float, fixed: Program | None, quick: bool
) -> Candidate | None:
    """The best of some combinations of layouts with its best program, if it is below `limit` seconds; `quick`: of the
    few with the lowest bounds."""
    problem, best, chosen = site.problem, None, 0
    seconds = with_mean(_seconds(site, engines, picks).swapaxes(0, 1))
    bound = problem.objective_of((floor @ seconds).max(axis=1))
    if fixed:
        n = int(bound.argmin())
        return _candidate(float(bound[n]), site, engines, picks, n, fixed) if bound[n] < limit else None
    looks = 0
    while (least := bound.min()) < _below(limit, best) and not (quick and looks >= FEW):
        looks += 1
        few = len(bound) <= AT_ONCE
        near = np.arange(len(bound)) if few else np.sort(np.argpartition(bound, AT_ONCE)[:AT_ONCE])
        bound[near] = _bound(site, floor, seconds[near])
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


def _first_with_room(problem: Problem, structure: Structure, counts: Sequence[int]) -> Arrangement | None:
    found = arrangements(structure, problem.cluster)
    return next((a for a in found if all(sum(counts[i] for i in pools) <= most for pools, most in a.limits)), None)


def _below(limit: float, best: Candidate | None) -> float:
    """What a step time must be below to count as better."""
    return min(limit, best.seconds if best else np.inf) * (1 - SAME)


# --- the layouts that may be best ---


def _worth_trying(
    site: Site, floor: Array, below: Callable[[], float], quick: bool = False
) -> Iterator[tuple[Engines, Array]]:
    """The rollout layouts that may lead below the threshold, and what no layouts of the other roles undercut beside
    each; the fastest generation first of those with a slot for every sequence, which are simulated at once, then of
    those with a queue (only the first few of all if `quick`), only where no floor
    rules them out."""
    problem, statistic = site.problem, site.problem.statistic
    table, generate = site.engines, problem.calls.index("generate")
    rows = _rows_below(site, floor, below())
    rows = rows[np.lexsort((statistic(table.seconds[rows]), table.queued[rows]))]
    rows = rows[:FEW] if quick else rows
    known: list[int] = []
    for row in rows.tolist():
        if any(_outdone(table, row, other) for other in known):
            continue
        for offload in table.offloads(site.shared):
            memory, moves = bytes_of(table.memory(row, offload)), table.moves(row, offload)
            least = _least(site, memory)
            if least is None:
                continue
            least[generate] = table.seconds[row] + moves
            while _bound(site, floor, with_mean(least)[None])[0] < below():
                if table.simulation(row).done:
                    known.append(row)
                    layout = table.layout(row, tuple(f"p{i}" for i in site.generating), offload)
                    yield Engines(layout, memory, least[generate]), least
                    break
                table.advance(row)
                least[generate] = table.seconds[row] + moves


def _rows_below(site: Site, floor: Array, limit: float) -> NDArray[np.int64]:
    """The engines with which the least that the other roles take, each call for itself, is below the limit; none if
    some role has no layout whose calls all together are."""
    problem, table = site.problem, site.engines
    rows, least = table.rows_on([site.places[i].parts for i in site.generating], site.shared), _least(site, np.zeros(3))
    if least is None:
        return rows[:0]
    many = np.repeat(least[None], len(rows), axis=0)
    many[:, problem.calls.index("generate")] = table.seconds[rows]
    rows = rows[problem.objective_of((floor @ with_mean(many)).max(axis=1)) < limit]
    if not len(rows):
        return rows
    least[problem.calls.index("generate")] = table.seconds[rows].min(axis=0)
    possible = _bound(site, floor, with_mean(least)[None])[0] < limit and _possible(site, least, floor, limit)
    return rows if possible else rows[:0]


def _possible(site: Site, least: Array, floor: Array, limit: float) -> bool:
    """Whether each role has a layout with which all of its own calls together do not exceed the limit, if the others
    take their `least` seconds [C, S]."""
    problem = site.problem
    if not np.isfinite(limit) or problem.objective == "p95":
        return True
    for role, layouts in site.layouts.items():
        own = [problem.calls.index(call) for call in problem.calls_of(role)]
        rest = np.delete(floor, own, axis=1) @ np.delete(least, own, axis=0).mean(axis=1)
        if not ((floor[:, own] @ layouts.means + rest[:, None]).max(axis=0) < limit).any():
            return False
    return True


def _outdone(table: EngineTable, row: int, known: int) -> bool:
    """Whether a row that has been simulated is no slower in any scenario and needs no more memory."""
    less = table.percent[known] <= table.percent[row] and table.number[known] == table.number[row]
    return bool(row != known and less and (table.seconds[known] <= table.seconds[row]).all())


def _least(site: Site, engine: Array) -> Array | None:
    """Seconds [C, S] that no layouts of the other roles undercut beside an engine of such memory, generation apart;
    None if nothing fits."""
    problem = site.problem
    least = np.zeros((len(problem.calls), problem.model.scenarios))
    for i in range(len(site.structure)):
        for role, fits in _fitting(site, i, engine).items():
            if not len(fits):
                return None
            for call, seconds in zip(problem.calls_of(role), site.layouts[role].seconds, strict=True):
                least[problem.calls.index(call)] = seconds[fits].min(axis=0)
    return _with_host(site, least)


def _with_host(site: Site, least: Array) -> Array:
    """With the host's calls."""
    problem = site.problem
    for row, name in enumerate(problem.calls):
        if not problem.flow[name].roles:
            least[row] = problem.model.host(name).seconds
    return least


def _fitting(site: Site, pool: int, engine: Array) -> dict[str, NDArray[np.int64]]:
    """For each role of a pool the layouts that fit beside the engine and the smallest of each other role."""
    held = site.held(pool)
    sizes = [site.layouts[role].memory for role in held]
    least = np.array([site.engine(pool, engine)[:2], *(rows[:, :2].min(axis=0, initial=np.inf) for rows in sizes)])
    found = {}
    for i, role in enumerate(held):
        others = np.delete(least, i + 1, axis=0)
        needed = sizes[i][:, 0] + others[:, 0].sum() + np.maximum(sizes[i][:, 1], others[:, 1].max())
        found[role] = np.flatnonzero(needed <= site.allowed(pool))
    return found


def _kept(site: Site, engines: Engines, least: Array, floor: Array, threshold: float) -> dict[str, Layouts]:
    """Of each role the layouts that fit and that do not by themselves exceed the threshold, undominated."""
    problem = site.problem
    found = {}
    for i in range(len(site.structure)):
        for role, fits in _fitting(site, i, engines.memory).items():
            own = [problem.calls.index(call) for call in problem.calls_of(role)]
            layouts = site.layouts[role]
            if np.isfinite(threshold):
                rest = floor @ np.where(np.isin(np.arange(len(least)), own)[:, None], 0.0, least)
                if problem.objective != "p95":  # means first: there are fewer
                    load = floor[:, own] @ layouts.means[:, fits] + rest.mean(axis=1)[:, None]
                    fits = fits[load.max(axis=0) < threshold]
                layouts = layouts.take(fits)
                load = np.einsum("rc,cns->nrs", floor[:, own], layouts.seconds) + rest
                layouts = layouts.take(np.flatnonzero(problem.statistic(load.max(axis=1)) < threshold))
                columns = [layouts.memory, *layouts.seconds]
                if role == "actor":  # what a sync really takes may depend on the shards
                    columns += [layouts.grid.shard[:, None], -layouts.grid.shard[:, None]]
            else:
                layouts = layouts.take(fits)
                columns = [layouts.memory, layouts.means.sum(axis=0)[:, None]]
            found[role] = layouts.take(undominated(-np.concatenate(columns, axis=1)))
    return found


class Picks(NamedTuple):
    """Combinations of layouts: of each role the rows [n] of its layouts."""

    layouts: dict[str, Layouts]
    rows: dict[str, NDArray[np.int64]]

    def __len__(self) -> int:
        return min(map(len, self.rows.values()))

    def take(self, which: NDArray[np.int64]) -> "Picks":
        return Picks(self.layouts, {role: rows[which] for role, rows in self.rows.items()})


def _picks(
    site: Site, engines: Engines, kept: dict[str, Layouts], floor: Array, threshold: float, rough: bool
) -> Picks:
    """Combinations of layouts that fit their pools and hosts: with `rough` the one with the least load on each pool,
    else all whose bound is below the threshold."""
    engine = engines.memory
    picks = Picks(kept, dict.fromkeys(kept, np.zeros(0, np.int64)))
    if not all(len(layouts.memory) for layouts in kept.values()):
        return picks
    if rough:
        for i in range(len(site.structure)):
            picks.rows.update(_lightest(site, i, kept, engine))
    else:
        picks = Picks(kept, _promising(site, engines, kept, floor, threshold))
    return picks.take(_hosts_hold(site, engine, picks)) if len(picks) and not site.ideal else picks


def _lightest(site: Site, pool: int, kept: dict[str, Layouts], engine: Array) -> dict[str, NDArray[np.int64]]:
    """The joint layouts of a pool's roles with the least seconds of all calls together; empty if none fit."""
    memory, load = site.engine(pool, engine)[None], np.zeros(1)
    picks = dict[str, NDArray[np.int64]]()
    for role in site.held(pool):
        layouts = kept[role]
        own = layouts.means.sum(axis=0)
        old, new = (grid.ravel() for grid in np.mgrid[: len(load), : len(own)])
        memory, load = together(memory[old], layouts.memory[new]), load[old] + own[new]
        fits = np.flatnonzero(memory[:, 0] + memory[:, 1] <= site.allowed(pool))
        best = fits[undominated(-np.column_stack([memory, load])[fits])] if len(fits) else fits
        picks = {other: rows[old[best]] for other, rows in picks.items()} | {role: new[best]}
        memory, load = memory[best], load[best]
    first = load.argmin() if len(load) else 0
    return {role: rows[first : first + 1] for role, rows in picks.items()}


def _promising(
    site: Site, engines: Engines, kept: dict[str, Layouts], floor: Array, threshold: float
) -> dict[str, NDArray[np.int64]]:
    """All combinations whose bound `floor` [rows, calls] is below the threshold.

    Roles are added one by one, the busiest pool's first; those to come count with their least seconds and bytes."""
    problem, engine = site.problem, engines.memory
    row = {call: i for i, call in enumerate(problem.calls)}
    means = _with_host(site, np.zeros((len(row), problem.model.scenarios))).mean(axis=1)
    means[row["generate"]] = engines.seconds.mean()
    for role, layouts in kept.items():
        for call, seconds in zip(problem.calls_of(role), layouts.means, strict=True):
            means[row[call]] = seconds.min()
    busy = {
        role: sum(means[row[call]] for other in site.held(i) for call in problem.calls_of(other))
        for role, i in site.pool_of.items()
    }
    order = sorted(kept, key=lambda role: -busy[role])
    smallest = {role: layouts.memory.min(axis=0) for role, layouts in kept.items()}
    found, picks = means[None, :], dict[str, NDArray[np.int64]]()
    memory = np.stack([site.engine(i, engine) for i in range(len(site.structure))])[None]
    above = threshold if problem.objective != "p95" else np.inf
    for number, role in enumerate(order):
        layouts, i = kept[role], site.pool_of[role]
        old, new = (grid.ravel() for grid in np.mgrid[: len(found), : len(layouts.memory)])
        found, memory = found[old], memory[old]
        for call, seconds in zip(problem.calls_of(role), layouts.means, strict=True):
            found[:, row[call]] = seconds[new]
        memory[:, i] = together(memory[:, i], layouts.memory[new])
        most = memory[:, i]
        for later in order[number + 1 :]:
            if site.pool_of[later] == i:
                most = together(most, smallest[later])
        fits = np.flatnonzero((most[:, 0] + most[:, 1] <= site.allowed(i)) & ((found @ floor.T).max(axis=1) < above))
        picks = {other: rows[old][fits] for other, rows in picks.items()} | {role: new[fits]}
        found, memory = found[fits], memory[fits]
    return {role: picks[role] for role in kept}


def _hosts_hold(site: Site, engine: Array, picks: Picks) -> NDArray[np.int64]:
    """The combinations for which every node's host memory holds what the pools offload and the batches in flight."""
    problem = site.problem
    nodes = np.zeros((len(site.structure), len(problem.cluster.nodes)))
    for i, parts in enumerate(site.spread):
        for node, _, count in parts:
            nodes[i, node] = count
    pinned = np.zeros((len(picks), len(site.structure)))
    for role, rows in picks.rows.items():
        pinned[:, site.pool_of[role]] += picks.layouts[role].memory[rows, 2]
    pinned[:, list(site.generating)] += engine[2]
    needed = pinned @ nodes
    needed[:, 0] += batch_bytes(problem.workload, problem.max_staleness)
    there = np.array([node.host_memory_bytes for node in problem.cluster.nodes], dtype=np.float64)
    return np.flatnonzero((needed <= there).all(axis=1))


# --- what they take ---


def _seconds(site: Site, engines: Engines, picks: Picks) -> Array:
    """Durations [calls, n, S] of every call for each combination."""
    problem = site.problem
    row = {call: i for i, call in enumerate(problem.calls)}
    least = _with_host(site, np.zeros((len(row), problem.model.scenarios)))
    seconds = np.repeat(least[:, None], len(picks), axis=1)
    seconds[row["generate"]] = engines.seconds
    for role, rows in picks.rows.items():
        for name, found in zip(problem.calls_of(role), picks.layouts[role].seconds, strict=True):
            seconds[row[name]] = found[rows]
    grid = picks.layouts["actor"].grid  # what a sync takes does not depend on its other columns
    kinds = np.column_stack([grid.shard, grid.replicas, grid.offload])[picks.rows["actor"]]
    _, first, which = np.unique(kinds, axis=0, return_index=True, return_inverse=True)
    actors = picks.rows["actor"][first].tolist()
    synced = [_sync(site, engines, picks.layouts["actor"].layout(actor, "p")) for actor in actors]
    seconds[row["sync_weights"]] = np.array(synced)[which.ravel()]
    return seconds


def _sync(site: Site, engines: Engines, actor: TrainerRole) -> Array:
    """Seconds [S] of a weight sync."""
    home = site.pool_of["actor"]
    return site.problem.model.sync(
        actor,
        site.places[home],
        engines.layout,
        [site.places[i] for i in site.generating],
        same_node=site.same_node,
        shared=home in site.generating,
    ).seconds


def _candidate(seconds: float, site: Site, engines: Engines, picks: Picks, n: int, program: Program) -> Candidate:
    trainers = {
        role: picks.layouts[role].layout(int(rows[n]), f"p{site.pool_of[role]}") for role, rows in picks.rows.items()
    }
    rollout = engines.layout.model_copy(update={"pools": tuple(f"p{i}" for i in site.generating)})
    return Candidate(seconds, site.structure, tuple(map(gpus_of, site.spread)), trainers, rollout, program)
