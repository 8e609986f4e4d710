"""What a machine has, by a tree of files like Linux's."""

from pathlib import Path
from typing import Any

import pytest

from planner.spec import machine

FILES = {
    "proc/meminfo": "MemTotal:       64000 kB\nMemFree: 1 kB\n",
    "proc/self/cgroup": "1:cpu:/\n0::/batch/job\n",
    "sys/fs/cgroup/batch/memory.max": "30000000\n",
    "sys/fs/cgroup/batch/job/memory.max": "max\n",
    "sys/fs/cgroup/batch/cpu.max": "100000 100000\n",
}


@pytest.mark.parametrize(
    ("without", "found"), [("", 30_000_000), ("sys/fs/cgroup/batch/memory.max", 65_536_000)]
)
def test_a_job_has_what_its_control_groups_leave_it(
    tmp_path: Path, monkeypatch: Any, without: str, found: int
) -> None:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text if name != without else "max\n")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.memory_bytes() == found
    assert machine.physical_cores() == 1


def test_this_machine_has_something() -> None:
    assert machine.physical_cores() >= 1 and machine.memory_bytes() > 2**30
