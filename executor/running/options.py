"""The options of `plan execute`: how a plan is run."""

import re
from dataclasses import dataclass

from planner.spec.errors import UserError
from planner.spec.limits import check_range

DEADLINE_FLOOR_SECONDS = 60.0
MOST_FLOOR_SECONDS = 1e6
LAST_PORT = 65_535
ADDRESS = r"auto|[^:/]+:\d+"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The run ends after `steps` steps (None: the workload's). A checkpoint is saved every
    `save_every` steps (0: never), and the last `keep` of them stay; after a failure of processes
    the run starts again by itself from the last one, at most `max_restarts` times.

    Of every `samples_every`-th step `samples` sequences are written down, and with any also all
    responses of evaluations. The models are exported every `export_every` steps (0: at the end
    only), from a checkpoint.

    A call that takes ten times its predicted seconds, and more than `deadline_floor`, counts as
    failed. `address` is that of a Ray cluster (None: one is started on this machine's loopback);
    `track` names trackers in addition to TensorBoard (wandb, mlflow), and at the port `prometheus`
    of the loopback Prometheus may read the metrics.

    Raises UserError for a number that is out of its range."""

    steps: int | None = None
    save_every: int = 10
    keep: int = 2
    max_restarts: int = 3
    deadline_floor: float = DEADLINE_FLOOR_SECONDS
    samples: int = 8
    samples_every: int = 10
    export_every: int = 0
    address: str | None = None
    track: tuple[str, ...] = ()
    prometheus: int | None = None

    def __post_init__(self) -> None:
        if self.steps is not None:
            check_range("--steps", self.steps, 1)
        if self.address is not None and not re.fullmatch(ADDRESS, self.address):
            raise UserError(
                f"--address {self.address}: write host:port, such as 127.0.0.1:6379 (the port that "
                "`ray start --head` names), or auto for the cluster of this machine"
            )
        if self.prometheus is not None:
            check_range("--prometheus", self.prometheus, 1, LAST_PORT)
        check_range("--keep", self.keep, 1)
        check_range("--save-every", self.save_every, 0)
        check_range("--max-restarts", self.max_restarts, 0)
        check_range("--samples", self.samples, 0)
        check_range("--export-every", self.export_every, 0)
        check_range("--samples-every", self.samples_every, 1)
        if not 0 < self.deadline_floor <= MOST_FLOOR_SECONDS:
            raise UserError(
                f"--deadline-floor {self.deadline_floor:g}: choose a number of seconds, at most "
                f"{MOST_FLOOR_SECONDS:g}"
            )
