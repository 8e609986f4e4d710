"""The layouts of roles on pools: what each role could have, with its memory and its seconds, as
columns.

One layout dominates another if it needs no more of any kind of memory and its calls take no longer
in any scenario. A step time only grows with each duration, so what is dominated need not be
considered.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.predict.cost import SCENARIOS, CostModel, Place
from planner.predict.layouts import Grid, rank_counts, tensor_parallels, trainer_grid
from planner.predict.memory import RoleMemory, moved_bytes, pool_peak, trainer_bytes
from planner.predict.profile import Profile, check_profiles
from planner.predict.roofline import Split, gather_seconds, hand_over_seconds, nodes_spanned
from planner.search.solver.best_program import (
    SAME,
    Choices,
    Cut,
    Program,
    ProgramResult,
    best_program,
    choices_of,
)
from planner.search.solver.rollout_table import RolloutTable
from planner.search.space.placements import PlacementFamily, Sharing, gpus_of_kinds
from planner.spec.cluster import Cluster, Device
from planner.spec.dataflow import Dataflow, ppo
from planner.spec.plan import Plan, TrainerRole
from planner.spec.workload import Workload

Array = NDArray[np.float64]

Objective = Literal["mean", "p95", "cost"]
CUTS = 6  # of each sharing of pools that are remembered


class Layouts(NamedTuple):
    """Layouts of a trained or inference role: memory [n, 3] (resident bytes, the surplus while the
    role runs, pinned host bytes), and seconds [calls of the role, n, S] with their means [calls,
    n]. Of the actor the last row is what a weight sync takes to move what is offloaded, and
    `gathered` [n] what gathering its weights does by the roofline."""

    grid: Grid
    memory: Array
    seconds: Array
    means: Array
    gathered: Array

    def take(self, rows: NDArray[np.int64] | slice) -> "Layouts":
        seconds, means, gathered = self.seconds[:, rows], self.means[:, rows], self.gathered[rows]
        return Layouts(self.grid.take(rows), self.memory[rows], seconds, means, gathered)

    def layout(self, row: int, pool: str) -> TrainerRole:
        return self.grid.layout(row, pool)

    def with_sync(self, times: float, seconds: float = 0.0) -> "Layouts":
        """Of the actor, with the rest of the sync in the last row: so many times gathering, and
        what handing over the weights takes."""
        longer = np.zeros((len(self.seconds), len(self.gathered)))
        longer[-1] = times * self.gathered + seconds
        return self._replace(seconds=self.seconds + longer[..., None], means=self.means + longer)

    def of_shards(self, within: bool | None, node: int) -> "Layouts":
        """Those whose shards lie within a node of so many GPUs, or do not; all of them if None."""
        return (
            self
            if within is None
            else self.take(np.flatnonzero((self.grid.shard <= node) == within))
        )


@dataclass(kw_only=True)
class Problem:
    """One workload on one cluster, with everything memoised that the search asks for more than
    once. `objective` is what is minimised: the `mean` step time over the length scenarios, its 95th
    percentile (`p95`), or the `cost` of a step; all GPUs of the cluster are paid for, idle ones
    too, so the cost is the mean times a constant."""

    workload: Workload
    cluster: Cluster
    model: CostModel
    flow: Dataflow  # without monitors
    max_staleness: int
    objective: str = "mean"
    _cuts: dict[tuple[Sharing, int], list[Cut]] = field(default_factory=dict)
    _handed: dict[object, float] = field(default_factory=dict)
    _layouts: dict[object, Layouts] = field(default_factory=dict)
    _engines: dict[str, RolloutTable] = field(default_factory=dict)

    @property
    def calls(self) -> tuple[str, ...]:
        """The calls of the steady state, in the dataflow's order."""
        return self.flow.names

    def calls_of(self, role: str) -> tuple[str, ...]:
        """Calls that a trained or inference role runs, the sync last."""
        found = tuple(call.name for call in self.flow.calls if call.roles == (role,))
        return (*found, "sync_weights") if role == "actor" else found

    def statistic(self, periods: Array) -> Array:
        """The objective in seconds of periods [..., S]."""
        if self.objective == "p95":
            return np.asarray(np.percentile(periods, 95, axis=-1))
        return np.asarray(periods.mean(axis=-1))

    def objective_of(self, periods: Array) -> Array:
        """The objective in seconds of periods [..., S + 1] (see `with_mean`), which may be bounds.
        A period is a maximum of sums, hence convex: at the mean durations it is at most the mean of
        the periods."""
        if periods.shape[-1] == 1:
            return np.asarray(periods[..., 0])
        found = self.statistic(periods[..., :-1])
        return found if self.objective == "p95" else np.maximum(found, periods[..., -1])

    def choices(self, sharing: Sharing) -> Choices:
        """What the programs of pools that are shared so choose."""
        return choices_of(self.flow, sharing, self.max_staleness)

    def cuts(self, sharing: Sharing) -> Sequence[Cut]:
        """What was learned about the programs of pools that are shared so, the latest last."""
        return self._cuts.get((sharing, self.max_staleness), ())

    def best_program(self, sharing: Sharing, seconds: Array, limit: float) -> ProgramResult:
        """The best program below `limit` seconds at durations [calls, S + 1]; its cut is
        remembered."""
        found = best_program(self.choices(sharing), seconds, self.objective_of, limit)
        cuts = self._cuts.setdefault((sharing, self.max_staleness), [])
        cuts.append(found.cut)
        del cuts[:-CUTS]
        return found

    def device(self, kind: str) -> Device:
        return self.cluster.devices[kind]

    def node(self, kind: str) -> int:
        """GPUs of the largest node of a kind."""
        return self._largest[kind]

    @cached_property
    def _largest(self) -> dict[str, int]:
        return {
            kind: max(node.gpus for node in self.cluster.nodes if node.device == kind)
            for kind in self.there
        }

    @cached_property
    def there(self) -> dict[str, int]:
        """GPUs of each kind."""
        return gpus_of_kinds(self.cluster)

    def ranks(self, kind: str) -> tuple[int, ...]:
        """On how many GPUs of a kind a trained or inference role may compute."""
        return rank_counts(self.there[kind], self.workload.minibatch, self.node(kind))

    def layouts(self, role: str, kind: str) -> Layouts:
        """Of a role on all GPUs of a kind and on any fewer, in the order of the ranks, as if every
        pool filled its nodes: no other packing has faster links, since a group of s ranks lies on s
        / node nodes at least."""
        if (role, kind) not in self._layouts:
            fitting = self._fitting(role, kind)
            self._layouts[role, kind] = fitting.take(_best_of_alike(fitting))
        return self._layouts[role, kind]

    def _fitting(self, role: str, kind: str) -> Layouts:
        """As `layouts`, also those that others dominate on full nodes: across nodes they may be the
        better ones."""
        if (role, kind, ()) not in self._layouts:
            device, node = self.device(kind), self.node(kind)
            grid = trainer_grid(self.workload, role, self.ranks(kind), node, device)
            inside = np.maximum(node // grid.shard, 1)  # members of a replica group on a node
            nodes = np.where(grid.shard > 1, -(-grid.shard // node), 1)
            across = np.where(grid.gpus <= node, 1, -(-grid.replicas // inside))
            self._layouts[role, kind, ()] = self._made(role, grid, nodes, across, device)
        return self._layouts[role, kind, ()]

    def layouts_at(self, role: str, kind: str, place: Place) -> Layouts:
        """Of a role on a pool on real nodes, on all of its GPUs and on any fewer."""
        parts, node = place.parts, self.node(kind)
        whole = next((i for i, part in enumerate(parts) if part < node), len(parts))
        alike = sum(parts[: whole + 1])  # so many ranks lie as if the nodes were filled
        full = self.layouts(role, kind)
        known = full.take(slice(0, int(np.searchsorted(full.grid.gpus, place.gpus, "right"))))
        if alike >= place.gpus or not (known.grid.gpus > alike).any():
            return known
        if (role, kind, parts) not in self._layouts:
            fitting = self._fitting(role, kind)
            first, last = np.searchsorted(fitting.grid.gpus, (alike, place.gpus), "right").tolist()
            near, far = fitting.take(slice(0, first)), fitting.take(slice(first, last))
            splits = zip(far.grid.shard.tolist(), far.grid.replicas.tolist(), strict=True)
            shard_nodes, replica_nodes = (
                np.array([nodes_spanned(parts, *split) for split in splits]).reshape(-1, 2).T
            )
            far = self._made(role, far.grid, shard_nodes, replica_nodes, place.device)
            both = Layouts(
                fitting.grid.take(slice(0, last)),
                np.concatenate([near.memory, far.memory]),
                np.concatenate([near.seconds, far.seconds], axis=1),
                np.concatenate([near.means, far.means], axis=1),
                np.concatenate([near.gathered, far.gathered]),
            )
            self._layouts[role, kind, parts] = both.take(_best_of_alike(both))
        return self._layouts[role, kind, parts]

    def _made(
        self,
        role: str,
        grid: Grid,
        shard_nodes: NDArray[np.int64],
        replica_nodes: NDArray[np.int64],
        device: Device,
    ) -> Layouts:
        """Layouts with their memory and seconds, without those that do not fit a GPU alone."""
        away, half = grid.offload == 2, grid.offload > 0
        idle, detail, host = trainer_bytes(self.workload, role, grid, away, half, device)
        running = sum(detail.values())
        memory = np.stack([idle, running - idle, host], axis=1).astype(np.float64)
        fits = np.flatnonzero(running <= device.memory_bytes - pool_peak((), True, False, device))
        grid, memory, away, half = grid.take(fits), memory[fits], away[fits], half[fits]
        shard_nodes, replica_nodes = shard_nodes[fits], replica_nodes[fits]
        split = Split(*grid[:4], shard_nodes, replica_nodes)
        rows, gathered = [], np.zeros(len(fits))
        timed, each = _distinct_splits(split)
        for name in self.calls_of(role):
            train = self.flow[name].kind == "train"
            moved = moved_bytes(
                self.workload.model_of(role).shape,
                role,
                grid.shard,
                away,
                half,
                device,
                train=train,
            )
            seconds = self.model.move_seconds(role, split, moved, device)[:, None]
            if name == "sync_weights":
                gathered = gather_seconds(self.workload.actor.shape, split, device, self.cluster)
            else:
                alone = self.model.trainer_seconds(
                    "train" if train else "infer", role, timed, device
                )
                seconds = alone[each] + seconds
            rows.append(np.broadcast_to(seconds, (len(fits), self.model.scenarios)))
        return Layouts(grid, memory, np.stack(rows), np.stack(rows).mean(axis=2), gathered)

    def freshest(
        self, sharing: Sharing, seconds: Array, program: Program, period: float
    ) -> Program:
        """The least stale program that is as fast as one of that period at durations [calls, S +
        1]."""
        for k in range(program.staleness):
            choices = choices_of(self.flow, sharing, k)
            found = best_program(
                choices, seconds, self.objective_of, period * (1 + 2 * SAME), any_below=True
            )
            if found.program:
                return found.program
        return program

    def rollout_table(self, kind: str) -> RolloutTable:
        """The engines that a rollout may have on GPUs of a kind."""
        if kind not in self._engines:
            gpus, node = self.there[kind], self.node(kind)
            self._engines[kind] = RolloutTable(
                self.workload, self.model, self.device(kind), node, gpus, self.statistic
            )
        return self._engines[kind]

    def gathers(self, a: PlacementFamily) -> float:
        """What a sync counts of gathering the actor's weights: all of it for each of its ways, as
        measured."""
        shared, separate = _ways_of(a)
        return (shared + separate) * self._sync_ratio(a)

    def hand_over(self, a: PlacementFamily, *, same_node: bool) -> float:
        """Seconds that the rest of a sync takes at least: handing over the actor's gathered
        weights."""
        actor, (shared, separate) = a.kinds[_home(a)], _ways_of(a)
        key = actor, a.kinds[a.generating[0]], same_node, shared, separate
        if key not in self._handed:
            device = self.device(actor)
            seconds = min(
                hand_over_seconds(
                    self.workload.actor.shape,
                    device,
                    self.cluster,
                    split,
                    same_node=same_node,
                    shared=shared,
                    separate=separate,
                )
                for split in tensor_parallels(self.workload, self.device(a.kinds[a.generating[0]]))
            )
            self._handed[key] = self._sync_ratio(a) * (
                seconds + (shared + separate) * device.overhead_seconds
            )
        return self._handed[key]

    def _sync_ratio(self, a: PlacementFamily) -> float:
        shared, separate = _ways_of(a)
        return self.model.sync_ratio(
            self.device(a.kinds[_home(a)]), shared=shared, separate=separate
        )

    def allowed(self, roles: bool, engine: bool, kind: str) -> int:
        """Bytes of a GPU that are left beside the contexts of its processes."""
        device = self.device(kind)
        return device.memory_bytes - pool_peak((), roles, engine, device)


def _home(a: PlacementFamily) -> int:
    """The actor's pool."""
    return next(i for i, roles in enumerate(a.structure) if "actor" in roles)


def _ways_of(a: PlacementFamily) -> tuple[bool, bool]:
    """Whether weights go to engines on the actor's GPUs, and whether they go to engines
    elsewhere."""
    shared = _home(a) in a.generating
    return shared, len(a.generating) > shared


def _distinct_splits(split: Split) -> tuple[Split, NDArray[np.int64]]:
    """The splits without repetition (what is offloaded does not matter to them), and which one each
    row has."""
    columns = np.column_stack([np.asarray(column, dtype=np.int64) for column in split])
    order = np.lexsort(columns.T)
    new = np.ones(len(order), dtype=bool)
    new[1:] = (columns[order][1:] != columns[order][:-1]).any(axis=1)
    each = np.empty(len(order), dtype=np.int64)
    each[order] = np.cumsum(new) - 1
    first = order[new]
    return Split(*(np.asarray(column)[first] for column in split)), each


def _best_of_alike(layouts: Layouts) -> NDArray[np.int64]:
    """The rows that no other row with the same shards, replicas and offload dominates (of equal
    rows the first)."""
    grid, count = layouts.grid, len(layouts.memory)
    key = np.column_stack([grid.shard, grid.replicas, grid.offload])
    order = np.lexsort((np.arange(count), *key.T))
    same = (key[order][1:] == key[order][:-1]).all(axis=1)
    group = np.concatenate([[0], np.cumsum(~same)]) if count else np.zeros(0, np.int64)
    kept = np.ones(count, dtype=bool)
    cost = np.concatenate([layouts.memory, *layouts.seconds], axis=1)[order]
    for step in range(1, int(np.bincount(group).max()) if count else 0):
        near = np.flatnonzero(group[step:] == group[:-step])
        first, second = near, near + step
        worse = (cost[first] <= cost[second]).all(axis=1)
        kept[second[worse]] = False
        better = (cost[second] <= cost[first]).all(axis=1) & ~worse
        kept[first[better]] = False
    return np.sort(order[kept])


def together(memory: Array, more: Array) -> Array:
    """Memory [n, 3] of roles on one pool: residents and host copies add up, of the surpluses the
    largest counts."""
    return np.where([True, False, True], memory + more, np.maximum(memory, more))


def bytes_of(memory: RoleMemory) -> Array:
    """[3], as in `Layouts.memory`."""
    return np.array([memory.idle, memory.running - memory.idle, memory.host], dtype=np.float64)


def problem_of(
    workload: Workload,
    cluster: Cluster,
    profiles: Sequence[Profile],
    max_staleness: int | None,
    objective: Objective = "mean",
    scenarios: int = SCENARIOS,
) -> Problem:
    check_profiles(profiles, workload, cluster)
    if max_staleness is not None:
        workload = workload.model_copy(update={"max_staleness": max_staleness})
    return Problem(
        workload=workload,
        cluster=cluster,
        model=CostModel(workload, cluster, profiles, scenarios),
        flow=ppo(workload).steady,
        max_staleness=workload.max_staleness,
        objective=objective,
    )


def scenarios_of(plan: Plan) -> int:
    """How many length scenarios a plan was found with at most."""
    return plan.predicted.proof.scenarios if plan.predicted else SCENARIOS
