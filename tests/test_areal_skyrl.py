"""Plans for AReaL and SkyRL: what the search may not do for them, and what is written of a plan."""

import subprocess
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from conftest import small_workload, tiny_cluster

from planner.cli import main
from planner.exchange.areal_config import areal_config
from planner.exchange.expressing import expressed
from planner.exchange.skyrl_script import skyrl_script
from planner.search import SearchOptions, baseline, find
from planner.search.questions.framework_modes import AS_A_WHOLE, ASLEEP, RESIDENT, Mode, modes_of
from planner.spec.cluster import make_cluster
from planner.spec.errors import UserError
from planner.spec.files import profiles_dir
from planner.spec.frameworks import FrameworkName
from planner.spec.plan import Plan
from planner.spec.workload import Workload
from planner.spec.workload_file import load_workload

WORKLOADS = sorted((profiles_dir() / "workloads").glob("*.toml"))
SMALL = small_workload(max_staleness=1)
JOB = load_workload(profiles_dir() / "workloads" / "1.5b.toml")
GRPO = load_workload(profiles_dir() / "workloads" / "h200-1.5b-grpo.toml")
FAST = {"scenarios": 2, "runners_up": 0}


def best_for(framework: FrameworkName, workload: Workload, gpus: int = 8, pins=()) -> Plan:
    options = SearchOptions(framework=framework, pins=pins, **FAST)
    return find(workload, make_cluster(gpus), options).best


def modes(framework: FrameworkName, workload: Workload = JOB) -> list[Mode]:
    return list(modes_of(framework, workload.roles, workload.dataflow.steady))


# --- what they cannot do ---


@pytest.mark.parametrize("framework", ["areal", "skyrl"])
def test_a_reward_model_is_beside_them(framework):
    for mode in modes(framework):
        assert {"reward"} in mode.structure
        assert mode.offloads["reward"] == RESIDENT


def test_engines_of_areal_lie_on_the_actors_gpus_or_on_their_own():
    listed = modes("areal")
    for mode in listed:
        pool = next(roles for roles in mode.structure if "rollout" in roles)
        assert pool == {"rollout"} or "actor" in pool
        shared = "actor" in pool
        assert mode.widest_engine == (1 if shared else None)
        assert mode.offloads["actor"] == (ASLEEP if shared else AS_A_WHOLE)
        assert mode.offloads.get("critic") == AS_A_WHOLE  # never the optimizer alone
    # Actor, critic and reference have five partitions, with and without engines; one streams.
    assert len(listed) == 11 and [mode.ahead for mode in listed].count(True) == 1
    ahead = listed[-1]
    assert ahead.streams and {"actor", "critic", "reference"} in ahead.structure


def test_what_shares_gpus_in_skyrl_takes_turns():
    for mode in modes("skyrl"):
        assert not mode.streams and mode.widest_engine is None
        for pool in mode.structure:
            assert pool in (
                {"actor", "critic", "reference", "rollout"},
                {"actor", "reference"},
                *({role} for role in JOB.roles),
            )
            for role in pool - {"rollout"}:
                assert mode.offloads[role] == (RESIDENT if len(pool) == 1 else ASLEEP)
        assert {"rollout"} in mode.structure or not mode.ahead


@pytest.mark.slow
def test_areal_is_ahead_only_where_weights_may_arrive_in_flight():
    held = best_for("areal", GRPO)
    assert held.staleness == 0 and "no weights in flight" in held.predicted.proof.space
    plan = best_for("areal", GRPO.changed(sync="any"))
    assert plan.sync == "in_flight" and plan.staleness == 1 and plan.workload.kv == "recompute"
    assert plan.rollout.pools == ("rollout",)
    config = yaml.safe_load(areal_config(expressed("areal", plan, ()), "x"))
    assert config["rollout"]["max_head_offpolicyness"] == 1
    assert config["actor"]["weight_update_mode"] == "xccl"


@pytest.mark.parametrize(
    ("framework", "changed", "said"),
    [
        ("areal", {"algorithm": {"epochs": 2}}, "areal 1.0.4 passes once over a batch"),
        ("skyrl", {"proximal": "rollout"}, "set proximal to 'recompute'"),
        ("skyrl", {"sync": "in_flight"}, "skyrl brings no weights in flight"),
        ("verl", {"sync": "in_flight"}, "verl brings no weights in flight"),
    ],
)
def test_jobs_that_it_would_run_as_others_are_refused(framework, changed, said):
    with pytest.raises(UserError, match=said) as found:
        find(SMALL.changed(**changed), tiny_cluster(4), SearchOptions(framework=framework, **FAST))
    assert "\n" not in str(found.value)


def test_what_it_wants_where_nothing_fits_is_said():
    with pytest.raises(UserError, match="areal wants 2 GPUs at least"):
        best_for("areal", JOB, 1)  # one is the reward model's
    seventy = load_workload(profiles_dir() / "workloads" / "70b.toml")
    with pytest.raises(UserError, match=r"skyrl 0\.3\.0 can execute fits 70b on 8 GPUs"):
        best_for("skyrl", seventy, 8)


def test_an_advantage_that_skyrl_has_not_is_refused():
    workload = GRPO.changed(algorithm={"advantage": "reinforce++-baseline"})
    with pytest.raises(UserError, match="has no advantage 'reinforce"):
        best_for("skyrl", workload)


@pytest.mark.slow
def test_gpus_among_which_nothing_comes_out_even_are_refused():
    """32 prompts of 8 samples: on three GPUs AReaL would deal 11, 11 and 10."""
    three = baseline("colocated", GRPO, make_cluster(3))
    with pytest.raises(UserError, match="each of the 3 GPUs of actor"):
        expressed("areal", three, ())
    with pytest.raises(UserError, match="64 sequences of a minibatch"):
        expressed("skyrl", three, ())
    for framework in ("areal", "skyrl"):
        plan = best_for(framework, GRPO, 3)
        assert 32 % plan.trainers["actor"].gpus == 0


# --- what is written ---


@pytest.mark.slow
def test_the_gpus_of_a_reward_model_are_none_of_areals():
    plan = best_for("areal", JOB, 16)
    text = areal_config(expressed("areal", plan, ()), "x")
    config = yaml.safe_load(text)
    own = {pool for role in plan.roles if role != "reward" for pool in plan.roles[role].pools}
    nodes = {node for pool in own for node, _ in plan.pools[pool].gpus}
    assert len(nodes) == 1  # the reward model is on the other
    assert config["cluster"]["n_nodes"] == len(nodes)
    assert "areal has no such role" in text.replace("\n#   ", " ")


@pytest.mark.slow
def test_a_configuration_for_areal_on_one_pool():
    plan = best_for("areal", GRPO, pins=("actor=8", "actor+reference"))
    text = areal_config(expressed("areal", plan, ()), "plan export")
    config = yaml.safe_load(text)
    assert config["actor"]["backend"] == config["ref"]["backend"] == "fsdp:d8"
    assert config["rollout"]["backend"] == "vllm:d8t1"
    for role in ("rollout", "ref"):
        wanted = {"type": "colocation", "target": "actor"}
        assert config[role]["scheduling_strategy"] == wanted
    assert config["enable_offload"] is True and config["actor"]["offload"] is True
    assert config["actor"]["weight_update_mode"] == "disk"
    assert "AReaL writes 3.1 GB" in text.replace("\n#   ", " ")
    assert config["train_dataset"]["batch_size"] == 32 and config["gconfig"]["n_samples"] == 8
    assert config["actor"]["ppo_n_minibatches"] == 4
    assert config["actor"]["optimizer"]["lr"] == GRPO.optimizer.actor.lr  # a number, no text
    norm = {"mean_level": "group", "std_level": "group", "mean_leave1out": False, "group_size": 8}
    assert config["actor"]["reward_norm"] == norm and config["actor"]["adv_norm"] is None
    assert config["actor"]["rejection_sampling"]["upper"] == 2.0
    assert "critic" not in config
    assert "kl_kind = k3 in the loss" in text


def test_a_reference_on_gpus_of_its_own():
    plan = best_for("areal", GRPO, 4, pins=("actor=2", "reference=1", "rollout=1"))
    config = yaml.safe_load(areal_config(expressed("areal", plan, ()), "x"))
    assert config["ref"]["scheduling_strategy"] == {"type": "separation"}
    assert config["ref"]["backend"] == "fsdp:d1" and config["actor"]["backend"] == "fsdp:d2"
    assert "scheduling_strategy" not in config["rollout"]
    assert config["scheduler"]["type"] == "local" and config["cluster"]["n_nodes"] == 1
    assert config["enable_offload"] == any(
        layout.offload == "all" for layout in plan.trainers.values()
    )


def test_engines_on_the_actors_gpus_are_made_narrow_for_areal():
    """Two engines of two GPUs: AReaL has one on each."""
    plan = baseline("colocated", GRPO, make_cluster(4))
    wide = plan.rollout.changed(tensor_parallel=2, replicas=2, memory_fraction=0.3)
    found = expressed("areal", plan.changed(roles={**plan.roles, "rollout": wide}), ())
    assert found.plan.rollout.tensor_parallel == 1 and found.plan.rollout.replicas == 4
    assert "engines have no more GPUs than it gives them" in [each.what for each in found.changes]


@pytest.mark.slow
def test_what_areal_does_otherwise_has_its_price():
    plan = baseline("one-step-off", GRPO, make_cluster(8))
    pools = {"rollout": 4, "actor+reference": 4}
    gpus = [gpu for pool in plan.pools.values() for gpu in pool.gpus]
    even = dict(zip(pools, (gpus[:4], gpus[4:]), strict=True))
    roles = dict(plan.roles)
    for role in ("actor", "reference"):
        roles[role] = plan.trainers[role].changed(shard=4, replicas=1)
    roles["rollout"] = plan.rollout.changed(tensor_parallel=1, replicas=4)
    four = plan.changed(
        pools={name: {"gpus": tuple(own)} for name, own in even.items()}, roles=roles
    )
    found = expressed("areal", four, ())
    assert found.plan.streams and found.plan.workload.kv == "recompute"
    first = found.changes[0]
    assert first.what == "generation is ahead, and weights arrive in the middle of sequences"
    assert first.seconds < 0.05 * four.predicted.step_seconds  # no boundary to wait at
    assert "Otherwise than in the plan, generation is ahead" in areal_config(found, "x")


def options_of(text: str) -> dict[str, str]:
    lines = [line.split("  #")[0].strip() for line in text.splitlines() if "=" in line]
    return dict(line.split("=", 1) for line in lines)


def test_a_script_for_skyrl_on_one_pool():
    plan = best_for("skyrl", JOB.changed(reward={"function": "r.py:f"}, max_staleness=0))
    text = skyrl_script(expressed("skyrl", plan, ()), "x")
    assert subprocess.run(["bash", "-n"], input=text.encode()).returncode == 0
    options = options_of(text)
    gpus = options["trainer.placement.policy_num_gpus_per_node"]
    together = options["trainer.placement.colocate_all"] == "True"
    assert together == ("rollout" in plan.roles["actor"].pools[0])
    engines = int(options["generator.inference_engine.num_engines"])
    width = int(options["generator.inference_engine.tensor_parallel_size"])
    assert not together or engines * width == int(gpus)
    assert options["trainer.policy_mini_batch_size"] == "128"
    assert options["trainer.algorithm.use_kl_in_reward"] == "True"
    assert "skyrl.train.entrypoints.main_base" in text
    assert "how r.py:f is called: SkyRL has the step()" in text


def test_a_script_for_skyrl_with_generation_ahead():
    plan = best_for("skyrl", GRPO, pins=("actor+reference",))
    text = skyrl_script(expressed("skyrl", plan, ()), "x")
    options = options_of(text)
    assert plan.staleness == 1 and "examples.train.async.main_async" in text
    assert options["trainer.placement.colocate_all"] == "False"
    assert options["trainer.placement.colocate_policy_ref"] == "True"
    assert options["trainer.train_batch_size"] == "32"
    assert options["generator.n_samples_per_prompt"] == "8"
    assert options["trainer.algorithm.use_kl_loss"] == "True"
    tokens = {layout.micro_batch_tokens for layout in plan.trainers.values()}
    assert tokens == {int(options["trainer.max_tokens_per_microbatch"])}


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["areal", "skyrl"])
def test_the_commands(framework, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    search = f"search --gpus 4 --workload h200-1.5b-grpo --for {framework} --no-picture --keep 0"
    result = CliRunner().invoke(main, [*search.split(), "--scenarios", "2"])
    assert result.exit_code == 0, result.stderr
    good, bad = ("run.yaml", "run.sh") if framework == "areal" else ("run.sh", "run.yaml")
    result = CliRunner().invoke(main, ["export", framework, "best.json", "--out", bad])
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert not Path(bad).exists()
    result = CliRunner().invoke(main, ["export", framework, "best.json", "--out", good])
    assert result.exit_code == 0 and Path(good).exists()
    assert f"predicted under {framework}" in result.stdout


@pytest.mark.nightly
@pytest.mark.parametrize("framework", ["areal", "skyrl"])
@pytest.mark.parametrize("path", WORKLOADS, ids=lambda path: path.stem)
def test_all_that_is_found_can_be_written(framework: FrameworkName, path: Path) -> None:
    """A plan that was searched for a framework is one that it executes as it is."""
    gpus = 32 if path.stem == "70b" else 16
    plan = best_for(framework, load_workload(path), gpus)
    assert not expressed(framework, plan, ()).changes
