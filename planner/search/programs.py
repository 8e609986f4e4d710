"""Every program that can be best for a sharing of pools: one round per step, offsets 0 to k, no waits.

A wait only adds predecessors, so for a fixed program and durations that do not depend on overlap it never shortens a
schedule; hence the programs searched have none. What order the calls have matters only between calls that share a
pool; of all orders that induce the same event graph one is kept.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import permutations, product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.predict.cycle import Cycles, Edges, cycles
from planner.predict.schedule import steady_edges
from planner.spec.dataflow import Dataflow
from planner.spec.plan import Issue, Wait

Sharing = tuple[tuple[str, tuple[str, ...]], ...]  # call -> names of the pools that it occupies


class Program(NamedTuple):
    """A program of staleness k and the cycles of its event graph over all calls of the flow."""

    items: tuple[Issue | Wait, ...]
    staleness: int
    cycles: Cycles


@cache
def plain_programs(flow: Dataflow, sharing: Sharing, k: int) -> tuple[Program, ...]:
    """A few natural programs of staleness k; one alone if nothing can beat it, whatever the costs."""
    calls = tuple(call for call, _ in sharing)
    floor = bound_rates(flow, sharing, k)
    found: list[Program] = []
    for items, edges in _distinct(flow, sharing, _natural_orders(flow, dict(sharing), k)):
        program = Program(items, k, cycles(calls, edges))
        if dominates(floor, rates(program)):
            return (program,)
        found.append(program)
    return _undominated(found)


@cache
def all_programs(flow: Dataflow, sharing: Sharing, k: int) -> tuple[tuple[tuple[Issue, ...], ...], NDArray[np.float64]]:
    """Every program of staleness k with an event graph of its own, and the graphs: the steps [programs, u, v] by which
    v lags behind u, infinite where it need not wait for it. Independent of costs."""
    index = {call: i for i, (call, _) in enumerate(sharing)}
    found = list(_distinct(flow, sharing, orders(flow, dict(sharing), k)))
    steps = np.full((len(found), len(index), len(index)), np.inf)
    for number, (_, edges) in enumerate(found):
        for (u, v), distance in edges.items():
            steps[number, index[u], index[v]] = distance
    return tuple(items for items, _ in found), steps


def programs_below(
    flow: Dataflow, sharing: Sharing, k: int, seconds: NDArray[np.float64], threshold: float
) -> list[Program]:
    """The programs of staleness k whose period at durations [calls] is below `threshold` seconds.

    A period is at least that exactly if the graph with weights seconds(u) - threshold * steps has a cycle that is not
    negative; the longest walks of all graphs are found at once (Floyd 1962)."""
    listed, steps = all_programs(flow, sharing, k)
    walks = seconds[None, :, None] - threshold * steps
    for via in range(len(seconds)):
        walks = np.maximum(walks, walks[:, :, via, None] + walks[:, None, via, :])
    below = np.flatnonzero(walks.diagonal(axis1=1, axis2=2).max(axis=1) < 0)
    pools, calls = dict(sharing), tuple(call for call, _ in sharing)
    graphs = [steady_edges(flow, listed[i], lambda call: pools[call.name]) for i in below]
    return [Program(listed[i], k, cycles(calls, edges)) for i, edges in zip(below, graphs, strict=True)]


def _distinct(
    flow: Dataflow, sharing: Sharing, candidates: Iterable[tuple[Issue, ...]]
) -> Iterator[tuple[tuple[Issue, ...], Edges]]:
    """Programs and their event graphs, one for each graph. What has the same order on every pool has the same graph."""
    pools = dict(sharing)
    occupied = sorted({pool for names in pools.values() for pool in names})
    seen: set[object] = set()
    for items in candidates:
        in_pools = tuple(tuple((i.call, i.offset) for i in items if pool in pools[i.call]) for pool in occupied)
        if in_pools in seen:
            continue
        edges = steady_edges(flow, items, lambda call: pools[call.name])
        graph = frozenset(edges.items())
        if graph not in seen:
            seen.update((in_pools, graph))
            yield items, edges


def rates(program: Program) -> NDArray[np.float64]:
    """[cycles, calls]: seconds per step that a second of each call adds on each cycle."""
    return program.cycles.counts / program.cycles.distance[:, None]


def dominates(greater: NDArray[np.float64], less: NDArray[np.float64]) -> bool:
    """Whether every row of `less` is at most some row of `greater`, so that its maximum is never above."""
    return bool(all(((row <= greater + 1e-12).all(axis=1)).any() for row in less))


def _undominated(found: list[Program]) -> tuple[Program, ...]:
    kept: list[Program] = []
    for program in found:
        if any(dominates(rates(program), rates(other)) for other in kept):
            continue
        kept = [other for other in kept if not dominates(rates(other), rates(program))]
        kept.append(program)
    return tuple(kept)


def bound_rates(flow: Dataflow, sharing: Sharing, k: int) -> NDArray[np.float64]:
    """Rows [n, calls] that no program of staleness at most k can beat: period >= max(rows @ seconds).

    The load of each pool; the data path generate -> what a pool has to infer (in turn) -> advantages -> update_actor ->
    sync_weights, which spans k + 1 steps because generation uses weights k updates old; and the recurrence of each
    trained role, which infers and updates with its own weights every step."""
    pools = dict(sharing)
    calls = tuple(pools)
    rows = [{call for call in calls if pool in pools[call]} for pool in {p for ps in pools.values() for p in ps}]
    scaled = [(row, 1.0) for row in rows]
    needed = {flow.writer(read.data) for read in flow["advantages"].reads}
    before = {call.name for call in needed if call is not None} - {"generate"}
    path = {"generate", "advantages", "update_actor", "sync_weights"}
    groups = [{call for call in before if pool in pools[call]} for pool in {p for c in before for p in pools[c]}]
    groups += [{call} for call in before if not pools[call]] or [set()]
    scaled += [(path | group, 1.0 / (k + 1)) for group in groups]
    for infer, train in (("values", "update_critic"), ("old_logprobs", "update_actor")):
        if infer in calls and train in calls:
            scaled.append(({infer, "advantages", train}, 1.0))
    return np.array(sorted({tuple(scale * (call in row) for call in calls) for row, scale in scaled}))


def _natural_orders(flow: Dataflow, pools: dict[str, tuple[str, ...]], k: int) -> Iterator[tuple[Issue, ...]]:
    """Inference of one step as a block, before or after the updates of an earlier one; the critic's update before,
    beside or after the actor's and the sync."""
    infer = [call.name for call in flow.calls if call.kind == "infer" or call.name == "score"]
    tail = [call for call in ("update_critic", "update_actor", "sync_weights") if call in pools]
    for ahead, critic in product(range(k + 1), range(-1, k + 1)):
        offset = dict.fromkeys(infer, ahead) | {"generate": k, "advantages": ahead, "update_critic": critic}
        offset |= {"update_actor": 0, "sync_weights": 0}
        before = _precedence(flow, {call: offset[call] for call in pools})
        if before is None:
            continue
        for first, last in product(permutations(infer), permutations(tail)):
            preference = ("generate", *first, "advantages", *last)
            order = next(_extensions(preference, before, dict.fromkeys(pools, ("all",))), None)
            if order is not None:
                yield _issues(order, offset)


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
