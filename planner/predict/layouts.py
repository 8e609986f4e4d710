"""The layouts that are considered for a role on a number of GPUs. The search chooses among them and
a profile measures them."""

from bisect import bisect_right
from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np

from planner.predict.columns import OFFLOADS, Grid
from planner.predict.memory import rollout_fraction
from planner.spec.cluster import Device
from planner.spec.engines import engine_for
from planner.spec.plan import RolloutRole, TrainerRole
from planner.spec.workload import TENSOR_PARALLEL, TRAINED, Workload

# 18k rather than 16k: a rank's share is often about a power of two, and half of such shares would
# need one micro-batch more.
MICRO_BATCH_TOKENS = (4096, 8192, 18432, 32768)
CONCURRENCY = (64, 128, 256, 512)
FULLEST = 0.95  # of a GPU's memory, for engines that preempt
# Slots of an engine over those that its memory holds without preemption. With a quarter more one of
# many turns is shorter, with twice as many the last of few.
CROWDED = (1.25, 2.0)
LARGE_BATCH = 1024  # sequences
# Up to this many ranks any number is considered, above only those that gain something.
EVERY_COUNT = 64


@cache
def divisors(number: int) -> tuple[int, ...]:
    return tuple(d for d in range(1, number + 1) if number % d == 0)


@cache
def rank_counts(gpus: int, sequences: int, node: int) -> tuple[int, ...]:
    """The numbers of GPUs, out of `gpus`, on which a trained or inference role may compute, in
    rising order. Up to 64 that is any number. Above, it is whole nodes, and the smallest number of
    ranks for which the busiest one gets at most n of a minibatch's `sequences`, for each n. More
    ranks than sequences would only idle.

    >>> rank_counts(gpus=128, sequences=256, node=8)[64:]
    (72, 80, 86, 88, 96, 104, 112, 120, 128)

    On 86 ranks the busiest one has 3 of the 256 sequences, as it has on 87 to 127."""
    most = min(gpus, sequences)
    fewest = {-(-sequences // turns) for turns in range(1, sequences // EVERY_COUNT + 2)}
    counts = {*range(1, EVERY_COUNT + 1), *range(node, most + 1, node), *fewest}
    return tuple(sorted(count for count in counts if count <= most))


@cache
def shards(ranks: int, node: int) -> tuple[int, ...]:
    """The numbers of shards that a model may have on its ranks. Within a node that is any divisor
    of the ranks; across nodes a divisor of a node's GPUs, one, two, four, ... nodes, or all
    ranks.

    >>> shards(48, node=8)
    (1, 2, 4, 8, 16, 48)
    """
    if ranks <= node:
        return divisors(ranks)
    within = [d for d in divisors(node) if ranks % d == 0]
    nodes = [
        node * 2**power
        for power in range((ranks // node).bit_length())
        if ranks % (node * 2**power) == 0
    ]
    return tuple(sorted({*within, *nodes, ranks}))


def trainer_grid(
    workload: Workload, role: str, ranks: tuple[int, ...], node: int, device: Device
) -> Grid:
    """All layouts of a trained or inference role that compute on one of these numbers of `ranks`,
    in that order; of one number the least sharded first, with the largest micro-batches.

    A micro-batch holds at least one longest sequence. On a CPU nothing is saved by sharding less,
    recomputing or offloading: its memory is the host's."""
    trained = role in TRAINED
    largest = (workload.minibatch if trained else workload.inferred_by(role)) * workload.longest
    sizes = {min(max(size, workload.longest), largest) for size in MICRO_BATCH_TOKENS}
    tokens = sorted(sizes, reverse=True)
    if device.kind == "cpu":
        splits = [(count, count) for count in ranks]
        options = [(tokens[0], False, OFFLOADS.index("none"))]
    else:
        splits = [(count, shard) for count in ranks for shard in shards(count, node)]
        recomputes = (False, True) if trained else (False,)
        # A role that does not train has no optimizer to offload.
        offloads = [OFFLOADS.index(o) for o in OFFLOADS if trained or o != "optimizer"]
        options = list(product(tokens, recomputes, offloads))
    columns = np.array(splits, dtype=np.int64).reshape(-1, 2)
    used, shard = np.repeat(columns, len(options), axis=0).T
    size, recompute, offload = np.tile(np.array(options, dtype=np.int64), (len(splits), 1)).T
    return Grid(shard, used // shard, size, recompute.astype(bool), offload)


def trainer_layouts(
    workload: Workload, role: str, gpus: int, pool: str, device: Device, node: int | None = None
) -> Iterator[TrainerRole]:
    """The layouts of a role that compute on all of `gpus` GPUs (of one node, unless `node` says how
    many one has), or on as many as a minibatch has sequences."""
    grid = trainer_grid(workload, role, (min(gpus, workload.minibatch),), node or gpus, device)
    return (grid.layout(row, pool) for row in range(len(grid.shard)))


def rollout_layouts(
    workload: Workload,
    parts: tuple[tuple[int, ...], ...],
    pools: tuple[str, ...],
    device: Device,
    shared: bool = True,
) -> Iterator[RolloutRole]:
    """Layouts of the rollout on pools that have `parts[p]` GPUs per node, `shared` with other roles
    or not: an engine lies within one node of one pool, and every pool has room for one. Concurrency
    never exceeds an engine's even share of the batch by more than it must."""
    on_cpu = device.kind == "cpu"
    for tensor_parallel in tensor_parallels(workload, device):
        engines = [sum(part // tensor_parallel for part in pool) for pool in parts]
        if not all(engines):
            continue
        replicas = engine_counts(sum(engines), workload.generated)[-1]
        for slots, percent in engine_sizes(workload, tensor_parallel, replicas, device, shared):
            for offload in (False, True) if shared and not on_cpu else (False,):
                yield RolloutRole(
                    engine=engine_for(device.kind),
                    pools=pools,
                    tensor_parallel=tensor_parallel,
                    replicas=replicas,
                    memory_fraction=percent / 100,
                    concurrency=slots,
                    offload=offload,
                )


@cache
def engine_counts(most: int, sequences: int) -> tuple[int, ...]:
    """The numbers of engines among which a batch of `sequences` may be shared, in rising order: any
    up to 64; above, the fewest with a given share for the busiest one."""
    fewest = {-(-sequences // share) for share in range(1, sequences // EVERY_COUNT + 2)}
    return tuple(sorted(count for count in {*range(1, EVERY_COUNT + 1), *fewest} if count <= most))


def tensor_parallels(workload: Workload, device: Device) -> list[int]:
    """The GPUs that an engine may have."""
    sizes = (1,) if device.kind == "cpu" else TENSOR_PARALLEL
    wanted = workload.tensor_parallel
    return [t for t in sizes if workload.actor.shape.splits_into(t) and wanted in (None, t)]


def stream_size(
    workload: Workload, tensor_parallel: int, engines: int, device: Device, batches: int
) -> list["EngineSize"]:
    """The size that each of some engines has which stream, with nothing else on their GPUs: slots
    for its share of so many batches, or for as many sequences as its memory holds; none if it holds
    no longest sequence."""
    share = -(-workload.generated * batches // engines)

    def percent(slots: int) -> int:
        return round(100 * rollout_fraction(workload, tensor_parallel, slots, device))

    fitting = bisect_right(range(1, share + 1), 100 * FULLEST, key=percent)
    return [EngineSize(fitting, percent(fitting))] if fitting else []


class EngineSize(NamedTuple):
    """The slots of an engine, and the percent of a GPU's memory that it takes."""

    slots: int
    percent: int


def engine_sizes(
    workload: Workload, tensor_parallel: int, engines: int, device: Device, shared: bool = True
) -> list[EngineSize]:
    """The sizes that each of some engines may have: a listed number of slots up to an even share of
    the batch, or that share, as far as a GPU's memory holds what they need; and more slots in the
    same memory, which preempts. If the share does not fit, also as many slots as do.

    Fewer slots gain nothing but memory. So an engine that shares its GPUs with no other role has
    the most memory that is of use, and so has one with a large batch: a large cluster has memory
    enough, and a long queue takes long to simulate."""
    share = -(-workload.generated // engines)

    def percent(slots: int) -> int:
        return round(100 * rollout_fraction(workload, tensor_parallel, slots, device))

    if device.kind == "cpu":
        return [EngineSize(share, percent(share))] if 0 < percent(share) <= 100 else []
    listed = sorted({share, *(min(share, slots) for slots in CONCURRENCY)})
    sizes = [EngineSize(slots, percent(slots)) for slots in listed if 0 < percent(slots) <= 100]
    if (not sizes or sizes[-1].slots < share) and percent(1) <= 100 * FULLEST:
        most = bisect_right(range(1, share), 100 * FULLEST, key=percent)
        sizes = [*(size for size in sizes if size.slots < most), EngineSize(most, percent(most))]
    if not (shared and workload.generated <= LARGE_BATCH):
        sizes = sizes[-1:]
    crowded = {
        EngineSize(min(share, int(times * size.slots)), size.percent)
        for size in sizes
        for times in CROWDED
        if size.slots < share
    }
    return sorted({*sizes, *crowded})
