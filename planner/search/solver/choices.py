"""What all programs of a dataflow have in common, and what each of them chooses.

v of step t starts after u of step t - d, for the data's sake or because the two share a pool. All
programs of staleness at most k have the data in common. What a program decides is which of two
calls on one pool has its turn first.
"""

from functools import cache
from itertools import combinations
from typing import NamedTuple

import networkx as nx
import numpy as np

from planner.predict.edges import before_overwriting, data_needs, pool_needs
from planner.search.space.arrays import Array, Mask
from planner.search.space.placements import Sharing
from planner.spec.dataflow import Dataflow


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
    shared: Mask
    floor: Array


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
    connected = np.isfinite(_least_lags(flow, calls, k)).all()
    assert connected, "a call leads from generation to nowhere; make it a monitor"
    lags = _data_lags(flow, calls, k)
    np.fill_diagonal(lags, np.where(shared.diagonal(), 1.0, np.inf))
    sharing_pairs = [(u, v) for u, v in combinations(range(len(calls)), 2) if shared[u, v]]
    while True:
        least = closed(lags)
        ways = {pair: ways_of(pair, least) for pair in sharing_pairs}
        before = lags.copy()
        for pair, each in ways.items():
            if len(each) == 1:
                choose(lags, pair, each[0])
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


def ways_of(pair: tuple[int, int], least: Array) -> range:
    """The values of m that are left to a pair, by the least steps [u, v] of all paths."""
    u, v = pair
    return range(int(1 - least[v, u]), int(least[u, v]) + 1)


def choose(lags: Array, pair: tuple[int, int], m: float) -> None:
    """Let v of step t start after u of step t - m, and u of step t - m + 1 after that v."""
    u, v = pair
    lags[u, v] = min(lags[u, v], m)
    lags[v, u] = min(lags[v, u], 1 - m)


def _data_lags(flow: Dataflow, calls: tuple[str, ...], k: int) -> Array:
    """The steps d [u, v] by which v lags behind u for the data's sake in programs of staleness at
    most k.

    The latest weights are at most k updates old, so generation lags k + 1 steps behind their
    transfer. State is read before it is overwritten. Both are calls of one role, hence on one pool,
    so the second waits for the first. For example `old_logprobs` reads the actor's weights of the
    step before (lag 1 behind `update_actor`), and `update_actor` comes after it (lag 0)."""
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
            common = set(flow[u].roles) & set(flow[v].roles)
            assert common, f"{v} overwrites {need.what}, which {u} reads as another role"
            if need.lag is not None:
                add(u, v, need.lag)
    return lags


def closed(lags: Array) -> Array:
    """The least steps of any path."""
    for via in range(len(lags)):
        lags = np.minimum(lags, lags[:, via, None] + lags[None, via, :])
    return lags


@cache
def _least_lags(flow: Dataflow, calls: tuple[str, ...], k: int) -> Array:
    return closed(_data_lags(flow, calls, k))


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
    exclusive = exclusive_rows(_least_lags(flow, calls, k), _shared(flow, sharing))
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


def _shared(flow: Dataflow, sharing: Sharing) -> Mask:
    """Which calls [n, n] have a pool in common; on the diagonal, which have a pool at all."""
    pools, index = dict(sharing), {call: at for at, (call, _) in enumerate(sharing)}
    shared = np.zeros((len(index), len(index)), dtype=bool)
    for call, needed in pool_needs(flow, lambda call: pools[call.name]).items():
        for need in needed:
            shared[[index[other] for other in need.by], index[call]] = True
    return shared


def exclusive_rows(least: Array, shared: Mask) -> Array:
    """Rows [n, calls] of calls of which no two ever run at the same time: they share a pool, or
    each step of one lies between two steps of the other, by the `least` steps of the paths between
    them."""
    near = shared | (least + least.T <= 1)
    pairs = np.argwhere(np.triu(near, k=1))
    rows = _cliques(len(near), tuple((int(u), int(v)) for u, v in pairs))
    free = ~shared.diagonal()  # a host call may run at the same time as itself, of another step
    return np.asarray(rows[(rows.sum(axis=1) > 1) | ~(rows[:, free] > 0).any(axis=1)])


@cache
def _cliques(count: int, near: tuple[tuple[int, int], ...]) -> Array:
    """The largest sets [n, count] of calls that are all near each other, in a fixed order."""
    graph = nx.Graph(near)
    graph.add_nodes_from(range(count))
    rows = np.zeros((0, count))
    for clique in nx.find_cliques(graph):
        row = np.zeros((1, count))
        row[0, clique] = 1
        rows = np.concatenate([rows, row])
    return np.asarray(rows[np.lexsort(rows.T)])
