"""Lower bounds on the step time of every pool size at once.

A bound takes for each call the least mean duration that any layout of its role allows on a pool of that size (one that
fits beside the pool's other roles), and puts them into the rows that no program can beat (`programs.bound_rates`).
The period is a maximum of sums of durations, hence convex: at mean durations it is at most the mean of the scenarios'
periods, so the bound holds for the objective too.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from planner.predict.cost import Place
from planner.predict.memory import RoleMemory, rollout_memory
from planner.search.options import Problem
from planner.search.programs import Sharing, bound_rates
from planner.search.space import Structure


def sharing_of(problem: Problem, structure: Structure) -> Sharing:
    """Which pools (p0, p1, ...) each call occupies under a structure."""
    calls = [problem.flow[name] for name in problem.calls]
    return tuple(
        (call.name, tuple(f"p{i}" for i, roles in enumerate(structure) if roles & set(call.roles))) for call in calls
    )


class Bounds:
    """Tables of least durations over pool sizes 1..G, made when first asked for."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.gpus = len(problem.cluster.gpus)
        self._tables: dict[frozenset[str], dict[str, NDArray[np.float64]]] = {}
        self._generate: NDArray[np.float64] | None = None

    def of(self, structure: Structure, sizes: NDArray[np.int64]) -> NDArray[np.float64]:
        """Lower bounds [n] in seconds for pool sizes [n, pools]; infinite where nothing fits."""
        problem = self.problem
        seconds = np.zeros((len(problem.calls), len(sizes)))
        for i, roles in enumerate(structure):
            for call, table in self._table(roles).items():
                seconds[problem.calls.index(call)] = table[sizes[:, i]]
        engines = [i for i, roles in enumerate(structure) if "rollout" in roles]
        seconds[problem.calls.index("generate")] = self._generation()[sizes[:, engines].sum(axis=1)]
        for i, roles in enumerate(structure):
            seconds[problem.calls.index("generate")] += self._table(roles)[""][sizes[:, i]]
        for name in problem.calls:
            if not problem.flow[name].roles:
                seconds[problem.calls.index(name)] = problem.model.host(name).seconds.mean()
        rates = bound_rates(problem.flow, sharing_of(problem, structure), problem.max_staleness)
        return np.asarray((rates @ np.nan_to_num(seconds, posinf=1e30)).max(axis=0))

    def _table(self, roles: frozenset[str]) -> dict[str, NDArray[np.float64]]:
        """Least mean seconds of each call [G + 1] on a pool of these roles; under "" infinity where nothing fits."""
        if roles not in self._tables:
            trained = tuple(role for role in self.problem.workload.roles if role in roles and role != "rollout")
            calls = [call for role in trained for call in self.problem.calls_of(role)]
            table = {call: np.full(self.gpus + 1, np.inf) for call in calls} | {"": np.full(self.gpus + 1, np.inf)}
            for gpus in range(1, self.gpus + 1):
                place = self._compact(gpus)
                engines = self._smallest_engines(place) if "rollout" in roles else [None]
                for engine in engines:
                    options = self.problem.options(trained, place, engine)
                    if options.layouts:
                        table[""][gpus] = 0.0
                        means = options.seconds.mean(axis=2).min(axis=0) if trained else ()
                        for call, least in zip(options.calls, means, strict=True):
                            table[call][gpus] = min(table[call][gpus], least)
            self._tables[roles] = table
        return self._tables[roles]

    def _smallest_engines(self, place: Place) -> Sequence[RoleMemory]:
        """The engines' memory figures on a pool that none other undercuts."""
        found = {
            (memory.idle, memory.running): memory
            for layout in self.problem.rollouts([place])
            for memory in [rollout_memory(self.problem.workload, layout, place.device)]
        }
        least = [key for key in found if not any(o != key and o[0] <= key[0] and o[1] <= key[1] for o in found)]
        return [found[key] for key in sorted(least)]

    def _generation(self) -> NDArray[np.float64]:
        """Least mean seconds of `generate` [G + 1] with that many GPUs, however they lie on pools."""
        if self._generate is None:
            table = np.full(self.gpus + 1, np.inf)
            for gpus in range(1, self.gpus + 1):
                place = self._compact(gpus)
                for layout in self.problem.rollouts([place]):
                    table[gpus] = min(table[gpus], self.problem.model.generate(layout, [place]).seconds.mean())
            self._generate = np.minimum.accumulate(table)
        return self._generate

    def _compact(self, gpus: int) -> Place:
        """A pool on as few nodes as possible; a real packing may be more scattered, which is never faster."""
        cluster = self.problem.cluster
        largest = sorted((node.gpus for node in cluster.nodes), reverse=True)
        parts: list[int] = []
        while gpus:
            parts.append(min(gpus, largest[len(parts)]))
            gpus -= parts[-1]
        return Place(parts=tuple(parts), device=cluster.device_of(cluster.gpus[0]))
