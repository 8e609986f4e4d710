"""What this machine has, or of it the container (where its limits are at the root of cgroup v2)."""

import os
import re
from pathlib import Path


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
