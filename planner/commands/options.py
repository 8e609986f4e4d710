"""What several commands are given, as it was typed. The command line loads this before it knows
which command will run, so nothing here is slow to import."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """Which job is planned, on which GPUs, at which measured costs. `cluster` and `workload` are
    each a file or a name. `planner.commands.inputs` reads and checks them."""

    gpus: int | None = None
    device: str | None = None
    gpus_per_node: int | None = None
    cluster: str | None = None
    workload: str = "7b"
    profiles: tuple[Path, ...] = ()
