"""The GPUs of this machine, as their driver tells of them, and whether they are those of a plan and
free."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from planner.spec.errors import UserError
from planner.spec.files import profiles_dir, read_data
from planner.spec.plan import Plan

FIELDS = "index,uuid,name,memory.total,memory.used,driver_version"
IDLE_BYTES = 2 * 10**9  # what a GPU that nobody uses may show
ANSWER_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Found:
    """One GPU; bytes of its memory."""

    index: int
    uuid: str
    name: str
    total: int
    used: int
    driver: str


def found() -> list[Found]:
    """The GPUs that this process may use; none without a driver. Raises UserError if the driver
    does not answer."""
    if shutil.which("nvidia-smi") is None:
        return _as_torch_sees()
    return visible(parse(_ask(f"--query-gpu={FIELDS}")), os.environ.get("CUDA_VISIBLE_DEVICES"))


def _as_torch_sees() -> list[Found]:
    """Where the driver's own program is missing."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    seen = [torch.cuda.get_device_properties(index) for index in range(count)]
    return [
        Found(
            index=index,
            uuid=str(gpu.uuid),
            name=gpu.name,
            total=gpu.total_memory,
            used=0,
            driver="unknown",
        )
        for index, gpu in enumerate(seen)
    ]


def users() -> dict[str, list[str]]:
    """Processes on each GPU by its UUID, as far as they can be seen from here (not from inside of a
    container)."""
    named: dict[str, list[str]] = {}
    if shutil.which("nvidia-smi") is None:
        return named
    for line in _ask("--query-compute-apps=gpu_uuid,pid,process_name").splitlines():
        parts = [part.strip() for part in line.split(",", 2)]
        if len(parts) == 3:
            named.setdefault(parts[0], []).append(f"{parts[1]} ({parts[2]})")
    return named


def _ask(query: str) -> str:
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(
            f"nvidia-smi does not answer ({type(error).__name__}); is the driver in order?"
        ) from None
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())[:200]
        raise UserError(f"nvidia-smi fails ({said}); is the driver in order?")
    return done.stdout


def parse(text: str) -> list[Found]:
    """What nvidia-smi prints for `FIELDS`; memory there is in MiB."""
    rows = [
        [part.strip() for part in line.split(",")] for line in text.splitlines() if line.strip()
    ]
    return [
        Found(
            index=int(index),
            uuid=uuid,
            name=name,
            total=_mebibytes(total),
            used=_mebibytes(used),
            driver=driver,
        )
        for index, uuid, name, total, used, driver in rows
    ]


def _mebibytes(text: str) -> int:
    return int(text) * 2**20 if text.isdigit() else 0  # "[N/A]" where memory is the host's


def visible(gpus: Sequence[Found], variable: str | None) -> list[Found]:
    """Those that CUDA_VISIBLE_DEVICES names: indices or beginnings of UUIDs, up to the first that
    is neither."""
    if variable is None:
        return list(gpus)
    chosen: list[Found] = []
    for entry in (part.strip() for part in variable.split(",")):
        match = [
            gpu for gpu in gpus if str(gpu.index) == entry or (entry and gpu.uuid.startswith(entry))
        ]
        if not match:
            break
        chosen += match
    return chosen


def check_kind(plan: Plan, gpus: Sequence[Found]) -> None:
    """Whether these are GPUs of the plan's kind: by name for a kind that is shipped, and by their
    memory."""
    shipped = read_data(profiles_dir() / "devices.toml")
    for pool in plan.pools:
        node = plan.cluster.nodes[plan.pools[pool].gpus[0][0]]
        for gpu in gpus:
            if node.device in shipped and node.device.upper() not in gpu.name.upper():
                raise UserError(
                    f"plan {plan.name!r} is for GPUs of kind {node.device}, and GPU {gpu.index} of "
                    "this machine is a "
                    f"{gpu.name}; search a plan with --device or a --cluster file for it"
                )
            counted = plan.device_of(pool).memory_bytes
            if 0 < gpu.total < counted:
                raise UserError(
                    f"plan {plan.name!r} counts on {counted / 1e9:.1f} GB per GPU, and GPU "
                    f"{gpu.index} of this machine "
                    f"({gpu.name}) has {gpu.total / 1e9:.1f} GB; search a plan with a --cluster "
                    "file for it"
                )


def check_free(gpus: Sequence[Found], named: dict[str, list[str]]) -> None:
    """Whether nobody else uses these GPUs. `named` are the processes that are known, by UUID."""
    busy = [gpu for gpu in gpus if gpu.used > IDLE_BYTES]
    if not busy:
        return
    who = [name for gpu in busy for name in named.get(gpu.uuid, [])]
    free = ",".join(str(gpu.index) for gpu in gpus if gpu not in busy)
    raise UserError(
        "in use by others: "
        f"{', '.join(f'GPU {gpu.index} ({gpu.used / 1e9:.1f} GB)' for gpu in busy)}"
        + (f", by process {', '.join(who[:4])}" if who else "")
        + "; end that"
        + (f", or leave them out with CUDA_VISIBLE_DEVICES={free}" if free else "")
    )
