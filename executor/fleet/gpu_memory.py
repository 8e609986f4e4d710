"""The part of a GPU's memory that a process may take, and the bytes that it and its GPU had in use
while a call ran."""

import contextlib
from collections.abc import Iterator

import torch

from executor.fleet import torch_private

# Mapped at a time: by 20, torch's default, an update that finds nothing cached took up to 1 s
# longer.
SEGMENT_MB = 256


def limit(count: int) -> None:
    """Let this process's tensors take at most this many bytes of its GPU, in segments that grow: of
    packed micro-batches no two are of one size, and segments of fixed sizes would lie about
    unused."""
    _grow(True)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, count / total)))


@contextlib.contextmanager
def shareable() -> Iterator[None]:
    """What is allocated here can be opened by other processes through CUDA IPC, unlike segments
    that grow."""
    _grow(False)
    yield
    _grow(True)


def _grow(on: bool) -> None:
    # A call resets what it does not name.
    size = f",large_segment_size_mb:{SEGMENT_MB}" if on else ""
    torch_private.set_allocator(f"expandable_segments:{on}{size}")


def forget_peak() -> None:
    """Look for a new peak from here on, and count retries from zero."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.reset_accumulated_memory_stats()


def peak() -> dict[str, int]:
    """Bytes at the peak since then: what tensors of this process took (`allocated`), what its
    allocator held for them (`reserved`), and what the whole GPU had in use with that (`used`: other
    processes and contexts too); and how often the allocator had to give back what it held before it
    got more (`retries`). Nothing where this process uses no GPU."""
    if not torch.cuda.is_initialized():
        return {}
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.max_memory_reserved()
    return {
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": reserved,
        "used": total - free - torch.cuda.memory_reserved() + reserved,
        "retries": torch.cuda.memory_stats().get("num_alloc_retries", 0),
    }
