"""The sources of a model's weights: a Hugging Face directory, read by slice, or a random draw for
each parameter.

A model is built without weights (on the meta device), sharded, and then filled. So a rank holds its
shards and, while they are filled, one whole parameter (of random weights) or the slices of one (of
weights that are read).
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard

from planner.spec.errors import UserError
from planner.spec.files import read_data

if TYPE_CHECKING:  # it is slow to load
    from transformers import PreTrainedModel

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class Source(Protocol):
    """Weights by name. A tied parameter has several names, of which a source may know any."""

    def rows(
        self, names: list[str], shape: torch.Size, begin: int, end: int, device: torch.device
    ) -> Tensor:
        """Rows `[begin, end)` of the first dimension of a parameter whose full shape is `shape`."""
        ...


class RandomWeights:
    """Normal weights, norms of one and biases of zero. The modules in `zeros` start at zero.

    The seed, the kind of model (`what`) and the parameter's name fix a draw. So it depends neither
    on shards nor on other draws. On another kind of device it is another draw.
    """

    def __init__(self, seed: int, what: str, deviation: float, zeros: tuple[str, ...] = ()) -> None:
        self._key, self._deviation, self._zeros = f"{seed} {what}", deviation, zeros

    def rows(
        self, names: list[str], shape: torch.Size, begin: int, end: int, device: torch.device
    ) -> Tensor:
        name = names[0]
        if name.endswith("norm.weight"):
            return torch.ones(shape, device=device)[begin:end]
        if name.endswith(".bias") or name.startswith(self._zeros):
            return torch.zeros(shape, device=device)[begin:end]
        key = int.from_bytes(
            hashlib.sha256(f"{self._key} {name}".encode()).digest()[:8], "little", signed=True
        )
        generator = torch.Generator(device).manual_seed(key)
        return torch.empty(shape, device=device).normal_(0.0, self._deviation, generator=generator)[
            begin:end
        ]


class StoredWeights:
    """The safetensors of a Hugging Face directory: one file, or several and their index. `prefix`
    is what the names of a base model's parameters begin with in a model with a head; files may have
    them with or without it. `zeros` are the modules that start at zero whatever the files hold.
    Files are opened when first needed, and only slices are read.

    Raises UserError, here and later, for what is missing, broken or of another shape."""

    def __init__(
        self, role: str, directory: Path, prefix: str, zeros: tuple[str, ...] = ()
    ) -> None:
        self.role, self.directory, self._prefix, self._zeros = role, directory, f"{prefix}.", zeros
        self._open: dict[str, Any] = {}
        self._file_of = self._files()

    def _files(self) -> dict[str, str]:
        """The name of the file of each tensor."""
        if (self.directory / INDEX).is_file():
            found = read_data(self.directory / INDEX).get("weight_map")
            if not isinstance(found, dict) or not all(
                isinstance(name, str) for name in found.values()
            ):
                raise self._error(f"{INDEX} has no weight_map", "save the model anew")
            return found
        if (self.directory / SINGLE).is_file():
            return dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
        raise self._error(
            f"there is neither {SINGLE} nor {INDEX}", "save the model with save_pretrained"
        )

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self.directory / name
            if Path(name).name != name or not path.is_file():
                raise self._error(
                    f"{INDEX} names {name!r}, which is not there", "copy the directory again"
                )
            try:
                self._open[name] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise self._broken(name, error) from None
        return self._open[name]

    def check(self, names: list[str], shape: torch.Size) -> None:
        """Check that a parameter is there, in this shape."""
        if not self._is_zero(names):
            self._slice(names, shape)

    def rows(
        self, names: list[str], shape: torch.Size, begin: int, end: int, device: torch.device
    ) -> Tensor:
        if self._is_zero(names):
            return torch.zeros((end - begin, *shape[1:]), device=device)
        name, stored = self._slice(names, shape)
        try:
            read: Tensor = stored[begin:end]
        except (SafetensorError, OSError) as error:
            raise self._broken(name, error) from None
        return read.to(device)

    def _is_zero(self, names: list[str]) -> bool:
        return any(name.startswith(module) for name in names for module in self._zeros)

    def _slice(self, names: list[str], shape: torch.Size) -> tuple[str, Any]:
        file, name = self._find(names)
        try:
            stored = self._file(file).get_slice(name)
        except SafetensorError as error:
            raise self._broken(file, error) from None
        found = list(stored.get_shape())
        if found != list(shape):
            raise self._error(
                f"{name} has shape {found}, the model wants {list(shape)}",
                "check that it is this model",
            )
        return file, stored

    def _find(self, names: list[str]) -> tuple[str, str]:
        """The file that holds a parameter, and the name there."""
        for name in names:
            for stored in (name, name.removeprefix(self._prefix), self._prefix + name):
                if stored in self._file_of:
                    return self._file_of[stored], stored
        raise self._error(f"{names[0]} is missing", "check that it is a whole model of this kind")

    def _broken(self, file: str, error: Exception) -> UserError:
        return self._error(
            f"{file} cannot be read ({' '.join(str(error).split())[:200]})", "copy it again"
        )

    def _error(self, what: str, do: str) -> UserError:
        return UserError(f"{self.role}: weights in {self.directory}: {what}; {do}")


def parameters(model: nn.Module) -> Iterator[tuple[list[str], nn.Parameter]]:
    """Each parameter once, with all of its names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for parameter in model.parameters():
        yield names[id(parameter)], parameter


@torch.no_grad()
def fill(root: nn.Module, model: "PreTrainedModel", source: Source, device: torch.device) -> None:
    """Give a model on the meta device its weights on `device`: all of them, or this rank's where
    the model is sharded.

    `root` is the module that was sharded, `model` the part of it whose names the source knows.
    Buffers, which have their values already, go to the device too.
    """
    buffers = {name: buffer.cpu() for name, buffer in root.named_buffers()}
    root.to_empty(device=device)
    model.tie_weights()  # of plain parameters new ones were made
    for name, buffer in root.named_buffers():
        buffer.copy_(buffers[name])
    for names, parameter in parameters(model):
        local, begin = (
            parameter.to_local() if isinstance(parameter, DTensor) else parameter,
            first_row(parameter),
        )
        if local.numel():
            local.copy_(source.rows(names, parameter.shape, begin, begin + len(local), device))


def first_row(parameter: Tensor) -> int:
    """The first row of this rank's shard. fully_shard cuts the first dimension as torch.chunk does:
    every shard but the last ones has the rows that are left over."""
    if not isinstance(parameter, DTensor):
        return 0
    mesh, rows, begin = parameter.device_mesh, parameter.shape[0], 0
    here = mesh.get_coordinate()
    assert here is not None, "this rank is not in the mesh"
    for dimension, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            assert placement.dim == 0, "shards of another dimension than the first"
            begin = min(rows, -(-rows // mesh.size(dimension)) * here[dimension])
    return begin
