"""Launch scripts for verl, by verl's own composing and checks: those of the baselines that it knows
and of the winners of all shipped workloads."""

import os
import subprocess
from pathlib import Path

import hollow  # isort: skip  # before the peers

import pytest

from planner.exchange.expressing import expressed
from planner.exchange.verl_script import verl_script
from planner.search import SearchOptions, baseline, find
from planner.spec.cluster import make_cluster
from planner.spec.errors import UserError
from planner.spec.files import profiles_dir
from planner.spec.plan import Plan
from planner.spec.workload_file import load_workload

with hollow.again():
    import verl
    from verl.trainer.ppo.utils import need_critic, need_reference_policy, need_reward_model
    from verl.utils.config import omega_conf_to_dataclass, validate_config

hydra = pytest.importorskip("hydra")

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

WORKLOADS = sorted((profiles_dir() / "workloads").glob("*.toml"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory: verl reads the configurations and tokenizers of models."""
    from transformers import LlamaConfig

    from executor.digits.prompts import build_tokenizer

    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def options_of(script: str, folder: Path, model: Path) -> list[str]:
    """What the shell makes of a script: the arguments that python3 gets."""
    variables = dict.fromkeys(("MODEL", "CRITIC", "REWARD_MODEL"), str(model))
    variables["TRAIN"] = "/t.parquet"
    (folder / "run.sh").write_text(script)
    (folder / "python3").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (folder / "python3").chmod(0o755)
    known = {**os.environ, **variables, "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", folder / "run.sh"], env=known, capture_output=True, text=True, check=True
    )
    words = done.stdout.splitlines()
    assert words[:2] == ["-m", "verl.trainer.main_ppo"]
    return words[2:]


def composed(plan: Plan, folder: Path, model: Path):
    """The configuration that verl makes of a plan's script, after its checks."""
    from hydra import compose, initialize_config_dir

    options = options_of(verl_script(expressed("verl", plan, ()), "test"), folder, model)
    home = str(Path(verl.__file__).parent / "trainer" / "config")
    with initialize_config_dir(home, version_base=None):
        config = compose("ppo_trainer", overrides=options)
    validate_config(config, need_reference_policy(config), need_critic(config))
    rollout = config.actor_rollout_ref.rollout
    for section in (config.actor_rollout_ref.actor, rollout, config.actor_rollout_ref.model):
        omega_conf_to_dataclass(section)
    return config


def assert_valid(config, plan: Plan) -> None:
    workload = plan.workload
    assert need_critic(config) == (workload.critic is not None)
    assert need_reference_policy(config) == (workload.reference is not None)
    assert bool(need_reward_model(config)) == ("reward" in workload.models)
    batch = config.data.train_batch_size * config.actor_rollout_ref.rollout.n
    assert batch == workload.batch
    homes = plan.roles["actor"].pools
    trainer_gpus = config.trainer.nnodes * config.trainer.n_gpus_per_node
    assert trainer_gpus == plan.gpus_of(homes)
    actor = plan.trainers["actor"]
    size = config.actor_rollout_ref.actor.fsdp_config.fsdp_size
    assert (trainer_gpus if size == -1 else size) == actor.shard
    if config.trainer.v1.trainer_mode == "separate_async":
        rollout, mode = config.actor_rollout_ref.rollout, config.trainer.v1.separate_async
        assert rollout.nnodes * rollout.n_gpus_per_node == plan.gpus_of(plan.rollout.pools)
        minibatch = config.actor_rollout_ref.actor.ppo_mini_batch_size
        assert config.data.train_batch_size == mode.parameter_sync_step * minibatch


@pytest.mark.parametrize("path", WORKLOADS, ids=lambda path: path.stem)
@pytest.mark.parametrize("gpus", [8, 16])
def test_winners_are_valid(path: Path, gpus: int, tmp_path: Path, model: Path) -> None:
    options = SearchOptions(framework="verl", scenarios=2, runners_up=0)
    try:
        plan = find(load_workload(path), make_cluster(gpus), options).best
    except UserError as error:
        pytest.skip(f"no plan on {gpus} GPUs: {str(error)[:60]}")
    assert_valid(composed(plan, tmp_path, model), plan)


@pytest.mark.parametrize("path", WORKLOADS, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", ["colocated", "one-step-off"])
def test_baselines_are_valid(path: Path, name: str, tmp_path: Path, model: Path) -> None:
    workload = load_workload(path)
    try:
        plan = baseline(name, workload, make_cluster(16))
        script = expressed("verl", plan, ()).plan
    except UserError as error:
        pytest.skip(str(error)[:80])
    assert_valid(composed(plan, tmp_path, model), script)
