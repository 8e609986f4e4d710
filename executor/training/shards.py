"""The part of a checkpoint that a rank writes and reads: safetensors of its shards, and a table of
which rows of which tensor lie in which file. Nothing here unpickles. Any rank of any layout reads
the rows that it needs."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from pydantic import NonNegativeInt
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from executor.training import loading
from planner.spec.errors import UserError
from planner.spec.files import Spec

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


class Piece(Spec):
    """Rows `[begin, end)` of a tensor, in a file of the checkpoint."""

    file: str
    begin: NonNegativeInt
    end: NonNegativeInt


class Stored(Spec):
    """A parameter: its full shape and where its rows are. `moments`: the optimizer's moments lie
    next to them."""

    shape: tuple[NonNegativeInt, ...]
    moments: bool
    pieces: tuple[Piece, ...]


class FileEntry(Spec):
    bytes: NonNegativeInt
    sha256: str


class RoleState(Spec):
    """A role that trains: updates in its weights, steps of its optimizer, and its parameters by
    name."""

    version: NonNegativeInt
    optimizer_steps: NonNegativeInt
    tensors: dict[str, Stored]


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint, with the parts that a trainer needs."""

    directory: Path
    roles: dict[str, RoleState]


@dataclass(frozen=True, kw_only=True)
class Copied:
    """A rank's part of a role in host memory, by the names in its file."""

    state: RoleState
    file: str
    tensors: dict[str, Tensor]


def give_moments(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Give an optimizer from the start the state that AdamW makes in its first step. So the warm-up
    already uses the memory of a step, and no moment lies between activations."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # The fused kernels want the count of steps on the device.
            moments = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
            optimizer.state[parameter] = {"step": torch.zeros((), device=device), **moments}


def copy(
    role: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    version: int,
    rank: int,
    peek: Callable[[Tensor], Tensor] | None = None,
) -> Copied | None:
    """A rank's shards of a model and of its moments, copied off the device; None on replicas, which
    hold the same. `peek` finds the data of tensors that are parked on the host: an engine may have
    taken their place on the device."""
    peek = peek or _local
    tensors: dict[str, Tensor] = {}
    stored: dict[str, Stored] = {}
    steps, file = 0, f"{role}-{rank:05d}.safetensors"
    for names, parameter in loading.parameters(model):
        if not _is_first_replica(parameter):
            return None
        shard = peek(parameter)
        if not shard.numel():
            continue
        state = optimizer.state.get(parameter, {})
        parts = {"weights": shard, **{name: peek(state[name]) for name in MOMENTS if name in state}}
        for part, tensor in parts.items():
            tensors[f"{part}/{names[0]}"] = tensor.to("cpu", copy=True).contiguous()
        steps = max(steps, int(state.get("step", 0)))
        begin = loading.first_row(parameter)
        piece = Piece(file=file, begin=begin, end=begin + len(shard))
        stored[names[0]] = Stored(
            shape=tuple(parameter.shape), moments=bool(state), pieces=(piece,)
        )
    return Copied(
        state=RoleState(version=version, optimizer_steps=steps, tensors=stored),
        file=file,
        tensors=tensors,
    )


def _is_first_replica(parameter: Tensor) -> bool:
    if not isinstance(parameter, DTensor) or parameter.device_mesh.ndim == 1:
        return True
    here = parameter.device_mesh.get_coordinate()
    return here is not None and here[0] == 0


def _local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


class Writer:
    """Writes a rank's copies in a thread. `finished` says how that ended."""

    def __init__(self, copies: dict[str, Copied], directory: Path) -> None:
        self._roles = {role: copied.state for role, copied in copies.items()}
        self._copies, self._directory = list(copies.values()), directory
        self._files: dict[str, FileEntry] = {}
        self._error: Exception | None = None
        self._thread = Thread(target=self._write, daemon=True)
        self._thread.start()

    def _write(self) -> None:
        try:
            while self._copies:
                copied = self._copies.pop()  # its memory goes with it
                path = self._directory / copied.file
                save_file(copied.tensors, path)
                self._files[copied.file] = entry_of(path)
        except Exception as error:
            self._error = error

    def finished(self) -> tuple[dict[str, RoleState], dict[str, FileEntry]] | None:
        """None while it writes; then roles and files, each time it is asked, for other ranks may
        still write. Raises what writing raised."""
        if self._thread.is_alive():
            return None
        if self._error is not None:
            raise self._error
        return self._roles, self._files


def entry_of(path: Path) -> FileEntry:
    """Size and hash of a file that is now on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(bytes=path.stat().st_size, sha256=digest)


def merge(parts: list[RoleState]) -> RoleState:
    """Put a role together from the parts that its ranks have written."""
    tensors: dict[str, Stored] = {}
    for part in parts:
        for name, stored in part.tensors.items():
            pieces = (*tensors[name].pieces, *stored.pieces) if name in tensors else stored.pieces
            tensors[name] = stored.changed(pieces=pieces)
    return parts[0].changed(tensors=tensors)


# --- back ---


class Restored:
    """A role's weights as a `loading.Source`, and its moments."""

    def __init__(self, role: str, saved: Saved) -> None:
        self._role, self._directory, self.state = role, saved.directory, saved.roles[role]
        self._open: dict[str, Any] = {}

    def rows(
        self, names: list[str], shape: torch.Size, begin: int, end: int, device: torch.device
    ) -> Tensor:
        return self._read("weights", names, shape, begin, end).to(device)

    def _stored(self, names: list[str], shape: torch.Size) -> tuple[str, Stored]:
        name = next((name for name in names if name in self.state.tensors), None)
        if name is None or self.state.tensors[name].shape != tuple(shape):
            raise self._error(
                f"has no {names[0]} of shape {list(shape)}; resume the model that it is of"
            )
        return name, self.state.tensors[name]

    def _read(self, part: str, names: list[str], shape: torch.Size, begin: int, end: int) -> Tensor:
        """Rows `[begin, end)` of a tensor, out of the pieces that hold them."""
        name, stored = self._stored(names, shape)
        found = torch.empty((end - begin, *shape[1:]))
        done = 0
        for piece in stored.pieces:
            first, last = max(begin, piece.begin), min(end, piece.end)
            if first < last:
                try:
                    rows = self._file(piece.file).get_slice(f"{part}/{name}")[
                        first - piece.begin : last - piece.begin
                    ]
                except (SafetensorError, OSError) as error:
                    raise self._error(f"{piece.file} cannot be read ({error})") from None
                found[first - begin : last - begin] = rows
                done += last - first
        if done != end - begin:
            raise self._error(f"holds {done} of rows {begin} to {end} of {name}")
        return found

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self._directory / name, framework="pt")
        return self._open[name]

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Fill an optimizer's moments with those that the ranks had, for this rank's shards of a
        model that is filled."""
        for names, parameter in loading.parameters(model):
            if not self._stored(names, parameter.shape)[1].moments:
                continue
            state = optimizer.state[parameter]
            state["step"].fill_(self.state.optimizer_steps)
            shard, begin = _local(parameter), loading.first_row(parameter)
            for moment in MOMENTS if len(shard) else ():
                rows = self._read(moment, names, parameter.shape, begin, begin + len(shard))
                _local(state[moment]).copy_(rows)

    def _error(self, what: str) -> UserError:
        return UserError(f"checkpoint {self._directory}, {self._role}: {what}")
