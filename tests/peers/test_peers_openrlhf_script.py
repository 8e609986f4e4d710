"""Launch scripts for OpenRLHF, by its own parser and the checks behind it: those of the winners of
all shipped workloads."""

import runpy
import sys

import hollow  # isort: skip  # before the peers

import pytest
import ray
from exports import WORKLOADS, program_and_options, winner

from planner.exchange.expressing import expressed
from planner.exchange.openrlhf_script import openrlhf_script

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

VARIABLES = {"MODEL": "/m", "CRITIC": "/c", "REWARD_MODEL": "/r", "REWARD": "/f.py", "TRAIN": "/t"}


class Parsed(Exception):
    """What the parser has made of a script, caught before anything starts."""


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
    plan = winner("openrlhf", path, 16, max_staleness=stale)
    script = openrlhf_script(expressed("openrlhf", plan, ()), "test")
    _, options = program_and_options(script, tmp_path, VARIABLES)
    args = parsed(options, monkeypatch)
    workload = plan.workload
    assert args.actor.num_nodes * args.actor.num_gpus_per_node == plan.trainers["actor"].gpus
    assert args.vllm.num_engines == plan.rollout.replicas
    assert args.train.async_enable == (plan.staleness > 0)
    assert args.rollout.batch_size * args.rollout.n_samples_per_prompt == workload.batch
    assert bool(args.critic.model_name_or_path) == (workload.critic is not None)
    assert (args.algo.kl.init_coef > 0) == (workload.reference is not None)
