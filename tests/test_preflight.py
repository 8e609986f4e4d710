"""What is said of a machine's GPUs before anything is started."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import ROLES, colocated, make_plan, make_workload

from executor.fleet import driver, gpus
from executor.fleet.driver import LocalGpu
from executor.running import hosts, preflight
from planner.cli import main
from planner.predict.host_memory import host_memory, merged
from planner.spec.cluster import make_cluster
from planner.spec.errors import UserError
from planner.spec.plan import Plan
from planner.spec.rewards import RewardFunction

DRIVER = Path(__file__).parent / "driver.c"
UUIDS = ("GPU-11111111-aaaa", "GPU-21111111-aaaa")
# An idle and a busy GPU, as the library of `driver.c` tells of them.
IDLE, BUSY = (
    LocalGpu(
        index=index,
        uuid=uuid,
        name="NVIDIA H200",
        total=143771 * 2**20,
        used=used * 2**20,
        driver="580.159.04",
    )
    for index, (uuid, used) in enumerate(zip(UUIDS, (4, 20481), strict=True))
)


def plan_for(count: int, device: str = "h200") -> Plan:
    roles = dict.fromkeys(ROLES, "all")
    return make_plan(make_workload(), {"all": count}, roles, cluster=make_cluster(count, device))


@pytest.fixture
def on_machine(tmp_path: Path) -> Callable[..., str]:
    """Runs lines in a process for which a library made of `driver.c` is the driver's; what they
    print."""
    if (compiler := shutil.which("cc")) is None or sys.platform != "linux":
        pytest.skip("there is no C compiler")

    def run(lines: str, *flags: str) -> str:
        library = tmp_path / "libnvidia-ml.so.1"
        made = [compiler, "-shared", "-fPIC", *flags, "-o", str(library), str(DRIVER)]
        subprocess.run(made, check=True)
        environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        script = f"import sys\nsys.path.insert(0, {str(DRIVER.parent)!r})\n{lines}"
        command = [sys.executable, "-c", script]
        return subprocess.run(
            command, env=environment, check=True, capture_output=True, text=True
        ).stdout

    return run


def test_the_driver_tells_of_its_gpus_and_of_who_uses_them(on_machine: Callable[..., str]) -> None:
    lines = "from executor.fleet import driver\nprint(driver.gpus())\nprint(driver.users())"
    there, users = on_machine(lines).splitlines()
    assert there == str([IDLE, BUSY])
    assert users == str({UUIDS[0]: [], UUIDS[1]: ["4711 (python3)"]})


def test_without_a_driver_there_are_no_gpus() -> None:
    if not driver.is_there():
        assert driver.gpus() == [] and driver.users() == {}


@pytest.mark.parametrize(
    ("variable", "indices"),
    [
        (None, [0, 1]),
        ("1", [1]),
        ("1,0", [1, 0]),
        ("GPU-2111", [1]),
        ("0,-1,1", [0]),
        ("", []),
        ("NoDevFiles", []),
    ],
)
def test_only_visible_gpus_count(variable: str | None, indices: list[int]) -> None:
    assert [gpu.index for gpu in gpus.visible([IDLE, BUSY], variable)] == indices


def test_gpus_of_another_kind_or_size_are_refused() -> None:
    there = [IDLE, BUSY]
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


def test_a_gpu_in_use_is_named_with_its_process_and_the_free_ones() -> None:
    users = {UUIDS[1]: ["4711 (python3)"]}
    with pytest.raises(UserError) as error:
        gpus.check_free([IDLE, BUSY], users)
    line = str(error.value)
    assert "GPU 1 (21.5 GB), by process 4711 (python3)" in line and "CUDA_VISIBLE_DEVICES=0" in line
    gpus.check_free([IDLE], users)


def test_a_host_that_does_not_hold_what_is_offloaded_is_refused() -> None:
    plan = plan_for(2)
    away = {
        role: layout.model_copy(update={"offload": "all"}) for role, layout in plan.trainers.items()
    }
    plan = plan.model_copy(update={"roles": {**plan.roles, **away}})
    parts = merged(host_memory(plan).values())
    needed = int(sum(parts.values()) / 0.95) + 1
    hosts.check_here(plan, needed, saves=True)
    with pytest.raises(
        UserError, match=r"of the host's memory \(.*what is offloaded .* and this machine has "
    ):
        hosts.check_here(plan, needed - 2, saves=True)


def test_every_machine_of_a_cluster_is_asked_for_its_memory() -> None:
    plan = plan_for(2)
    needed = int(sum(host_memory(plan)[0].values()) / 0.95) + 1
    hosts.check_each(plan, {0: needed}, saves=True)
    with pytest.raises(UserError, match="and the machine of node 0 has "):
        hosts.check_each(plan, {0: needed - 2}, saves=True)
    hosts.check_each(plan, {0: needed - 2}, saves=False)  # no copies for checkpoints


CHECKED = """
from test_preflight import plan_for
from executor.running import hosts, preflight
from planner.cli import main
from planner.spec.errors import UserError
try:
    preflight.check_machine(plan_for({count}))
except UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_too_few_gpus_and_a_torch_that_cannot_use_them(on_machine: Callable[..., str]) -> None:
    said = on_machine(CHECKED.format(count=4))
    assert "needs 4 GPUs of kind h200 and this machine has 2" in said
    import torch

    if torch.version.cuda is None:
        assert "built without CUDA" in on_machine(CHECKED.format(count=2))


@pytest.mark.slow
def test_a_driver_that_does_not_answer_is_one_line(on_machine: Callable[..., str]) -> None:
    said = on_machine(CHECKED.format(count=2), "-DFAILS")
    assert said == "the NVIDIA driver does not answer (Driver Not Loaded); check the driver\n"
    impatient = "from executor.fleet import driver\ndriver.DRIVER_SECONDS = 0.2\n"
    said = on_machine(impatient + CHECKED.format(count=2), "-DHANGS")
    assert said == "the NVIDIA driver does not answer (nothing in 0.2 s); check the driver\n"


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


def test_a_plan_that_does_not_fit_is_refused_before_anything_starts(tmp_path: Path) -> None:
    """By `plan execute` as by `plan check`, in the same words."""
    plan = colocated(make_workload(), cores=1)
    small = plan.cluster.device_of((0, 0)).model_copy(update={"memory_bytes": 10**6})
    cluster = plan.cluster.model_copy(update={"devices": {plan.cluster.nodes[0].device: small}})
    file = tmp_path / "plan.json"
    plan.model_copy(update={"cluster": cluster}).write(file)
    execute = CliRunner().invoke(main, ["execute", str(file), "--runs", str(tmp_path / "runs")])
    check = CliRunner().invoke(main, ["check", str(file)])
    assert execute.exit_code == check.exit_code == 2 and not (tmp_path / "runs").exists()
    told = check.stderr.removeprefix(f"plan: {file}: ")
    assert execute.stderr == f"plan: plan 'colocated': {told}"
    assert "needs 0.001 GB per GPU while actor runs" in told and "but 0.001 GB are there" in told
