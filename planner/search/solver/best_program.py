"""The best program for given durations: one round per step, no waits, staleness at most k.

A wait only adds predecessors, so for a fixed program and durations that do not depend on overlap it
never shortens a schedule; hence the programs searched have none. What remains to be chosen is, of
each two calls u and v that share a pool, after which u a v starts: v of step t comes after u of
step t - m and before u of step t - m + 1. The data between calls and the staleness leave a few m to
choose from, often one. Choices that allow a schedule of some period are a program: its calls in the
order of their starts within a round (Hanen and Munier 1995 treat such cyclic problems).

`best_program` branches on these m. The period of what has been chosen so far, the maximum cycle
ratio of its event graph, bounds all that may still be chosen. The cycles that ruled the branches
out do so for other durations too: `Cut`.
"""

import heapq
from collections.abc import Callable
from functools import cache
from itertools import combinations, count
from typing import NamedTuple

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from planner.predict.cycle import Cycles, program_cycles
from planner.predict.edges import (
    Turn,
    before_overwriting,
    data_needs,
    pool_needs,
    steps_behind,
)
from planner.search.space.arrays import Array
from planner.search.space.placements import Sharing
from planner.spec.dataflow import Dataflow
from planner.spec.plan import Issue, Wait

Items = tuple[Issue | Wait, ...]
# seconds [...] of periods [..., S + 1] in each scenario and at the mean
OfPeriods = Callable[[Array], Array]

SAME = 1e-9  # relative difference below which two step times are taken as equal


class Program(NamedTuple):
    """A program of staleness k."""

    items: Items
    staleness: int


class Choices(NamedTuple):
    """What all programs of staleness at most k have in common, and what they choose.

    v of step t starts after u of step t - lags[u, v], where inf means that no reason is known. Each
    pair (u, v) in `pairs` is a choice of the program: the two share a pool and take turns, so its
    lags become m and 1 - m for some m. `generates` and `installs` are the numbers of these calls,
    `shared` [n, n] says which calls have a pool in common, and `floor` are rates [rows, calls] that
    no program is below (see `bound_rates`).

    For example `score` and `old_logprobs` on one pool both read what `generate` has made for their
    step. Nothing is known of their order, so they are a pair: with m = 0 `old_logprobs` comes after
    the `score` of its own step (and before that of the next, lag 1), with m = 1 after that of the
    step before (and before that of its own, lag 0)."""

    calls: tuple[str, ...]
    generates: int
    installs: int
    lags: Array
    pairs: tuple[tuple[int, int], ...]
    shared: NDArray[np.bool_]
    floor: Array


class Cut(NamedTuple):
    """A bound on all programs, which a search for the best one leaves behind for other durations.

    `rates` [leaves, rows, calls]: each program is in one of the leaves, and its period is no less
    than any of that leaf's rows times the durations. So the least over the leaves of the greatest
    over the rows bounds every program.

    For example there are two leaves, the programs that run `values` before `score` and those that
    run it after. A row of the first has 1 for `generate`, `values` and `score` and 0 for all
    others: in these programs a step takes at least those three together."""

    rates: Array

    def bound(self, seconds: Array, objective: OfPeriods) -> Array:
        """Seconds [n] that no program is below at durations [n, calls, S + 1]."""
        leaves, rows, calls = self.rates.shape
        periods = (self.rates.reshape(-1, calls) @ seconds).reshape(len(seconds), leaves, rows, -1)
        return np.asarray(objective(periods.max(axis=2)).min(axis=1))

    def least(self, means: Array) -> Array:
        """The least period [n] of any program at durations [n, calls]."""
        leaves, rows, calls = self.rates.shape
        periods = (means @ self.rates.reshape(-1, calls).T).reshape(len(means), leaves, rows)
        return np.asarray(periods.max(axis=2).min(axis=1))


class ProgramResult(NamedTuple):
    """The best program below the limit, if any, its seconds (else the limit), and the cut that
    proves it."""

    program: Program | None
    seconds: float
    cut: Cut


def best_program(
    choices: Choices,
    seconds: Array,
    objective: OfPeriods,
    limit: float = np.inf,
    any_below: bool = False,
) -> ProgramResult:
    """The program with the least `objective` of its periods at durations [calls, S + 1], those in
    each scenario and at the mean; none if that is not below `limit`. With `any_below` the first one
    found, and without a cut that proves it."""
    found: Program | None = None
    best, order, leaves = limit, count(), list[Array]()
    left = [(0.0, next(order), choices.lags, choices.floor)]
    while left:
        bound, _, lags, rows = heapq.heappop(left)
        if bound < best * (1 - SAME):
            rows, periods, paths = _periods(lags, rows, seconds)
            bound = float(objective(periods))
        if bound >= best * (1 - SAME):
            leaves.append(rows)
            continue
        starts, period = paths[-1][choices.generates], float(periods[-1])
        pair = _forced(choices, lags, seconds[:, -1], best)
        pair = pair or _overlapping(choices, lags, starts, seconds[:, -1], period)
        if pair is None:  # a schedule, at the mean durations
            chosen = _chosen(choices, lags, starts, period)
            _, periods, _ = _periods(chosen, rows, seconds)
            value = float(objective(periods))
            if value < best * (1 - SAME):
                best, found = value, _program(choices, starts, period)
                if any_below:
                    return ProgramResult(found, best, Cut(choices.floor[None]))
            if value <= bound * (1 + SAME):
                leaves.append(rows)
                continue
            pair = _binding(choices, lags, chosen, rows, periods, seconds)
        u, v = pair
        least = _closed(lags)
        for m in range(int(1 - least[v, u]), int(least[u, v]) + 1):
            child = lags.copy()
            child[u, v], child[v, u] = min(lags[u, v], m), min(lags[v, u], 1 - m)
            more = _exclusive(_closed(child), choices.shared)
            known = np.asarray((more[:, None] <= rows).all(axis=2)).any(axis=1)
            heapq.heappush(left, (bound, -next(order), child, np.concatenate([rows, more[~known]])))
    return ProgramResult(found, best, Cut(_padded(leaves)))


def _padded(leaves: list[Array]) -> Array:
    """[leaves, rows, calls] with the most rows of any leaf; a row of zeros bounds nothing."""
    table = np.zeros((len(leaves), max(map(len, leaves)), leaves[0].shape[1]))
    for at, rows in enumerate(leaves):
        table[at, : len(rows)] = rows
    return table


# --- periods ---


def _periods(lags: Array, rows: Array, seconds: Array) -> tuple[Array, Array, Array]:
    """These `rows` of rates with those of the cycles that bind in an event graph at durations
    [calls, S]; its period [S], the maximum cycle ratio, no less than the rows say; and the longest
    paths [S, u, v] at that period, from the start of u to that of v.

    Newton's method: a cycle that is longer than the period so far raises it to its own ratio."""
    while True:
        periods = (rows @ seconds).max(axis=0)
        paths = seconds.T[:, :, None] - periods[:, None, None] * lags
        for via in range(len(lags)):  # Floyd 1962
            np.maximum(paths, paths[:, :, via, None] + paths[:, None, via, :], out=paths)
        above = paths.diagonal(axis1=1, axis2=2).max(axis=1) / periods
        worst = int(above.argmax())
        if above[worst] <= 1e-11:
            return rows, periods, paths
        on, distance = _longest_cycle(lags, seconds[:, worst].tolist(), float(periods[worst]))
        row = np.zeros((1, len(lags)))
        row[0, on] = 1 / distance
        rows = np.concatenate([rows, row])


def _longest_cycle(lags: Array, seconds: list[float], period: float) -> tuple[list[int], float]:
    """A cycle whose ratio is the greatest, and above `period`: its calls and the steps that it
    spans. Bellman and Ford's search for a cycle that is longer than the period, again and again at
    that cycle's ratio."""
    edges = [(int(u), int(v), float(lags[u, v])) for u, v in np.argwhere(np.isfinite(lags))]
    found: tuple[list[int], float] | None = None
    while True:
        cycle = _longer_cycle(
            len(seconds), [(u, v, seconds[u] - period * lag) for u, v, lag in edges], 1e-12 * period
        )
        if cycle is None:
            assert found is not None, "no cycle is longer"
            return found
        distance = float(
            sum(lags[u, v] for u, v in zip(cycle, [*cycle[1:], cycle[0]], strict=True))
        )
        ratio = sum(seconds[u] for u in cycle) / distance
        if found is not None and ratio <= period:
            return found
        found, period = (cycle, distance), ratio


def _longer_cycle(
    size: int, edges: list[tuple[int, int, float]], tolerance: float
) -> list[int] | None:
    """A cycle of positive length, if there is one."""
    length, before = [0.0] * size, [-1] * size
    for _ in range(size):
        changed = -1
        for u, v, weight in edges:
            if length[u] + weight > length[v] + tolerance:
                length[v], before[v], changed = length[u] + weight, u, v
        if changed < 0:
            return None
    at = changed
    for _ in range(size):
        at = before[at]
    cycle = [at]
    while (at := before[at]) != cycle[0]:
        cycle.append(at)
    return cycle[::-1]


# --- what is chosen ---


def _forced(choices: Choices, lags: Array, seconds: Array, limit: float) -> tuple[int, int] | None:
    """A free pair with at most one way to a period below the limit at durations [calls], if there
    is one."""
    if not np.isfinite(limit) or not choices.pairs:
        return None
    paths = seconds[:, None] - limit * lags
    for via in range(len(lags)):
        np.maximum(paths, paths[:, via, None] + paths[None, via, :], out=paths)
    u, v = np.array(choices.pairs).T
    least = np.ceil((seconds[u] + paths[v, u]) / limit - 1e-9)
    most = np.floor(1 - (seconds[v] + paths[u, v]) / limit + 1e-9)
    tight = np.flatnonzero((least >= most) & (lags[u, v] + lags[v, u] > 1))
    return choices.pairs[tight[(most - least)[tight].argmin()]] if len(tight) else None


def _overlapping(
    choices: Choices, lags: Array, starts: Array, seconds: Array, period: float
) -> tuple[int, int] | None:
    """The pair whose calls overlap most if every call starts as early as `lags` allow; None if none
    do."""
    worst, most = None, 1e-9 * period
    for u, v in choices.pairs:
        after = (starts[v] - starts[u]) % period
        overlap = min(max(seconds[u] - after, after - period + seconds[v]), seconds[u], seconds[v])
        if overlap > most and not lags[u, v] + lags[v, u] <= 1:
            worst, most = (u, v), overlap
    return worst


def _chosen(choices: Choices, lags: Array, starts: Array, period: float) -> Array:
    """The lags with every choice made as a schedule has it."""
    chosen = lags.copy()
    for u, v in choices.pairs:
        m = np.ceil((starts[u] - starts[v]) / period - 1e-9)
        chosen[u, v], chosen[v, u] = min(lags[u, v], m), min(lags[v, u], 1 - m)
    return chosen


def _binding(
    choices: Choices, lags: Array, chosen: Array, rows: Array, periods: Array, seconds: Array
) -> tuple[int, int]:
    """A pair that has been chosen on a cycle that binds in the scenario where the choices cost
    most, and is free in `lags`."""
    free = [
        pair for pair in choices.pairs if not lags[pair[0], pair[1]] + lags[pair[1], pair[0]] <= 1
    ]
    bound = (rows @ seconds).max(axis=0)
    for scenario in np.argsort(-(periods / bound), kind="stable").tolist():
        durations, period = seconds[:, scenario].tolist(), float(periods[scenario]) * (1 - 1e-7)
        cycle, _ = _longest_cycle(chosen, durations, period)
        edges = {*zip(cycle, [*cycle[1:], cycle[0]], strict=True)}
        for u, v in free:
            if ((u, v) in edges and chosen[u, v] < lags[u, v]) or (
                (v, u) in edges and chosen[v, u] < lags[v, u]
            ):
                return u, v
    return free[0]


def _program(choices: Choices, starts: Array, period: float) -> Program:
    """The program of a schedule: the calls by their starts within a round.

    For example with a period of 10 s, `generate` at 0, `train` at 12 and the transfer at 18 s give
    offsets 1, 0 and 0 and the order `generate`, `train`, transfer: train starts 2 s into a round,
    of the step before the one that is generated. The weights that generation uses are those of the
    transfer that is issued last before it, here two steps before: staleness 1."""
    step = np.floor(starts / period + 1e-9)
    within = np.round((starts - step * period) / period, 9)
    order = np.lexsort((np.arange(len(starts)), within)).tolist()
    offset = (step.max() - step).astype(int).tolist()
    items = tuple(Issue(call=choices.calls[at], offset=offset[at]) for at in order)
    generate, install = (
        Turn(order.index(call), offset[call]) for call in (choices.generates, choices.installs)
    )
    return Program(items, steps_behind(install, generate) - 1)


# --- what all programs have in common ---


@cache
def choices_of(flow: Dataflow, sharing: Sharing, k: int) -> Choices:
    """What programs of staleness at most k choose, of calls that share pools.

    Two calls on one pool have as many choices m as the data leave them: if the least lags on any
    way from u to v and back are a and b, then 1 - b <= m <= a. A pair with one choice only is no
    choice; its lags are known, which may leave other pairs fewer choices.

    For example `generate` and `score` on one pool: a = 0, as `score` reads the sequences of its own
    step. For k = 0 the way back leads through the updates to the weights of the next step, b = 1,
    and m = 0 is the only choice. For k = 1 it is b = 2: with m = -1 the next step's sequences are
    generated before this one's are scored."""
    calls = tuple(call for call, _ in sharing)
    shared = _shared(flow, sharing)
    lags = _data_lags(flow, calls, k)
    np.fill_diagonal(lags, np.where(shared.diagonal(), 1.0, np.inf))
    sharing_pairs = [(u, v) for u, v in combinations(range(len(calls)), 2) if shared[u, v]]
    while True:
        least = _closed(lags)
        ways = {(u, v): range(int(1 - least[v, u]), int(least[u, v]) + 1) for u, v in sharing_pairs}
        before = lags.copy()
        for (u, v), each in ways.items():
            if len(each) == 1:
                lags[u, v], lags[v, u] = min(lags[u, v], each[0]), min(lags[v, u], 1 - each[0])
        if (lags == before).all():
            break
    return Choices(
        calls=calls,
        generates=calls.index(flow.generates.name),
        installs=calls.index(flow.installs.name),
        lags=lags,
        pairs=tuple(pair for pair, each in ways.items() if len(each) > 1),
        shared=shared,
        floor=bound_rates(flow, sharing, k),
    )


def _data_lags(flow: Dataflow, calls: tuple[str, ...], k: int) -> Array:
    """The steps d [u, v] by which v lags behind u for the data's sake in programs of staleness at
    most k.

    The latest weights are at most k updates old, so generation lags k + 1 steps behind their
    transfer. A state is read before it is overwritten: that holds back the call that overwrites it
    where both are calls of one role, hence on one pool, which they have in the order of their
    issue. For example `old_logprobs` reads the actor's weights of the step before (lag 1 behind
    `update_actor`), and `update_actor` comes after it (lag 0)."""
    lags = np.full((len(calls), len(calls)), np.inf)
    index = {call: at for at, call in enumerate(calls)}

    def add(u: str, v: str, lag: int) -> None:
        lags[index[u], index[v]] = min(lags[index[u], index[v]], lag)

    for v, needed in data_needs(flow).items():
        for need in needed:
            add(need.by[0], v, k + 1 if need.lag is None else need.lag)
    for v, needed in before_overwriting(flow).items():
        for need in needed:
            u = need.by[0]
            if need.lag is not None and set(flow[u].roles) & set(flow[v].roles):
                add(u, v, need.lag)
    return lags


def _closed(lags: Array) -> Array:
    """The least steps of any path."""
    for via in range(len(lags)):
        lags = np.minimum(lags, lags[:, via, None] + lags[None, via, :])
    return lags


@cache
def _least_lags(flow: Dataflow, calls: tuple[str, ...], k: int) -> Array:
    return _closed(_data_lags(flow, calls, k))


@cache
def bound_rates(flow: Dataflow, sharing: Sharing, k: int) -> Array:
    """Rows [n, calls] that no program of staleness at most k can beat: period >= max(rows @
    seconds).

    Calls of which no two ever run at the same time, because they share a pool or because each step
    of one lies between two steps of the other: every step takes at least their sum. Among these are
    the load of each pool and the recurrence of a trained role, which infers and updates with its
    own weights every step. And the ways of the data through a step, which take k + 1 periods at
    most, because generation uses weights k updates old."""
    calls = tuple(call for call, _ in sharing)
    exclusive = _exclusive(_least_lags(flow, calls, k), _shared(flow, sharing))
    rows = {tuple(row) for row in exclusive.tolist()}
    if k:
        for way in _ways(flow, dict(sharing)):
            rows.add(tuple((call in way) / (k + 1) for call in calls))
    return np.array(sorted(rows))


def _ways(flow: Dataflow, pools: dict[str, tuple[str, ...]]) -> set[frozenset[str]]:
    """The largest sets of calls of one step that run one after the other, from generation to the
    transfer of its weights.

    They are the paths of the data, with whatever else a pool has to do between two calls of a path.
    For example `generate`, all that one pool infers in turn, `advantages`, `update_actor` and
    `sync_weights`."""
    ways = set()
    for path, between in _paths(flow):
        ways.add(frozenset(path))
        for call, others in zip(path[1:-1], between, strict=True):
            for pool in pools[call]:
                ways.add(frozenset(path) | {other for other in others if pool in pools[other]})
    return {way for way in ways if not any(way < larger for larger in ways)}


@cache
def _paths(flow: Dataflow) -> tuple[tuple[tuple[str, ...], tuple[frozenset[str], ...]], ...]:
    """The paths of data within a step from generation to the transfer of its weights. To each call
    of a path but the first and the last belong the calls that run after the call before it and
    before the call behind it, for the data's sake."""
    graph = nx.DiGraph()
    for call, needed in data_needs(flow).items():
        graph.add_edges_from((need.by[0], call) for need in needed if need.lag == 0)
    found = []
    for path in nx.all_simple_paths(graph, flow.generates.name, flow.installs.name):
        between = tuple(
            frozenset(nx.descendants(graph, before) & nx.ancestors(graph, behind))
            for before, behind in zip(path, path[2:], strict=False)
        )
        found.append((tuple(path), between))
    return tuple(found)


def _shared(flow: Dataflow, sharing: Sharing) -> NDArray[np.bool_]:
    """Which calls [n, n] have a pool in common; on the diagonal, which have a pool at all."""
    pools, index = dict(sharing), {call: at for at, (call, _) in enumerate(sharing)}
    shared = np.zeros((len(index), len(index)), dtype=bool)
    for call, needed in pool_needs(flow, lambda call: pools[call.name]).items():
        for need in needed:
            shared[[index[other] for other in need.by], index[call]] = True
    return shared


def _exclusive(least: Array, shared: NDArray[np.bool_]) -> Array:
    """Rows [n, calls] of calls of which no two ever run at the same time: they share a pool, or
    each step of one lies between two steps of the other, by the `least` steps of the paths between
    them."""
    near = (shared | (least + least.T <= 1)) & ~np.eye(len(least), dtype=bool)
    rows = _cliques(tuple((near @ (1 << np.arange(len(near)))).tolist()))
    free = ~shared.diagonal()  # a host call may run at the same time as itself, of another step
    return np.asarray(rows[(rows.sum(axis=1) > 1) | ~(rows[:, free] > 0).any(axis=1)])


@cache
def _cliques(near: tuple[int, ...]) -> Array:
    """The largest sets [n, calls] of which all are near each other; as bits, those `near` each
    call. All sets are looked at."""
    bits = 1 << np.arange(len(near))
    sets = np.arange(1 << len(near))[:, None]
    within = (sets & bits) > 0
    cliques = ((sets & ~(np.array(near) | bits) == 0) | ~within).all(axis=1)
    larger = (~within & cliques[sets | bits]).any(axis=1)
    return np.asarray(within[cliques & ~larger], dtype=np.float64)


# --- programs that are given ---


@cache
def cycles_of(flow: Dataflow, sharing: Sharing, items: Items) -> Cycles:
    """The cycles of a program's event graph over all calls of the flow."""
    pools = dict(sharing)
    return program_cycles(flow, items, lambda call: pools[call.name])


def rates(found: Cycles) -> Array:
    """[cycles, calls]: seconds per step that a second of each call adds on each cycle."""
    return found.counts / found.distance[:, None]
