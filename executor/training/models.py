"""The models of the roles: a transformer from a Hugging Face directory or with random weights, and
the outputs that a role needs of it.

A model may compute in bf16, but its outputs (log-probs, values, scores) are fp32.
"""

import copy
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.utils import logging

from executor.fleet import torch_private
from executor.training import lm_head, loading
from executor.training.packing import Packed, hidden_states, use_packed_attention
from executor.training.residual import blocks
from planner.spec.errors import UserError
from planner.spec.wording import reason_of
from planner.spec.workload import Model, Shape, head_of

MISCOUNT = 0.05  # of the parameters: a shape counts neither biases nor all norms
# A critic has one label per token: the value.
OF_TOKENS: Any = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING, GenericForTokenClassification
OF_SEQUENCES: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, GenericForSequenceClassification


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
        hidden = hidden_states(self.model, batch)[batch.before]
        settings: dict[str, Any] = {"bias": head.bias, "shaping": shaping_of(self.model.config)}
        given = hidden, head.weight, batch.targets, self.temperature
        if not entropy:
            return batch.columns(lm_head.log_probs(*given, **settings))
        both = lm_head.log_probs_and_entropies(*given, **settings)
        return torch.stack([batch.columns(part) for part in both])


class Value(RoleModel):
    """The critic: values `[n, W]` of the states before the response tokens."""

    def forward(self, batch: Packed) -> Tensor:
        hidden = hidden_states(self.model, batch)[batch.before]
        return batch.columns(_scalar(scalar_head(self.model), hidden))


class Score(RoleModel):
    """The reward model: scores `[n]`, read at the last token."""

    def forward(self, batch: Packed) -> Tensor:
        hidden = hidden_states(self.model, batch)[batch.starts[1:] - 1]
        return _scalar(scalar_head(self.model), hidden)


def shaping_of(config: PreTrainedConfig) -> lm_head.Shaping:
    """What a model does to the products of its head: Cohere multiplies them, Granite divides them,
    Gemma 2 bounds them."""
    factor = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None)
    return lm_head.Shaping(scale=factor / divisor, cap=cap)


def scalar_head(model: PreTrainedModel) -> nn.Linear:
    """The head of a critic or a reward model, under the name that it has in its class."""
    found = next(head for name in loading.HEADS if (head := getattr(model, name, None)))
    return cast(nn.Linear, found)


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
    try:
        found = empty(role, model, torch.float32)
    except UserError:
        raise
    except Exception as error:  # whatever a configuration makes transformers raise
        reason = reason_of(error, named=True)
        raise UserError(
            f"{role}: transformers cannot make the model of {model.path}/config.json ({reason}); "
            "save the model again"
        ) from None
    weights_of(role, model, 0, found)
    if role == "actor":
        _check_ends(role, model, found)
    counted = sum(parameter.numel() for parameter in found.parameters())
    planned = model.shape.parameters(head_of(role))
    if abs(planned - counted) > MISCOUNT * counted:
        raise UserError(
            f"{role}: {model.path} has {counted:,} parameters, and {planned:,} are planned for; "
            "its structure is not supported, use another model"
        )


def _check_ends(role: str, model: Model, found: PreTrainedModel) -> None:
    """Whether what ends a text are tokens. Raises UserError."""
    for token in eos_tokens(found):
        if not isinstance(token, int) or not 0 <= token < model.shape.vocab:
            raise UserError(
                f"{role}: {model.path} ends texts with {token!r} (eos_token_id of "
                f"generation_config.json or config.json), which is none of its "
                f"{model.shape.vocab:,} tokens; correct it there"
            )


def empty(role: str, model: Model, dtype: torch.dtype) -> PreTrainedModel:
    """A role's model with its parameters on the meta device. Dropout is off: PPO compares log-probs
    between passes."""
    config = config_for(role, model)
    with torch.device("meta"):
        found = build(role, config, dtype)
    _compute_buffers(found)
    if (
        found.can_generate()
        and model.path is not None
        and (model.path / "generation_config.json").is_file()
    ):
        found.generation_config = GenerationConfig.from_pretrained(
            model.path, local_files_only=True
        )
    _drop_nothing(found)
    return found


def config_for(role: str, model: Model) -> PreTrainedConfig:
    """The configuration of a role's model, with one label for a scalar head."""
    labels = {} if head_of(role) == "lm" else {"num_labels": 1}
    if model.path is None:
        return config_of(model.shape, **labels)
    found: PreTrainedConfig = AutoConfig.from_pretrained(
        model.path, local_files_only=True, trust_remote_code=False, **labels
    )
    return found


def build(role: str, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A role's model of a configuration, as transformers initialises it, on torch's default
    device."""
    config = copy.deepcopy(config)
    config.dtype = dtype
    config._attn_implementation = None  # a file may ask for one that is not installed
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found: PreTrainedModel = _class_of(role, config)(config)
    finally:
        torch.set_default_dtype(before)
    return found


def stored_names(model: PreTrainedModel) -> dict[str, str]:
    """What files call each parameter. transformers renames some while it loads, as the head of
    GPT-NeoX; what reads files itself, as an engine does, expects the names that are there."""
    named: dict[str, Tensor] = dict(model.named_parameters())
    names = {id(tensor): name for name, tensor in revert_weight_conversion(model, named).items()}
    return {name: names[id(tensor)] for name, tensor in named.items()}


def _class_of(role: str, config: PreTrainedConfig) -> Any:
    """The class of transformers that makes a role's model. Some model types have none for critics
    or reward models; theirs is put together as transformers does it for the others."""
    kind = type(config)
    if head_of(role) == "lm":
        return MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    known, part = OF_TOKENS if role == "critic" else OF_SEQUENCES
    if kind in known:
        return known[kind]
    base: Any = MODEL_MAPPING[kind]
    name = base.__name__.removesuffix("Model") + part.__name__.removeprefix("Generic")
    return type(name, (part, base.__mro__[1]), {"config_class": kind})


def _drop_nothing(model: PreTrainedModel) -> None:
    """Turn off dropout, whatever a model calls its probability."""
    for module in model.modules():
        names = [name for name, value in vars(module).items() if isinstance(value, float)]
        dropout = [name for name in names if "drop" in name]
        if type(module).__name__.endswith("Dropout"):
            dropout.append("p")
        for name in dropout:
            setattr(module, name, 0.0)


def _compute_buffers(model: PreTrainedModel) -> None:
    """Compute on the CPU the buffers that no file holds, such as the rotary frequencies.
    transformers does the same when it loads. Raises UserError for those that it leaves out."""
    for module in model.modules():
        buffers = dict(module.named_buffers(recurse=False))
        for name, buffer in buffers.items():
            if torch_private.is_stored(module, name) or not buffer.is_floating_point():
                raise _buffer_error(model, name)
            setattr(module, name, torch.full_like(buffer, torch.nan, device="cpu"))
        if buffers:
            model._init_weights(module)
        for name in buffers:
            if not getattr(module, name).isfinite().all():
                raise _buffer_error(model, name)


def _buffer_error(model: PreTrainedModel, name: str) -> UserError:
    return UserError(
        f"models of type {model.config.model_type} keep {name} besides their parameters, which is "
        "not supported; use another model"
    )


def weights_of(role: str, model: Model, seed: int, empty: PreTrainedModel) -> loading.Source:
    """Where a role's weights come from. The reference's are the actor's; a critic starts with
    values of 0, unless its directory has a scalar head, be it a critic's or a reward model's.
    Raises UserError for a directory that lacks what the model needs, or has more."""
    what = role if head_of(role) == "scalar" else "actor"
    if model.path is None:
        zeros = tuple(f"{name}." for name in loading.HEADS) if role == "critic" else ()
        return loading.RandomWeights(seed, what, empty.config.initializer_range, zeros)
    stored = loading.StoredWeights(role, model.path, empty.base_model_prefix)
    stored.check(empty)
    return stored


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


def compile_blocks(model: PreTrainedModel) -> None:
    """Fuse the operations between the matrix products. Each block is compiled whole, inside of
    FSDP's and recomputation's wrappers, for any number of tokens."""
    torch_private.allow_recompiling(64)  # roles, modes and devices share the code of a block
    torch_private.fuse_alike_for_any_size()
    for block in blocks(model):
        block.forward = torch.compile(block.forward, dynamic=True)


def eos_tokens(model: PreTrainedModel) -> list[int]:
    """The tokens that end a response; none for random weights."""
    found = getattr(model.generation_config, "eos_token_id", None)
    return listed(model.config.eos_token_id if found is None else found)


def listed(tokens: int | list[int] | None) -> list[int]:
    """Token ids as Hugging Face configurations hold them: one, several or none."""
    return [] if tokens is None else list(tokens) if isinstance(tokens, list) else [tokens]


def export(model: PreTrainedModel, state: dict[str, Tensor], directory: Path) -> None:
    """Write a Hugging Face directory that `from_pretrained` loads (safetensors), without a progress
    bar."""
    logging.disable_progress_bar()
    model.save_pretrained(directory, state_dict=state, safe_serialization=True)
