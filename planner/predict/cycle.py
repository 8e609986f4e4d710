"""The exact period of a plan: the maximum cycle ratio of its event graph.

In the steady state call v of step t starts when each predecessor u of step t - d has ended, so start times follow a
max-plus recursion whose growth per step is the maximum, over the cycles of the graph, of the cycle's total duration
by its total step distance (Baccelli, Cohen, Olsder, Quadrat: Synchronization and Linearity, 1992, theorem 3.28).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from planner.predict.schedule import unroll
from planner.spec.dataflow import Call, Dataflow
from planner.spec.plan import Issue, Wait

Edges = frozenset[tuple[str, str, int]]


def event_edges(
    flow: Dataflow, program: Sequence[Issue | Wait], pools_of: Callable[[Call], tuple[str, ...]]
) -> Edges:
    """The steady-state edges (u, v, d): v of step t starts after u of step t - d. Read off the unrolled program far
    from both ends. Monitors are left out. Raises UserError as `unroll` does."""
    steady = flow.steady
    items = [item for item in program if isinstance(item, Wait) or item.call in steady.names]
    depth = max(item.offset for item in items if isinstance(item, Issue))
    middle = 2 * depth + 2
    tasks = unroll(steady, items, pools_of, middle + depth + 2)
    nearest: dict[tuple[str, str], int] = {}
    for task in tasks:
        if task.step == middle:
            for index in task.after:
                pair, distance = (tasks[index].call.name, task.call.name), middle - tasks[index].step
                nearest[pair] = min(distance, nearest.get(pair, distance))
    return frozenset((u, v, distance) for (u, v), distance in nearest.items())


@dataclass(frozen=True, kw_only=True, eq=False)
class Cycles:
    """All cycles that can bind, over the calls in the order of `calls`: `counts[c, i]` is 1 where cycle c runs through
    call i, `distance[c]` the steps that it spans."""

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


def cycles(calls: tuple[str, ...], edges: Edges) -> Cycles:
    """The cycles of an event graph, without those that another one always outweighs."""
    graph = nx.DiGraph()
    graph.add_nodes_from(calls)
    graph.add_weighted_edges_from(sorted(edges), weight="distance")
    index = {call: i for i, call in enumerate(calls)}
    rows: dict[tuple[int, ...], int] = {}
    for cycle in nx.simple_cycles(graph):
        on = [0] * len(calls)
        for call in cycle:
            on[index[call]] = 1
        distance = sum(graph[u][v]["distance"] for u, v in zip(cycle, [*cycle[1:], cycle[0]], strict=True))
        assert distance > 0, f"a cycle without delay: {cycle}"
        rows[tuple(on)] = min(distance, rows.get(tuple(on), distance))
    counts, distance = np.array(list(rows), dtype=float), np.array(list(rows.values()), dtype=float)
    kept = undominated(counts / distance[:, None])
    return Cycles(calls=calls, counts=counts[kept], distance=distance[kept])


def undominated(rates: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices of the rows [n, m] that no other row equals or exceeds everywhere (of equal rows the first)."""
    order = np.argsort(-rates.sum(axis=1), kind="stable")
    kept: list[int] = []
    for row in order:
        if not any((rates[row] <= rates[other] + 1e-12).all() for other in kept):
            kept.append(int(row))
    return np.array(sorted(kept), dtype=np.int64)
