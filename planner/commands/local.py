"""This machine as a cluster: one core stands in for a GPU."""

import os
import re
from pathlib import Path

from planner.spec.cluster import Cluster, Device, Node
from planner.spec.errors import UserError

# Rough rates of one core, so that a search without a profile puts things in the right order; a profile corrects them.
CORE_FLOPS = 3e10
CORE_MEMORY_BANDWIDTH = 8e9
CORE_LINK_BANDWIDTH = 1e9
CORE_OVERHEAD_SECONDS = 5e-3

HOST_SHARE = 0.4  # of the memory: the system, the controller, what is offloaded and the batches in flight


def local_cluster(gpus: int | None = None) -> Cluster:
    """One node with a "GPU" per physical core (or the first `gpus` of them). Raises UserError if there are fewer."""
    cores = physical_cores()
    if gpus is not None and not 1 <= gpus <= cores:
        raise UserError(f"--gpus {gpus}: this machine has {cores} physical cores that may be used; choose 1 to {cores}")
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
    return Cluster(name="local", nodes=(node,), devices={"cpu": device}, network_bandwidth=CORE_LINK_BANDWIDTH)


def physical_cores() -> int:
    """Physical cores that this process may use; a container's CPU quota counts."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = _read("/proc/cpuinfo")
    pairs = set(re.findall(r"physical id\s*: (\d+).*?core id\s*: (\d+)", text, re.DOTALL))
    quota = re.match(r"(\d+) (\d+)", _read("/sys/fs/cgroup/cpu.max"))
    allowed = max(1, int(quota[1]) // int(quota[2])) if quota else usable
    return min(usable, allowed, len(pairs) or usable)


def memory_bytes() -> int:
    """Bytes of memory that this process may use: the machine's, or its container's limit."""
    total = re.search(r"MemTotal:\s*(\d+) kB", _read("/proc/meminfo"))
    machine = 1024 * int(total[1]) if total else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return min(machine, int(limit)) if limit.isdigit() else machine


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
