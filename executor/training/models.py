"""The models of the roles: a transformer from a Hugging Face directory or with random weights, and
the outputs that a role needs of it.

A model may compute in bf16, but its outputs (log-probs, values, scores) are fp32.
"""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.utils import logging

from executor.fleet import torch_private
from executor.training import lm_head, loading
from executor.training.packing import Packed, hidden_states, use_packed_attention
from planner.spec.workload import Model, Shape

CLASSES: dict[str, Any] = {
    "actor": AutoModelForCausalLM,
    "reference": AutoModelForCausalLM,
    "critic": AutoModelForTokenClassification,  # one label per token: the value
    "reward": AutoModelForSequenceClassification,
}


class RoleModel(nn.Module):
    """A model as its role uses it: the transformer `model`, and what is read off it."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model


class Policy(RoleModel):
    """The actor and the reference: log-probs `[n, W]` of the response tokens at the sampler's
    temperature; with `entropy` also the entropies there, `[2, n, W]`."""

    def __init__(self, model: PreTrainedModel, temperature: float) -> None:
        super().__init__(model)
        self.temperature = temperature

    def forward(self, batch: Packed, entropy: bool = False) -> Tensor:
        head = self.model.get_output_embeddings()
        assert head.bias is None, "a head with a bias is not supported"
        hidden = hidden_states(self.model, batch)[batch.before]
        log_probs = batch.columns(
            lm_head.log_probs(hidden, head.weight, batch.targets, self.temperature)
        )
        if not entropy:
            return log_probs
        return torch.stack(
            [log_probs, batch.columns(lm_head.entropies(hidden, head.weight, self.temperature))]
        )


class Value(RoleModel):
    """The critic: values `[n, W]` of the states before the response tokens."""

    def forward(self, batch: Packed) -> Tensor:
        hidden = hidden_states(self.model, batch)[batch.before]
        return batch.columns(_scalar(cast(nn.Linear, self.model.score), hidden))


class Score(RoleModel):
    """The reward model: scores `[n]`, read at the last token."""

    def forward(self, batch: Packed) -> Tensor:
        hidden = hidden_states(self.model, batch)[batch.starts[1:] - 1]
        return _scalar(cast(nn.Linear, self.model.score), hidden)


def _scalar(head: nn.Linear, hidden: Tensor) -> Tensor:
    """The output `[S]` of a scalar head, in fp32, for hidden states `[S, H]`."""
    bias = None if head.bias is None else head.bias.float()
    return nn.functional.linear(hidden.float(), head.weight.float(), bias).squeeze(-1)


def wrap(role: str, model: PreTrainedModel, temperature: float) -> RoleModel:
    """The model as its role uses it, on micro-batches without padding."""
    use_packed_attention(model)
    if role == "critic":
        return Value(model)
    return Score(model) if role == "reward" else Policy(model, temperature)


def load(
    role: str, model: Model, seed: int, dtype: torch.dtype, device: torch.device | None = None
) -> PreTrainedModel:
    """A role's whole model on a device (default: the CPU). Raises UserError as `weights_of` and
    `loading.fill` do."""
    found = empty(role, model, dtype)
    loading.fill(found, found, weights_of(role, model, seed, found), device or torch.device("cpu"))
    return found


def check(role: str, model: Model) -> None:
    """Whether a directory holds a role's weights. Raises UserError."""
    weights_of(role, model, 0, empty(role, model, torch.float32))


def empty(role: str, model: Model, dtype: torch.dtype) -> PreTrainedModel:
    """A role's model with its parameters on the meta device. Dropout is off: PPO compares log-probs
    between passes."""
    labels = {} if CLASSES[role] is AutoModelForCausalLM else {"num_labels": 1}
    if model.path is None:
        config = config_of(model.shape, **labels)
    else:
        config = AutoConfig.from_pretrained(
            model.path, local_files_only=True, trust_remote_code=False, **labels
        )
    with torch.device("meta"):
        found: PreTrainedModel = CLASSES[role].from_config(
            config, dtype=dtype, trust_remote_code=False
        )
    _compute_buffers(found)
    if (
        found.can_generate()
        and model.path is not None
        and (model.path / "generation_config.json").is_file()
    ):
        found.generation_config = GenerationConfig.from_pretrained(
            model.path, local_files_only=True
        )
    for module in found.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            cast(Any, module).attention_dropout = 0.0
    return found


def _compute_buffers(model: PreTrainedModel) -> None:
    """Compute on the CPU the buffers that no file holds, such as the rotary frequencies.
    transformers does the same when it loads."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            assert not torch_private.is_stored(module, name), (
                f"{name}: buffers that are stored are not supported"
            )
            setattr(module, name, torch.empty_like(buffer, device="cpu"))
        if any(True for _ in module.buffers(recurse=False)):
            model._init_weights(module)


def weights_of(role: str, model: Model, seed: int, empty: PreTrainedModel) -> loading.Source:
    """Where a role's weights come from. The reference's are the actor's; a critic starts with
    values of 0, unless its directory is a critic that was exported. Raises UserError for a
    directory that lacks what the model needs."""
    what = role if role in ("critic", "reward") else "actor"
    zeros = ("score.",) if role == "critic" and not _holds_value_head(model.path) else ()
    if model.path is None:
        return loading.RandomWeights(seed, what, empty.config.initializer_range, zeros)
    stored = loading.StoredWeights(role, model.path, empty.base_model_prefix, zeros)
    for names, parameter in loading.parameters(empty):
        stored.check(names, parameter.shape)
    return stored


def _holds_value_head(directory: Path | None) -> bool:
    """Whether a directory is a critic that was exported; any other critic starts with values of
    0."""
    if directory is None:
        return False
    architectures = AutoConfig.from_pretrained(directory, local_files_only=True).architectures or []
    return any(name.endswith("ForTokenClassification") for name in architectures)


def config_of(shape: Shape, **more: Any) -> Qwen2Config:
    more["head_dim"] = shape.head_dim  # which the class takes, and does not declare
    return Qwen2Config(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
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


def keep_residual_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let a model that computes in `dtype` add up the outputs of its blocks in fp32. Much of the
    rounding that sets its log-probs apart from an engine's is in that sum."""
    parts = [part for block in blocks(model) for part in block.children()] + list(
        model.base_model.children()
    )
    _cast_output(model.get_input_embeddings(), torch.float32)
    for part in parts:
        if "norm" in type(part).__name__.lower() or "rotary" in type(part).__name__.lower():
            _cast_output(part, dtype)


def _cast_output(module: nn.Module, dtype: torch.dtype) -> None:
    forward = module.forward

    def cast(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        return tuple(x.to(dtype) for x in output) if isinstance(output, tuple) else output.to(dtype)

    module.forward = cast


def compile_blocks(model: PreTrainedModel) -> None:
    """Fuse the operations between the matrix products. Each block is compiled whole, inside of
    FSDP's and recomputation's wrappers, for any number of tokens."""
    torch_private.allow_recompiling(64)  # roles, modes and devices share the code of a block
    for block in blocks(model):
        block.forward = torch.compile(block.forward, dynamic=True)


def eos_tokens(model: PreTrainedModel) -> list[int]:
    """The tokens that end a response; none for random weights."""
    found = getattr(model.generation_config, "eos_token_id", None)
    return listed(model.config.eos_token_id if found is None else found)


def listed(tokens: int | list[int] | None) -> list[int]:
    """Token ids as Hugging Face configurations hold them: one, several or none."""
    return [] if tokens is None else [tokens] if isinstance(tokens, int) else list(tokens)


def export(model: PreTrainedModel, state: dict[str, Tensor], directory: Path) -> None:
    """Write a Hugging Face directory that `from_pretrained` loads (safetensors), without a progress
    bar."""
    logging.disable_progress_bar()
    model.save_pretrained(directory, state_dict=state, safe_serialization=True)
