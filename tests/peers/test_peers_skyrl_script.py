"""Launch scripts for SkyRL, by its own parser and checks: those of the baselines that it knows and
of the winners of all shipped workloads."""

import os
import subprocess
from pathlib import Path

import hollow  # isort: skip  # before the peers

import pytest

from planner.exchange.expressing import expressed
from planner.exchange.skyrl_script import SKYRL_SECTIONS, skyrl_script
from planner.search import SearchOptions, baseline, find
from planner.search.questions.baselines import NAMES
from planner.spec.cluster import make_cluster
from planner.spec.errors import UserError
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

WORKLOADS = sorted((profiles_dir() / "workloads").glob("*.toml"))
VARIABLES = {"MODEL": "/m", "CRITIC": "/c", "ENV": "gsm8k", "TRAIN": "/t.parquet"}


def options_of(script: str, folder: Path) -> list[str]:
    """What the shell makes of a script: the arguments that python3 gets."""
    (folder / "run.sh").write_text(script)
    (folder / "python3").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (folder / "python3").chmod(0o755)
    known = {**os.environ, **VARIABLES, "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", folder / "run.sh"], env=known, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[2:]


def parsed(plan: Plan, folder: Path):
    """The configuration that SkyRL makes of a plan's script, after its checks."""
    options = options_of(skyrl_script(expressed("skyrl", plan, ()), "test"), folder)
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
    options = SearchOptions(framework="skyrl", scenarios=2, runners_up=0, max_staleness=stale)
    gpus = 32 if path.stem == "70b" else 16
    plan = find(load_workload(path), make_cluster(gpus), options).best
    assert_valid(parsed(plan, tmp_path), plan)


@pytest.mark.parametrize("path", WORKLOADS, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", NAMES)
def test_baselines_are_valid(path: Path, name: str, tmp_path: Path) -> None:
    workload = load_workload(path)
    try:
        pins = ("actor=8",) if name == "one-step-off" else ()
        plan = baseline(name, workload, make_cluster(16), pins=pins)
        executed = expressed("skyrl", plan, ()).plan
    except UserError as error:
        pytest.skip(str(error)[:80])
    assert_valid(parsed(plan, tmp_path), executed)
