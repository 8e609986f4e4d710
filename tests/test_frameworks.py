"""Plans that another framework can execute, and launch scripts of them."""

import os
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import small_workload, tiny_cluster

from planner.cli import main
from planner.exchange.expressing import expressed
from planner.exchange.openrlhf_script import openrlhf_script
from planner.exchange.verl_script import verl_script
from planner.predict.memory_check import check_memory
from planner.predict.schedule import check
from planner.search import SearchOptions, baseline, find
from planner.search.questions.framework_modes import RANKS, modes_of
from planner.spec.cluster import make_cluster
from planner.spec.errors import UserError
from planner.spec.files import profiles_dir
from planner.spec.frameworks import FRAMEWORKS
from planner.spec.plan import Plan
from planner.spec.workload_file import load_workload

SMALL = small_workload(max_staleness=1)
JOB = load_workload(profiles_dir() / "workloads" / "1.5b.toml")


def best_for(framework, workload=SMALL, cluster=None, **options) -> Plan:
    options = {"scenarios": 2, "runners_up": 0} | options
    asked = SearchOptions(framework=framework, **options)
    return find(workload, cluster or tiny_cluster(4), asked).best


# --- the space of a framework ---


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("workload", [SMALL, JOB], ids=["small", "1.5b"])
def test_its_best_plan_is_one_that_it_can_execute_and_no_faster_than_the_best(framework, workload):
    cluster = tiny_cluster(4) if workload is SMALL else make_cluster(8)
    plan = best_for(framework, workload, cluster)
    free = find(workload, cluster, SearchOptions(scenarios=2, runners_up=0)).best
    assert plan.predicted.step_seconds >= free.predicted.step_seconds * (1 - 1e-9)
    assert plan.predicted.lower_bound_seconds <= plan.predicted.step_seconds * (1 + 1e-9)
    assert plan.predicted.gap < 0.002
    homes = {frozenset(r for r, lay in plan.roles.items() if p in lay.pools) for p in plan.pools}
    flow = plan.dataflow.steady
    modes = [set(mode.structure) for mode in modes_of(framework, workload.roles, flow)]
    assert homes in modes
    for layout in plan.trainers.values():
        assert layout.gpus == len(plan.pools[layout.pools[0]].gpus)
        assert RANKS[framework] == "all" or layout.replicas == 1
    check(plan)
    check_memory(plan)
    assert not expressed(framework, plan, ()).changes


def test_without_staleness_verl_generates_where_it_trains():
    plan = best_for("verl", max_staleness=0)
    assert len(plan.pools) == 1 and plan.staleness == 0 and plan.rollout.offload


def test_pools_fill_nodes_or_lie_in_one():
    plan = best_for("verl", JOB, make_cluster(24))
    sizes = [len(pool.gpus) for pool in plan.pools.values()]
    assert all(size <= 8 or size % 8 == 0 for size in sizes)


def test_pins_narrow_it_further():
    plan = best_for("verl", JOB, make_cluster(8), pins=("rollout=4",))
    assert plan.gpus_of(plan.rollout.pools) == 4
    with pytest.raises(UserError):
        best_for("verl", JOB, make_cluster(8), pins=("actor/critic",))


def test_openrlhf_updates_side_by_side_where_roles_are_apart():
    modes = [mode for mode in modes_of("openrlhf", JOB.roles, JOB.dataflow) if mode.ahead]
    split = next(mode for mode in modes if frozenset({"critic", "reward"}) in mode.structure)
    assert {"actor", "reference"} in split.structure and {"rollout"} in split.structure
    text = str(split.program.items)
    assert "wait=('update_critic', 'update_actor')" in text


# --- launch scripts ---


def options_of(text: str, folder: Path, **variables: str) -> dict[str, str]:
    """The options that a script gives, as a shell reads it."""
    (folder / "run.sh").write_text(text)
    (folder / "python3").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (folder / "python3").chmod(0o755)
    known = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **variables}
    done = subprocess.run(["bash", folder / "run.sh", "more=1"], env=known, capture_output=True)
    assert done.returncode == 0, done.stderr
    return dict(word.split("=", 1) for word in done.stdout.decode().splitlines()[2:])


MODELS = {"MODEL": "/models/a b", "TRAIN": "t.parquet", "REWARD_MODEL": "/r"}


def test_a_script_of_one_pool(tmp_path):
    plan = best_for("verl", max_staleness=0)
    text = verl_script(expressed("verl", plan, ()), "plan export")
    found = options_of(text, tmp_path, **MODELS)
    assert found["trainer.v1.trainer_mode"] == "sync"
    assert found["trainer.n_gpus_per_node"] == "4" and found["trainer.nnodes"] == "1"
    assert found["data.train_batch_size"] == "64"
    assert found["actor_rollout_ref.actor.ppo_mini_batch_size"] == "16"
    assert found["actor_rollout_ref.model.path"] == found["critic.model.path"] == "/models/a b"
    actor = plan.trainers["actor"]
    tokens = str(actor.micro_batch_tokens)
    assert found["actor_rollout_ref.actor.ppo_max_token_len_per_gpu"] == tokens
    recompute = str(actor.recompute)
    assert found["actor_rollout_ref.model.enable_gradient_checkpointing"] == recompute
    assert found["more"] == "1"  # what is given to the script comes last, and so decides
    assert f"{plan.predicted.step_seconds:.3g} s a step predicted" in text


def test_a_script_with_generation_apart(tmp_path):
    plan = best_for("verl", JOB, make_cluster(16))
    found = options_of(verl_script(expressed("verl", plan, ()), "x"), tmp_path, **MODELS)
    assert found["trainer.v1.trainer_mode"] == "separate_async"
    assert found["actor_rollout_ref.hybrid_engine"] == "False"
    rollout = "actor_rollout_ref.rollout"
    gpus = int(found[f"{rollout}.nnodes"]) * int(found[f"{rollout}.n_gpus_per_node"])
    assert gpus == plan.gpus_of(plan.rollout.pools)
    assert found["trainer.v1.separate_async.parameter_sync_step"] == "4"  # 512 / 128
    assert found["reward.reward_model.enable_resource_pool"] == "True"


def test_a_script_for_openrlhf(tmp_path):
    plan = best_for("openrlhf", JOB, make_cluster(16))
    text = openrlhf_script(expressed("openrlhf", plan, ()), "x")
    assert subprocess.run(["bash", "-n"], input=text.encode()).returncode == 0
    words = dict(line.split("  #")[0].strip().partition(" ")[::2] for line in text.splitlines())
    gpus = plan.gpus_of(plan.roles["actor"].pools)
    assert words["--actor.num_gpus_per_node"] == str(min(8, gpus))
    assert words["--vllm.num_engines"] == str(plan.rollout.replicas)
    assert words["--train.batch_size"] == "128" and words["--rollout.batch_size"] == "512"
    assert ("--train.async_enable" in words) == (plan.staleness == 1)
    layouts = plan.trainers.values()
    tokens = min(layout.micro_batch_tokens for layout in layouts)
    assert words["--train.max_tokens_per_gpu"] == str(tokens)


def test_what_is_done_otherwise_has_its_price():
    """A baseline that splits nothing, on GPUs of which some roles use a part."""
    plan = baseline("colocated", SMALL, tiny_cluster(4))
    half = plan.trainers["actor"].changed(shard=2, replicas=1)
    found = expressed("verl", plan.changed(roles={**plan.roles, "actor": half}), ())
    changes = {change.what: change.seconds for change in found.changes}
    everywhere = changes["every role computes on all GPUs of its pool"]
    assert everywhere < 0  # it was slower on two
    assert found.plan.trainers["actor"].gpus == 4
    assert "Otherwise than in the plan" in verl_script(found, "x")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("split", "verl cannot make the pools of this plan"),
        ("standalone", "plan search --for verl"),
    ],
)
def test_pools_that_it_cannot_make_are_refused(name, said):
    plan = baseline(name, SMALL, tiny_cluster(4))
    with pytest.raises(UserError, match=said):
        expressed("verl", plan, ())


def test_unequal_nodes_are_refused():
    plan = baseline("colocated", SMALL, make_cluster(12))
    with pytest.raises(UserError, match=r"as many GPUs on each node, and pool .* has 8 and 4"):
        expressed("verl", plan, ())


def test_what_verl_cannot_say_is_said():
    workload = SMALL.changed(
        rewards=[
            {"function": "r.py:f", "form": "verl"},
            {"url": "http://h:1/x"},
            {"overlong_buffer": 8},
        ],
        reward=None,
        algorithm={"mask_truncated": True},
        optimizer={"actor": {"schedule": "linear", "warmup_steps": 1}},
    )
    plan = baseline("colocated", workload, tiny_cluster(4))
    text = verl_script(expressed("verl", plan, ()), "x")
    for said in ("several rewards", "the reward server", "penalty on length", "mask_truncated"):
        assert said in text
    assert "schedule = linear" in text


def test_the_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    search = "search --gpus 8 --workload 1.5b --for verl --no-picture --scenarios 2 --keep 0"
    result = CliRunner().invoke(main, [*search.split(), "--max-staleness", "0"])
    assert result.exit_code == 0 and "what verl 0.9.1 can execute" in result.stdout.replace(
        "\n", " "
    )
    result = CliRunner().invoke(main, ["export", "verl", "best.json", "--out", "run.sh"])
    assert result.exit_code == 0, result.stderr
    seconds = Plan.read(tmp_path / "best.json").predicted.step_seconds
    assert result.stdout.startswith(f"{seconds:.2f} s per step predicted under verl")
    assert os.access("run.sh", os.X_OK)
    assert subprocess.run(["bash", "-n", "run.sh"]).returncode == 0
    result = CliRunner().invoke(main, ["export", "verl", "best.json", "--out", "run.txt"])
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
