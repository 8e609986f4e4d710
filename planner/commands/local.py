"""This machine as a cluster: one core stands in for a GPU."""

from planner.spec.cluster import Cluster, Device, Node
from planner.spec.errors import UserError
from planner.spec.machine import memory_bytes, physical_cores

# Rough rates of one core in fp32, so that a search without a profile puts things in the right
# order; a profile corrects them. A server's core did 88e9 operations a second in the passes of a
# 135M model, and read 7.5e9 bytes a second while it generated.
CORE_FLOPS = 1e11
CORE_MEMORY_BANDWIDTH = 1e10
CORE_LINK_BANDWIDTH = 1e9
CORE_OVERHEAD_SECONDS = 5e-3

HOST_SHARE = (
    0.4  # of the memory: the system, the controller, what is offloaded and the batches in flight
)


def local_cluster(gpus: int | None = None) -> Cluster:
    """One node with a "GPU" per physical core (or the first `gpus` of them). Raises UserError if
    there are fewer."""
    cores = physical_cores()
    if gpus is not None and not 1 <= gpus <= cores:
        raise UserError(
            f"--gpus {gpus}: this machine has {cores} physical cores that may be used; choose 1 to "
            f"{cores}"
        )
    count, memory = gpus or cores, memory_bytes()
    device = Device(
        kind="cpu",
        memory_bytes=int((1 - HOST_SHARE) * memory / count),
        flops=CORE_FLOPS,
        memory_bandwidth=CORE_MEMORY_BANDWIDTH,
        link_bandwidth=CORE_LINK_BANDWIDTH,
        host_bandwidth=CORE_MEMORY_BANDWIDTH / 2,
        overhead_seconds=CORE_OVERHEAD_SECONDS,
        source="rough figures of one core; a profile corrects them",
    )
    node = Node(gpus=count, device="cpu", host_memory_bytes=int(HOST_SHARE * memory))
    return Cluster(
        name="local", nodes=(node,), devices={"cpu": device}, network_bandwidth=CORE_LINK_BANDWIDTH
    )
