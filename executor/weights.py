"""Weights from the sharded actor to the rollout engines, and whole states out of shards."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Arrays = dict[str, NDArray[np.float32]]


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
