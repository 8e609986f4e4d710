"""Lower bounds on the step time of every pool size at once.

A bound takes for each call the least mean duration that any layout of its role allows on a pool of that size (one that
fits beside the pool's other roles), and puts them into the rows that no program can beat (`programs.bound_rates`).
The period is a maximum of sums of durations, hence convex: at mean durations it is at most the mean of the scenarios'
periods, so the bound holds for the objective too.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.predict.cost import Place
from planner.predict.memory import RoleMemory
from planner.search.options import Problem
from planner.search.programs import Sharing, bound_rates
from planner.search.space import Structure


def sharing_of(problem: Problem, structure: Structure) -> Sharing:
    """Which pools (p0, p1, ...) each call occupies under a structure."""
    calls = [problem.flow[name] for name in problem.calls]
    return tuple(
        (call.name, tuple(f"p{i}" for i, roles in enumerate(structure) if roles & set(call.roles))) for call in calls
    )


class Least(NamedTuple):
    """Of the roles of a pool, by its number of GPUs [G + 1]: 0 where they fit and infinity where not, and the least
    mean seconds of each call."""

    fits: NDArray[np.float64]
    seconds: dict[str, NDArray[np.float64]]


class Bounds:
    """Tables of least durations over pool sizes 1..G, made when first asked for. No plan above `ceiling` seconds is of
    interest: where generation alone exceeds it, its floor is enough."""

    def __init__(self, problem: Problem, ceiling: float = np.inf) -> None:
        self.problem, self.ceiling = problem, ceiling
        self.gpus = len(problem.cluster.gpus)
        self._tables: dict[frozenset[str], Least] = {}
        self._generate: NDArray[np.float64] | None = None

    def of(self, structure: Structure, sizes: NDArray[np.int64]) -> NDArray[np.float64]:
        """Lower bounds [n] in seconds, for any program, of pool sizes [n, pools]; infinite where nothing fits."""
        rates = bound_rates(self.problem.flow, sharing_of(self.problem, structure), self.problem.max_staleness)
        return self.at_rates(rates, structure, sizes)

    def at_rates(
        self, rates: NDArray[np.float64], structure: Structure, sizes: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Lower bounds [n] of the largest of `rates` [rows, calls] times the calls' durations."""
        problem = self.problem
        row = {call: i for i, call in enumerate(problem.calls)}
        seconds = np.zeros((len(row), len(sizes)))  # what has no table, the sync, is bounded by 0
        for call in problem.flow.calls:
            if not call.roles:
                seconds[row[call.name]] = problem.model.host(call.name).seconds.mean()
        generating = [i for i, roles in enumerate(structure) if "rollout" in roles]
        seconds[row["generate"]] = self._generation()[sizes[:, generating].sum(axis=1)]
        fits = np.zeros(len(sizes))
        for i, roles in enumerate(structure):
            least = self._least(roles)
            fits += least.fits[sizes[:, i]]
            for name, table in least.seconds.items():
                seconds[row[name]] = table[sizes[:, i]]
        return np.asarray((rates @ np.where(np.isfinite(seconds), seconds, 0.0)).max(axis=0) + fits)

    def _least(self, roles: frozenset[str]) -> Least:
        if roles not in self._tables:
            trained = tuple(role for role in self.problem.workload.roles if role in roles and role != "rollout")
            calls = [call for role in trained for call in self.problem.calls_of(role)]
            infinite = np.full(self.gpus + 1, np.inf)
            least = Least(infinite.copy(), {call: infinite.copy() for call in calls})
            for gpus in range(1, self.gpus + 1):
                place = self._compact(gpus)
                for engine in self._smallest_engines(place) if "rollout" in roles else (None,):
                    found = self.problem.least(trained, place, engine)
                    if found is not None:
                        least.fits[gpus] = 0.0
                        for call, seconds in found.items():
                            least.seconds[call][gpus] = min(least.seconds[call][gpus], seconds)
            self._tables[roles] = least
        return self._tables[roles]

    def _smallest_engines(self, place: Place) -> list[RoleMemory]:
        """The engines' memory figures on a pool that none other undercuts."""
        found = {(memory.idle, memory.running): memory for _, memory in self.problem.rollouts([place])}
        least = [key for key in found if not any(o != key and o[0] <= key[0] and o[1] <= key[1] for o in found)]
        return [found[key] for key in sorted(least)]

    def _generation(self) -> NDArray[np.float64]:
        """Least mean seconds of `generate` [G + 1] with that many GPUs, however they lie on pools."""
        if self._generate is None:
            table = np.full(self.gpus + 1, np.inf)
            for gpus in range(1, self.gpus + 1):
                places = [self._compact(gpus)]
                layouts = [layout for layout, _ in self.problem.rollouts(places) if not layout.offload]
                floors = [self.problem.model.generate_floor(layout, places) for layout in layouts]
                if floors and min(floors) >= self.ceiling:
                    table[gpus] = min(floors)
                for at in np.argsort(floors, kind="stable"):
                    if floors[at] >= table[gpus]:
                        break
                    table[gpus] = min(table[gpus], self.problem.model.generate(layouts[at], places).seconds.mean())
            self._generate = np.minimum.accumulate(table)
        return self._generate

    def _compact(self, gpus: int) -> Place:
        """A pool as if all of its GPUs shared a node: no real packing has faster links or room for more engines."""
        return Place(parts=(gpus,), device=self.problem.cluster.device_of(self.problem.cluster.gpus[0]))
