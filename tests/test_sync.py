"""Which way the weights take to an engine, and that all of them arrive there."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist
from conftest import colocated, make_plan, make_workload
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from executor.fleet import pools
from executor.fleet.asking import Rank, ask, to_each
from executor.fleet.worker import Died, Worker
from executor.running.weight_sync import WeightSync, channels
from executor.training import models, residual, weights
from planner.spec.cluster import make_cluster
from planner.spec.workload import Model, Shape

ray.cloudpickle.register_pickle_by_value(
    sys.modules[__name__]
)  # Ray's processes cannot import tests
WORKLOAD = make_workload()


VLLM: dict[str, Any] = {"rollout": {"engine": "vllm"}}
GPUS: dict[str, Any] = {"layouts": VLLM, "cluster": make_cluster(4, "h200", 4)}


def test_an_engine_beside_the_actor_reads_its_memory() -> None:
    assert channels(colocated(WORKLOAD, **GPUS), [((0, 0),), ((0, 1),)]) == ["ipc", "ipc"]
    assert channels(colocated(WORKLOAD, **GPUS), [((0, 0), (0, 1))]) == ["ipc"]


def test_an_engine_elsewhere_gets_them_over_nccl() -> None:
    home = {"actor": "a", "reference": "a", "critic": "b", "reward": "b", "rollout": ["a", "b"]}
    spanning = make_plan(WORKLOAD, {"a": 1, "b": 2}, home, **GPUS)
    assert channels(spanning, [((0, 0),), ((0, 1), (0, 2))]) == ["ipc", "nccl"]
    layouts = {**VLLM, "actor": {"shard": 1}}
    idle = colocated(
        WORKLOAD, **{**GPUS, "layouts": layouts}
    )  # the second GPU has no rank of the actor
    assert channels(idle, [((0, 0),), ((0, 1),)]) == ["ipc", "nccl"]
    assert channels(idle, [((0, 0), (0, 1))]) == ["nccl"]


def test_engines_on_cores_or_on_transformers_get_them_from_the_object_store() -> None:
    on_cores = colocated(WORKLOAD, layouts=VLLM)
    on_transformers = colocated(WORKLOAD, cluster=GPUS["cluster"])
    for plan in (on_cores, on_transformers):
        assert channels(plan, [((0, 0),), ((0, 1),)]) == ["store", "store"]


class Noting(Worker):
    """A process that notes what it is asked, as an actor's rank or as an engine."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[tuple[Any, ...]] = []

    def describe_weights(self) -> list[weights.Described]:
        return [weights.Described(name="w", shape=(2,))]

    def rendezvous(self) -> tuple[str, int]:
        return "here", 1

    def open_window(self, chunks: list[list[weights.Described]]) -> dict[str, str]:
        return {"gpu": "handle"}

    def lead_group(self, host: str, port: int, world: int) -> None:
        self.notes.append(("lead", world))

    def join_group(self, host: str, port: int, world: int, rank: int) -> None:
        self.notes.append(("join", world, rank))

    def send_weights(self, version: int) -> None:
        self.notes.append(("send", version))

    def receive_weights(self, version: int, described: list[weights.Described]) -> None:
        self.notes.append(("receive", version, *(weight.name for weight in described)))

    def begin_sending(self, version: int) -> None:
        self.notes.append(("begin sending", version))

    def begin_receiving(self, version: int) -> None:
        self.notes.append(("begin receiving", version))

    def fill_window(self, chunk: list[weights.Described]) -> None:
        self.notes.append(("fill", len(chunk)))

    def read_window(self, chunk: list[weights.Described], handles: dict[str, str]) -> None:
        self.notes.append(("read", len(chunk), *handles.values()))

    def end_sending(self) -> None:
        self.notes.append(("end sending",))

    def end_receiving(self) -> None:
        self.notes.append(("end receiving",))

    def noted(self) -> list[tuple[Any, ...]]:
        found, self.notes = self.notes, []
        return found


def test_an_engine_that_died_is_replaced_in_the_group_and_gets_the_weights_again(
    ray_two: None,
) -> None:
    home = {"actor": "a", "reference": "a", "critic": "b", "reward": "b", "rollout": ["a", "b"]}
    plan = make_plan(WORKLOAD, {"a": 1, "b": 2}, home)
    ranks = [
        replace(pools.start(Noting), name=name)
        for name in ("actor", "beside", "lost", "left", "fresh")
    ]
    actor, beside, lost, left, fresh = pools.connect(ranks)

    def noted(*those: Rank[Noting]) -> list[Any]:
        return ask(to_each(those, Noting.noted)).results

    sent = [("send", 5), ("begin sending", 5), ("fill", 1), ("end sending",)]
    read = [("begin receiving", 5), ("read", 1, "handle"), ("end receiving",)]
    try:
        sync = WeightSync(plan, [actor], [beside, lost, left], ["ipc", "nccl", "nccl"])
        sync(5)
        pools.stop([lost])
        assert noted(actor, beside, left) == [
            [("lead", 3), *sent],
            read,
            [("join", 3, 2), ("receive", 5, "w")],
        ]
        with pytest.raises(Died):
            while True:  # it may end a moment later
                noted(lost)
        with pytest.raises(Died):
            sync(5)
        noted(actor, beside, left)
        sync(5, absent=frozenset({1}))  # while it is started again
        assert noted(actor, beside, left) == [
            [("lead", 2), *sent],
            read,
            [("join", 2, 1), ("receive", 5, "w")],
        ]
        sync.replace(1, fresh)
        sync(5)
        assert noted(actor, beside, fresh, left) == [
            [("lead", 3), *sent],
            read,
            *([("join", 3, n), ("receive", 5, "w")] for n in (1, 2)),
        ]
        sync.replace(0, fresh)  # no group to form for one that reads the actor's memory
        assert noted(actor, left) == [[], []]
    finally:
        pools.stop([actor, beside, left, fresh])


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(model: nn.Module) -> nn.Module:
    module = models.wrap("actor", model, 1.0)
    mesh = DeviceMesh("cpu", torch.arange(1), mesh_dim_names=("shard",))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for block in residual.blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    return module


@pytest.mark.parametrize(("tied", "gathered"), [(True, False), (True, True), (False, True)])
def test_compute_weights_are_all_parameters_in_bfloat16(
    one_rank: None, monkeypatch: pytest.MonkeyPatch, tied: bool, gathered: bool
) -> None:
    if gathered:  # as if there were shards on other ranks
        monkeypatch.setattr(weights, "_whole_here", lambda parameter: None)
    shape = Shape(
        hidden=32, layers=2, heads=4, kv_heads=2, intermediate=60, vocab=47, tied_embeddings=tied
    )
    model = models.load("actor", Model(shape=shape, random_weights=True), 0, torch.float32)
    expected = {name: p.detach().to(torch.bfloat16) for name, p in model.named_parameters()}
    module = shard(model)
    for _ in range(2):  # the second time after FSDP has been through a gathering
        found = list(weights.compute_weights(module))
        described = weights.describe(module)
        assert [d.name for d in described] == [name for name, _ in found]
        assert {name: w.shape for name, w in found} == {
            d.name: torch.Size(d.shape) for d in described
        }
        assert dict(found).keys() == expected.keys()
        assert all(
            torch.equal(w, expected[name]) and w.dtype == torch.bfloat16 for name, w in found
        )
        assert [d.bytes for d in described] == [w.nbytes for _, w in found]
    wanted = frozenset({described[0].name, described[-1].name})
    assert {name for name, _ in weights.compute_weights(module, wanted)} == wanted


def test_chunks_keep_the_order_and_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SYNC_BYTES", 100)
    sizes = [10, 40, 20, 30, 1]
    described = [weights.Described(name=str(i), shape=(size,)) for i, size in enumerate(sizes)]
    chunks = weights.in_chunks(described)
    assert [d.name for chunk in chunks for d in chunk] == ["0", "1", "2", "3", "4"]
    assert [sum(d.bytes for d in chunk) for chunk in chunks] == [100, 100, 2]
    alone = weights.in_chunks([weights.Described(name="large", shape=(80,)), *described[:1]])
    assert [len(chunk) for chunk in alone] == [1, 1]  # a large one is a chunk of its own
