"""What the NVIDIA driver tells of this machine's GPUs, through its management library (NVML)."""

import contextlib
import threading
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import pynvml

from planner.spec.errors import UserError

DRIVER_SECONDS = 60.0  # a driver that hangs answers no call of its library


@dataclass(frozen=True, kw_only=True)
class LocalGpu:
    """One GPU; bytes of its memory, 0 where it has none of its own."""

    index: int
    uuid: str
    name: str
    total: int
    used: int
    driver: str


def is_there() -> bool:
    """Whether this machine has the driver. Raises UserError if it is there and does not answer, or
    not in time."""
    answers: SimpleQueue[bool | UserError] = SimpleQueue()
    threading.Thread(target=lambda: answers.put(_answers()), daemon=True).start()
    try:
        answer = answers.get(timeout=DRIVER_SECONDS)
    except Empty:
        raise _fails(f"nothing in {DRIVER_SECONDS:g} s") from None
    if isinstance(answer, UserError):
        raise answer
    return answer


def _answers() -> bool | UserError:
    """Whether there is a driver that answers, or what it says instead."""
    try:
        pynvml.nvmlInit()  # as often as one likes
    except pynvml.NVMLError_LibraryNotFound:
        return False
    except pynvml.NVMLError as error:
        return _fails(error)
    return True


def gpus() -> list[LocalGpu]:
    """All GPUs; none without a driver. Raises UserError if it does not answer."""
    if not is_there():
        return []
    try:
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        return [_gpu(index, driver) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        raise _fails(error) from None


def _gpu(index: int, driver: str) -> LocalGpu:
    handle, total, used = pynvml.nvmlDeviceGetHandleByIndex(index), 0, 0
    with contextlib.suppress(pynvml.NVMLError_NotSupported):  # its memory is the host's
        # In this version of the call, `used` is without what the driver keeps for itself.
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
        total, used = int(memory.total), int(memory.used)
    return LocalGpu(
        index=index,
        uuid=str(pynvml.nvmlDeviceGetUUID(handle)),
        name=str(pynvml.nvmlDeviceGetName(handle)),
        total=total,
        used=used,
        driver=driver,
    )


def users() -> dict[str, list[str]]:
    """The processes on each GPU by its UUID, as far as they can be seen from here (not from inside
    of a container)."""
    named: dict[str, list[str]] = {}
    for gpu in gpus():
        with contextlib.suppress(pynvml.NVMLError):
            handle = pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid)
            processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
            named[gpu.uuid] = [_named(process.pid) for process in processes]
    return named


def _named(pid: int) -> str:
    try:
        return f"{pid} ({pynvml.nvmlSystemGetProcessName(pid)})"
    except pynvml.NVMLError:
        return str(pid)


def handle_of(device: str) -> Any:
    """The library's handle of a GPU, by its number or by its UUID."""
    if device.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(device))
    return pynvml.nvmlDeviceGetHandleByUUID(device)


def bytes_in_use(handle: Any) -> int:
    """Bytes of a GPU's memory that are not free, all processes and the driver itself included."""
    return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)


def _fails(error: object) -> UserError:
    return UserError(f"the NVIDIA driver does not answer ({error}); check the driver")
