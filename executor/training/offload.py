"""The state of an idle role, moved between its GPU and pinned memory of the host.

Storages are emptied and filled again under the tensors that view them. So parameters, FSDP's views
of them and the optimizer's states stay the same objects.
"""

import contextlib
import mmap
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, UntypedStorage
from torch.distributed.tensor import DTensor

from executor.fleet import torch_private


class Parking:
    """Holds tensors' data on the host while they are parked; its buffers stay for the next time."""

    def __init__(self) -> None:
        self._parked: list[tuple[UntypedStorage, Tensor]] = []
        self._buffers: dict[int, list[Tensor]] = {}  # free ones by size

    def park(self, tensors: Iterable[Tensor]) -> None:
        """Move the data of tensors to the host; until `fetch` they must not be used."""
        assert not self._parked, "parked already"
        storages = [_local(tensor).untyped_storage() for tensor in tensors]
        for storage in {
            storage.data_ptr(): storage for storage in storages if storage.nbytes()
        }.values():
            buffer = self._buffer(storage.nbytes())
            buffer.copy_(_bytes(storage), non_blocking=True)
            self._parked.append((storage, buffer))
        _wait()
        for storage, _ in self._parked:
            storage.resize_(0)

    def fetch(self) -> None:
        """Move everything back."""
        for storage, buffer in self._parked:
            storage.resize_(buffer.numel())
            _bytes(storage).copy_(buffer, non_blocking=True)
            self._buffers[buffer.numel()].append(buffer)
        self._parked = []
        _wait()

    def peek(self, tensor: Tensor) -> Tensor:
        """A tensor's data (this rank's) where they are now: on the host while it is parked."""
        local = _local(tensor)
        for storage, buffer in self._parked:
            if torch_private.is_same_storage(storage, local.untyped_storage()):
                host = buffer[: len(buffer) // local.element_size() * local.element_size()].view(
                    local.dtype
                )
                return host.as_strided(local.shape, local.stride(), local.storage_offset())
        return local

    def _buffer(self, size: int) -> Tensor:
        free = self._buffers.setdefault(size, [])
        return free.pop() if free else _pinned(size)


def _pinned(size: int) -> Tensor:
    """A tensor of this many bytes of the host, page-locked where there is a GPU. Torch's own pinned
    memory comes in powers of two, which for a model's matrices is up to twice as much."""
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE)
    buffer = torch.frombuffer(pages, dtype=torch.uint8)
    if torch.cuda.is_available():
        with contextlib.suppress(
            OSError
        ):  # a kernel without large pages locks every 4 KiB by themselves
            pages.madvise(mmap.MADV_HUGEPAGE)
        cuda, address = torch.cuda.cudart(), buffer.data_ptr()
        if error := int(cuda.cudaHostRegister(address, size, 0)):
            raise MemoryError(f"the host cannot lock {size / 1e9:.1f} GB more (CUDA error {error})")
        weakref.finalize(buffer, cuda.cudaHostUnregister, address).atexit = False
    return buffer


def _local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
