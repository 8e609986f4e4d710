"""Which way the weights take to an engine, and that all of them arrive there."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from conftest import colocated, make_plan, make_workload
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from executor import models, weights
from executor.sync import channels
from planner.spec.workload import Model, Shape

WORKLOAD = make_workload()


def test_an_engine_beside_the_actor_reads_its_memory() -> None:
    assert channels(colocated(WORKLOAD), [((0, 0),), ((0, 1),)]) == ["ipc", "ipc"]
    assert channels(colocated(WORKLOAD), [((0, 0), (0, 1))]) == ["ipc"]


def test_an_engine_elsewhere_gets_them_over_nccl() -> None:
    home = {"actor": "a", "reference": "a", "critic": "b", "reward": "b", "rollout": ["a", "b"]}
    spanning = make_plan(WORKLOAD, {"a": 1, "b": 2}, home)
    assert channels(spanning, [((0, 0),), ((0, 1), (0, 2))]) == ["ipc", "nccl"]
    idle = colocated(WORKLOAD, layouts={"actor": {"shard": 1}})  # the second GPU has no rank of the actor
    assert channels(idle, [((0, 0),), ((0, 1),)]) == ["ipc", "nccl"]
    assert channels(idle, [((0, 0), (0, 1))]) == ["nccl"]


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(model: nn.Module) -> nn.Module:
    module = models.wrap("actor", model, 1.0)
    mesh = DeviceMesh("cpu", torch.arange(1), mesh_dim_names=("shard",))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for block in models.blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    return module


@pytest.mark.parametrize(("tied", "gathered"), [(True, False), (True, True), (False, True)])
def test_compute_weights_are_all_parameters_in_bfloat16(
    one_rank: None, monkeypatch: pytest.MonkeyPatch, tied: bool, gathered: bool
) -> None:
    if gathered:  # as if there were shards on other ranks
        monkeypatch.setattr(weights, "_whole_here", lambda parameter: None)
    shape = Shape(hidden=32, layers=2, heads=4, kv_heads=2, intermediate=60, vocab=47, tied_embeddings=tied)
    model = models.load("actor", Model(shape=shape, random_weights=True), 0, torch.float32)
    expected = {name: p.detach().to(torch.bfloat16) for name, p in model.named_parameters()}
    module = shard(model)
    for _ in range(2):  # the second time after FSDP has been through a gathering
        found = list(weights.compute_weights(module))
        described = weights.describe(module)
        assert [d.name for d in described] == [name for name, _ in found]
        assert {name: w.shape for name, w in found} == {d.name: torch.Size(d.shape) for d in described}
        assert dict(found).keys() == expected.keys()
        assert all(torch.equal(w, expected[name]) and w.dtype == torch.bfloat16 for name, w in found)
        assert [d.bytes for d in described] == [w.nbytes for _, w in found]
    wanted = frozenset({described[0].name, described[-1].name})
    assert {name for name, _ in weights.compute_weights(module, wanted)} == wanted


def test_chunks_keep_the_order_and_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "CHUNK_BYTES", 100)
    sizes = [10, 40, 20, 30, 1]
    described = [weights.Described(name=str(i), shape=(size,)) for i, size in enumerate(sizes)]
    chunks = weights.in_chunks(described)
    assert [d.name for chunk in chunks for d in chunk] == ["0", "1", "2", "3", "4"]
    assert [sum(d.bytes for d in chunk) for chunk in chunks] == [100, 100, 2]
    alone = weights.in_chunks([weights.Described(name="large", shape=(80,)), *described[:1]])
    assert [len(chunk) for chunk in alone] == [1, 1]  # a large one is a chunk of its own
