"""The layouts of the roles that share a pool, chosen jointly under its memory."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.predict.cost import CostModel, Place
from planner.predict.cycle import undominated
from planner.predict.layouts import rollout_layouts, trainer_layouts
from planner.predict.memory import RoleMemory, pool_peak, trainer_memory
from planner.spec.cluster import Cluster
from planner.spec.dataflow import Dataflow
from planner.spec.plan import RolloutRole, TrainerRole
from planner.spec.workload import Workload


class Choice(NamedTuple):
    """A layout of one role: its memory and the seconds [calls of the role, S] of its calls."""

    layout: TrainerRole
    memory: RoleMemory
    seconds: NDArray[np.float64]

    group: tuple[object, ...]  # what a weight sync's time depends on: layouts are compared only within a group


class Options(NamedTuple):
    """Joint layouts of a pool's trained and inference roles that fit: `seconds[n, calls, S]` and pinned host bytes per
    GPU [n] of each."""

    calls: tuple[str, ...]
    layouts: tuple[tuple[TrainerRole, ...], ...]
    seconds: NDArray[np.float64]
    host: NDArray[np.float64]


@dataclass(kw_only=True)
class Problem:
    """One workload on one cluster, with everything memoised that the search asks for more than once."""

    workload: Workload
    cluster: Cluster
    model: CostModel
    flow: Dataflow  # without monitors
    max_staleness: int
    _choices: dict[object, tuple[Choice, ...]] = field(default_factory=dict)
    _options: dict[object, Options] = field(default_factory=dict)

    @property
    def calls(self) -> tuple[str, ...]:
        """The calls of the steady state, in the dataflow's order."""
        return self.flow.names

    def calls_of(self, role: str) -> tuple[str, ...]:
        """Calls that a trained or inference role runs alone (not the sync, which depends on the rollout too)."""
        return tuple(call.name for call in self.flow.calls if call.roles == (role,))

    def choices(self, role: str, place: Place) -> tuple[Choice, ...]:
        """The undominated layouts of a role on a pool. The shard counts in the comparison too: a sync's time
        depends on it."""
        key = (role, place.parts, id(place.device))
        if key not in self._choices:
            found = [self._choice(role, layout, place) for layout in self._layouts(role, place)]
            groups = [choice.group for choice in found]
            memory = np.array([_bytes(choice.memory) for choice in found], dtype=float)
            kept = _front(memory, np.stack([choice.seconds for choice in found]), groups)
            self._choices[key] = tuple(found[i] for i in kept)
        return self._choices[key]

    def _layouts(self, role: str, place: Place) -> list[TrainerRole]:
        return list(trainer_layouts(self.workload, role, sum(place.parts), "pool", place.device))

    def _choice(self, role: str, layout: TrainerRole, place: Place) -> Choice:
        rows = []
        for name in self.calls_of(role):
            estimate = self.model.train if self.flow[name].kind == "train" else self.model.infer
            rows.append(np.broadcast_to(estimate(role, layout, place).seconds, (self.model.scenarios,)))
        memory = trainer_memory(self.workload, role, layout, place.device)
        group = (layout.shard, layout.replicas, layout.offload) if role == "actor" else ()
        return Choice(layout, memory, np.stack(rows), group)

    def rollouts(self, places: Sequence[Place]) -> list[RolloutRole]:
        parts = tuple(place.parts for place in places)
        pools = tuple(f"p{i}" for i in range(len(places)))
        return list(rollout_layouts(self.workload, parts, pools, places[0].device))

    def options(self, roles: tuple[str, ...], place: Place, rollout: RoleMemory | None) -> Options:
        """The undominated joint layouts of `roles` on a pool, beside an engine that needs `rollout` if it has one."""
        key = (roles, place.parts, id(place.device), rollout and (rollout.idle, rollout.running))
        if key not in self._options:
            self._options[key] = self._joint(roles, place, rollout)
        return self._options[key]

    def _joint(self, roles: tuple[str, ...], place: Place, rollout: RoleMemory | None) -> Options:
        """Roles are added one by one. `memory` [n, 3] is what stays resident, the largest surplus of a running role and
        the pinned host bytes so far; what exceeds the GPU already is dropped, and so is what another combination dominates."""
        allowed = place.device.memory_bytes - pool_peak((), bool(roles), rollout is not None, place.device)
        memory = np.array([_bytes(rollout) if rollout else (0, 0, 0)], dtype=float)
        seconds = np.zeros((1, 0, self.model.scenarios))
        picked: list[tuple[Choice, ...]] = [()]
        for role in roles:
            choices = self.choices(role, place)
            added = np.array([_bytes(choice.memory) for choice in choices], dtype=float)
            drawn = np.stack([choice.seconds for choice in choices])
            old, new = (grid.ravel() for grid in np.mgrid[: len(picked), : len(choices)])
            memory = np.where([True, False, True], memory[old] + added[new], np.maximum(memory[old], added[new]))
            fits = memory[:, 0] + memory[:, 1] <= allowed
            memory, old, new = memory[fits], old[fits], new[fits]
            seconds = np.concatenate([seconds[old], drawn[new]], axis=1)
            picked = [(*picked[o], choices[n]) for o, n in zip(old, new, strict=True)]
            kept = _front(memory, seconds, [_group(choices) for choices in picked])
            memory, seconds, picked = memory[kept], seconds[kept], [picked[i] for i in kept]
        kept = _front(memory[:, 2:], seconds, [_group(choices) for choices in picked])  # what fits is alike
        calls = tuple(call for role in roles for call in self.calls_of(role))
        layouts = tuple(tuple(choice.layout for choice in picked[i]) for i in kept)
        return Options(calls, layouts, seconds[kept], memory[kept, 2])


def _bytes(memory: RoleMemory) -> tuple[int, int, int]:
    """Resident bytes, the surplus while the role runs, and pinned host bytes."""
    return memory.idle, memory.running - memory.idle, memory.host


def _group(picked: tuple[Choice, ...]) -> tuple[object, ...]:
    return next((choice.group for choice in picked if choice.group), ())


def _front(
    memory: NDArray[np.float64], seconds: NDArray[np.float64], groups: Sequence[tuple[object, ...]]
) -> NDArray[np.int64]:
    """Indices of the rows that no row of the same group matches or beats in every memory figure and every second."""
    columns = np.concatenate([memory, seconds.reshape(len(seconds), -1)], axis=1)
    kept: list[int] = []
    for group in dict.fromkeys(groups):
        members = np.array([i for i, g in enumerate(groups) if g == group])
        kept += members[undominated(-columns[members])].tolist()
    return np.array(sorted(kept), dtype=np.int64)
