"""The GPUs that this process may use, and whether they are those of a plan and free."""

import os
from collections.abc import Sequence

from executor.fleet import driver
from executor.fleet.driver import LocalGpu
from planner.spec.errors import UserError
from planner.spec.files import profiles_dir, read_data
from planner.spec.plan import Plan

IDLE_BYTES = 2 * 10**9  # what a GPU that nobody uses may show


def found() -> list[LocalGpu]:
    """The GPUs that this process may use; none without a driver. Raises UserError if the driver
    does not answer."""
    if not driver.is_there():
        return _as_torch_sees()
    return visible(driver.gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))


def _as_torch_sees() -> list[LocalGpu]:
    """The GPUs as torch sees them, where the driver's library is missing."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    seen = [torch.cuda.get_device_properties(index) for index in range(count)]
    return [
        LocalGpu(
            index=index,
            uuid=str(gpu.uuid),
            name=gpu.name,
            total=gpu.total_memory,
            used=0,
            driver="unknown",
        )
        for index, gpu in enumerate(seen)
    ]


def visible(gpus: Sequence[LocalGpu], variable: str | None) -> list[LocalGpu]:
    """Those that CUDA_VISIBLE_DEVICES names: indices or beginnings of UUIDs, up to the first that
    is neither."""
    if variable is None:
        return list(gpus)
    chosen: list[LocalGpu] = []
    for entry in (part.strip() for part in variable.split(",")):
        match = [
            gpu for gpu in gpus if str(gpu.index) == entry or (entry and gpu.uuid.startswith(entry))
        ]
        if not match:
            break
        chosen += match
    return chosen


def check_kind(plan: Plan, gpus: Sequence[LocalGpu]) -> None:
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


def check_free(gpus: Sequence[LocalGpu], named: dict[str, list[str]]) -> None:
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
