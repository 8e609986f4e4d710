"""Every program, one after the other: to be counted, and to hold `best_program` against.

One round per step, offsets 0 to k, no waits. What order the calls have matters only between calls
that share a pool; of all orders that induce the same event graph one is kept.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.predict.edges import (
    Needs,
    Turn,
    before_overwriting,
    data_needs,
    needs,
    steps_behind,
)
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
    programs = list(orders(flow, dict(sharing), k))
    calls = {call: at for at, (call, _) in enumerate(sharing)}
    place, offset = np.zeros((2, len(programs), len(calls)), dtype=np.int64)
    for number, items in enumerate(programs):
        for at, item in enumerate(items):
            call = calls[item.call]
            place[number, call], offset[number, call] = at, item.offset
    steps = _event_graphs(flow, sharing, place, offset)
    _, first = np.unique(steps.reshape(len(steps), -1), axis=0, return_index=True)
    first.sort()
    return Listed(tuple(programs[at] for at in first), steps[first])


def _event_graphs(
    flow: Dataflow, sharing: Sharing, place: NDArray[np.int64], offset: NDArray[np.int64]
) -> NDArray[np.float64]:
    """`schedule.steady_edges` of many programs without waits at once, from the place in the round
    and the offset of each call [n, calls]. Every pair that shares a pool has an edge here, as long
    as the way through the calls between them."""
    pools, index = dict(sharing), {call: at for at, (call, _) in enumerate(sharing)}
    turns = {call: Turn(place[:, at], offset[:, at]) for call, at in index.items()}
    steps = np.full((len(place), len(index), len(index)), np.inf)
    for v, needed in needs(flow, lambda call: pools[call.name]).items():
        for need in needed:
            for u in need.by:
                lag = steps_behind(turns[u], turns[v]) if need.lag is None else need.lag
                edge = steps[:, index[u], index[v]]
                np.minimum(edge, lag, out=edge)
    return steps


def orders(
    flow: Dataflow, pools: dict[str, tuple[str, ...]], k: int
) -> Iterator[tuple[Issue, ...]]:
    """Programs of staleness k, up to the exchange of neighbours that share neither a pool nor a
    datum.

    Rotated so that generation is first, and shifted so that it is k steps ahead of the call that
    installs weights. How far the others may be ahead of that (behind it, if negative) follows from
    the data. In PPO all but `update_critic` are 0 to k steps ahead; it is -1 to k, for only the
    values of the next step need it."""
    generates, installs = flow.generates.name, flow.installs.name
    fixed = {generates: k, installs: 0}
    before_install = _least_lags_to(flow, installs)
    free = [call for call in pools if call not in fixed]
    overwriting = before_overwriting(flow)
    needed = {call: (*wanted, *overwriting[call]) for call, wanted in data_needs(flow).items()}
    for offsets in product(*(range(-before_install[call], k + 1) for call in free)):
        offset = dict(zip(free, offsets, strict=True)) | fixed
        before = _precedence(generates, needed, offset)
        if before is not None:
            for order in _extensions(tuple(pools), before, pools):
                yield _issues(order, offset)


def _least_lags_to(flow: Dataflow, target: str) -> dict[str, int]:
    """The least sum of lags on any way of data from each call to the target. A call that is so many
    steps behind the target is just in time."""
    least = {target: 0}
    for _ in flow.calls:  # no way has more calls
        for call, needed in data_needs(flow).items():
            for need in needed:
                if need.lag is not None and call in least:
                    lag = least[call] + need.lag
                    least[need.by[0]] = min(lag, least.get(need.by[0], lag))
    return least


def _precedence(first: str, needed: Needs, offset: dict[str, int]) -> dict[str, set[str]] | None:
    """The calls that must stand before each call in the round, which begins with `first`; None if
    the offsets allow no order.

    v of round i needs u of step i + offset(v) - lag, which round i - gap issues: gap 0 puts u
    before v, a negative gap is impossible.
    """
    before: dict[str, set[str]] = {call: {first} - {call} for call in offset}
    for v in offset:
        for need in needed[v]:
            if need.lag is None:
                continue
            u = need.by[0]
            gap = offset[u] + need.lag - offset[v]
            if gap < 0 or (gap == 0 and v == first):
                return None
            if gap == 0 and u != v:
                before[v].add(u)
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
