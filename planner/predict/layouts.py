"""The layouts that are considered for a role on a number of GPUs. The search chooses among them and a profile
measures them."""

from collections.abc import Iterator
from functools import cache

from planner.predict.memory import rollout_fraction
from planner.spec.cluster import Device
from planner.spec.plan import Offload, RolloutRole, TrainerRole
from planner.spec.workload import Workload

MICRO_BATCH_TOKENS = (4096, 8192, 16384, 32768)
CONCURRENCY = (64, 128, 256, 512)
TENSOR_PARALLEL = (1, 2, 4, 8)


def divisors(number: int) -> tuple[int, ...]:
    return tuple(d for d in range(1, number + 1) if number % d == 0)


@cache
def used_gpus(gpus: int, minibatch: int) -> tuple[int, ...]:
    """How many of a pool's GPUs a trained role may compute on: all of them, or the most that share a minibatch's
    sequences evenly. More ranks than sequences would only idle."""
    even = max(d for d in divisors(minibatch) if d <= gpus)
    return tuple(sorted({even, min(gpus, minibatch)}, reverse=True))


def trainer_layouts(workload: Workload, role: str, gpus: int, pool: str, device: Device) -> Iterator[TrainerRole]:
    """Layouts of a trained or inference role on a pool of `gpus` GPUs, the fastest kind first.

    A micro-batch holds at least one longest sequence. On a CPU nothing is saved by sharding less, recomputing or
    offloading: its memory is the host's."""
    trained = role in ("actor", "critic")
    rows = workload.batch if not trained else workload.minibatch
    largest = rows * workload.longest
    sizes = sorted({min(max(size, workload.longest), largest) for size in MICRO_BATCH_TOKENS}, reverse=True)
    on_cpu = device.kind == "cpu"
    offloads: tuple[Offload, ...] = ("none", "optimizer", "all") if trained else ("none", "all")
    for used in used_gpus(gpus, workload.minibatch):
        for shard in (used,) if on_cpu else divisors(used):
            for tokens in sizes[:1] if on_cpu else sizes:
                for recompute in (False, True) if trained and not on_cpu else (False,):
                    for offload in offloads[:1] if on_cpu else offloads:
                        yield TrainerRole(
                            pools=(pool,),
                            shard=shard,
                            replicas=used // shard,
                            micro_batch_tokens=tokens,
                            recompute=recompute,
                            offload=offload,
                        )


def rollout_layouts(
    workload: Workload, parts: tuple[tuple[int, ...], ...], pools: tuple[str, ...], device: Device
) -> Iterator[RolloutRole]:
    """Layouts of the rollout on pools that have `parts[p]` GPUs per node: an engine lies within one node of one pool,
    and every pool has one. Concurrency never exceeds an engine's even share of the batch by more than it must."""
    shape = workload.actor.shape
    on_cpu = device.kind == "cpu"
    for tensor_parallel in TENSOR_PARALLEL[:1] if on_cpu else TENSOR_PARALLEL:
        engines = [sum(part // tensor_parallel for part in pool) for pool in parts]
        if shape.heads % tensor_parallel or not all(engines):
            continue
        share = -(-workload.batch // sum(engines))
        for concurrency in sorted({min(share, c) for c in ((share,) if on_cpu else (*CONCURRENCY, share))}):
            fraction = rollout_fraction(workload, tensor_parallel, concurrency, device)
            if not 0 < fraction <= 1:
                continue
            for offload in (False,) if on_cpu else (False, True):
                yield RolloutRole(
                    engine="transformers" if on_cpu else "vllm",
                    pools=pools,
                    tensor_parallel=tensor_parallel,
                    replicas=sum(engines),
                    memory_fraction=fraction,
                    concurrency=concurrency,
                    offload=offload,
                )
