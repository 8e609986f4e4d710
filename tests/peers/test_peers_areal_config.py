"""Configurations for AReaL, by its own loading and checks: those of the baselines that it knows and
of the winners of all shipped workloads."""

from collections.abc import Iterator
from pathlib import Path

import hollow  # isort: skip  # before the peers

import pytest
from exports import WORKLOADS, expressed_baseline, winner
from hydra.core.global_hydra import GlobalHydra

from planner.exchange.areal_config import AREAL_SECTIONS, areal_config
from planner.exchange.expressing import expressed
from planner.search import baseline
from planner.search.questions.baselines import NAMES
from planner.spec.cluster import make_cluster
from planner.spec.files import profiles_dir
from planner.spec.plan import Plan
from planner.spec.workload_file import load_workload

with hollow.again():
    from areal.api.alloc_mode import ModelAllocation
    from areal.api.cli_args import GRPOConfig, load_expr_config
    from areal.trainer.rl_trainer import PPOTrainer

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name, value in (("MODEL", "/m"), ("TRAIN", "/t.parquet"), ("FILEROOT", str(tmp_path))):
        monkeypatch.setenv(name, value)
    yield
    GlobalHydra.instance().clear()  # AReaL leaves it, and verl wants it anew


def loaded(plan: Plan, folder: Path):
    """The configuration that AReaL makes of a plan's file, after the checks of its trainer."""
    file = folder / "run.yaml"
    file.write_text(areal_config(expressed("areal", plan, ()), "test"))
    config, _ = load_expr_config(["--config", str(file)], GRPOConfig)
    trainer = object.__new__(PPOTrainer)  # whose building would start a fleet
    trainer.config = config
    trainer.actor_alloc = ModelAllocation.from_str(config.actor.backend)
    trainer.rollout_alloc = ModelAllocation.from_str(config.rollout.backend)
    shared = trainer._is_actor_rollout_colocated(config)
    trainer._should_offload_rollout = shared
    trainer._should_offload_actor = shared or config.actor.offload
    trainer._should_offload_critic = config.critic is not None and config.critic.offload
    trainer._should_offload_ref = config.ref is not None and config.ref.offload
    trainer._should_offload_teacher = False
    trainer._validate_cfg()
    return config


def assert_valid(config, plan: Plan) -> None:
    workload = plan.workload
    assert (config.critic is not None) == (workload.critic is not None)
    assert (config.ref is not None and config.actor.kl_ctl > 0) == (workload.reference is not None)
    assert config.train_dataset.batch_size * config.gconfig.n_samples == workload.batch
    assert config.actor.ppo_n_minibatches * workload.minibatch == workload.batch
    assert config.actor.should_compute_prox_logp() == (workload.proximal == "recompute")
    assert config.rollout.max_head_offpolicyness == plan.staleness
    rollout = ModelAllocation.from_str(config.rollout.backend)
    assert rollout.world_size == plan.gpus_of(plan.rollout.pools)
    roles = [role for role in AREAL_SECTIONS if role in plan.trainers]
    hosts = {}
    for role in roles:
        section = getattr(config, AREAL_SECTIONS[role])
        size = ModelAllocation.from_str(section.backend).world_size
        assert size == plan.trainers[role].shard
        strategy = section.scheduling_strategy
        hosts[AREAL_SECTIONS[role]] = strategy.target or AREAL_SECTIONS[role]
        if strategy.type == "colocation":  # a fork of each process of a role that is there already
            target = getattr(config, strategy.target)
            assert ModelAllocation.from_str(target.backend).world_size == size
            assert list(hosts).index(strategy.target) < list(hosts).index(AREAL_SECTIONS[role])
    homes = {plan.roles[role].pools for role in roles}
    assert len(set(hosts.values())) == len(homes)
    if config.rollout.scheduling_strategy.type == "colocation":
        actor = ModelAllocation.from_str(config.actor.backend)
        assert rollout.parallel.dp_size == actor.world_size  # an engine beside each rank
        assert config.vllm.enable_sleep_mode


@pytest.mark.parametrize("path", WORKLOADS, ids=lambda path: path.stem)
@pytest.mark.parametrize("sync", ["boundary", "any"])
def test_winners_are_valid(path: Path, sync: str, tmp_path: Path) -> None:
    plan = winner("areal", path, 32 if path.stem == "70b" else 16, sync=sync)
    assert_valid(loaded(plan, tmp_path), plan)


@pytest.mark.parametrize("path", WORKLOADS, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", NAMES)
def test_baselines_are_valid(path: Path, name: str, tmp_path: Path) -> None:
    plan, executed = expressed_baseline("areal", path, name)
    assert_valid(loaded(plan, tmp_path), executed)


ALGORITHMS = [
    {"advantage": "dr_grpo", "loss": "gspo", "clip_high": 0.28, "dual_clip": 3.0},
    {"advantage": "rloo", "importance": "sequence", "importance_cap": 5.0},
    {"advantage": "reinforce++", "importance": "off", "kl_kind": "k2"},
    {"advantage": "reinforce++-baseline", "importance_cap": 1.0, "oversampling_factor": 2.0},
]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm["advantage"])
def test_algorithms_are_valid(algorithm: dict, tmp_path: Path) -> None:
    workload = load_workload(profiles_dir() / "workloads" / "h200-1.5b-grpo.toml")
    rewards = [{"function": "math-verify"}, {"overlong_buffer": 64, "weight": 0.5}]
    optimizer = {"actor": {"schedule": "cosine", "warmup_steps": 5, "min_lr_ratio": 0.1}}
    workload = workload.changed(
        algorithm=algorithm, reward=None, rewards=rewards, optimizer=optimizer
    )
    plan = baseline("colocated", workload, make_cluster(4))
    config = loaded(plan, tmp_path)
    assert_valid(config, expressed("areal", plan, ()).plan)
    actor = config.actor
    assert (actor.reward_norm is None) == (algorithm["advantage"] == "reinforce++")
    assert (actor.adv_norm is not None) == workload.algorithm.whitens
    level = "sequence" if algorithm.get("loss") == "gspo" else "token"
    assert actor.importance_sampling_level == level
    assert actor.use_decoupled_loss == (workload.algorithm.importance != "off")
    assert (actor.overlong_tokens, actor.overlong_penalty_factor) == (64, 0.5)
    assert actor.optimizer.lr_scheduler_type == "cosine"
    assert actor.optimizer.warmup_steps_proportion == pytest.approx(5 / workload.steps)
