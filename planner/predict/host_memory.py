"""Bytes of each host's memory: what roles and engines put there while they idle, what a checkpoint
copies, the batches in flight, and the processes themselves."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

from planner.predict.columns import Integers
from planner.predict.memory import role_memory
from planner.spec.cluster import Device, Node
from planner.spec.plan import Plan
from planner.spec.wording import gigabytes
from planner.spec.workload import TRAINED, Workload, head_of

# Ray ends processes when more of a host's memory is in use.
# https://docs.ray.io/en/latest/ray-core/scheduling/ray-oom-prevention.html
USABLE = 0.95
# A checkpoint copies weights and two moments in fp32 off the GPUs before they are written.
COPIED_BYTES = 12
# The models that a run leaves are written by one rank, from a copy in fp32.
EXPORTED_BYTES = 4
# What a process with torch, CUDA and compiled code takes of its host, roughly.
PROCESS_BYTES = 4_000_000_000
# What an engine keeps of its weights while it sleeps lies in torch's pinned memory, which comes in
# powers of two: up to twice as much.
PINNED_BYTES = 2
# A batch has token ids, masks and about eight fp32 columns.
SAMPLE_BYTES_PER_TOKEN = 48

CHECKPOINT = "copies for checkpoints"


def host_memory(plan: Plan, saves: bool = True) -> dict[int, dict[str, int]]:
    """Bytes of each node by what takes them, with checkpoints or without."""
    found: dict[int, dict[str, int]] = {}
    workload = plan.workload
    for node in range(len(plan.cluster.nodes)):
        on_node = {
            name: sum(place == node for place, _ in pool.gpus) for name, pool in plan.pools.items()
        }
        used: defaultdict[str, int] = defaultdict(int)
        exported = 0
        for role, layout in plan.trainers.items():
            (pool,) = layout.pools
            used["what is offloaded"] += role_memory(plan, role).host * on_node[pool]
            copied = copied_bytes(workload, role, np.array(layout.shard), on_node[pool])
            used[CHECKPOINT] += int(copied)
            if plan.pools[pool].gpus[0][0] == node:
                exported = max(exported, exported_bytes(workload, role))
        used[CHECKPOINT] = max(used[CHECKPOINT], exported) if saves else 0
        engine = role_memory(plan, "rollout").host * kept_asleep(workload, plan.staleness)
        used["engines asleep"] = engine * sum(on_node[pool] for pool in plan.rollout.pools)
        if node == 0 or any(on_node.values()):
            used["batches in flight"] = batch_bytes(workload, plan.staleness)
        trained = {layout.pools[0] for layout in plan.trainers.values()}
        for pool, gpus in on_node.items():
            of_gpu = processes(pool in trained, pool in plan.rollout.pools, plan.device_of(pool))
            used["processes"] += of_gpu * gpus
        found[node] = {what: size for what, size in used.items() if size}
    return found


def allowed(node: Node) -> int:
    """Bytes of a node's host that may be in use."""
    return allowed_of(node.host_memory_bytes)


def allowed_of(memory: int) -> int:
    """Bytes that may be in use of a machine with so many."""
    return int(USABLE * memory)


def merged(hosts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """What takes how many bytes of several hosts together."""
    total: Counter[str] = Counter()
    for parts in hosts:
        total.update(parts)
    return dict(total)


def named(parts: Mapping[str, int]) -> str:
    """What takes how much of a host, the most first."""
    largest_first = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{what} {gigabytes(size)}" for what, size in largest_first)


def batch_bytes(workload: Workload, staleness: int) -> int:
    """Bytes of the batches in flight, on the controller's host and in the object store of each
    other one: staleness + 1 batches of longest sequences."""
    return workload.generated * workload.longest * SAMPLE_BYTES_PER_TOKEN * (staleness + 1)


def copied_bytes(workload: Workload, role: str, shard: Integers, gpus: Integers | int) -> Integers:
    """Bytes that a checkpoint copies of a role, by its shard size, on a node with so many GPUs of
    its pool: as if the replica that is saved began there."""
    if role not in TRAINED:
        return np.zeros_like(shard * gpus)
    parameters = workload.models[role].shape.parameters(head_of(role))
    return np.asarray(COPIED_BYTES * parameters // shard * np.minimum(shard, gpus))


def exported_bytes(workload: Workload, role: str) -> int:
    """Bytes of a role's copy for its export, on the node of its first rank."""
    if role not in TRAINED:
        return 0
    return EXPORTED_BYTES * workload.models[role].shape.parameters(head_of(role))


def kept_asleep(workload: Workload, staleness: int) -> int:
    """Bytes of a host for each byte of the weights of an engine that sleeps: none if there is a
    transfer before it generates again, for then it drops them."""
    drops = staleness == 0 and "evaluate" not in workload.dataflow.names
    return 0 if drops else PINNED_BYTES


def processes(trainer: bool, engine: bool, device: Device) -> int:
    """Bytes of a host for the processes on each GPU of a pool. Those on cores take what is counted
    as the core's own memory."""
    return PROCESS_BYTES * (int(trainer) + int(engine)) if device.kind == "cuda" else 0
