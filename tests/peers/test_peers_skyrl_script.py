"""Launch scripts for SkyRL, by its own parser and checks: those of the baselines that it knows and
of the winners of all shipped workloads."""

from pathlib import Path

import hollow  # isort: skip  # before the peers

import pytest
from exports import WORKLOADS, expressed_baseline, program_and_options, winner

from planner.exchange.expressing import expressed
from planner.exchange.skyrl_script import SKYRL_SECTIONS, skyrl_script
from planner.search import baseline
from planner.search.questions.baselines import NAMES
from planner.spec.cluster import make_cluster
from planner.spec.files import profiles_dir
from planner.spec.plan import Plan
from planner.spec.workload_file import load_workload

with hollow.again():
    import skyrl.tinker.types  # hollow: pydantic refuses it under Python 3.11
    from skyrl.backends.skyrl_train.inference_servers import utils
    from skyrl.backends.skyrl_train.utils import ppo_utils
    from skyrl.train.config import SkyRLTrainConfig
    from skyrl.train.utils.utils import validate_cfg

assert ppo_utils and utils and skyrl.tinker.types  # which the checks import
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

VARIABLES = {"MODEL": "/m", "CRITIC": "/c", "ENV": "gsm8k", "TRAIN": "/t.parquet"}


def parsed(plan: Plan, folder: Path):
    """The configuration that SkyRL makes of a plan's script, after its checks."""
    script = skyrl_script(expressed("skyrl", plan, ()), "test")
    _, options = program_and_options(script, folder, VARIABLES)
    config = SkyRLTrainConfig.from_cli_overrides(options)
    validate_cfg(config)
    return config


def assert_valid(config, plan: Plan) -> None:
    workload, trainer, engines = plan.workload, config.trainer, config.generator.inference_engine
    samples = config.generator.n_samples_per_prompt
    assert trainer.train_batch_size * samples == workload.batch
    assert trainer.policy_mini_batch_size * samples == workload.minibatch
    assert bool(trainer.critic.model.path) == (workload.critic is not None)
    algorithm = trainer.algorithm
    assert (algorithm.use_kl_loss or algorithm.use_kl_in_reward) == (workload.reference is not None)
    engine_gpus = engines.num_engines * engines.tensor_parallel_size
    assert engine_gpus == plan.gpus_of(plan.rollout.pools)
    together = trainer.placement.colocate_all
    for role, name in SKYRL_SECTIONS.items():
        if role not in plan.trainers:
            continue
        nodes = getattr(trainer.placement, f"{name}_num_nodes")
        gpus = nodes * getattr(trainer.placement, f"{name}_num_gpus_per_node")
        layout = plan.trainers[role]
        assert gpus == layout.gpus
        assert not together or gpus == engine_gpus  # else it refuses to build the models
        size = getattr(trainer, name).fsdp_config.fsdp_size
        assert (gpus if size == -1 else size) == layout.shard
        assert trainer.max_tokens_per_microbatch == layout.micro_batch_tokens
        shares = together or (name != "critic" and trainer.placement.colocate_policy_ref)
        alone = role == "actor" and "reference" not in plan.trainers and not together
        assert (layout.offload == "all") == (shares and not alone)


@pytest.mark.parametrize("path", WORKLOADS, ids=lambda path: path.stem)
@pytest.mark.parametrize("stale", [0, 1])
def test_winners_are_valid(path: Path, stale: int, tmp_path: Path) -> None:
    plan = winner("skyrl", path, 32 if path.stem == "70b" else 16, max_staleness=stale)
    assert_valid(parsed(plan, tmp_path), plan)


@pytest.mark.parametrize("path", WORKLOADS, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", NAMES)
def test_baselines_are_valid(path: Path, name: str, tmp_path: Path) -> None:
    plan, executed = expressed_baseline("skyrl", path, name)
    assert_valid(parsed(plan, tmp_path), executed)


ALGORITHMS = [
    {"advantage": "dr_grpo", "loss": "gspo", "aggregation": "constant", "ratio_mask": "sequence"},
    {"advantage": "rloo", "loss": "cispo", "clip_high": 0.28, "ratio_mask": "token"},
    {"advantage": "reinforce++", "dual_clip": 3.0, "kl_target": 0.1, "ratio_mask": "geometric"},
    {"advantage": "grpo", "importance": "off", "kl_kind": "k2", "epochs": 2, "entropy_coef": 0.01},
]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm["advantage"])
def test_algorithms_are_valid(algorithm: dict, tmp_path: Path) -> None:
    workload = load_workload(profiles_dir() / "workloads" / "h200-1.5b-grpo.toml")
    cuts = "importance" not in algorithm  # which importance weights put right
    sampling = {"top_k": 20, "min_tokens": 4} if cuts else {}
    workload = workload.changed(
        algorithm={**algorithm, "oversampling_factor": 1.5, "mask_truncated": True},
        sampling=sampling,
        optimizer={"actor": {"schedule": "linear", "warmup_steps": 5}},
    )
    plan = baseline("colocated", workload, make_cluster(4))
    config = parsed(plan, tmp_path)
    assert_valid(config, expressed("skyrl", plan, ()).plan)
    theirs, ours = config.trainer.algorithm, workload.algorithm
    losses = {"ppo": "dual_clip" if ours.dual_clip else "regular"}
    assert theirs.policy_loss_type == losses.get(ours.loss, ours.loss)
    assert theirs.grpo_norm_by_std == (ours.advantage != "dr_grpo")
    correction = theirs.off_policy_correction
    weighs = None if ours.importance == "off" else ours.importance
    assert correction.tis_ratio_type == weighs
    metrics = {"sequence": "product", "geometric": "geometric"}
    assert correction.sequence_mask_metric == metrics.get(ours.ratio_mask)
    assert (correction.token_mask_is_threshold_high == 2.0) == (ours.ratio_mask == "token")
    assert (theirs.kl_ctrl.type == "adaptive") == (ours.kl_target is not None)
    assert theirs.dynamic_sampling.type == "filter" and config.generator.apply_overlong_filtering
    more = config.generator.sampling_params.additional_kwargs
    assert more == ({"min_tokens": 4} if cuts else None)
    updates = workload.batch // workload.minibatch * ours.epochs
    assert config.trainer.policy.optimizer_config.num_warmup_steps == 5 * updates
    assert config.trainer.update_epochs_per_batch == ours.epochs
