"""The small task that is shipped: sort digits, "sort 4 1 3 2 :" -> "1 2 3 4".

`make` writes all that a run needs: prompts, a language model that supervised training left only
partly right, a reward model that tells right answers from wrong ones, and the workload file. All of
it follows from the seed, and takes about a minute of one core.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from executor.digits.files import REWARD_FUNCTIONS, WORKLOAD
from executor.digits.language_model import exact_match, train_actor
from executor.digits.prompts import build_tokenizer, encode, make_lines
from executor.digits.recipe import Recipe, Tell
from executor.digits.reward_model import reward_accuracy, train_reward_model
from executor.training import models
from planner.spec.directories import check_free, whole_directory
from planner.spec.files import write_atomic


@dataclass(frozen=True, kw_only=True)
class Made:
    """What `make` achieved on held-out prompts: the share of greedy answers that are right, and the
    share of right and wrong answers that the reward model tells apart."""

    exact_match: float
    reward_accuracy: float


def make(
    directory: Path, seed: int = 0, recipe: Recipe | None = None, say: Tell = lambda text: None
) -> Made:
    """Write train.jsonl, eval.jsonl, actor/, reward/, reward.py and workload.toml into `directory`,
    all or nothing, and `say` how far it is.

    Raises UserError if the directory holds something already."""
    check_free(directory)
    threads = torch.get_num_threads()
    try:
        # Sums in a fixed order, so that the same models come out on any machine of a kind.
        torch.set_num_threads(1)
        with whole_directory(directory) as made, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _make(made, seed, recipe or Recipe(), say)
    finally:
        torch.set_num_threads(threads)


def _make(directory: Path, seed: int, recipe: Recipe, say: Tell) -> Made:
    say("Making prompts, an actor and a reward model: a minute or two of one core.")
    tokenizer = build_tokenizer()
    lines = make_lines(recipe, seed)
    train, held_out = (encode(tokenizer, part) for part in lines)
    actor = train_actor(train, held_out, recipe, say)
    reward = train_reward_model(actor, train, recipe, say)
    made = Made(
        exact_match=exact_match(actor, held_out, recipe),
        reward_accuracy=reward_accuracy(reward, actor, held_out, recipe),
    )
    for name, model in (("actor", actor), ("reward", reward)):
        models.export(model, model.state_dict(), directory / name)
        tokenizer.save_pretrained(directory / name)
    for name, part in zip(("train.jsonl", "eval.jsonl"), lines, strict=True):
        write_atomic(directory / name, "".join(json.dumps(line) + "\n" for line in part))
    write_atomic(directory / "reward.py", REWARD_FUNCTIONS)
    prompt_tokens = held_out.shape[1] - recipe.answer_tokens
    workload = WORKLOAD.format(
        prompt=prompt_tokens, response=recipe.answer_tokens, seed=seed, made=made
    )
    write_atomic(directory / "workload.toml", workload)
    return made
