"""All that is used of Ray besides its documented interface. `tests/test_private.py` says whether it
is there; pyproject.toml bounds the versions."""

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ray._private import auto_init_hook, ray_constants, worker
from ray.job_config import JobConfig


def logs_directory() -> Path | None:
    """Where the processes of this host write their logs; None without a session."""
    node = worker._global_node
    return None if node is None else Path(node.get_logs_dir_path())


def never_start_by_itself() -> None:
    """Keep Ray from starting once more when a thread that it held up asks it for something after
    its end."""
    auto_init_hook.enable_auto_connect = False


def send(number: signal.Signals) -> None:
    """Send a signal to the processes of Ray itself, if this process has started them."""
    node = worker._global_node
    if node is None or not node.head:
        return
    for started in node.all_processes.values():
        for each in started:
            with suppress(ProcessLookupError):
                os.kill(each.process.pid, number)


def start_options(address: str, directory: Path, starts_at_once: int) -> dict[str, Any]:
    """Options of `ray.init`: listen at this address of the host only, keep all files in this
    directory, and start so many processes at a time."""
    return {
        "_node_ip_address": address,
        "_temp_dir": str(directory),
        "_system_config": {"worker_maximum_startup_concurrency": starts_at_once},
    }


class _Fixed(list[str]):
    """A list that Ray cannot extend."""

    def extend(self, more: Iterable[str]) -> None:
        """Leave out what is given."""


def job_config(code_path: list[str]) -> JobConfig:
    """Let processes look for modules in these directories first. Ray would put the working
    directory before them, where another `planner` may lie."""
    return JobConfig(_py_driver_sys_path=_Fixed(code_path))


@contextmanager
def without_other_hosts() -> Iterator[None]:
    """Let Ray keep an address of the loopback, which it takes for that of a cluster of one host."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
