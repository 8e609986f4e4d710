"""The layouts of roles on pools: those worth considering for each role, and jointly for a pool under its memory.

One layout dominates another if it needs no more of any kind of memory and its calls take no longer in any scenario. A
step time only grows with each duration, so what is dominated need not be considered.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.predict.cost import CostModel, Place
from planner.predict.cycle import undominated
from planner.predict.layouts import rollout_layouts, trainer_layouts
from planner.predict.memory import RoleMemory, pool_peak, rollout_memory, trainer_memory
from planner.spec.cluster import Cluster
from planner.spec.dataflow import Dataflow
from planner.spec.plan import RolloutRole, TrainerRole
from planner.spec.workload import Workload

Array = NDArray[np.float64]


class Choice(NamedTuple):
    """A layout of a trained or inference role on a pool: its memory, the seconds [calls of the role, S] of its calls,
    and the mean seconds that a weight sync takes beyond what all layouts share (of the actor)."""

    layout: TrainerRole
    memory: RoleMemory
    seconds: Array
    sync: float


class Engines(NamedTuple):
    """A layout of the rollout on its pools: the memory of an engine on each GPU, and the seconds [S] to generate."""

    layout: RolloutRole
    memory: RoleMemory
    seconds: Array


@dataclass(kw_only=True)
class Problem:
    """One workload on one cluster, with everything memoised that the search asks for more than once."""

    workload: Workload
    cluster: Cluster
    model: CostModel
    flow: Dataflow  # without monitors
    max_staleness: int
    _choices: dict[object, tuple[Choice, ...]] = field(default_factory=dict)
    _rollouts: dict[object, list[tuple[RolloutRole, RoleMemory]]] = field(default_factory=dict)
    _least: dict[object, dict[str, float] | None] = field(default_factory=dict)
    _lightest: dict[object, tuple[Choice, ...] | None] = field(default_factory=dict)

    @property
    def calls(self) -> tuple[str, ...]:
        """The calls of the steady state, in the dataflow's order."""
        return self.flow.names

    def calls_of(self, role: str) -> tuple[str, ...]:
        """Calls that a trained or inference role runs alone (not the sync, which depends on the rollout too)."""
        return tuple(call.name for call in self.flow.calls if call.roles == (role,))

    def choices(self, role: str, place: Place) -> tuple[Choice, ...]:
        """The undominated layouts of a role that fit a pool of its own."""
        key = (role, place.parts, id(place.device))
        if key not in self._choices:
            layouts = trainer_layouts(self.workload, role, place.gpus, "pool", place.device)
            allowed = place.device.memory_bytes - pool_peak((), True, False, place.device)
            memory = ((layout, trainer_memory(self.workload, role, layout, place.device)) for layout in layouts)
            found = [self._choice(role, *sized, place) for sized in memory if sized[1].running <= allowed]
            rows = [[*bytes_of(choice.memory), *choice.seconds.ravel(), choice.sync] for choice in found]
            self._choices[key] = tuple(found[i] for i in undominated(-np.array(rows))) if rows else ()
        return self._choices[key]

    def _choice(self, role: str, layout: TrainerRole, memory: RoleMemory, place: Place) -> Choice:
        rows = []
        for name in self.calls_of(role):
            estimate = self.model.train if self.flow[name].kind == "train" else self.model.infer
            rows.append(np.broadcast_to(estimate(role, layout, place).seconds, (self.model.scenarios,)))
        sync = 0.0
        if role == "actor":  # which engines receive the weights adds the same to every layout of the actor
            engines = RolloutRole(
                engine="vllm", pools=("pool",), tensor_parallel=1, replicas=1, memory_fraction=1, concurrency=1
            )
            sync = float(self.model.sync(layout, place, engines, [place], same_node=True, shared=True).seconds.mean())
        return Choice(layout, memory, np.stack(rows), sync)

    def rollouts(self, places: Sequence[Place]) -> list[tuple[RolloutRole, RoleMemory]]:
        """All layouts of the rollout on pools p0, p1, ... and the memory of an engine."""
        key = tuple((place.parts, id(place.device)) for place in places)
        if key not in self._rollouts:
            pools, device = tuple(f"p{i}" for i in range(len(places))), places[0].device
            layouts = rollout_layouts(self.workload, tuple(place.parts for place in places), pools, device)
            self._rollouts[key] = [(layout, rollout_memory(self.workload, layout, device)) for layout in layouts]
        return self._rollouts[key]

    def engines(self, layout: RolloutRole, memory: RoleMemory, places: Sequence[Place]) -> Engines:
        seconds = self.model.generate(layout, places).seconds
        return Engines(layout, memory, np.broadcast_to(seconds, (self.model.scenarios,)))

    def least(self, roles: tuple[str, ...], place: Place, engine: RoleMemory | None) -> dict[str, float] | None:
        """The least mean seconds of each call that some layout allows beside the other roles' smallest ones; None if
        not even the smallest fit together. Below what any joint choice reaches."""
        key = (roles, place.parts, id(place.device), engine and bytes_of(engine))
        if key not in self._least:
            self._least[key] = self._find_least(roles, place, engine)
        return self._least[key]

    def _find_least(self, roles: tuple[str, ...], place: Place, engine: RoleMemory | None) -> dict[str, float] | None:
        allowed = self.allowed(roles, place, engine)
        listed = [self.choices(role, place) for role in roles]
        if not all(listed):
            return None
        memory = [np.array([bytes_of(choice.memory)[:2] for choice in choices], dtype=float) for choices in listed]
        floor = np.array(
            [bytes_of(engine)[:2] if engine else (0, 0), *(rows.min(axis=0) for rows in memory)], dtype=float
        )
        found: dict[str, float] = {}
        for i, (role, choices) in enumerate(zip(roles, listed, strict=True)):
            others = np.delete(floor, i + 1, axis=0)
            needed = memory[i][:, 0] + others[:, 0].sum() + np.maximum(memory[i][:, 1], others[:, 1].max())
            fits = np.flatnonzero(needed <= allowed)
            if not len(fits):
                return None
            means = np.array([choices[n].seconds.mean(axis=1) for n in fits])
            found.update(zip(self.calls_of(role), means.min(axis=0).tolist(), strict=True))
        return found if floor[:, 0].sum() + floor[:, 1].max() <= allowed else None

    def lightest(self, roles: tuple[str, ...], place: Place, engine: RoleMemory | None) -> tuple[Choice, ...] | None:
        """The joint layouts of a pool that fit with the least seconds of all calls together; None if none fit."""
        key = (roles, place.parts, id(place.device), engine and bytes_of(engine))
        if key not in self._lightest:
            allowed = self.allowed(roles, place, engine)
            memory = np.array([bytes_of(engine) if engine else (0, 0, 0)], dtype=float)
            total, picked = np.zeros(1), [()]
            for role in roles:
                choices = self.choices(role, place)
                added = np.array([bytes_of(choice.memory) for choice in choices], dtype=float).reshape(-1, 3)
                load = np.array([choice.seconds.mean(axis=1).sum() for choice in choices])
                old, new = (grid.ravel() for grid in np.mgrid[: len(picked), : len(choices)])
                memory, total = together(memory[old], added[new]), total[old] + load[new]
                fits = np.flatnonzero(memory[:, 0] + memory[:, 1] <= allowed)
                kept = fits[undominated(-np.column_stack([memory, total])[fits])]
                picked = [(*picked[old[i]], choices[new[i]]) for i in kept]
                memory, total = memory[kept], total[kept]
            self._lightest[key] = picked[int(total.argmin())] if picked else None
        return self._lightest[key]

    def allowed(self, roles: tuple[str, ...], place: Place, engine: RoleMemory | None) -> int:
        """Bytes of a GPU that are left beside the contexts of its processes."""
        return place.device.memory_bytes - pool_peak((), bool(roles), engine is not None, place.device)


def bytes_of(memory: RoleMemory) -> tuple[int, int, int]:
    """Resident bytes, the surplus while the role runs, and pinned host bytes."""
    return memory.idle, memory.running - memory.idle, memory.host


def together(memory: Array, more: Array) -> Array:
    """Memory [n, 3] of roles on one pool: residents and host copies add up, of the surpluses the largest counts."""
    return np.where([True, False, True], memory + more, np.maximum(memory, more))
