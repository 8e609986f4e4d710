"""The small task that is shipped: sort digits, "sort 4 1 3 2 :" -> "1 2 3 4".

`make` writes all that a run needs: prompts, a language model that supervised training left only
partly right, a reward model that tells right answers from wrong ones, and the workload file. All of
it follows from the seed, and takes about a minute of one core.
"""

import copy
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from executor.training import models
from planner.spec.errors import UserError
from planner.spec.files import write_atomic

DIGITS = "0123456789"
SAY_EVERY = 250  # steps, between two lines on the screen
VOCABULARY = ["<pad>", "<eos>", "<unk>", *DIGITS, "sort", ":"]
PAD, EOS, FIRST_DIGIT = 0, 1, VOCABULARY.index("0")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Sizes of the task and how long its models train; the defaults are what `plan task` makes."""

    digits: int = 4
    train_prompts: int = 8192
    held_out_prompts: int = 512
    hidden: int = 128
    layers: int = 2
    heads: int = 8
    kv_heads: int = 4
    batch: int = 64
    exact_match: float = 0.3  # held-out, of greedy decoding: where the actor's training stops
    teacher_steps: int = (
        300  # supervised steps from there to the model that the reward model is made of
    )
    reward_steps: int = 1000

    @property
    def answer_tokens(self) -> int:
        return self.digits + 1  # and the end of the sequence


@dataclass(frozen=True, kw_only=True)
class Made:
    """What `make` achieved on held-out prompts: the share of greedy answers that are right, and the
    share of right and wrong answers that the reward model tells apart."""

    exact_match: float
    reward_accuracy: float


Tell = Callable[[str], None]


def make(
    directory: Path, seed: int = 0, recipe: Recipe | None = None, say: Tell = lambda text: None
) -> Made:
    """Write train.jsonl, eval.jsonl, actor/, reward/, reward.py and workload.toml into `directory`,
    all or nothing, and `say` how far it is.

    Raises UserError if the directory holds something already."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} is not an empty directory; remove it or choose another one")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    except OSError as error:
        raise UserError(
            f"{directory}: cannot be written ({error.strerror or error}); choose another place"
        ) from None
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(
            1
        )  # sums in a fixed order, so that the same models come out on any machine of a kind
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = _make(unfinished, seed, recipe or Recipe(), say)
        unfinished.chmod(0o755)
        os.replace(unfinished, directory)
    finally:
        torch.set_num_threads(threads)
        shutil.rmtree(unfinished, ignore_errors=True)
    return made


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


# --- prompts and answers ---


def make_lines(recipe: Recipe, seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The lines of train.jsonl and eval.jsonl; no prompt occurs twice."""
    count = recipe.train_prompts + recipe.held_out_prompts
    numbers = random.Random(seed).sample(range(10**recipe.digits), count)
    strings = [f"{number:0{recipe.digits}d}" for number in numbers]
    lines = [
        {"prompt": f"sort {' '.join(text)} :", "answer": " ".join(sorted(text))} for text in strings
    ]
    return lines[: recipe.train_prompts], lines[recipe.train_prompts :]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token per word; nothing is added to a prompt."""
    words = {word: number for number, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def encode(tokenizer: PreTrainedTokenizerFast, lines: list[dict[str, str]]) -> Tensor:
    """The prompt, the right answer and the end of the sequence as token ids `[N, T]`. All lines are
    equally long."""
    return torch.tensor(
        tokenizer([f"{line['prompt']} {line['answer']} <eos>" for line in lines])["input_ids"]
    )


def draw(sequences: Tensor, count: int) -> Tensor:
    return sequences[torch.randint(len(sequences), (count,))]


# --- the language model ---


def train_actor(train: Tensor, held_out: Tensor, recipe: Recipe, say: Tell) -> LlamaForCausalLM:
    """Train a model from random weights, supervised, until it answers the wanted share of held-out
    prompts correctly."""
    model = LlamaForCausalLM(_config(recipe))
    optimizer = _optimizer(model, 5e-4)  # slow, so as not to overshoot
    for step in range(2000):
        _supervised_step(model, optimizer, draw(train, recipe.batch), recipe)
        right = exact_match(model, held_out, recipe)
        if right >= recipe.exact_match:
            return model
        if step % SAY_EVERY == 0:
            say(f"The actor gets {right:.0%} right, and stops at {recipe.exact_match:.0%}.")
    raise AssertionError(f"never {recipe.exact_match:.0%} right: {recipe}")


def exact_match(model: LlamaForCausalLM, sequences: Tensor, recipe: Recipe) -> float:
    """The share of prompts that greedy decoding answers correctly. One pass over the right answers
    is enough: decoding gives the right answer exactly if the likeliest token after each of its
    beginnings is the right one."""
    with torch.inference_mode():
        likeliest = _answer_logits(model, sequences, recipe).argmax(-1)
    return (likeliest == sequences[:, -recipe.answer_tokens :]).all(1).float().mean().item()


def _supervised_step(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, right: Tensor, recipe: Recipe
) -> None:
    logits = _answer_logits(model, right, recipe)
    cross_entropy(logits.flatten(0, 1), right[:, -recipe.answer_tokens :].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


def _answer_logits(model: LlamaForCausalLM, sequences: Tensor, recipe: Recipe) -> Tensor:
    """The model's logits `[N, answer_tokens, V]` at each place of the answers."""
    output = model(sequences[:, :-1], use_cache=False, logits_to_keep=recipe.answer_tokens)
    logits: Tensor = output.logits
    return logits


def _config(recipe: Recipe, **more: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=recipe.hidden,
        intermediate_size=2 * recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        **more,
    )


def _optimizer(model: torch.nn.Module, learning_rate: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )


# --- the reward model ---


def train_reward_model(
    actor: LlamaForCausalLM, train: Tensor, recipe: Recipe, say: Tell
) -> LlamaForSequenceClassification:
    """Train a model to say 1 for a right answer and 0 for a wrong one, by least squares. Its score
    at the end of a response is then about the chance that the response is right.

    PPO finds the mistakes of a reward model. Three things let such a small one judge well: it
    starts from a language model that masters the task; it is asked after each token of an answer
    whether all is right so far; and of the perturbed answers it learns from those that it likes
    best.
    """
    teacher = copy.deepcopy(actor)
    optimizer = _optimizer(teacher)
    say("The actor is trained; the reward model learns from a copy that is trained on.")
    for _ in range(recipe.teacher_steps):
        _supervised_step(teacher, optimizer, draw(train, recipe.batch), recipe)
    model = LlamaForSequenceClassification(_config(recipe, num_labels=1))
    model.model.load_state_dict(teacher.model.state_dict())
    sampled = sample(actor, train, recipe)
    optimizer = _optimizer(model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1e-3, total_steps=recipe.reward_steps
    )
    quarter = recipe.batch // 4
    for step in range(recipe.reward_steps):
        if step % SAY_EVERY == 0:
            say(f"The reward model has done {step} of {recipe.reward_steps} steps.")
        chosen = torch.randint(len(train), (quarter,))
        perturbed, originals = _most_liked(model, draw(train, 4 * quarter), quarter, recipe)
        given = torch.cat([draw(train, 2 * quarter), perturbed, sampled[chosen]])
        wanted = torch.cat([given[: 2 * quarter], originals, train[chosen]])
        answer = slice(-recipe.answer_tokens, None)
        right_so_far = (given == wanted)[:, answer].cumprod(1).float()
        scores = model.score(model.model(given, use_cache=False).last_hidden_state)[:, answer, 0]
        (scores - right_so_far)[given[:, answer] != PAD].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model


@torch.no_grad()
def _most_liked(
    model: LlamaForSequenceClassification, right: Tensor, count: int, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """Perturb right answers. Return the `count` wrong ones with the highest scores, and the right
    answers that they were made from."""
    perturbed = perturb(right, recipe)
    scores = model(perturbed).logits[:, 0].masked_fill((perturbed == right).all(1), -torch.inf)
    best = scores.topk(count).indices
    return perturbed[best], right[best]


def reward_accuracy(
    model: LlamaForSequenceClassification, actor: LlamaForCausalLM, held_out: Tensor, recipe: Recipe
) -> float:
    """The share of answers whose score is on their side of 0.5. Half of the answers are right; of
    the wrong ones half are perturbed and half are sampled."""
    sampled = sample(actor, held_out, recipe)
    wrong = torch.cat([sampled, perturb(held_out, recipe)])
    wrong = wrong[(wrong != held_out.repeat(2, 1)).any(1)]
    with torch.inference_mode():
        right_scores, wrong_scores = (model(part).logits[:, 0] for part in (held_out, wrong))
    right_share: float = (right_scores > 0.5).float().mean().item()
    wrong_share: float = (wrong_scores <= 0.5).float().mean().item()
    return (right_share + wrong_share) / 2


def sample(actor: LlamaForCausalLM, sequences: Tensor, recipe: Recipe) -> Tensor:
    """The actor's own answers to the prompts, at temperature 1, padded after their end: `[N,
    T]`."""
    prompts = sequences[:, : -recipe.answer_tokens]
    sampled: Tensor = cast(Any, actor).generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        generation_config=GenerationConfig(
            do_sample=True,
            top_k=0,
            max_new_tokens=recipe.answer_tokens,
            pad_token_id=PAD,
            eos_token_id=EOS,
        ),
    )
    return pad(sampled, (0, sequences.shape[1] - sampled.shape[1]), value=PAD)


def perturb(right: Tensor, recipe: Recipe) -> Tensor:
    """Right answers `[N, T]` with one mistake each: two digits exchanged, the rest cut off, or one
    digit replaced (by another one of the prompt or by any). Half of the answers have a replaced
    digit and are sorted again, because that is the hardest mistake to see. Where digits are equal
    the answer may still be right."""
    rows, start = torch.arange(len(right)), right.shape[1] - recipe.answer_tokens
    here = torch.randint(recipe.digits, (len(right),))
    there = (here + torch.randint(1, recipe.digits, (len(right),))) % recipe.digits
    exchanged, replaced = right.clone(), right.clone()
    exchanged[rows, start + here] = right[rows, start + there]
    exchanged[rows, start + there] = right[rows, start + here]
    place = torch.arange(right.shape[1]) - start - here[:, None]  # from the cut
    cut = right.masked_fill(place == 0, EOS).masked_fill(place > 0, PAD)
    any_digit = FIRST_DIGIT + torch.randint(10, (len(right),))
    replaced[rows, start + here] = torch.where(
        torch.rand(len(right)) < 0.5, right[rows, start + there], any_digit
    )
    sorted_again = replaced.clone()
    sorted_again[:, start:-1] = replaced[:, start:-1].sort(1).values
    choices = torch.stack([exchanged, cut, replaced, sorted_again, sorted_again, sorted_again])
    return choices[torch.randint(len(choices), (len(right),)), rows]


# --- files ---

REWARD_FUNCTIONS = '''\
"""Rewards that need no model. In workload.toml: reward = { function = "reward.py:exact_match" }"""


def exact_match(prompts: list[str], responses: list[str], answers: list[str]) -> list[float]:
    """1 for the right answer, 0 for any other."""
    return [float(response.split() == answer.split()) for response, answer in zip(responses, answers)]


def partial_credit(prompts: list[str], responses: list[str], answers: list[str]) -> list[float]:
    """The share of places that hold the right digit; what is too long or too short loses those places."""
    return [_share(response.split(), answer.split()) for response, answer in zip(responses, answers)]


def _share(given: list[str], wanted: list[str]) -> float:
    return sum(x == y for x, y in zip(given, wanted)) / max(len(given), len(wanted), 1)
'''

WORKLOAD = """\
# Sort digits: `plan task digits`. The actor gets {made.exact_match:.0%} of the held-out prompts right, greedily; the
# reward model tells {made.reward_accuracy:.1%} of right and wrong answers apart. Actor, critic and reference start from
# the same weights.
schema = "splitplan/workload/1"
name = "digits"
batch = 1024
minibatch = 128
prompt = {{ kind = "fixed", tokens = {prompt} }}
response = {{ kind = "fixed", tokens = {response} }}
steps = 60
seed = {seed}

[actor]
path = "actor"

[critic]
path = "actor"  # its value head starts at zero

[reference]
path = "actor"

# To try a Python function instead: function = "reward.py:exact_match", or "reward.py:partial_credit"
[reward]
path = "reward"

[data]
train = "train.jsonl"
evaluation = "eval.jsonl"
evaluate_every = 5

[algorithm]
kl_coef = 0.02
temperature = 0.7
epochs = 1

[optimizer]
actor = {{ lr = 3e-4 }}
critic = {{ lr = 1e-3 }}
"""
