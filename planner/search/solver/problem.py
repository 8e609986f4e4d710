"""The problem that a search solves: one workload on one cluster, with the tables of layouts that it
looks up again and again."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import NamedTuple

import numpy as np

from planner.predict.cost import SCENARIOS, CostModel, Place
from planner.predict.layouts import tensor_parallels
from planner.predict.memory import pool_peak
from planner.predict.objective import MEAN, Objective, ObjectiveName, with_mean
from planner.predict.profile import Profile, check_profiles
from planner.predict.roofline import hand_over_seconds
from planner.search.solver.choices import Choices, choices_of
from planner.search.solver.layout_table import LayoutTable, LayoutTables
from planner.search.solver.rollout_table import RolloutTable
from planner.search.space.arrays import Array
from planner.search.space.placements import PlacementFamily, Sharing, gpus_of_kinds
from planner.spec.cluster import Cluster, Device
from planner.spec.dataflow import Dataflow
from planner.spec.errors import UserError
from planner.spec.plan import Plan
from planner.spec.workload import Workload


class SyncPath(NamedTuple):
    """How new weights reach the engines: from the kind of GPU of the `actor`'s pool to that of the
    `rollout`'s pools. Some of these may be on the actor's own GPUs (`shared`), others elsewhere
    (`separate`)."""

    actor: str
    rollout: str
    shared: bool
    separate: bool

    @property
    def times(self) -> int:
        """How often the weights are gathered: once for the engines on the actor's own GPUs, and
        once for those elsewhere."""
        return self.shared + self.separate


def sync_path(family: PlacementFamily) -> SyncPath:
    """How new weights reach the engines in all placements of a family."""
    home = family.pool_of("actor")
    shared = home in family.generating
    separate = len(family.generating) > int(shared)
    return SyncPath(family.kinds[home], family.kinds[family.generating[0]], shared, separate)


@dataclass(kw_only=True)
class Problem:
    """One workload on one cluster, what is minimised, and the tables of what layouts need and take.

    The tables hold facts about the workload and the cluster only, and are made when they are first
    asked for. What a search learns while it runs is the search's own."""

    workload: Workload
    cluster: Cluster
    model: CostModel
    flow: Dataflow  # without monitors
    max_staleness: int
    objective: Objective = MEAN
    streams: bool = False
    _layout_memo: dict[object, LayoutTable] = field(default_factory=dict)
    _hand_over: dict[object, float] = field(default_factory=dict)
    rollout_tables: dict[str, RolloutTable] = field(default_factory=dict)

    # --- calls ---

    @property
    def calls(self) -> tuple[str, ...]:
        """The calls of the steady state, in the dataflow's order."""
        return self.flow.names

    def calls_of(self, role: str) -> tuple[str, ...]:
        """The calls that a trained or inference role runs, the weight sync last."""
        return self._layouts.calls_of(role)

    @cached_property
    def row(self) -> dict[str, int]:
        """The row of each call in arrays [calls, ...]."""
        return {call: row for row, call in enumerate(self.calls)}

    @cached_property
    def generate(self) -> int:
        """The row of the call that generates."""
        return self.row[self.flow.generates.name]

    @cached_property
    def sync(self) -> int:
        """The row of the weight sync."""
        return self.row[self.flow.installs.name]

    @cached_property
    def host_seconds(self) -> dict[int, Array]:
        """Seconds [S] of each call on the host, by its row; without what is scored beside
        generation, which `fill_in_generation` adds."""
        on_host = [call.name for call in self.flow.calls if not call.roles]
        return {self.row[name]: self.model.host(name).seconds for name in on_host}

    @cached_property
    def _scored_beside(self) -> tuple[int, ...]:
        """The rows of calls that score beside generation."""
        found = [call.name for call in self.flow.calls if self.model.scores_beside(call)]
        return tuple(self.row[name] for name in found)

    def fill_in_generation(self, seconds: Array, generation: Array) -> None:
        """Let generation take so long [..., S] in `seconds` [..., calls, S], and scoring beside it
        what then sticks out. Where both have a column of means more, what sticks out there is a
        bound. Seconds that generation is not below bound the two together: see `costs.scoring`."""
        seconds[..., self.generate, :] = generation
        for row in self._scored_beside:
            seconds[..., row, :] = self._after(row, generation)

    def _after(self, row: int, generation: Array) -> Array:
        alone = self.host_seconds[row]
        alone = with_mean(alone) if generation.shape[-1] > len(alone) else alone
        return np.asarray(alone + self.model.scoring.after(generation))

    @cached_property
    def trained_or_inferred(self) -> tuple[str, ...]:
        """All roles but the rollout, whose layouts are of another sort."""
        return tuple(role for role in self.workload.roles if role != "rollout")

    def choices(self, sharing: Sharing) -> Choices:
        """What programs have to choose if calls share pools like this."""
        return choices_of(self.flow, sharing, self.max_staleness)

    # --- GPUs ---

    def device(self, kind: str) -> Device:
        return self.cluster.devices[kind]

    @cached_property
    def gpus(self) -> dict[str, int]:
        """The number of GPUs of each kind."""
        return gpus_of_kinds(self.cluster)

    @cached_property
    def _largest_node(self) -> dict[str, int]:
        largest = dict.fromkeys(self.gpus, 0)
        for node in self.cluster.nodes:
            largest[node.device] = max(largest[node.device], node.gpus)
        return largest

    def node(self, kind: str) -> int:
        """GPUs of the largest node of a kind."""
        return self._largest_node[kind]

    def allowed(self, roles: bool, engine: bool, kind: str) -> int:
        """Bytes of a GPU that are left next to the contexts of its processes: those of `roles` that
        train or infer, and that of an `engine`."""
        device = self.device(kind)
        return device.memory_bytes - pool_peak((), roles, engine, device)

    # --- tables ---

    @cached_property
    def _layouts(self) -> LayoutTables:
        return LayoutTables(
            model=self.model,
            flow=self.flow,
            gpus=self.gpus,
            largest_node=self._largest_node,
            memo=self._layout_memo,
        )

    def ranks(self, kind: str) -> tuple[int, ...]:
        """The numbers of GPUs of a kind on which a trained or inference role may compute."""
        return self._layouts.ranks(kind)

    def layouts(self, role: str, kind: str) -> LayoutTable:
        """The layouts of a role as if every pool filled its nodes."""
        return self._layouts.on_full_nodes(role, kind)

    def layouts_at(self, role: str, kind: str, place: Place) -> LayoutTable:
        """The layouts of a role on a pool on real nodes."""
        return self._layouts.at(role, kind, place)

    def rollout_table(self, kind: str) -> RolloutTable:
        """The layouts of the rollout on GPUs of a kind."""
        if kind not in self.rollout_tables:
            self.rollout_tables[kind] = RolloutTable(
                self.workload,
                self.model,
                self.device(kind),
                self.node(kind),
                self.gpus[kind],
                self.objective.of_parts.of,
                self.max_staleness + 1 if self.streams else None,
            )
        return self.rollout_tables[kind]

    # --- the weight sync ---

    def gathers(self, path: SyncPath) -> float:
        """Seconds of a sync per second of gathering the actor's weights by the roofline."""
        return path.times * self._sync_ratio(path)

    @cached_property
    def least_sync(self) -> float:
        """The least seconds of a sync to engines that have their pools alone."""
        found = list[float]()
        for actor, rollout in product(self.gpus, self.gpus):
            path = SyncPath(actor, rollout, shared=False, separate=True)
            handed = min(self.hand_over(path, same_node=same) for same in (True, False))
            gathered = self.layouts("actor", actor).with_sync(self.gathers(path), handed)
            found.append(float(gathered.seconds[-1].min(initial=np.inf)))
        return min(found)

    def hand_over(self, path: SyncPath, *, same_node: bool) -> float:
        """The least seconds of handing the gathered weights to the engines; `same_node`: all of
        their pools lie on one node."""
        key = path, same_node
        if key not in self._hand_over:
            device = self.device(path.actor)
            seconds = min(
                hand_over_seconds(
                    self.workload.actor.shape,
                    device,
                    self.cluster,
                    tensor_parallel,
                    same_node=same_node,
                    shared=path.shared,
                    separate=path.separate,
                )
                for tensor_parallel in tensor_parallels(self.workload, self.device(path.rollout))
            )
            overhead = path.times * device.overhead_seconds
            self._hand_over[key] = self._sync_ratio(path) * (seconds + overhead)
        return self._hand_over[key]

    def _sync_ratio(self, path: SyncPath) -> float:
        device = self.device(path.actor)
        return self.model.syncs.ratio(device, shared=path.shared, separate=path.separate)


def problem_of(
    workload: Workload,
    cluster: Cluster,
    profiles: Sequence[Profile],
    max_staleness: int | None,
    objective: ObjectiveName = "mean",
    scenarios: int = SCENARIOS,
) -> Problem:
    """The problem of a workload on a cluster, at the costs of the profiles (else of the roofline).
    `max_staleness` replaces the workload's, if it is not None. Raises UserError for profiles that
    do not fit."""
    check_profiles(profiles, workload, cluster)
    if max_staleness is not None:
        if workload.sync == "in_flight" and not max_staleness:
            raise UserError(
                "sync = 'in_flight' with a staleness of 0: nothing is in flight when weights "
                "arrive; allow a staleness of 1 or more, or set sync to 'any' or 'boundary'"
            )
        workload = workload.changed(max_staleness=max_staleness)
    model = CostModel(workload, cluster, profiles, scenarios)
    return Problem(
        workload=workload,
        cluster=cluster,
        model=model,
        flow=workload.dataflow.steady,
        max_staleness=workload.max_staleness,
        objective=Objective(objective, model.least_period),
    )


def scenarios_of(plan: Plan) -> int:
    """The most length scenarios that a plan was found with."""
    return plan.predicted.proof.scenarios if plan.predicted else SCENARIOS
