"""The actor: a language model that supervised training left only partly right."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from executor.digits.prompts import EOS, PAD, VOCABULARY, draw
from executor.digits.recipe import SAY_EVERY, Recipe, Tell


def train_actor(train: Tensor, held_out: Tensor, recipe: Recipe, say: Tell) -> LlamaForCausalLM:
    """Train a model from random weights, supervised, until it answers the wanted share of held-out
    prompts correctly."""
    model = LlamaForCausalLM(make_config(recipe))
    optimizer = make_optimizer(model, 5e-4)  # slow, so as not to overshoot
    for step in range(2000):
        supervised_step(model, optimizer, draw(train, recipe.batch), recipe)
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


def supervised_step(
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


def make_config(recipe: Recipe, **more: Any) -> LlamaConfig:
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


def make_optimizer(model: torch.nn.Module, learning_rate: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
