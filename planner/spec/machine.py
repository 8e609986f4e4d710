"""The cores and the memory of this machine, or of the container or job (by the limits of cgroup
v2)."""

import os
import re
from pathlib import Path

ROOT = Path("/")


def usable_cores() -> int:
    """Cores that this process may use, as taskset(1) and a container's CPU quota leave them."""
    usable = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    quotas = [re.match(r"(\d+) (\d+)", text) for text in _limits("cpu.max")]
    allowed = [max(1, int(quota[1]) // int(quota[2])) for quota in quotas if quota]
    return min([usable, *allowed])


def physical_cores() -> int:
    """Physical cores among those that this process may use."""
    text = _read("proc/cpuinfo")
    pairs = set(re.findall(r"physical id\s*: (\d+).*?core id\s*: (\d+)", text, re.DOTALL))
    usable = usable_cores()
    return min(usable, len(pairs) or usable)


def memory_bytes() -> int:
    """Bytes of memory that this process may use: the machine's, or its container's or job's
    limit."""
    total = re.search(r"MemTotal:\s*(\d+) kB", _read("proc/meminfo"))
    machine = (
        1024 * int(total[1]) if total else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )
    return min([machine, *(int(limit) for limit in _limits("memory.max") if limit.isdigit())])


def _limits(file: str) -> list[str]:
    """The values of such a file for this process's control group, and for each group around it."""
    found = re.search(r"^0::(/.*)$", _read("proc/self/cgroup"), re.MULTILINE)
    group = Path(found[1] if found else "/")
    return [_read(f"sys/fs/cgroup/{path}/{file}").strip() for path in (group, *group.parents)]


def _read(path: str) -> str:
    try:
        return (ROOT / path).read_text()
    except OSError:
        return ""
