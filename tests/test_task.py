"""The small task: what `plan task digits` writes can be loaded, and is what it says."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from executor.digits.prompts import build_tokenizer, encode, make_lines
from executor.digits.recipe import Recipe
from executor.digits.reward_model import perturb
from executor.digits.task import make
from planner.spec.errors import UserError
from planner.spec.workload_file import load_workload

QUICK = Recipe(
    digits=2,
    train_prompts=60,
    held_out_prompts=30,
    hidden=32,
    exact_match=0.1,
    teacher_steps=20,
    reward_steps=20,
)


SAID: list[str] = []


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("task") / "digits"
    return directory, make(directory, 0, QUICK, SAID.append)


def test_it_says_what_it_does_and_how_far_it_is(made):
    first, actor, *_, last = SAID
    assert first.startswith("Making prompts, an actor and a reward model")
    assert actor == "The actor gets 0% right, and stops at 10%."
    assert last == "The reward model has done 0 of 20 steps."


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_the_sorted_digits_and_no_prompt_is_held_out_and_trained_on(made):
    train, held_out = (lines(made[0] / name) for name in ("train.jsonl", "eval.jsonl"))
    assert len(train) == 60 and len(held_out) == 30
    for line in train + held_out:
        digits = line["prompt"].split()[1:-1]
        assert line["answer"].split() == sorted(digits)
    assert not {line["prompt"] for line in train} & {line["prompt"] for line in held_out}


def test_the_workload_names_what_was_made(made):
    directory, _ = made
    workload = load_workload(directory / "workload.toml")
    assert workload.roles == ("actor", "rollout", "critic", "reference", "reward")
    assert workload.response.longest == QUICK.answer_tokens
    assert workload.data.train == directory / "train.jsonl"
    AutoModelForCausalLM.from_pretrained(directory / "actor")
    assert (
        AutoModelForSequenceClassification.from_pretrained(directory / "reward").config.num_labels
        == 1
    )


def test_the_actor_is_trained_to_the_wanted_share_only(made):
    assert 0.1 <= made[1].exact_match < 0.9


def test_the_seed_decides_the_lines():
    assert make_lines(QUICK, 1) == make_lines(QUICK, 1) != make_lines(QUICK, 2)


def test_perturbed_answers_keep_the_prompt_and_are_mostly_wrong():
    recipe = Recipe()
    torch.manual_seed(0)
    right = encode(build_tokenizer(), make_lines(recipe, 0)[0][:500])
    wrong = perturb(right, recipe)
    start = right.shape[1] - recipe.answer_tokens
    assert (wrong[:, :start] == right[:, :start]).all()
    assert (wrong != right).any(1).float().mean() > 0.6


def test_a_directory_that_holds_something_is_left_alone(made):
    before = sorted(path.name for path in made[0].iterdir())
    with pytest.raises(UserError, match="is there already, and no empty directory"):
        make(made[0], 0, QUICK)
    assert sorted(path.name for path in made[0].iterdir()) == before
