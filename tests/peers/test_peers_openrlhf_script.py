"""Launch scripts for OpenRLHF, by its own parser and the checks behind it: those of the winners of
all shipped workloads."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import hollow  # isort: skip  # before the peers

import pytest
import ray

from planner.exchange.expressing import expressed
from planner.exchange.openrlhf_script import openrlhf_script
from planner.search import SearchOptions, find
from planner.spec.cluster import make_cluster
from planner.spec.errors import UserError
from planner.spec.files import profiles_dir
from planner.spec.workload_file import load_workload

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

WORKLOADS = sorted((profiles_dir() / "workloads").glob("*.toml"))
VARIABLES = {"MODEL": "/m", "CRITIC": "/c", "REWARD_MODEL": "/r", "REWARD": "/f.py", "TRAIN": "/t"}


class Parsed(Exception):
    """What the parser has made of a script, caught before anything starts."""


def options_of(script: str, folder: Path) -> list[str]:
    (folder / "run.sh").write_text(script)
    (folder / "python3").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (folder / "python3").chmod(0o755)
    known = {**os.environ, **VARIABLES, "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", folder / "run.sh"], env=known, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[2:]


def parsed(options: list[str], monkeypatch: pytest.MonkeyPatch):
    def caught() -> bool:
        raise Parsed(sys._getframe(1).f_locals["args"])

    monkeypatch.setattr(ray, "is_initialized", caught)
    monkeypatch.setattr(sys, "argv", ["train_ppo_ray", *options])
    with pytest.raises(Parsed) as found, hollow.again():
        runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__")
    return found.value.args[0]


@pytest.mark.parametrize("path", WORKLOADS, ids=lambda path: path.stem)
@pytest.mark.parametrize("stale", [0, 1])
def test_winners_are_parsed(path, stale, tmp_path, monkeypatch) -> None:
    options = SearchOptions(framework="openrlhf", scenarios=2, runners_up=0, max_staleness=stale)
    try:
        plan = find(load_workload(path), make_cluster(16), options).best
    except UserError as error:
        pytest.skip(f"no plan: {str(error)[:60]}")
    found = expressed("openrlhf", plan, ())
    args = parsed(options_of(openrlhf_script(found, "test"), tmp_path), monkeypatch)
    workload = plan.workload
    assert args.actor.num_nodes * args.actor.num_gpus_per_node == plan.trainers["actor"].gpus
    assert args.vllm.num_engines == plan.rollout.replicas
    assert args.train.async_enable == (plan.staleness > 0)
    assert args.rollout.batch_size * args.rollout.n_samples_per_prompt == workload.batch
    assert bool(args.critic.model_name_or_path) == (workload.critic is not None)
    assert (args.algo.kl.init_coef > 0) == (workload.reference is not None)
