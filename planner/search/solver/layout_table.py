"""The layouts of trained and inference roles on pools, with their memory and seconds, as columns.

One layout dominates another if it needs no more of any kind of memory and its calls take no longer
in any scenario. A step time only grows with each duration, so dominated layouts are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from planner.predict.columns import OFFLOADS, Grid
from planner.predict.cost import CostModel, Place
from planner.predict.layouts import rank_counts, trainer_grid
from planner.predict.memory import RoleMemory, moved_bytes, pool_peak, trainer_bytes
from planner.predict.roofline import Sharding, gather_seconds, sharding_of
from planner.search.space.arrays import Array, Indices
from planner.search.space.placements import Ranks
from planner.spec.cluster import Device
from planner.spec.dataflow import Dataflow
from planner.spec.plan import Offload, TrainerRole


class LayoutTable(NamedTuple):
    """Layouts of one trained or inference role as columns of n rows.

    `memory` [n, 3] has the resident bytes, the surplus while the role runs, and the pinned bytes of
    the host; `given_back` [n] what is not resident where an engine sleeps (see `beside_sleeping`).
    `seconds` [calls of the role, n, S] has their durations, `means` [calls, n] the means of these.
    For the actor the last call is the weight sync: its row holds the moves of what is offloaded
    only, and `gathered` [n] the seconds of gathering its weights once, by the roofline (see
    `with_sync`)."""

    grid: Grid
    memory: Array
    given_back: Array
    seconds: Array
    means: Array
    gathered: Array

    def take(self, rows: Indices | slice) -> "LayoutTable":
        return LayoutTable(
            self.grid.take(rows),
            self.memory[rows],
            self.given_back[rows],
            self.seconds[:, rows],
            self.means[:, rows],
            self.gathered[rows],
        )

    def layout(self, row: int, pool: str) -> TrainerRole:
        """The layout of a row, on a pool of that name."""
        return self.grid.layout(row, pool)

    def beside_sleeping(self) -> "LayoutTable":
        """The layouts on GPUs where an engine sleeps: less resident, and as much while they run."""
        less = np.outer(self.given_back, [1, -1, 0])
        return self._replace(memory=self.memory - less, given_back=np.zeros_like(self.given_back))

    def with_sync(self, times: float, seconds: float = 0.0) -> "LayoutTable":
        """The actor's layouts with the rest of the weight sync in its row: `times` gathering, and
        `seconds` of handing the weights over."""
        longer = np.zeros((len(self.seconds), len(self.gathered)))
        longer[-1] = times * self.gathered + seconds
        return self._replace(seconds=self.seconds + longer[..., None], means=self.means + longer)

    def of_shards(self, within: bool | None, node: int) -> "LayoutTable":
        """The layouts whose shards lie within a node of `node` GPUs, or those whose shards do not;
        all of them if `within` is None."""
        if within is None:
            return self
        return self.take(np.flatnonzero((self.grid.shard <= node) == within))

    def of_ranks(self, ranks: Ranks, gpus: int) -> "LayoutTable":
        """The layouts that compute on so many of a pool's GPUs as `PlacementFamily.ranks` says."""
        if ranks == "any":
            return self
        count = self.grid.gpus if ranks == "all" else self.grid.shard
        return self.take(np.flatnonzero(count == gpus))

    def of_offloads(self, allowed: Sequence[Offload] | None) -> "LayoutTable":
        """The layouts that move no other part of a role than is `allowed`; all of them if it is
        None."""
        if allowed is None:
            return self
        known = [OFFLOADS.index(offload) for offload in allowed]
        return self.take(np.flatnonzero(np.isin(self.grid.offload, known)))


@dataclass(kw_only=True)
class LayoutTables:
    """The layout tables of all roles on all kinds of GPU, each made once and kept in `memo`."""

    model: CostModel
    flow: Dataflow
    gpus: dict[str, int]  # of each kind
    largest_node: dict[str, int]  # its GPUs, of each kind
    memo: dict[object, LayoutTable]

    def ranks(self, kind: str) -> tuple[int, ...]:
        """The numbers of GPUs of a kind on which a trained or inference role may compute."""
        return rank_counts(self.gpus[kind], self.model.workload.minibatch, self.largest_node[kind])

    def calls_of(self, role: str) -> tuple[str, ...]:
        """The calls that a trained or inference role runs, the weight sync last."""
        own = tuple(call.name for call in self.flow.calls if call.roles == (role,))
        return (*own, self.flow.installs.name) if self._is_installed(role) else own

    def _is_installed(self, role: str) -> bool:
        """Whether the role's weights are what a sync installs in the engines: the actor's are."""
        return role == self.flow.installs.roles[0]

    def on_full_nodes(self, role: str, kind: str) -> LayoutTable:
        """The layouts of a role on all GPUs of a kind and on any fewer, in the order of their
        ranks, as if every pool filled its nodes. No other packing has faster links, since a group
        of s ranks lies on at least s / node nodes."""
        key = role, kind
        if key not in self.memo:
            self.memo[key] = _undominated(self._fitting(role, kind))
        return self.memo[key]

    def at(self, role: str, kind: str, place: Place) -> LayoutTable:
        """The layouts of a role on a pool on real nodes, on all of its GPUs and on any fewer."""
        alike = _ranks_as_on_full_nodes(place.parts, self.largest_node[kind])
        full = self.on_full_nodes(role, kind)
        known = full.take(slice(0, int(np.searchsorted(full.grid.gpus, place.gpus, "right"))))
        if alike >= place.gpus or not (known.grid.gpus > alike).any():
            return known
        key = role, kind, place.parts
        if key not in self.memo:
            self.memo[key] = self._on_parts(role, kind, place, alike)
        return self.memo[key]

    def _fitting(self, role: str, kind: str) -> LayoutTable:
        """The table of `on_full_nodes` and the layouts that others dominate there: a layout that is
        worse on full nodes may be the better one on others."""
        key = role, kind, ()
        if key not in self.memo:
            device, node = self.model.cluster.devices[kind], self.largest_node[kind]
            grid = trainer_grid(self.model.workload, role, self.ranks(kind), node, device)
            self.memo[key] = self._made(role, grid, _on_full_nodes(grid, node), device)
        return self.memo[key]

    def _on_parts(self, role: str, kind: str, place: Place, alike: int) -> LayoutTable:
        """The layouts on a pool of which only the first `alike` ranks lie as on full nodes."""
        fitting = self._fitting(role, kind)
        gpus = fitting.grid.gpus
        first, last = np.searchsorted(gpus, (alike, place.gpus), "right").tolist()
        near, far = fitting.take(slice(0, first)), fitting.take(slice(first, last))
        far = self._made(role, far.grid, sharding_of(far.grid, place), place.device)
        both = LayoutTable(
            fitting.grid.take(slice(0, last)),
            np.concatenate([near.memory, far.memory]),
            np.concatenate([near.given_back, far.given_back]),
            np.concatenate([near.seconds, far.seconds], axis=1),
            np.concatenate([near.means, far.means], axis=1),
            np.concatenate([near.gathered, far.gathered]),
        )
        return _undominated(both)

    def _made(self, role: str, grid: Grid, sharding: Sharding, device: Device) -> LayoutTable:
        """The layouts of a grid with their memory and seconds, without those that do not fit a GPU
        alone."""
        workload = self.model.workload
        found = trainer_bytes(workload, role, grid, device)
        surplus = found.running - found.idle
        memory = np.stack([found.idle, surplus, found.host], axis=1).astype(np.float64)
        room = device.memory_bytes - pool_peak((), True, False, device)
        fits = np.flatnonzero(found.running <= room)
        grid, memory, sharding = grid.take(fits), memory[fits], sharding.take(fits)
        given_back = found.given_back[fits].astype(np.float64)
        seconds = self._seconds(role, grid, sharding, device)
        gathered = np.zeros(len(fits))
        if self._is_installed(role):
            gathered = gather_seconds(workload.actor.shape, sharding, device, self.model.cluster)
        return LayoutTable(grid, memory, given_back, seconds, seconds.mean(axis=2), gathered)

    def _seconds(self, role: str, grid: Grid, sharding: Sharding, device: Device) -> Array:
        """Durations [calls of the role, n, S]."""
        trainers = self.model.trainers
        distinct, which = _distinct(sharding)
        shape = self.model.workload.model_of(role).shape
        rows = []
        for name in self.calls_of(role):
            kind = self.flow[name].kind
            moved = moved_bytes(shape, role, grid, device, train=kind == "train")
            seconds = trainers.moves(role, sharding, moved, device).both[:, None]
            if kind == "infer" or kind == "train":
                alone = trainers.calls(kind, role, distinct, device)
                seconds = alone.seconds[which] + seconds
            rows.append(np.broadcast_to(seconds, (len(grid.shard), self.model.scenarios)))
        return np.stack(rows)


def _on_full_nodes(grid: Grid, node: int) -> Sharding:
    """How layouts lie on nodes of `node` GPUs that they fill."""
    shard_nodes = np.where(grid.shard > 1, -(-grid.shard // node), 1)
    replicas_on_a_node = np.maximum(node // grid.shard, 1)
    nodes_of_replicas = -(-grid.replicas // replicas_on_a_node)
    replica_nodes = np.where(grid.gpus <= node, 1, nodes_of_replicas)
    return Sharding.of(grid, shard_nodes, replica_nodes)


def _ranks_as_on_full_nodes(parts: tuple[int, ...], node: int) -> int:
    """How many ranks of a pool with these GPUs per node lie as if the nodes were filled.

    >>> _ranks_as_on_full_nodes((8, 4, 4), 8)  # the third part begins where the second could go on
    12
    """
    ranks = 0
    for part in parts:
        ranks += part
        if part < node:
            break
    return ranks


def _distinct(sharding: Sharding) -> tuple[Sharding, Indices]:
    """The shardings without repetition, since layouts that only differ in their offload have the
    same; and which of them each row has."""
    columns = np.column_stack([np.asarray(column, dtype=np.int64) for column in sharding])
    order = np.lexsort(columns.T)
    ordered = columns[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    which = np.empty(len(order), dtype=np.int64)
    which[order] = np.cumsum(new) - 1
    first = order[new]
    return sharding.take(first), which


def _undominated(table: LayoutTable) -> LayoutTable:
    """The layouts that no other one with the same shards, replicas and offload dominates; the first
    of equal ones."""
    grid, count = table.grid, len(table.memory)
    if not count:
        return table
    key = np.column_stack([grid.shard, grid.replicas, grid.offload])
    order = np.lexsort((np.arange(count), *key.T))  # rows of a group lie together
    ordered = key[order]
    begins = (ordered[1:] != ordered[:-1]).any(axis=1)
    group = np.concatenate([[0], np.cumsum(begins)])
    costs = np.concatenate([table.memory, *table.seconds], axis=1)[order]
    kept = np.ones(count, dtype=bool)
    for step in range(1, int(np.bincount(group).max())):  # from each row to one of its group
        first = np.flatnonzero(group[step:] == group[:-step])
        second = first + step
        worse = (costs[first] <= costs[second]).all(axis=1)
        kept[second[worse]] = False
        better = (costs[second] <= costs[first]).all(axis=1) & ~worse
        kept[first[better]] = False
    return table.take(np.sort(order[kept]))


def together(memory: Array, more: Array) -> Array:
    """The memory [n, 3] of roles that share a pool, as in `LayoutTable.memory`: residents and host
    copies add up, and of the surpluses the largest counts, since one role runs at a time."""
    return np.where([True, False, True], memory + more, np.maximum(memory, more))


def columns_of(memory: RoleMemory) -> Array:
    """The bytes [3] of one layout, as in `LayoutTable.memory`."""
    return np.array([memory.idle, memory.running - memory.idle, memory.host], dtype=np.float64)
