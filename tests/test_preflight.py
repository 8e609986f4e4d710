"""What is said of a machine's GPUs before anything is started."""

import os
from pathlib import Path

import pytest
from conftest import ROLES, colocated, make_plan, make_workload

from executor.fleet import gpus
from executor.running import preflight
from planner.predict.memory import host_bytes
from planner.spec.cluster import make_cluster
from planner.spec.errors import UserError
from planner.spec.plan import Plan
from planner.spec.workload import RewardFunction

# As nvidia-smi prints it for `gpus.FIELDS`, of an idle and a busy GPU.
PRINTED = """\
0, GPU-11111111-aaaa-bbbb-cccc-000000000000, NVIDIA H200, 143771, 4, 580.159.04
1, GPU-22222222-aaaa-bbbb-cccc-000000000001, NVIDIA H200, 143771, 20481, 580.159.04
"""


def plan_for(count: int, device: str = "h200") -> Plan:
    roles = dict.fromkeys(ROLES, "all")
    return make_plan(make_workload(), {"all": count}, roles, cluster=make_cluster(count, device))


def on_machine(
    directory: Path, monkeypatch: pytest.MonkeyPatch, gpus_printed: str, status: int = 0
) -> None:
    """Put a driver's program that answers so on the path; it names one process, on the second
    GPU."""
    program = directory / "nvidia-smi"
    apps = "GPU-22222222-aaaa-bbbb-cccc-000000000001, 4711, python3"
    (directory / "gpus.csv").write_text(gpus_printed)
    answer = f"case $1 in --query-gpu=*) cat {directory}/gpus.csv;; *) echo '{apps}';; esac"
    program.write_text(f"#!/bin/sh\n{answer}\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_the_drivers_table_is_read() -> None:
    idle, busy = gpus.parse(PRINTED)
    assert (idle.index, idle.name, idle.driver) == (0, "NVIDIA H200", "580.159.04")
    assert idle.total == 143771 * 2**20 and (idle.used, busy.used) == (4 * 2**20, 20481 * 2**20)
    assert gpus.parse("0, GPU-1, NVIDIA GB10, [N/A], [N/A], 580.1\n")[0].total == 0


@pytest.mark.parametrize(
    ("variable", "indices"),
    [
        (None, [0, 1]),
        ("1", [1]),
        ("1,0", [1, 0]),
        ("GPU-2222", [1]),
        ("0,-1,1", [0]),
        ("", []),
        ("NoDevFiles", []),
    ],
)
def test_only_visible_gpus_count(variable: str | None, indices: list[int]) -> None:
    assert [gpu.index for gpu in gpus.visible(gpus.parse(PRINTED), variable)] == indices


def test_gpus_of_another_kind_or_size_are_refused() -> None:
    there = gpus.parse(PRINTED)
    gpus.check_kind(plan_for(2), there)
    with pytest.raises(
        UserError, match="is for GPUs of kind h100, and GPU 0 of this machine is a NVIDIA H200"
    ):
        gpus.check_kind(plan_for(2, "h100"), there)
    plan = plan_for(2)
    own = plan.cluster.model_copy(
        update={
            "nodes": (plan.cluster.nodes[0].model_copy(update={"device": "ours"}),),
            "devices": {
                "ours": plan.cluster.devices["h200"].model_copy(
                    update={"memory_bytes": 192 * 10**9}
                )
            },
        }
    )
    with pytest.raises(UserError, match=r"counts on 192.0 GB per GPU, and GPU 0 .* has 150.8 GB"):
        gpus.check_kind(plan.model_copy(update={"cluster": own}), there)


def test_a_gpu_in_use_is_named_with_its_process_and_the_free_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_machine(tmp_path, monkeypatch, PRINTED)
    with pytest.raises(UserError) as error:
        gpus.check_free(gpus.found(), gpus.users())
    line = str(error.value)
    assert "GPU 1 (21.5 GB), by process 4711 (python3)" in line and "CUDA_VISIBLE_DEVICES=0" in line
    gpus.check_free(gpus.found()[:1], gpus.users())


def test_a_host_that_does_not_hold_what_is_offloaded_is_refused() -> None:
    plan = plan_for(2)
    away = {
        role: layout.model_copy(update={"offload": "all"}) for role, layout in plan.trainers.items()
    }
    plan = plan.model_copy(update={"roles": {**plan.roles, **away}})
    needed = sum(host_bytes(plan).values())
    preflight.check_host(plan, needed)
    with pytest.raises(
        UserError, match=r"of the host's memory for what is offloaded .* and this machine has "
    ):
        preflight.check_host(plan, needed - 1)


def test_too_few_gpus_and_a_torch_that_cannot_use_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_machine(tmp_path, monkeypatch, PRINTED)
    with pytest.raises(UserError, match="needs 4 GPUs of kind h200 and this machine has 2"):
        preflight.check_machine(plan_for(4))
    import torch

    if torch.version.cuda is None:
        with pytest.raises(UserError, match="built without CUDA"):
            preflight.check_machine(plan_for(2))


def test_a_driver_that_does_not_answer_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_machine(tmp_path, monkeypatch, "NVIDIA-SMI has failed\nbecause\n", status=9)
    with pytest.raises(UserError, match=r"nvidia-smi fails \(NVIDIA-SMI has failed because\)"):
        preflight.check_machine(plan_for(2))


def test_an_engine_that_is_wider_than_an_actor_beside_it_is_refused() -> None:
    layouts = {
        "rollout": {"engine": "vllm", "tensor_parallel": 2, "replicas": 1, "memory_fraction": 0.5},
        "actor": {"shard": 1},
    }
    cluster, roles = make_cluster(2, "h200", 2), dict.fromkeys(ROLES, "all")
    narrow = make_plan(make_workload(), {"all": 2}, roles, layouts=layouts, cluster=cluster)
    with pytest.raises(UserError, match="engine of 2 GPUs shares some with the actor, which has 1"):
        preflight.check_engine(narrow)
    layouts["actor"] = {"shard": 2}
    with pytest.raises(UserError, match="not installed"):
        preflight.check_engine(
            make_plan(make_workload(), {"all": 2}, roles, layouts=layouts, cluster=cluster)
        )


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    missing = RewardFunction(function=f"{tmp_path}/none.py:f")
    plan = colocated(
        make_workload(reward=missing), cores=1, layouts={"rollout": {"engine": "vllm"}}
    )
    engine, reward = preflight.problems(plan)
    assert "vllm" in engine and "no file" in reward
    assert preflight.problems(colocated(make_workload(), cores=1)) == []


def test_a_plan_that_is_only_checked_runs_no_code(tmp_path: Path) -> None:
    file = tmp_path / "reward.py"
    file.write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\ndef score(prompts, responses, answers): ...\n"
    )
    plan = colocated(make_workload(reward=RewardFunction(function=f"{file}:score")), cores=1)
    assert preflight.problems(plan) == [] and not (tmp_path / "ran").exists()
    file.write_text("def score(:")
    assert "cannot be imported: SyntaxError" in preflight.problems(plan)[0]
