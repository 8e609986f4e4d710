"""Seconds of a call from its operations and bytes, and the device's rates at their efficiencies.

One forward pass over t tokens in sequences of lengths l takes 2 P t + 2 L H d (sum of l^2) FLOPs: P
parameters in matrices (the head's included, the embedding's not), and for each of L layers and H
heads of size d the two products of causal attention, which see half of each square. A backward pass
takes twice as much, recomputation one forward pass more (Kaplan et al. 2020, arXiv:2001.08361,
section 2.1; Korthikanti et al. 2022, arXiv:2205.05198, appendix A). A pass over a micro-batch takes
no less than launching its kernels (`launch_seconds` of the device for each layer; as long again for
the collectives of a sharded one), and FSDP moves all weights through the GPU's memory for each.

FSDP gathers the weights in their compute type for every micro-batch, once for inference, twice for
an update (forward and backward), which also reduces and scatters gradients in fp32. Of s shards a
ring moves (s - 1) / s of the bytes through every GPU. This runs during the arithmetic: a
micro-batch takes the longer of the two. (Its two ends, embedding and first block, are not hidden in
truth: 1 to 4% of a 7B model's micro-batch on one node.)
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.predict.columns import Booleans, Grid, Integers, Seconds
from planner.predict.dealing import Work
from planner.predict.memory import SYNC_BYTES, compute_bytes
from planner.spec.cluster import Cluster, Device
from planner.spec.workload import Head, Shape

LINK_LATENCY_SECONDS = 8e-6  # of one collective inside a node
# What FSDP2 reads and writes of a parameter for each micro-batch, in bytes: a pass copies it into
# and out of the buffers of a collective; an update passes twice, casts what it gathers from fp32,
# and adds up a gradient in fp32.
GATHER_BYTES, UPDATE_BYTES = 8, 38
# AdamW reads weight, gradient and both moments and writes three of them; the clip reads once more.
OPTIMIZER_BYTES = 32
HOST_SECONDS = 5e-3  # of a call on the controller
HOST_SECONDS_PER_TOKEN = 5e-8  # collecting, GAE and handing out again; profiles replace both


@dataclass(frozen=True, kw_only=True)
class Place:
    """The GPUs that a role computes on, all of one kind: `parts` are the numbers on each node, in
    the order of its ranks."""

    parts: tuple[int, ...]
    device: Device

    @property
    def gpus(self) -> int:
        return sum(self.parts)


class Sharding(NamedTuple):
    """How a model is spread over ranks in many layouts [n]: shards, their replicas, tokens per
    micro-batch, recomputation, and the nodes that a shard group and a replica group lie on."""

    shard: Integers
    replicas: Integers
    micro_batch_tokens: Integers
    recompute: Booleans
    shard_nodes: Integers
    replica_nodes: Integers

    @classmethod
    def of(cls, grid: Grid, shard_nodes: Integers, replica_nodes: Integers) -> "Sharding":
        shard, replicas, micro_batch_tokens, recompute, _ = grid
        return cls(shard, replicas, micro_batch_tokens, recompute, shard_nodes, replica_nodes)

    @property
    def gpus(self) -> Integers:
        return self.shard * self.replicas

    def take(self, rows: Integers) -> "Sharding":
        return Sharding(*(column[rows] for column in self))  # type: ignore[arg-type]


def sharding_of(grid: Grid, place: Place) -> Sharding:
    """Layouts on the first GPUs of one place."""
    pairs = zip(grid.shard.tolist(), grid.replicas.tolist(), strict=True)
    spanned = np.array([nodes_spanned(place.parts, *pair) for pair in pairs])
    shard_nodes, replica_nodes = spanned.reshape(-1, 2).T
    return Sharding.of(grid, shard_nodes, replica_nodes)


class Ring(NamedTuple):
    """The speed of groups of `ranks`: bytes/s per GPU, and seconds of latency of one collective.
    Arrays [n], or without axes for one group."""

    ranks: Integers
    bandwidth: Seconds
    latency: Seconds

    def seconds(self, count: float | Seconds) -> Seconds:
        """All-gather or reduce-scatter of `count` bytes in total; an all-reduce is both."""
        return count * (self.ranks - 1) / self.ranks / self.bandwidth


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds [n, S] of a call by its parts: arithmetic and memory, and communication that neither
    hides."""

    compute: Seconds
    transfer: Seconds


def matrix_parameters(shape: Shape, head: Head) -> int:
    """Parameters that every token is multiplied with."""
    output = shape.hidden if head == "scalar" else shape.embedding_parameters
    return shape.layers * shape.block_parameters + output


def forward_flops(shape: Shape, head: Head, work: Work) -> Seconds:
    """FLOPs [..., S, M] of one forward pass over each minibatch's share."""
    matrices = 2.0 * matrix_parameters(shape, head) * work.tokens
    attention = float(2 * shape.layers * shape.heads * shape.head_dim) * work.squares
    return np.asarray(matrices + attention)


# --- rings ---


@cache
def nodes_spanned(parts: tuple[int, ...], shard: int, replicas: int) -> tuple[int, int]:
    """Nodes that the most scattered shard group (neighbouring ranks) and replica group (every
    shard-th) lie on.

    >>> nodes_spanned((4, 4), shard=4, replicas=2)
    (1, 2)
    """
    node_of_rank = np.repeat(np.arange(len(parts)), parts)[: shard * replicas]
    nodes = node_of_rank.reshape(replicas, shard)  # rising along both
    across_shards = np.count_nonzero(np.diff(nodes, axis=1), axis=1).max()
    across_replicas = np.count_nonzero(np.diff(nodes, axis=0), axis=0).max()
    return int(across_shards) + 1, int(across_replicas) + 1


def ring_of(ranks: int | Integers, nodes: int | Integers, device: Device, cluster: Cluster) -> Ring:
    """The ring of a group that lies on some nodes. Within a node it has the node's links; across
    nodes it leaves each node through as many network ports as it has ranks there (one per GPU),
    unless the links are slower. No hop between nodes is quicker than one within."""
    ranks, nodes = np.asarray(ranks), np.asarray(nodes)
    ports = cluster.network_bandwidth * ranks / nodes
    bandwidth = np.where(nodes > 1, np.minimum(device.link_bandwidth, ports), device.link_bandwidth)
    hops = cluster.network_latency_seconds * np.ceil(np.log2(nodes))
    latency = np.maximum(hops, LINK_LATENCY_SECONDS)
    return Ring(ranks, bandwidth * device.efficiency_link, latency)


def _shard_ring(sharding: Sharding, device: Device, cluster: Cluster) -> Ring:
    return ring_of(sharding.shard, sharding.shard_nodes, device, cluster)


def _replica_ring(sharding: Sharding, device: Device, cluster: Cluster) -> Ring:
    return ring_of(sharding.replicas, sharding.replica_nodes, device, cluster)


# --- calls ---


def infer_cost(
    shape: Shape, head: Head, sharding: Sharding, device: Device, cluster: Cluster, work: Work
) -> Cost:
    """A forward pass over the batch (as one minibatch). `work` has one row for each layout."""
    parameters = shape.parameters(head)
    arithmetic, launches, micro_batches = _pass(shape, head, sharding, device, work)
    copies = micro_batches * GATHER_BYTES * parameters / _memory_rate(device)
    compute = np.maximum(arithmetic, launches) + copies
    shard = _shard_ring(sharding, device, cluster)
    gathered = shard.seconds(compute_bytes(device) * parameters) + _latency(shape, shard)
    exposed = np.maximum(micro_batches * _each(gathered) - compute, 0.0)
    return Cost(
        compute=compute.sum(axis=-1) + device.overhead_seconds, transfer=exposed.sum(axis=-1)
    )


def train_cost(
    shape: Shape,
    head: Head,
    sharding: Sharding,
    device: Device,
    cluster: Cluster,
    work: Work,
    epochs: int,
) -> Cost:
    """An optimizer step per minibatch: its micro-batches, the all-reduce of gradients between
    replicas, AdamW. `work` has one row for each layout."""
    parameters = shape.parameters(head)
    arithmetic, launches, micro_batches = _pass(shape, head, sharding, device, work)
    copies = micro_batches * UPDATE_BYTES * parameters / _memory_rate(device)
    passes = np.where(sharding.recompute, 4, 3)
    compute = _each(passes) * np.maximum(arithmetic, launches) + copies
    optimizer = OPTIMIZER_BYTES * parameters / sharding.shard / _memory_rate(device)
    shard = _shard_ring(sharding, device, cluster)
    moved = shard.seconds((2 * compute_bytes(device) + 4) * parameters) + 3 * _latency(shape, shard)
    replica = _replica_ring(sharding, device, cluster)
    reduced = 2 * replica.seconds(4 * parameters / sharding.shard) + 2 * _latency(shape, replica)
    exposed = np.maximum(micro_batches * _each(moved) - compute, 0.0) + _each(reduced)
    return Cost(
        compute=epochs * (compute + _each(optimizer)).sum(axis=-1) + device.overhead_seconds,
        transfer=epochs * exposed.sum(axis=-1),
    )


def _pass(
    shape: Shape, head: Head, sharding: Sharding, device: Device, work: Work
) -> tuple[Seconds, Seconds, Seconds]:
    """One forward pass over each minibatch [n, S, M]: seconds of its arithmetic, seconds of its
    launches, and its number of micro-batches."""
    micro_batches = np.ceil(work.tokens / _each(sharding.micro_batch_tokens))
    arithmetic = forward_flops(shape, head, work) / (device.flops * device.efficiency_compute)
    kernels_and_collectives = _each(1 + (sharding.shard > 1))
    launches = shape.layers * device.launch_seconds * kernels_and_collectives * micro_batches
    return arithmetic, launches, micro_batches


def _memory_rate(device: Device) -> float:
    return device.memory_bandwidth * device.efficiency_memory


def _each(column: NDArray[Any]) -> NDArray[Any]:
    """A figure of every layout [n], to be used with its minibatches [n, S, M]."""
    return column[..., None, None]


def _latency(shape: Shape, ring: Ring) -> Seconds:
    """Seconds of latency of one collective per layer."""
    return np.where(ring.ranks > 1, shape.layers * ring.latency, 0.0)


def gather_seconds(shape: Shape, sharding: Sharding, device: Device, cluster: Cluster) -> Seconds:
    """Seconds [n] of gathering a model over its shard groups, layer by layer; launching takes as
    long as in a pass."""
    shard = _shard_ring(sharding, device, cluster)
    launches = np.where(shard.ranks > 1, shape.layers * device.launch_seconds, 0.0)
    moved = shard.seconds(compute_bytes(device) * shape.parameters())
    return np.asarray(moved + _latency(shape, shard) + launches)


def hand_over_seconds(
    shape: Shape,
    device: Device,
    cluster: Cluster,
    tensor_parallel: int,
    *,
    same_node: bool,
    shared: bool,
    separate: bool,
) -> float:
    """Seconds of handing gathered weights to the engines, without a call for each way.

    On GPUs that actor and engines share, a window is filled and read in turns, at least as many
    times as the bytes need, between a call to begin and one to end. To other GPUs the weights are
    broadcast, which counts as one launch a layer."""
    count = compute_bytes(device) * shape.parameters()
    seconds = 0.0
    if shared:
        copies = 2 * count / tensor_parallel / _memory_rate(device)
        calls = 1 + 2 * math.ceil(count / SYNC_BYTES)
        seconds += copies + calls * device.overhead_seconds
    if separate:
        across = ring_of(2, 1 if same_node else 2, device, cluster)
        launches = float(across.latency + device.launch_seconds)
        seconds += float(count / across.bandwidth) + shape.layers * launches
    return seconds


def sync_cost(
    shape: Shape,
    sharding: Sharding,
    device: Device,
    cluster: Cluster,
    tensor_parallel: int,
    *,
    same_node: bool,
    shared: bool,
    separate: bool,
) -> Seconds:
    """Seconds [n] of moving the actor's weights to the engines. For either way they are gathered
    over the shard group (what lies in two windows twice in truth), then handed over, one way after
    the other."""
    gathered = gather_seconds(shape, sharding, device, cluster)
    handed = hand_over_seconds(
        shape,
        device,
        cluster,
        tensor_parallel,
        same_node=same_node,
        shared=shared,
        separate=separate,
    )
    ways = int(shared) + int(separate)
    return np.asarray(ways * (gathered + device.overhead_seconds) + handed)


def host_seconds(tokens: Integers) -> Seconds:
    """Seconds [S] of a call on the controller over a batch's tokens [S]."""
    return np.asarray(HOST_SECONDS + HOST_SECONDS_PER_TOKEN * tokens, dtype=np.float64)
