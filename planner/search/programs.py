"""Every program that can be best for a sharing of pools: one round per step, offsets 0 to k, no waits.

A wait only adds predecessors, so for a fixed program and durations that do not depend on overlap it never shortens a
schedule; hence the programs searched have none. What order the calls have matters only between calls that share a
pool; of all orders that induce the same event graph one is kept.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import permutations, product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.predict.cycle import Cycles, cycles
from planner.predict.schedule import steady_edges
from planner.spec.dataflow import Dataflow
from planner.spec.plan import Issue, Wait

Sharing = tuple[tuple[str, tuple[str, ...]], ...]  # call -> names of the pools that it occupies


class Program(NamedTuple):
    """A program of staleness k and the cycles of its event graph over all calls of the flow."""

    items: tuple[Issue | Wait, ...]
    staleness: int
    cycles: Cycles


class Listed(NamedTuple):
    """Programs with event graphs of their own: the steps [n, u, v] by which v lags behind u, infinite where it need not
    wait for it."""

    items: tuple[tuple[Issue, ...], ...]
    steps: NDArray[np.float64]


@cache
def natural_programs(flow: Dataflow, sharing: Sharing, k: int) -> Listed:
    """A few natural programs of staleness k, as many as have event graphs of their own."""
    return _listed(flow, sharing, _natural_orders(flow, tuple(call for call, _ in sharing), k))


def _graphs(
    flow: Dataflow, sharing: Sharing, place: NDArray[np.int64], offset: NDArray[np.int64]
) -> NDArray[np.float64]:
    """`schedule.steady_edges` of many programs without waits at once, from the place in the round and the offset of
    each call [n, calls]; with an edge for every pair that shares a pool, as its shortest path says."""
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


@cache
def unbeatable(flow: Dataflow, sharing: Sharing, k: int) -> Program | None:
    """A natural program of staleness k that no other can beat, whatever the costs; None if none is known."""
    calls, floor = tuple(call for call, _ in sharing), bound_rates(flow, sharing, k)
    listed = natural_programs(flow, sharing, k)
    left = np.arange(len(listed.items))
    for seconds in np.random.default_rng(0).uniform(0.1, 1, (4, len(calls))):  # most fail at some costs
        left = left[_below(listed.steps[left], seconds, float((floor @ seconds).max()) * (1 + 1e-9))]
    for at in left:
        program = _program(flow, sharing, listed.items[at], k)
        if dominates(floor, rates(program)):
            return program
    return None


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


def programs_below(
    flow: Dataflow, sharing: Sharing, k: int, seconds: NDArray[np.float64], threshold: float
) -> list[Program]:
    """The programs of staleness k whose period at durations [calls] is below `threshold` seconds."""
    listed = all_programs(flow, sharing, k)
    return [_program(flow, sharing, listed.items[at], k) for at in _below(listed.steps, seconds, threshold)]


@cache
def unbeaten(flow: Dataflow, sharing: Sharing, k: int) -> tuple[NDArray[np.float64], ...]:
    """The `rates` of programs of staleness at most k of which some one is as fast as any program, whatever the costs:
    period >= the minimum over these of max(rates @ seconds). Of programs whose cycles all lie on longer ones of another
    program, that other one is left out."""
    steps = np.concatenate([all_programs(flow, sharing, staleness).steps for staleness in range(k + 1)])
    programs = dict.fromkeys(_binding_cycles(graph) for graph in _without_detours(steps))
    left: list[tuple[tuple[int, int], ...]] = []
    for program in programs:
        if not any(_never_slower(other, program) for other in left):
            left = [other for other in left if not _never_slower(program, other)] + [program]
    calls = np.arange(len(sharing))
    return tuple(np.array([(on >> calls & 1) / distance for on, distance in program]) for program in left)


def _never_slower(one: tuple[tuple[int, int], ...], other: tuple[tuple[int, int], ...]) -> bool:
    return all(any(on & there == on and distance >= least for there, least in other) for on, distance in one)


def _without_detours(steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Event graphs [n, u, v] without the edges that a path of no more steps implies (as `cycle.cycles` leaves out)."""
    reach, through = steps.copy(), np.full_like(steps, np.inf)
    for via in range(steps.shape[1]):
        path = reach[:, :, via, None] + reach[:, None, via, :]
        path[:, via], path[:, :, via] = np.inf, np.inf
        through, reach = np.minimum(through, path), np.minimum(reach, path)
    own = np.eye(steps.shape[1], dtype=bool)
    return np.where(own | (through > steps), steps, np.inf)


def _binding_cycles(steps: NDArray[np.float64]) -> tuple[tuple[int, int], ...]:
    """The cycles of one event graph [u, v] that can bind: the calls on each, as bits, and the steps that it spans."""
    after = [[(v, int(row[v])) for v in np.flatnonzero(np.isfinite(row)).tolist()] for row in steps]
    least = dict[int, int]()

    def walk(first: int, at: int, on: int, distance: int) -> None:
        for to, lag in after[at]:
            if to == first:
                least[on] = min(least.get(on, distance + lag), distance + lag)
            elif to > first and not on >> to & 1:
                walk(first, to, on | 1 << to, distance + lag)

    for first in range(len(after)):
        walk(first, first, 1 << first, 0)
    found = sorted(least.items(), key=lambda cycle: (cycle[1], -cycle[0].bit_count(), cycle[0]))
    kept: list[tuple[int, int]] = []
    for on, distance in found:
        if not any(on & longer == on and distance >= spans for longer, spans in kept):
            kept.append((on, distance))
    return tuple(sorted(kept))


def best_naturals(
    flow: Dataflow, sharing: Sharing, k: int, seconds: NDArray[np.float64], threshold: float, keep: int = 4
) -> list[Program]:
    """The natural program that no other can beat, or else the few fastest at durations [calls]; none whose period is
    not below `threshold` seconds (which may be infinite)."""
    best = unbeatable(flow, sharing, k)
    if best is not None:
        return [best] if best.cycles.periods(seconds) < threshold else []
    listed = natural_programs(flow, sharing, k)
    low = float((bound_rates(flow, sharing, k) @ seconds).max())
    high = min(threshold, float(seconds.sum()) * 1.001)
    left = _below(listed.steps, seconds, high)
    while len(left) > keep and high - low > 1e-6 * high:
        middle = (low + high) / 2
        faster = left[_below(listed.steps[left], seconds, middle)]
        if len(faster):
            high, left = middle, faster
        else:
            low = middle
    return [_program(flow, sharing, listed.items[at], k) for at in left[:keep]]


@cache
def _program(flow: Dataflow, sharing: Sharing, items: tuple[Issue, ...], k: int) -> Program:
    pools = dict(sharing)
    edges = steady_edges(flow, items, lambda call: pools[call.name])
    return Program(items, k, cycles(tuple(pools), edges))


def _below(steps: NDArray[np.float64], seconds: NDArray[np.float64], threshold: float) -> NDArray[np.int64]:
    """Which event graphs [n, u, v] have a period below `threshold` at durations [calls].

    A period is at least that exactly if the graph with weights seconds(u) - threshold * steps has a cycle that is not
    negative; the longest walks of all graphs are found at once (Floyd 1962)."""
    walks = seconds[:, None] - threshold * steps
    path = np.empty_like(walks)
    for via in range(len(seconds)):
        np.add(walks[:, :, via, None], walks[:, None, via, :], out=path)
        np.maximum(walks, path, out=walks)
    return np.flatnonzero(walks.diagonal(axis1=1, axis2=2).max(axis=1) < 0)


def rates(program: Program) -> NDArray[np.float64]:
    """[cycles, calls]: seconds per step that a second of each call adds on each cycle."""
    return program.cycles.counts / program.cycles.distance[:, None]


def dominates(greater: NDArray[np.float64], less: NDArray[np.float64]) -> bool:
    """Whether every row of `less` is at most some row of `greater`, so that its maximum is never above."""
    return bool(all(((row <= greater + 1e-12).all(axis=1)).any() for row in less))


@cache
def bound_rates(flow: Dataflow, sharing: Sharing, k: int) -> NDArray[np.float64]:
    """Rows [n, calls] that no program of staleness at most k can beat: period >= max(rows @ seconds).

    Calls of which no two ever run at the same time, because they share a pool or because each step of one lies between
    two steps of the other: every step takes at least their sum. Among these are the load of each pool and the
    recurrence of a trained role, which infers and updates with its own weights every step. And the data path generate
    -> what a pool has to infer (in turn) -> advantages -> update_actor -> sync_weights, which spans k + 1 steps because
    generation uses weights k updates old."""
    pools = dict(sharing)
    calls = tuple(pools)
    scaled = [({calls[at] for at in row}, 1.0) for row in _cliques(_never_beside(flow, sharing, k))]
    needed = {flow.writer(read.data) for read in flow["advantages"].reads}
    before = {call.name for call in needed if call is not None} - {"generate"}
    path = {"generate", "advantages", "update_actor", "sync_weights"}
    groups = [{call for call in before if pool in pools[call]} for pool in {p for c in before for p in pools[c]}]
    groups += [{call} for call in before if not pools[call]] or [set()]
    scaled += [(path | group, 1.0 / (k + 1)) for group in groups] if k else []
    return np.array(sorted({tuple(scale * (call in row) for call in calls) for row, scale in scaled}))


def _never_beside(flow: Dataflow, sharing: Sharing, k: int) -> NDArray[np.bool_]:
    """Which calls [n, n] never run at the same time as which others, whatever the program of staleness at most k."""
    pools = dict(sharing)
    lags = _least_lags(flow, tuple(pools), k)
    shared = np.array([[bool(set(own) & set(other)) for other in pools.values()] for own in pools.values()])
    return np.asarray((shared | (lags + lags.T <= 1)) & ~np.eye(len(pools), dtype=bool))


@cache
def _least_lags(flow: Dataflow, calls: tuple[str, ...], k: int) -> NDArray[np.float64]:
    """The least d [u, v] for which v of step t always starts after u of step t - d has ended, in programs of staleness
    at most k. A state is read before it is overwritten: by a call of the role that it belongs to, on the same pool."""
    lags = np.full((len(calls), len(calls)), np.inf)
    index = {call: at for at, call in enumerate(calls)}
    for call in flow.calls:
        for read in call.reads:
            if (writer := flow.writer(read.data)) is None:
                continue
            u, v = index[writer.name], index[call.name]
            lags[u, v] = min(lags[u, v], k + 1 if read.latest else read.lag)
            if read.data in flow.state and not read.latest and set(writer.roles) & set(call.roles):
                lags[v, u] = min(lags[v, u], 1 - read.lag)
    for via in range(len(calls)):
        lags = np.minimum(lags, lags[:, via, None] + lags[None, via, :])
    return lags


def _cliques(near: NDArray[np.bool_]) -> Iterator[frozenset[int]]:
    """The largest sets of which all are near each other (Bron and Kerbosch 1973)."""
    neighbours = [frozenset(np.flatnonzero(row).tolist()) for row in near]

    def grow(chosen: frozenset[int], able: frozenset[int], done: frozenset[int]) -> Iterator[frozenset[int]]:
        if not able and not done:
            yield chosen
            return
        pivot = max(able | done, key=lambda at: (len(neighbours[at] & able), -at))
        for at in sorted(able - neighbours[pivot]):
            yield from grow(chosen | {at}, able & neighbours[at], done & neighbours[at])
            able, done = able - {at}, done | {at}

    return grow(frozenset(), frozenset(range(len(neighbours))), frozenset())


@cache
def _natural_orders(flow: Dataflow, calls: tuple[str, ...], k: int) -> tuple[tuple[Issue, ...], ...]:
    """Inference of one step as a block, before or after the updates of an earlier one; the critic's update before,
    beside or after the actor's and the sync."""
    infer = [call.name for call in flow.calls if call.kind == "infer" or call.name == "score"]
    tail = [call for call in ("update_critic", "update_actor", "sync_weights") if call in calls]
    found: dict[tuple[Issue, ...], None] = {}
    for ahead, critic in product(range(k + 1), range(-1, k + 1)):
        offset = dict.fromkeys(infer, ahead) | {"generate": k, "advantages": ahead, "update_critic": critic}
        offset |= {"update_actor": 0, "sync_weights": 0}
        offset = {call: offset[call] for call in calls}
        before = _precedence(flow, offset)
        if before is None:
            continue
        for first, last in product(permutations(infer), permutations(tail)):
            order = _in_order(("generate", *first, "advantages", *last), before)
            if order is not None:
                found[_issues(order, offset)] = None
    return tuple(found)


def _in_order(preference: Sequence[str], before: dict[str, set[str]]) -> tuple[str, ...] | None:
    """The calls in an order that `before` allows, always the first that may come next; None if there is none."""
    left, order = list(preference), list[str]()
    while left:
        call = next((call for call in left if before[call].issubset(order)), None)
        if call is None:
            return None
        left.remove(call)
        order.append(call)
    return tuple(order)


def _issues(order: Sequence[str], offset: dict[str, int]) -> tuple[Issue, ...]:
    """The program with its offsets shifted so that the least is 0."""
    least = min(offset[call] for call in order)
    return tuple(_issue(call, offset[call] - least) for call in order)


@cache
def _issue(call: str, offset: int) -> Issue:
    return Issue(call=call, offset=offset)


def orders(flow: Dataflow, pools: dict[str, tuple[str, ...]], k: int) -> Iterator[tuple[Issue, ...]]:
    """Programs of staleness k, up to the exchange of neighbours that share neither a pool nor a datum.

    Rotated so that generate is first, and shifted so that it is k steps ahead of the sync. Inference and update_actor
    are then 0 to k steps ahead of the sync too, and update_critic perhaps one step behind."""
    free = [call for call in pools if call not in ("generate", "sync_weights")]
    first = {"update_critic": -1}  # it may lag behind the sync: only the values of the next step need it
    for offsets in product(*(range(first.get(call, 0), k + 1) for call in free)):
        offset = dict(zip(free, offsets, strict=True)) | {"generate": k, "sync_weights": 0}
        before = _precedence(flow, offset)
        if before is not None:
            for order in _extensions(tuple(pools), before, pools):
                yield _issues(order, offset)


def _precedence(flow: Dataflow, offset: dict[str, int]) -> dict[str, set[str]] | None:
    """For each call those that must stand before it in the round; None if the offsets allow no order.

    v of round i reads u of step i + offset(v) - lag, which round i - gap issues: gap 0 puts u before v, a negative gap
    is impossible. A state that v reads must not be overwritten before, which bounds the next u from the other side."""
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
    """Linear extensions of `before`, skipping those with two exchangeable neighbours out of the order of `calls`."""
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
