"""The models of the roles: a transformer from a Hugging Face directory or of random weights, and what is read off it.

Batches are right-padded, so under a causal mask padding reaches no real token and no attention mask is needed.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    Qwen2Config,
)

from executor.ppo import before_response
from planner.spec.workload import Model, Shape

CLASSES: dict[str, Any] = {
    "actor": AutoModelForCausalLM,
    "reference": AutoModelForCausalLM,
    "critic": AutoModelForTokenClassification,  # one label per token: the value
    "reward": AutoModelForSequenceClassification,
}
TRAINED = ("actor", "critic")


class Policy(nn.Module):
    """Actor and reference: logits `[B, R, V]` for the response tokens."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, prompt_lengths: Tensor, response_lengths: Tensor, width: int) -> Tensor:
        hidden = before_response(_hidden(self.model, tokens), prompt_lengths, width)
        return self.model.get_output_embeddings()(hidden)


class Value(nn.Module):
    """The critic: values `[B, R]` of the states before the response tokens."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, prompt_lengths: Tensor, response_lengths: Tensor, width: int) -> Tensor:
        hidden = before_response(_hidden(self.model, tokens), prompt_lengths, width)
        return self.model.score(hidden).squeeze(-1)


class Score(nn.Module):
    """The reward model: scores `[B]`, read at the last token."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, prompt_lengths: Tensor, response_lengths: Tensor, width: int) -> Tensor:
        last = prompt_lengths + response_lengths - 1
        hidden = _hidden(self.model, tokens)[torch.arange(len(tokens), device=tokens.device), last]
        return self.model.score(hidden).squeeze(-1)


def _hidden(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    return model.base_model(input_ids=tokens, use_cache=False).last_hidden_state


WRAPPERS: dict[str, type[nn.Module]] = {"actor": Policy, "reference": Policy, "critic": Value, "reward": Score}


def load(role: str, model: Model, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    """A role's model on the CPU, the same on every rank. Dropout is off: PPO compares log-probs between passes."""
    labels = {} if CLASSES[role] is AutoModelForCausalLM else {"num_labels": 1}
    if model.path is None:
        torch.manual_seed(seed + 1000 * (role == "critic") + 2000 * (role == "reward"))  # the reference is the actor
        loaded = CLASSES[role].from_config(config_of(model.shape, **labels), dtype=dtype)
    else:
        config = AutoConfig.from_pretrained(model.path, local_files_only=True, trust_remote_code=False, **labels)
        loaded = CLASSES[role].from_pretrained(
            model.path,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    for module in loaded.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    if role == "critic" and not _holds_value_head(model.path):
        nn.init.zeros_(loaded.score.weight)
        nn.init.zeros_(loaded.score.bias)
    return loaded


def _holds_value_head(directory: Path | None) -> bool:
    """Whether a directory is a critic that was exported; any other critic starts with values of 0."""
    if directory is None:
        return False
    architectures = AutoConfig.from_pretrained(directory, local_files_only=True).architectures or []
    return any(name.endswith("ForTokenClassification") for name in architectures)


def config_of(shape: Shape, **more: Any) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied_embeddings,
        max_position_embeddings=32768,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        **more,
    )


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer's layers: what FSDP shards one by one."""
    lists = [module for module in model.base_model.children() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len)


def eos_tokens(model: PreTrainedModel) -> list[int]:
    """The tokens that end a response; none for random weights."""
    found = getattr(model.generation_config, "eos_token_id", None)
    found = model.config.eos_token_id if found is None else found
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def export(model: PreTrainedModel, state: dict[str, Tensor], directory: Path) -> None:
    """Write a Hugging Face directory that `from_pretrained` loads (safetensors)."""
    model.save_pretrained(directory, state_dict=state, safe_serialization=True)
