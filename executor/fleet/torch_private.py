"""All that is used of torch besides its documented interface. `tests/test_private.py` says whether
it is there; pyproject.toml bounds the versions."""

from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch._inductor import config as inductor_config
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

DEVICE = 6  # the place of the device's index in the handle of a tensor


def set_allocator(settings: str) -> None:
    """Settings as in PYTORCH_ALLOC_CONF, for what is allocated from here on."""
    torch._C._accelerator_setAllocatorSettings(settings)


def is_same_storage(one: UntypedStorage, other: UntypedStorage) -> bool:
    """Whether two objects are one storage, also while it is empty and has no address."""
    return bool(one._cdata == other._cdata)


def allow_recompiling(times: int) -> None:
    """Let torch.compile compile the same code so often, for other modes, sizes or devices."""
    torch._dynamo.config.recompile_limit = times


def fuse_alike_for_any_size() -> None:
    """Keep torch.compile from choosing what it fuses by the number of tokens, as torch 2.10 began
    to. What it compiles for many tokens is else compiled again for the first micro-batch that has
    fewer, in the middle of a run."""
    settings: Any = inductor_config.triton
    if hasattr(settings, "mix_order_reduction"):
        settings.mix_order_reduction = False


def is_stored(module: nn.Module, buffer: str) -> bool:
    """Whether a module's buffer belongs to what is stored of it."""
    return buffer not in module._non_persistent_buffers_set


def ipc_handle(tensor: Tensor) -> tuple[Any, ...]:
    """The handle by which another process can open a tensor on a GPU, as long as this one keeps
    it."""
    handle: tuple[Any, ...] = reduce_tensor(tensor)[1]
    return handle


def open_ipc(handle: tuple[Any, ...], device: int) -> Tensor:
    """The tensor of another process; `device` is its GPU as this process counts them."""
    given = list(handle)
    given[DEVICE] = device
    tensor: Tensor = rebuild_cuda_tensor(*given)
    return tensor
