"""Launch scripts for verl, by verl's own composing and checks: those of the baselines that it knows
and of the winners of all shipped workloads."""

from pathlib import Path

import hollow  # isort: skip  # before the peers

import pytest
from exports import WORKLOADS, expressed_baseline, program_and_options, winner

from planner.exchange.expressing import expressed
from planner.exchange.verl_script import verl_script
from planner.spec.plan import Plan

with hollow.again():
    import verl
    from verl.trainer.ppo.utils import need_critic, need_reference_policy, need_reward_model
    from verl.utils.config import omega_conf_to_dataclass, validate_config

hydra = pytest.importorskip("hydra")

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory: verl reads the configurations and tokenizers of models."""
    from transformers import LlamaConfig

    from executor.digits.prompts import build_tokenizer

    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def composed(plan: Plan, folder: Path, model: Path):
    """The configuration that verl makes of a plan's script, after its checks."""
    from hydra import compose, initialize_config_dir

    variables = dict.fromkeys(("MODEL", "CRITIC", "REWARD_MODEL"), str(model))
    variables["TRAIN"] = "/t.parquet"
    script = verl_script(expressed("verl", plan, ()), "test")
    program, options = program_and_options(script, folder, variables)
    assert program == "verl.trainer.main_ppo"
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
    plan = winner("verl", path, gpus)
    assert_valid(composed(plan, tmp_path, model), plan)


@pytest.mark.parametrize("path", WORKLOADS, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", ["colocated", "one-step-off"])
def test_baselines_are_valid(path: Path, name: str, tmp_path: Path, model: Path) -> None:
    plan, executed = expressed_baseline("verl", path, name)
    assert_valid(composed(plan, tmp_path, model), executed)
