"""Weights out of FSDP's shards: in full for files and engines on the CPU, in bf16 for engines on
GPUs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from executor.fleet import gpu_memory, torch_private
from planner.predict.memory import SYNC_BYTES

Arrays = dict[str, NDArray[np.float32]]
Place = tuple[nn.Module, str]  # a parameter's module, and its name there


@dataclass(frozen=True, kw_only=True, slots=True)
class Described:
    """A parameter as an engine gets it: its name in the Hugging Face model, its full shape, its
    bytes in bf16."""

    name: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return 2 * int(np.prod(self.shape))


def whole(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each parameter in full, by name. A collective: every rank that holds a shard must iterate to
    the end."""
    for name, parameter in model.named_parameters():
        data = parameter.detach()
        yield name, data.full_tensor() if isinstance(data, DTensor) else data


def gather(model: nn.Module, keep: bool) -> Arrays | None:
    """All parameters as float32 arrays for Ray's object store, on the rank that is to `keep`
    them."""
    arrays: Arrays = {}
    for name, tensor in whole(model):
        if keep:
            arrays[name] = tensor.float().cpu().numpy()
    return arrays if keep else None


@torch.no_grad()
def install(model: nn.Module, arrays: Arrays) -> None:
    """Copy gathered parameters into an engine's model, which must have the same ones."""
    parameters = dict(model.named_parameters())
    assert parameters.keys() == arrays.keys(), (
        f"weights differ in {sorted(parameters.keys() ^ arrays.keys())}"
    )
    for name, parameter in parameters.items():
        parameter.copy_(torch.tensor(arrays[name]))


# --- for engines on GPUs ---


def describe(module: nn.Module) -> list[Described]:
    """Describe the tensors that `compute_weights` yields, in its order. `module.model` is the
    Hugging Face model that names them."""
    return [
        Described(name=name, shape=tuple(getattr(owner, attribute).shape))
        for _, parameters in _units(module)
        for name, (owner, attribute) in parameters.items()
    ]


@torch.no_grad()
def compute_weights(
    module: nn.Module, wanted: frozenset[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Each parameter (or each wanted one) in full and in bf16, on the current stream.

    What has shards elsewhere is gathered by FSDP itself, one unit after the other, and ready when
    it is yielded. A collective: every rank that holds a shard must iterate to the end."""
    for unit, parameters in _units(module):
        chosen = {
            name: place for name, place in parameters.items() if wanted is None or name in wanted
        }
        if chosen:
            yield from _in_full(unit, chosen)


def _in_full(unit: FSDPModule, places: Mapping[str, Place]) -> list[tuple[str, Tensor]]:
    own = {
        name: _whole_here(getattr(owner, attribute)) for name, (owner, attribute) in places.items()
    }
    if all(tensor is not None for tensor in own.values()):
        return [
            (name, tensor.to(torch.bfloat16)) for name, tensor in own.items() if tensor is not None
        ]
    unit.unshard()
    gathered = {
        name: getattr(owner, attribute).detach() for name, (owner, attribute) in places.items()
    }
    found = [(name, tensor.to(torch.bfloat16, copy=True)) for name, tensor in gathered.items()]
    if torch.cuda.is_available():  # resharding frees what they were gathered in
        torch.cuda.current_stream().synchronize()
    unit.reshard()
    return found


def _whole_here(parameter: Tensor) -> Tensor | None:
    """A parameter of which every rank has everything; None if it is in shards."""
    if not isinstance(parameter, DTensor):
        return parameter.detach()
    sizes = zip(parameter.placements, parameter.device_mesh.shape, strict=True)
    in_shards = any(placement.is_shard() and size > 1 for placement, size in sizes)
    return None if in_shards else parameter.to_local().detach()


def _units(module: nn.Module) -> list[tuple[FSDPModule, dict[str, Place]]]:
    """Each module that FSDP shards as one, with the places of the parameters that are its own by
    their names in the Hugging Face model; the innermost first."""
    units: dict[str, tuple[FSDPModule, dict[str, Place]]] = {}
    taken: set[int] = set()  # a tied parameter has two places
    for path, owner in module.named_modules():
        if isinstance(owner, FSDPModule):
            units[path] = owner, {}
        home = path
        while home not in units:
            home = home.rpartition(".")[0]
        for attribute, parameter in owner.named_parameters(recurse=False):
            if id(parameter) not in taken:
                taken.add(id(parameter))
                units[home][1][f"{path}.{attribute}".removeprefix("model.")] = owner, attribute
    return [*reversed(units.values())]


def in_chunks(weights: Sequence[Described]) -> list[list[Described]]:
    """Neighbouring weights in chunks of at most `SYNC_BYTES`, or of one weight."""
    chunks: list[list[Described]] = []
    free = 0
    for weight in weights:
        if not chunks or weight.bytes > free:
            chunks.append([])
            free = SYNC_BYTES
        chunks[-1].append(weight)
        free -= weight.bytes
    return chunks


class Window:
    """A buffer on a trainer's GPU that the engine on that GPU reads through CUDA IPC, a chunk at a
    time."""

    def __init__(self, chunks: Sequence[Sequence[Described]]) -> None:
        size = max(sum(weight.bytes for weight in chunk) for chunk in chunks)
        with gpu_memory.shareable():
            self.buffer = torch.empty(size, dtype=torch.uint8, device="cuda")
        gpu = str(torch.cuda.get_device_properties(self.buffer.device).uuid)
        self.handles: dict[str, Any] = {gpu: torch_private.ipc_handle(self.buffer)}

    def fill(self, module: nn.Module, chunk: Sequence[Described]) -> None:
        """Gather a chunk's weights into the buffer. A collective."""
        ends = np.cumsum([weight.bytes for weight in chunk]).tolist()
        place = {
            weight.name: slice(end - weight.bytes, end)
            for weight, end in zip(chunk, ends, strict=True)
        }
        for name, weight in compute_weights(module, frozenset(place)):
            self.buffer[place[name]].copy_(weight.contiguous().view(torch.uint8).view(-1))
        torch.cuda.synchronize()
