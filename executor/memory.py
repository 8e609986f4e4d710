"""How much memory a process and its GPU had in use while a call ran."""

import torch


def forget_peak() -> None:
    """From here on, look for a new peak."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def peak() -> dict[str, int]:
    """Bytes at the peak since then: what tensors of this process took (`allocated`), what its allocator held for them
    (`reserved`), and what the whole GPU had in use with that (`used`: other processes and contexts too). Nothing
    where this process uses no GPU."""
    if not torch.cuda.is_initialized():
        return {}
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.max_memory_reserved()
    return {
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": reserved,
        "used": total - free - torch.cuda.memory_reserved() + reserved,
    }
