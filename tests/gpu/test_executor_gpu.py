"""On GPUs: packed attention and log-probs against an exact reference, and PPO steps of a small
model with vLLM through every way that weights take. `python -m pytest -m gpu tests/gpu` on a host
with two GPUs."""

import os
import signal
from typing import Any

import numpy as np
import pytest
import ray
import torch
from conftest import ROLES, SERIAL, make_plan, make_workload
from ray.exceptions import RayActorError
from recording import Recording

from executor.data.batch import Sequences
from executor.running.step_data import Done
from executor.training import models, residual
from executor.training.packing import pack
from planner.predict.schedule import Task
from planner.spec.cluster import make_cluster
from planner.spec.lengths import sample
from planner.spec.plan import Plan
from planner.spec.workload import Workload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
SHAPE = {
    "hidden": 256,
    "layers": 4,
    "heads": 4,
    "kv_heads": 2,
    "intermediate": 512,
    "vocab": 1024,
    "head_dim": 64,
}
HOME = {"actor": "a", "reference": "a", "critic": "b", "reward": "b"}


def small_workload(actor_lr: float = 1e-4, **more: Any) -> Workload:
    model = {"shape": SHAPE, "random_weights": True}
    roles = {role: model for role in ROLES if role != "rollout"}
    response = {"kind": "lognormal", "mean": 32, "sigma": 0.5, "max": 64}
    return make_workload(
        **roles,
        batch=32,
        minibatch=16,
        response=response,
        optimizer={"actor": {"lr": actor_lr}},
        **more,
    )


def plan_of(name: str) -> Plan:
    workload = small_workload(actor_lr=1e-9 if name == "asleep_ahead" else 1e-4)
    if name.startswith("stream"):
        kv = name.removeprefix("stream_")
        workload = small_workload(actor_lr=1e-9, sync="in_flight", kv=kv, max_staleness=2)
    layouts: dict[str, dict[str, Any]] = {
        role: {"micro_batch_tokens": 1024, "shard": 1} for role in ROLES
    }
    layouts["rollout"] = {
        "engine": "vllm",
        "replicas": 2,
        "memory_fraction": 0.2,
        "concurrency": 16,
    }
    pools, roles = {"a": 1, "b": 1}, {**HOME, "rollout": ["a", "b"]}
    more: dict[str, Any] = {}
    if name.startswith("asleep"):  # CUDA IPC and sleep, sharded actor, everything offloaded
        pools, roles = {"all": 2}, dict.fromkeys(ROLES, "all")
        layouts |= {
            role: {"shard": 2, "micro_batch_tokens": 1024, "offload": "all"}
            for role in ("actor", "critic")
        }
        layouts["rollout"] |= {"offload": True}
        more = (
            {"offsets": {"generate": 1}, "staleness": 1}
            if name == "asleep_ahead"
            else {"blocking": True}
        )
    elif name == "tensor_parallel":
        pools, roles = {"all": 2}, dict.fromkeys(ROLES, "all")
        layouts["actor"] = {
            "shard": 1,
            "replicas": 2,
            "micro_batch_tokens": 1024,
            "recompute": True,
        }
        layouts["rollout"] |= {"replicas": 1, "tensor_parallel": 2}
    elif (
        name == "four_gpus"
    ):  # FSDP within pairs of GPUs that are replicas of each other, one engine over all
        pools, roles = {"all": 4}, dict.fromkeys(ROLES, "all")
        layouts |= {
            role: {"shard": 2, "replicas": 2, "micro_batch_tokens": 1024}
            for role in ("actor", "critic")
        }
        layouts["rollout"] |= {"replicas": 1, "tensor_parallel": 4}
    elif name == "one_step_off":  # NCCL alone
        roles |= {"rollout": "b", "critic": "a", "reward": "a"}
        layouts["rollout"] |= {"replicas": 1}
        more = {"offsets": {"generate": 1}, "staleness": 1}
    elif name.startswith("stream"):  # NCCL alone, while sequences are made
        roles |= {"rollout": "b", "critic": "a", "reward": "a"}
        layouts["rollout"] |= {"replicas": 1}
        more = {"offsets": {"generate": 2}, "staleness": 2, "sync": "in_flight"}
    cluster = make_cluster(sum(pools.values()), "h200", 8)
    return make_plan(
        workload, pools, roles, order=SERIAL, layouts=layouts, cluster=cluster, name=name, **more
    )


@pytest.fixture(scope="module")
def ray_gpus() -> Any:
    from executor.fleet.session import ray_session

    with ray_session(cpus=None, address=None):
        yield


@pytest.mark.parametrize(
    "name", ["spanning", "asleep", "asleep_ahead", "tensor_parallel", "one_step_off", "four_gpus"]
)
def test_engines_sample_from_what_the_trainers_see(ray_gpus: None, name: str) -> None:
    plan = plan_of(name)
    if (count := len(plan.cluster.gpus)) > torch.cuda.device_count():
        pytest.skip(f"needs {count} GPUs")
    backend = Recording(plan)
    backend.take(3)
    for number, metrics in enumerate(backend.metrics):
        assert metrics["weights_version"] == max(0, number - plan.staleness)
        assert metrics["actor/grad_norm"] > 0
        if (
            number == 0 or plan.staleness == 0 or name == "asleep_ahead"
        ):  # else the weights differ on purpose
            assert backend.differences[number].mean() < 0.02


@pytest.mark.parametrize("kv", ["keep", "recompute"])
def test_weights_reach_a_stream_over_nccl(ray_gpus: None, kv: str) -> None:
    """Nothing is learned, so all versions give the same log-probs."""
    backend = Recording(plan_of(f"stream_{kv}"))
    backend.take(6)
    sampled = np.cumsum([metrics["step_sampled_tokens"] for metrics in backend.metrics])
    for number, metrics in enumerate(backend.metrics):
        assert number - 2 <= metrics["weights_version"] <= number
        assert metrics["sampled_tokens"] == sampled[number] + metrics["in_flight_tokens"]
        assert backend.differences[number].mean() < 0.02
    assert backend.metrics[-1]["weights_version"] > 0


class Mortal(Recording):
    """An engine dies before each of the later generations: first one that gets weights through CUDA
    IPC, then one that gets them over NCCL."""

    def generate(self, task: Task) -> Done:
        if task.step:
            engine = self.processes.engines[task.step - 1]
            with pytest.raises(RayActorError):
                ray.get(
                    engine.handle.__ray_call__.remote(
                        lambda _: os.kill(os.getpid(), signal.SIGKILL)
                    )
                )
        return super().generate(task)


def test_an_engine_that_dies_comes_back_with_its_weights(ray_gpus: None) -> None:
    backend = Mortal(plan_of("spanning"))
    backend.take(3)
    assert [metrics["weights_version"] for metrics in backend.metrics] == [0, 1, 2]
    assert all(difference.mean() < 0.02 for difference in backend.differences)


def test_packed_equals_exact_attention() -> None:
    workload = small_workload()
    lengths = sample(workload.response, 8, 0, 0, 1)
    prompts = np.full(8, 5, dtype=np.int32)
    tokens = np.random.default_rng(0).integers(
        0, SHAPE["vocab"], (8, int((prompts + lengths).max())), dtype=np.int32
    )
    sequences = Sequences(
        tokens=tokens,
        prompt_lengths=prompts,
        response_lengths=lengths.astype(np.int32),
        log_probs=np.zeros((8, int(lengths.max())), dtype=np.float32),
        weights_versions=np.zeros((8, int(lengths.max())), dtype=np.int32),
    )
    rows, gpu, cpu = np.arange(8), torch.device("cuda"), torch.device("cpu")
    exact = models.load("actor", workload.actor, 0, torch.float32, cpu)
    found = models.load("actor", workload.actor, 0, torch.bfloat16, cpu).to(gpu)
    found.load_state_dict(exact.state_dict())
    residual.keep_residual_in_fp32(found, torch.bfloat16)
    models.compile_blocks(found)
    of_exact = models.wrap("actor", exact, 1.0)(pack(sequences, rows, cpu))
    of_found = models.wrap("actor", found, 1.0)(pack(sequences, rows, gpu))
    assert (of_found.cpu() - of_exact).abs().mean() < 0.02
    of_exact.sum().backward()
    of_found.sum().backward()
    for a, b in zip(exact.parameters(), found.parameters(), strict=True):
        assert (b.grad.cpu().float() - a.grad).norm() < 0.05 * a.grad.norm() + 1e-3
