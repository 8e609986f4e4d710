"""Every program, one after the other: to be counted, and to hold `programs.best_program` against.

One round per step, offsets 0 to k, no waits. What order the calls have matters only between calls
that share a pool; of all orders that induce the same event graph one is kept.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.search.space.placements import Sharing
from planner.spec.dataflow import Dataflow
from planner.spec.plan import Issue


class Listed(NamedTuple):
    """Programs with event graphs of their own: the steps [n, u, v] by which v lags behind u,
    infinite where it need not wait for it."""

    items: tuple[tuple[Issue, ...], ...]
    steps: NDArray[np.float64]


@cache
def all_programs(flow: Dataflow, sharing: Sharing, k: int) -> Listed:
    """Every program of staleness k with an event graph of its own. Independent of costs."""
    return _listed(flow, sharing, list(orders(flow, dict(sharing), k)))


def _listed(flow: Dataflow, sharing: Sharing, programs: Sequence[tuple[Issue, ...]]) -> Listed:
    """Programs without waits and their event graphs, one program for each graph."""
    calls = {call: at for at, (call, _) in enumerate(sharing)}
    place, offset = np.zeros((2, len(programs), len(calls)), dtype=np.int64)
    for number, items in enumerate(programs):
        for at, item in enumerate(items):
            place[number, calls[item.call]], offset[number, calls[item.call]] = at, item.offset
    steps = _graphs(flow, sharing, place, offset)
    _, first = np.unique(steps.reshape(len(steps), -1), axis=0, return_index=True)
    first.sort()
    return Listed(tuple(programs[at] for at in first), steps[first])


def _graphs(
    flow: Dataflow, sharing: Sharing, place: NDArray[np.int64], offset: NDArray[np.int64]
) -> NDArray[np.float64]:
    """`schedule.steady_edges` of many programs without waits at once, from the place in the round
    and the offset of each call [n, calls]; with an edge for every pair that shares a pool, as its
    shortest path says."""
    pools, index = dict(sharing), {call: at for at, (call, _) in enumerate(sharing)}
    behind = offset[:, None, :] - offset[:, :, None] + (place[:, :, None] >= place[:, None, :])
    shared = np.array([[bool(set(pools[u]) & set(pools[v])) for v in index] for u in index])
    steps = np.where(shared, behind.astype(np.float64), np.inf)
    for call in flow.calls:
        for read in call.reads:
            if writer := flow.writer(read.data):
                u, v = index[writer.name], index[call.name]
                lag = behind[:, u, v] if read.latest else float(read.lag)
                steps[:, u, v] = np.minimum(steps[:, u, v], lag)
    return steps


def orders(
    flow: Dataflow, pools: dict[str, tuple[str, ...]], k: int
) -> Iterator[tuple[Issue, ...]]:
    """Programs of staleness k, up to the exchange of neighbours that share neither a pool nor a
    datum.

    Rotated so that generate is first, and shifted so that it is k steps ahead of the sync.
    Inference and update_actor are then 0 to k steps ahead of the sync too, and update_critic
    perhaps one step behind."""
    free = [call for call in pools if call not in ("generate", "sync_weights")]
    first = {
        "update_critic": -1
    }  # it may lag behind the sync: only the values of the next step need it
    for offsets in product(*(range(first.get(call, 0), k + 1) for call in free)):
        offset = dict(zip(free, offsets, strict=True)) | {"generate": k, "sync_weights": 0}
        before = _precedence(flow, offset)
        if before is not None:
            for order in _extensions(tuple(pools), before, pools):
                yield _issues(order, offset)


def _precedence(flow: Dataflow, offset: dict[str, int]) -> dict[str, set[str]] | None:
    """For each call those that must stand before it in the round; None if the offsets allow no
    order.

    v of round i reads u of step i + offset(v) - lag, which round i - gap issues: gap 0 puts u
    before v, a negative gap is impossible. A state that v reads must not be overwritten before,
    which bounds the next u from the other side."""
    before: dict[str, set[str]] = {call: {"generate"} - {call} for call in offset}
    for v in offset:
        for read in flow[v].reads:
            writer = flow.writer(read.data)
            if writer is None or read.latest:
                continue
            u = writer.name
            gap = offset[u] + read.lag - offset[v]
            if gap < 0 or (gap == 0 and v == "generate"):
                return None
            if gap == 0:
                before[v].add(u)
            if read.data in flow.state:
                slack = offset[v] - read.lag + 1 - offset[u]
                if slack < 0:
                    return None
                if slack == 0 and u != v:
                    before[u].add(v)
    return before


def _extensions(
    calls: tuple[str, ...], before: dict[str, set[str]], pools: dict[str, tuple[str, ...]]
) -> Iterator[tuple[str, ...]]:
    """Linear extensions of `before`, skipping those with two exchangeable neighbours out of the
    order of `calls`."""
    rank = {call: i for i, call in enumerate(calls)}

    def exchangeable(a: str, b: str) -> bool:
        return a not in before[b] and not set(pools[a]) & set(pools[b])

    def extend(order: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        if len(order) == len(calls):
            yield order
        for call in calls:
            if call in order or not before[call] <= set(order):
                continue
            if order and rank[call] < rank[order[-1]] and exchangeable(order[-1], call):
                continue
            yield from extend((*order, call))

    return extend(())


def _issues(order: Sequence[str], offset: dict[str, int]) -> tuple[Issue, ...]:
    """The program with its offsets shifted so that the least is 0."""
    least = min(offset[call] for call in order)
    return tuple(_issue(call, offset[call] - least) for call in order)


@cache
def _issue(call: str, offset: int) -> Issue:
    return Issue(call=call, offset=offset)
