"""The reward model, which tells right answers from wrong ones."""

import copy
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationConfig, LlamaForCausalLM, LlamaForSequenceClassification

from executor.digits.language_model import make_config, make_optimizer, supervised_step
from executor.digits.prompts import EOS, FIRST_DIGIT, PAD, draw
from executor.digits.recipe import SAY_EVERY, Recipe, Tell


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
    optimizer = make_optimizer(teacher)
    say("The actor is trained; the reward model learns from a copy that is trained on.")
    for _ in range(recipe.teacher_steps):
        supervised_step(teacher, optimizer, draw(train, recipe.batch), recipe)
    model = LlamaForSequenceClassification(make_config(recipe, num_labels=1))
    model.model.load_state_dict(teacher.model.state_dict())
    sampled = sample(actor, train, recipe)
    optimizer = make_optimizer(model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1e-3, total_steps=recipe.reward_steps
    )
    quarter = recipe.batch // 4
    for step in range(recipe.reward_steps):
        if step % SAY_EVERY == 0:
            say(f"The reward model has done {step} of {recipe.reward_steps} steps.")
        chosen = torch.randint(len(train), (quarter,))
        perturbed, originals = _most_liked(model, draw(train, 4 * quarter), quarter, recipe)
        right = draw(train, 2 * quarter)
        given = torch.cat([right, perturbed, sampled[chosen]])
        wanted = torch.cat([right, originals, train[chosen]])
        _squared_error(model, given, wanted, recipe).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model


def _squared_error(
    model: LlamaForSequenceClassification, given: Tensor, wanted: Tensor, recipe: Recipe
) -> Tensor:
    """The mean squared error of the scores after each token of the given answers: 1 is right as
    long as all tokens so far are the wanted ones."""
    answer = slice(-recipe.answer_tokens, None)
    right_so_far = (given == wanted)[:, answer].cumprod(1).float()
    hidden = model.model(given, use_cache=False).last_hidden_state
    errors = model.score(hidden)[:, answer, 0] - right_so_far
    mean: Tensor = errors[given[:, answer] != PAD].square().mean()
    return mean


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
