"""The parts of a model and its optimizer that ranks save, and what other ranks read of them."""

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from executor.training import shards
from executor.training.offload import Parking
from planner.spec.errors import UserError


def test_rows_are_read_from_the_pieces_that_hold_them(tmp_path: Path) -> None:
    """Three ranks wrote; any other number of them reads, moments too."""
    whole = torch.arange(21.0).view(7, 3)
    parts = []
    for rank, (begin, end) in enumerate([(0, 3), (3, 6), (6, 7)]):
        file = f"actor-{rank}.safetensors"
        save_file({"weights/w": whole[begin:end].contiguous()}, tmp_path / file)
        stored = shards.Stored(
            shape=(7, 3), moments=False, pieces=(shards.Piece(file=file, begin=begin, end=end),)
        )
        parts.append(shards.RoleState(version=5, optimizer_steps=9, tensors={"w": stored}))
    saved = shards.Saved(directory=tmp_path, roles={"actor": shards.merge(parts)})
    restored = shards.Restored("actor", saved)
    for begin, end in [(0, 7), (0, 4), (4, 7), (2, 3), (5, 7)]:
        rows = restored.rows(["tied", "w"], torch.Size([7, 3]), begin, end, torch.device("cpu"))
        assert torch.equal(rows, whole[begin:end])
    with pytest.raises(UserError, match=r"no w of shape \[8, 3\]"):
        restored.rows(["w"], torch.Size([8, 3]), 0, 1, torch.device("cpu"))


def test_a_rank_that_is_done_first_tells_its_part_until_all_are(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 5)
    copied = shards.copy("actor", model, torch.optim.AdamW(model.parameters()), 1, 0)
    assert copied is not None
    writer = shards.Writer({"actor": copied}, tmp_path)
    while (first := writer.finished()) is None:
        time.sleep(0.01)
    assert (
        writer.finished() == first and set(first[0]) == {"actor"} and set(first[1]) == {copied.file}
    )


def test_moments_that_are_given_are_those_that_adam_makes() -> None:
    models = [torch.nn.Linear(3, 5), torch.nn.Linear(3, 5)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1, fused=True) for model in models]
    shards.give_moments(optimizers[1], torch.device("cpu"))
    assert not optimizers[0].state and len(optimizers[1].state) == 2
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            model(torch.arange(3.0) - step).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    copies = [shards.copy("actor", *pair, 1, 0) for pair in zip(models, optimizers, strict=True)]
    assert copies[0] is not None and copies[1] is not None and copies[0].state == copies[1].state
    assert all(
        torch.equal(copies[1].tensors[name], tensor) for name, tensor in copies[0].tensors.items()
    )


def test_what_is_parked_on_the_host_is_saved_from_there() -> None:
    model = torch.nn.Linear(3, 5)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    straight = shards.copy("actor", model, optimizer, 1, 0)
    weights, moments = Parking(), Parking()
    weights.park(model.parameters())
    moments.park(x for state in optimizer.state.values() for x in state.values() if x.dim())
    parked = shards.copy(
        "actor", model, optimizer, 1, 0, lambda tensor: moments.peek(weights.peek(tensor))
    )
    assert straight is not None and parked is not None and straight.state == parked.state
    assert len(parked.tensors) == 6
    assert all(
        torch.equal(parked.tensors[name], tensor) for name, tensor in straight.tensors.items()
    )
