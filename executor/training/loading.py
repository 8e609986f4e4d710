"""The sources of a model's weights: a Hugging Face directory, read by slice, or a random draw for
each parameter.

A model is built without weights (on the meta device), sharded, and then filled. So a rank holds its
shards and, while they are filled, one whole parameter (of random weights) or the slices of one (of
weights that are read).
"""

import hashlib
import re
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
from planner.spec.wording import reason_of

if TYPE_CHECKING:  # it is slow to load
    from transformers import PreTrainedModel

# The names of a scalar head: in transformers, in OpenRLHF and in TRL.
HEADS = ("score", "classifier", "value_head", "v_head.summary", "v_head")
OUTPUTS = ("lm_head", "embed_out")  # of the head that gives logits
SCALAR = ("ForTokenClassification", "ForSequenceClassification")
FLOATS = ("F64", "F32", "F16", "BF16")
BUFFER = re.compile(r"(^|\.)(inv_freq|masked_bias|attention\.bias|attn\.bias)$")
SAMPLE = 64  # first and last rows by which two tensors are told apart
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
    them with or without it, and call a head by another of its names. A critic's head starts at zero
    where the files have none. Files are opened when first needed, and only slices are read.

    Raises UserError, here and later, for what is missing, broken or of another shape."""

    def __init__(self, role: str, directory: Path, prefix: str) -> None:
        self.role, self.directory, self._prefix = role, directory, f"{prefix}."
        self._open: dict[str, Any] = {}
        self._file_of = self._files()
        self._bare = role == "critic" and not self._classifies()

    def _classifies(self) -> bool:
        """Whether the directory is of a kind of model that has a scalar head."""
        names = read_data(self.directory / "config.json").get("architectures") or []
        return any(str(name).endswith(SCALAR) for name in names)

    def _files(self) -> dict[str, str]:
        """The name of the file of each tensor."""
        if (self.directory / SINGLE).is_file():  # an index next to it would be of older files
            return dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
        if (self.directory / INDEX).is_file():
            found = read_data(self.directory / INDEX).get("weight_map")
            if not isinstance(found, dict) or not all(
                isinstance(name, str) for name in found.values()
            ):
                raise self._error(f"{INDEX} has no weight_map", "save the model anew")
            return found
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

    def check(self, model: "PreTrainedModel") -> None:
        """Check that all parameters are there, in their shapes and as numbers of a known kind, and
        that nothing else is: what has no place may be a scale or a layer that is meant to count."""
        known: set[str] = set()
        for names, parameter in parameters(model):
            known.update(self._spellings(names))
            if not self._is_zero(names):
                self._check(names, parameter.shape)
        others = sorted(name for name in self._file_of if name not in known | self._idle(name))
        if others:
            more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
            raise self._error(
                f"{others[0]}{more} has no place in the model", "check that it is this model"
            )

    def _check(self, names: list[str], shape: torch.Size) -> None:
        stored = self._slice(names, shape)[1]
        kind = stored.get_dtype()
        if kind not in FLOATS:
            raise self._error(
                f"{names[0]} is stored as {kind}", "use a checkpoint that is not quantised"
            )
        sample = _sample(stored)
        if not sample.isfinite().all():
            raise self._error(
                f"{names[0]} has values that are not finite", "use another checkpoint of it"
            )
        for name in names[1:]:  # of a tied parameter there may be several
            if self._is_there(name):
                other = self._slice([name], shape)[1]
                if not torch.equal(sample, _sample(other)):
                    raise self._error(
                        f"{names[0]} and {name} differ, and config.json says that they are one",
                        "set tie_word_embeddings to false there",
                    )

    def _idle(self, name: str) -> set[str]:
        """The name, if it is of something that this role's model can do without: a head of the
        other kind, or a buffer that is computed."""
        module = name.removeprefix(self._prefix).rpartition(".")[0]
        others = OUTPUTS if self.role in ("critic", "reward") else HEADS
        return {name} if module in others or BUFFER.search(name) else set()

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
        """Whether a parameter starts at zero: a critic's head, or the bias of one, that no file
        has."""
        module, _, part = names[0].rpartition(".")
        may = self.role == "critic" and module in HEADS and (self._bare or part == "bias")
        return may and not self._is_there(names[0])

    def _is_there(self, name: str) -> bool:
        return any(spelling in self._file_of for spelling in self._spellings([name]))

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
        for name in self._spellings(names):
            if name in self._file_of:
                return self._file_of[name], name
        raise self._error(f"{names[0]} is missing", "check that it is a whole model of this kind")

    def _spellings(self, names: list[str]) -> Iterator[str]:
        """What files may call a parameter."""
        for name in names:
            yield from (name, name.removeprefix(self._prefix), self._prefix + name)
            module, _, part = name.rpartition(".")
            for heads in (HEADS, OUTPUTS):
                if module in heads:
                    yield from (f"{other}.{part}" for other in heads)

    def _broken(self, file: str, error: Exception) -> UserError:
        return self._error(f"{file} cannot be read ({reason_of(error)})", "copy it again")

    def _error(self, what: str, do: str) -> UserError:
        return UserError(f"{self.role}: weights in {self.directory}: {what}; {do}")


def _sample(stored: Any) -> Tensor:
    """The first and the last rows of a stored tensor."""
    last = max(SAMPLE, stored.get_shape()[0] - SAMPLE)
    return torch.cat([stored[:SAMPLE], stored[last:]])


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
