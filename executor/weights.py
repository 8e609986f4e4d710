"""Weights out of FSDP's shards: in full for files and engines on the CPU, in the type they compute in for engines on
GPUs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from executor import memory

Arrays = dict[str, NDArray[np.float32]]
CHUNK_BYTES = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Described:
    """A parameter as an engine gets it: its name in the Hugging Face model, its full shape, its bytes in bf16."""

    name: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return 2 * int(np.prod(self.shape))


def whole(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each parameter in full, by name. A collective: every rank that holds a shard must iterate to the end."""
    for name, parameter in model.named_parameters():
        data = parameter.detach()
        yield name, data.full_tensor() if isinstance(data, DTensor) else data


def gather(model: nn.Module, keep: bool) -> Arrays | None:
    """All parameters as float32 arrays for Ray's object store, on the rank that is to `keep` them."""
    arrays: Arrays = {}
    for name, tensor in whole(model):
        if keep:
            arrays[name] = tensor.float().cpu().numpy()
    return arrays if keep else None


@torch.no_grad()
def install(model: nn.Module, arrays: Arrays) -> None:
    """Copy gathered parameters into an engine's model, which must have the same ones."""
    parameters = dict(model.named_parameters())
    assert parameters.keys() == arrays.keys(), f"weights differ in {sorted(parameters.keys() ^ arrays.keys())}"
    for name, parameter in parameters.items():
        parameter.copy_(torch.tensor(arrays[name]))


# --- for engines on GPUs ---


def describe(module: nn.Module) -> list[Described]:
    """What `compute_weights` yields, in its order; `module.model` is the Hugging Face model that names it."""
    shapes = {name: tuple(p.shape) for name, p in module.model.named_parameters()}
    return [Described(name=name, shape=shapes[name]) for _, names in _units(module) for name in names]


@torch.no_grad()
def compute_weights(module: nn.Module, wanted: frozenset[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Each parameter (or each wanted one) in full and in the type it computes in.

    Gathered by FSDP itself, one unit after the other on the current stream and ready when they are yielded. A
    collective: every rank that holds a shard must iterate to the end."""
    for unit, names in _units(module):
        if wanted is not None and not wanted.intersection(names):
            continue
        unit.unshard()
        parameters = dict(module.model.named_parameters())
        for name in names:
            if wanted is None or name in wanted:
                weight = parameters[name].detach().clone()  # resharding frees what it was gathered in
                if weight.is_cuda:
                    torch.cuda.current_stream().synchronize()
                yield name, weight
        unit.reshard()


def _units(module: nn.Module) -> list[tuple[FSDPModule, list[str]]]:
    """Each module that FSDP shards as one, with the names of the parameters that are its own, the innermost first."""
    units = [(name, unit) for name, unit in module.named_modules() if isinstance(unit, FSDPModule)]
    taken: set[str] = set()
    found = []
    for prefix, unit in reversed(units):
        names = [f"{prefix}.{name}".lstrip(".").removeprefix("model.") for name, _ in unit.named_parameters()]
        found.append((unit, [name for name in names if name not in taken]))
        taken.update(names)
    return found


def in_chunks(weights: Sequence[Described]) -> list[list[Described]]:
    """Neighbouring weights in chunks of at most `CHUNK_BYTES`, or of one weight."""
    chunks: list[list[Described]] = []
    free = 0
    for weight in weights:
        if not chunks or weight.bytes > free:
            chunks.append([])
            free = CHUNK_BYTES
        chunks[-1].append(weight)
        free -= weight.bytes
    return chunks


class Window:
    """A buffer on a trainer's GPU that the engine on that GPU reads through CUDA IPC, a chunk at a time."""

    def __init__(self, chunks: Sequence[Sequence[Described]]) -> None:
        from torch.multiprocessing.reductions import reduce_tensor

        size = max(sum(weight.bytes for weight in chunk) for chunk in chunks)
        with memory.shareable():
            self.buffer = torch.empty(size, dtype=torch.uint8, device="cuda")
        gpu = str(torch.cuda.get_device_properties(self.buffer.device).uuid)
        self.handles: dict[str, Any] = {gpu: reduce_tensor(self.buffer)[1]}

    def fill(self, module: nn.Module, chunk: Sequence[Described]) -> None:
        """Gather a chunk's weights into the buffer. A collective."""
        ends = np.cumsum([weight.bytes for weight in chunk]).tolist()
        place = {weight.name: slice(end - weight.bytes, end) for weight, end in zip(chunk, ends, strict=True)}
        for name, weight in compute_weights(module, frozenset(place)):
            self.buffer[place[name]].copy_(weight.contiguous().view(torch.uint8).view(-1))
        torch.cuda.synchronize()
