"""The small task: PPO learns it, on-policy and one step off, and so do GRPO and RLOO; none does
where the advantages are wrong."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from executor.digits.recipe import Recipe
from executor.digits.task import make
from executor.running.execute import execute
from executor.running.options import RunOptions
from executor.training import advantages
from planner.predict.schedule import load_plan
from planner.search import SearchOptions, find
from planner.spec.timeline import Timeline
from planner.spec.workload_file import load_workload

STUDY = Path(__file__).parents[1] / "reports" / "learning"
STEPS = 10  # of which the last ends with an evaluation
RECIPE = Recipe(held_out_prompts=128, reward_steps=300)
RIGHT, WRONG = 0.1, 0.05  # a rise of more and of less than that; 0.2 is usual, and none at all


@pytest.fixture(scope="module")
def sorting(tmp_path_factory):
    """With a reward model that is good enough for so few steps, and few prompts held out: the
    actor is asked all of them after each of its steps."""
    directory = tmp_path_factory.mktemp("learning") / "digits"
    return directory, make(directory, 0, RECIPE)


def rises(sorting, tmp_path, staleness, **changes):
    """Train with the best plan of a staleness on two cores; by how much what is said of greedy
    answers to held-out prompts and the score of sampled ones rise."""
    from planner.commands.local import local_cluster

    directory, _ = sorting
    settings = ("data.evaluate_first=true",)
    workload = load_workload(directory / "workload.toml", settings).changed(**changes)
    options = SearchOptions(max_staleness=staleness)
    plan = find(workload, local_cluster(2), options).best
    assert plan.staleness == staleness
    run = execute(plan, name="learning", runs=tmp_path, options=RunOptions(steps=STEPS))
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == STEPS and Timeline.read(run / "timeline.json").steps == STEPS
    scores = [step["score"] for step in metrics]
    right = metrics[-1].keys() & {"exact_match", "evaluation_score"}
    greedy = sum(metrics[-1][name] - metrics[0][f"initial_{name}"] for name in right)
    return greedy, sum(scores[-3:]) / 3 - scores[0]


@pytest.mark.parametrize("staleness", [0, 1, 2, 4])
def test_the_plans_of_the_study_have_the_staleness_of_their_names(staleness):
    assert load_plan(STUDY / f"k{staleness}.json").staleness == staleness


@pytest.mark.parametrize("staleness", [0, pytest.param(1, marks=pytest.mark.nightly)])
def test_it_learns(sorting, on_two_cores, tmp_path, staleness):
    assert min(rises(sorting, tmp_path, staleness)) > RIGHT


@pytest.mark.nightly
@pytest.mark.parametrize(
    "settings",
    [
        {"advantage": "grpo", "kl_kind": "k3", "aggregation": "sequence"},
        {"advantage": "rloo", "clip_high": 0.28, "oversampling_factor": 1.5},
    ],
    ids=lambda settings: settings["advantage"],
)
def test_it_learns_without_a_critic(sorting, on_two_cores, tmp_path, settings):
    """A rule gives the reward: a group's deviation would make much of what a model of rewards sees
    in wrong answers."""
    changes = {
        "critic": None,
        "samples_per_prompt": 4,
        "reward": {"function": f"{sorting[0] / 'reward.py'}:partial_credit"},
        "algorithm": {"temperature": 0.7, "kl_coef": 0.02, **settings},
    }
    greedy, sampled = rises(sorting, tmp_path, 0, **changes)
    assert greedy > WRONG and sampled > 2 * RIGHT


@pytest.mark.nightly
@pytest.mark.parametrize("factor", [pytest.param(0.0, id="zero"), pytest.param(-1.0, id="flipped")])
def test_it_does_not_learn_from_wrong_advantages(
    sorting, on_two_cores, tmp_path, monkeypatch, factor
):
    """The test above would notice: with the advantages at zero or of the other sign nothing
    rises."""
    right = advantages.estimate

    def wrong(**arguments):
        found = right(**arguments)
        return replace(found, advantages=factor * found.advantages)

    monkeypatch.setattr(advantages, "estimate", wrong)
    assert max(rises(sorting, tmp_path, 0)) < WRONG
