"""The exact period of a plan: the maximum cycle ratio of its event graph.

In the steady state call v of step t starts when each predecessor u of step t - d has ended, so
start times follow a max-plus recursion whose growth per step is the maximum, over the cycles of the
graph, of the cycle's total duration by its total step distance (Baccelli, Cohen, Olsder, Quadrat:
Synchronization and Linearity, 1992, theorem 3.28).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from planner.predict.edges import PoolsOf
from planner.predict.schedule import steady_edges
from planner.spec.dataflow import Dataflow
from planner.spec.plan import Issue, Plan, Wait

SLACK = 1e-12  # relative; differences that only rounding makes
Edges = Mapping[tuple[str, str], int]


@dataclass(frozen=True, kw_only=True, eq=False)
class Cycles:
    """All cycles that can bind, over the calls in the order of `calls`: `counts[c, i]` is 1 where
    cycle c runs through call i, `distance[c]` the steps that it spans."""

    calls: tuple[str, ...]
    counts: NDArray[np.float64]
    distance: NDArray[np.float64]

    def periods(self, seconds: NDArray[np.float64]) -> NDArray[np.float64]:
        """Seconds per step [...] of durations [calls, ...]."""
        ratios = np.tensordot(self.counts / self.distance[:, None], seconds, axes=1)
        return np.asarray(ratios.max(axis=0))

    def critical(self, seconds: NDArray[np.float64]) -> tuple[str, ...]:
        """The calls of the cycle that binds at durations [calls]."""
        row = self.counts[np.argmax(self.counts @ seconds / self.distance)]
        return tuple(call for call, on in zip(self.calls, row, strict=True) if on)


def plan_cycles(plan: Plan) -> Cycles:
    """The cycles of a plan's event graph in the steady state."""
    return program_cycles(plan.dataflow, plan.program, plan.pools_of)


def program_cycles(flow: Dataflow, program: Sequence[Issue | Wait], pools_of: PoolsOf) -> Cycles:
    """The cycles of a program's event graph in the steady state, over all of its calls."""
    steady, edges = flow.steady, steady_edges(flow, program, pools_of)
    beside = [call.name for call in steady.calls if call.since_generation]
    if not beside:
        return cycles(steady.names, edges)
    # What is left to score counts from where generation ends, however late the call is issued. So
    # its seconds lie on the way from generation to the call, and the call itself takes none.
    left = {call: f"what {call} has left" for call in beside}
    for call, name in left.items():
        edges |= {(steady.generates.name, name): 0, (name, call): 0}
    found = cycles((*steady.names, *left.values()), edges)
    columns = [found.calls.index(left.get(call, call)) for call in steady.names]
    return replace(found, calls=steady.names, counts=found.counts[:, columns])


def cycles(calls: tuple[str, ...], edges: Edges) -> Cycles:
    """The cycles of an event graph (`schedule.steady_edges`), without those that another one always
    outweighs."""
    index = {call: i for i, call in enumerate(calls)}
    graph = nx.DiGraph()
    graph.add_nodes_from(calls)
    graph.add_edges_from(sorted(_needed(index, edges)))
    steps_of: dict[tuple[bool, ...], int] = {}  # the fewest, by which calls a cycle runs through
    for cycle in nx.simple_cycles(graph):
        pairs = zip(cycle, [*cycle[1:], cycle[0]], strict=True)
        steps = sum(edges[pair] for pair in pairs)
        assert steps > 0, f"a cycle without delay: {cycle}"
        on = tuple(call in cycle for call in calls)
        steps_of[on] = min(steps, steps_of.get(on, steps))
    counts = np.array(list(steps_of), dtype=float)
    distance = np.array(list(steps_of.values()), dtype=float)
    kept = undominated(counts / distance[:, None])
    return Cycles(calls=calls, counts=counts[kept], distance=distance[kept])


def _needed(index: Mapping[str, int], edges: Edges) -> list[tuple[str, str]]:
    """The edges without those that a longer path implies: one that spans no more steps starts its
    end no earlier."""
    direct = np.full((len(index), len(index)), np.inf)
    for (u, v), distance in edges.items():
        direct[index[u], index[v]] = distance
    reach = direct.copy()  # the fewest steps of a path
    detour = np.full_like(direct, np.inf)  # and of one with another call between its ends
    for via in range(len(index)):
        path = reach[:, via, None] + reach[None, via, :]
        path[via] = np.inf
        path[:, via] = np.inf
        detour = np.minimum(detour, path)
        reach = np.minimum(reach, path)

    def is_needed(u: str, v: str) -> bool:
        ends = index[u], index[v]
        return u == v or bool(detour[ends] > direct[ends])

    return [edge for edge in edges if is_needed(*edge)]


def undominated(rates: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices of the rows [n, m] that no other row equals or exceeds everywhere (of equal rows the
    first)."""
    # A row is exceeded only by rows of a greater sum.
    left = np.argsort(-rates.sum(axis=1), kind="stable")
    kept: list[int] = []
    while len(left):
        first, left = left[0], left[1:]
        kept.append(int(first))
        limits = rates[first] + SLACK * np.abs(rates[first])
        exceeded = (rates[left] <= limits).all(axis=1)
        left = left[~exceeded]
    return np.array(sorted(kept), dtype=np.int64)


# --- event graphs that change ---


def tightened(
    lags: NDArray[np.float64], rows: NDArray[np.float64], seconds: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The periods of an event graph, given as the steps [u, v] by which v lags behind u (inf: by
    none), at durations [calls, S].

    `rows` [n, calls] are rates that the periods are not below. Returned are (rows, periods, paths):
    the rows with those of the cycles that bind, the periods [S], and the longest paths [S, u, v] at
    that period, from the start of u to that of v.

    Newton's method: a cycle that is longer than the period so far raises it to its own ratio. For
    example a call of 3 s and one of 4 s on one pool lag 0 steps and 1 step behind each other. Their
    cycle of 7 s spans one step, and adds the row (1, 1) to rows that say less."""
    while True:
        periods = (rows @ seconds).max(axis=0)
        paths = seconds.T[:, :, None] - periods[:, None, None] * lags
        for via in range(len(lags)):  # Floyd 1962
            np.maximum(paths, paths[:, :, via, None] + paths[:, None, via, :], out=paths)
        above = paths.diagonal(axis1=1, axis2=2).max(axis=1) / periods
        worst = int(above.argmax())
        if above[worst] <= 1e-11:
            return rows, periods, paths
        on, distance = longest_cycle(lags, seconds[:, worst].tolist(), float(periods[worst]))
        row = np.zeros((1, len(lags)))
        row[0, on] = 1 / distance
        rows = np.concatenate([rows, row])


def longest_cycle(
    lags: NDArray[np.float64], seconds: list[float], period: float
) -> tuple[list[int], float]:
    """A cycle whose ratio is the greatest, and above `period`: its calls and the steps that it
    spans. Bellman and Ford's search for a cycle that is longer than the period is repeated at that
    cycle's ratio until there is none."""
    edges = [(int(u), int(v), float(lags[u, v])) for u, v in np.argwhere(np.isfinite(lags))]
    found: tuple[list[int], float] | None = None
    while True:
        weighted = [(u, v, seconds[u] - period * lag) for u, v, lag in edges]
        cycle = _longer_cycle(len(seconds), weighted, 1e-12 * period)
        if cycle is None:
            assert found is not None, "no cycle is longer"
            return found
        pairs = zip(cycle, [*cycle[1:], cycle[0]], strict=True)
        distance = float(sum(lags[u, v] for u, v in pairs))
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
