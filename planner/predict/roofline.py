"""Seconds of a call from its operations and bytes, and the device's rates at their efficiencies.

One forward pass over t tokens in sequences of lengths l takes 2 P t + 2 L H d (sum of l^2) FLOPs: P parameters in
matrices (the head's included, the embedding's not), and for each of L layers and H heads of size d the two products of
causal attention, which see half of each square. A backward pass takes twice as much, recomputation one forward pass
more (Kaplan et al. 2020, arXiv:2001.08361, section 2.1; Korthikanti et al. 2022, arXiv:2205.05198, appendix A).

FSDP gathers the weights in their compute type for every micro-batch, once for inference, twice for an update (forward
and backward), which also reduces and scatters gradients in fp32. Of s shards a ring moves (s - 1) / s of the bytes
through every GPU. This runs beside the arithmetic: a micro-batch takes the longer of the two. (Its two ends, embedding
and first block, are not hidden in truth: 1 to 4% of a 7B model's micro-batch on one node.)
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from planner.predict.memory import compute_bytes
from planner.predict.profile import Head
from planner.spec.cluster import Cluster, Device
from planner.spec.plan import TrainerRole
from planner.spec.workload import Shape

Seconds = NDArray[np.float64]

LINK_LATENCY_SECONDS = 8e-6  # of one collective inside a node
OPTIMIZER_BYTES = 32  # AdamW reads weight, gradient and both moments and writes three of them; the clip reads once more


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a role computes: GPUs per node in the order of its ranks, all of one kind."""

    parts: tuple[int, ...]
    device: Device

    @property
    def gpus(self) -> int:
        return sum(self.parts)


@dataclass(frozen=True, kw_only=True)
class Link:
    """What a group of `ranks` reaches together: bytes/s per GPU, and seconds of latency of one collective."""

    ranks: int
    bandwidth: float
    latency: float

    def seconds(self, count: float) -> float:
        """All-gather or reduce-scatter of `count` bytes in total; an all-reduce is both."""
        return count * (self.ranks - 1) / self.ranks / self.bandwidth if self.ranks > 1 else 0.0


@dataclass(frozen=True, kw_only=True)
class Work:
    """The busiest rank's tokens and squared sequence lengths in each minibatch, [S, M]."""

    tokens: NDArray[np.int64]
    squares: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds [S] of a call by what it waits for: arithmetic and memory, and communication that neither hides."""

    compute: Seconds
    transfer: Seconds


def shares(lengths: NDArray[np.int64], minibatch: int, ranks: int) -> Work:
    """Spread each minibatch of `lengths` [S, B] over ranks: longest first, back and forth, so that sequences are even
    to one and tokens nearly so. With fewer sequences than ranks some ranks idle."""
    scenarios, batch = lengths.shape
    rows = -np.sort(-lengths.reshape(scenarios, batch // minibatch, minibatch), axis=2)
    turns = -(-minibatch // ranks)
    padded = np.zeros((*rows.shape[:2], turns * ranks), dtype=np.int64)
    padded[..., :minibatch] = rows
    dealt = padded.reshape(*rows.shape[:2], turns, ranks)
    dealt[:, :, 1::2] = dealt[:, :, 1::2, ::-1]
    tokens = dealt.sum(axis=2)
    busiest = tokens.argmax(axis=2)[..., None]
    squares = (dealt**2).sum(axis=2)
    return Work(
        tokens=np.take_along_axis(tokens, busiest, 2)[..., 0], squares=np.take_along_axis(squares, busiest, 2)[..., 0]
    )


def matrix_parameters(shape: Shape, head: Head) -> int:
    """Parameters that every token is multiplied with."""
    return shape.layers * shape.block_parameters + (shape.hidden if head == "scalar" else shape.embedding_parameters)


def forward_flops(shape: Shape, head: Head, work: Work) -> Seconds:
    """FLOPs [S, M] of one forward pass over each minibatch's share."""
    attention = 2 * shape.layers * shape.heads * shape.head_dim
    return np.asarray(2.0 * matrix_parameters(shape, head) * work.tokens + float(attention) * work.squares)


# --- links ---


@cache
def nodes_spanned(parts: tuple[int, ...], shard: int, replicas: int) -> tuple[int, int]:
    """Nodes that the most scattered shard group (neighbouring ranks) and replica group (every shard-th) lie on."""
    node = [number for number, gpus in enumerate(parts) for _ in range(gpus)][: shard * replicas]
    shard_groups = (node[first : first + shard] for first in range(0, len(node), shard))
    replica_groups = (node[first::shard] for first in range(shard))
    return max(len(set(group)) for group in shard_groups), max(len(set(group)) for group in replica_groups)


def link_of(ranks: int, nodes: int, device: Device, cluster: Cluster) -> Link:
    """Within a node its links; across nodes the ring leaves each node through as many network ports as it has ranks
    there (one per GPU), unless the links are slower."""
    bandwidth, latency = device.link_bandwidth, LINK_LATENCY_SECONDS
    if nodes > 1:
        bandwidth = min(bandwidth, cluster.network_bandwidth * ranks / nodes)
        latency = cluster.network_latency_seconds * int(np.ceil(np.log2(nodes)))
    return Link(ranks=ranks, bandwidth=bandwidth * device.efficiency_link, latency=latency)


def links(layout: TrainerRole, place: Place, cluster: Cluster) -> tuple[Link, Link]:
    """Of a shard group and of a replica group."""
    across_shards, across_replicas = nodes_spanned(place.parts, layout.shard, layout.replicas)
    return (
        link_of(layout.shard, across_shards, place.device, cluster),
        link_of(layout.replicas, across_replicas, place.device, cluster),
    )


# --- calls ---


def infer_cost(shape: Shape, head: Head, layout: TrainerRole, place: Place, cluster: Cluster, work: Work) -> Cost:
    """A forward pass over the batch (as one minibatch)."""
    device = place.device
    compute = forward_flops(shape, head, work) / (device.flops * device.efficiency_compute)
    micro_batches = np.ceil(work.tokens / layout.micro_batch_tokens)
    shard, _ = links(layout, place, cluster)
    gathered = shard.seconds(compute_bytes(device) * shape.parameters(head)) + _latency(shape, shard)
    exposed = np.maximum(micro_batches * gathered - compute, 0.0)
    return Cost(compute=compute.sum(axis=1) + device.overhead_seconds, transfer=exposed.sum(axis=1))


def train_cost(
    shape: Shape, head: Head, layout: TrainerRole, place: Place, cluster: Cluster, work: Work, epochs: int
) -> Cost:
    """An optimizer step per minibatch: its micro-batches, the all-reduce of gradients between replicas, AdamW."""
    device, parameters = place.device, shape.parameters(head)
    passes = 4 if layout.recompute else 3
    compute = passes * forward_flops(shape, head, work) / (device.flops * device.efficiency_compute)
    micro_batches = np.ceil(work.tokens / layout.micro_batch_tokens)
    shard, replica = links(layout, place, cluster)
    moved = shard.seconds((2 * compute_bytes(device) + 4) * parameters) + 3 * _latency(shape, shard)
    exposed = np.maximum(micro_batches * moved - compute, 0.0)
    exposed += 2 * replica.seconds(4 * parameters / layout.shard) + 2 * _latency(shape, replica)
    optimizer = OPTIMIZER_BYTES * parameters / layout.shard / (device.memory_bandwidth * device.efficiency_memory)
    return Cost(
        compute=epochs * (compute + optimizer).sum(axis=1) + device.overhead_seconds,
        transfer=epochs * exposed.sum(axis=1),
    )


def _latency(shape: Shape, link: Link) -> float:
    """Of one collective per layer."""
    return shape.layers * link.latency if link.ranks > 1 else 0.0


def sync_cost(
    shape: Shape, layout: TrainerRole, place: Place, cluster: Cluster, tensor_parallel: int, *, same_node: bool,
    shared: bool, separate: bool,
) -> float:  # fmt: skip
    """Seconds of moving the actor's weights to the engines: gathered over the shard group layer by layer, then copied
    within the GPUs that both share, and broadcast to GPUs that they do not."""
    device = place.device
    count = compute_bytes(device) * shape.parameters()
    shard, _ = links(layout, place, cluster)
    gather = shard.seconds(count) + _latency(shape, shard)
    copy = 2 * count / tensor_parallel / (device.memory_bandwidth * device.efficiency_memory) if shared else 0.0
    across = link_of(2, 1 if same_node else 2, device, cluster)
    broadcast = count / across.bandwidth + shape.layers * across.latency if separate else 0.0
    return gather + max(copy, broadcast) + device.overhead_seconds
