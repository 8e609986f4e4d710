"""What a Hugging Face `config.json` says of a model, and whether splitplan computes models of that
kind right. `docs/models.md` lists the model types; `tests/test_models.py` tries each of them."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.spec.errors import UserError
from planner.spec.files import read_data

Config = Mapping[str, Any]

# Keys whose numbers say how large something is that a library then makes.
SIZES = re.compile(r"^(num|n)_|_(size|dim|rank)$")
MOST = 2**24  # of anything, as of the tokens of a vocabulary
MOST_LABELS = 10_000  # each gets a name
SOFTMAX = {"full_attention", "sliding_attention"}  # kinds of layers
FIXED_ROPE = {"default", "linear", "llama3", "yarn"}
ROPE_BY_LENGTH = {"dynamic", "longrope"}  # another scaling from some length on


@dataclass(frozen=True, kw_only=True)
class ModelType:
    """What a model type does where its config.json is silent (0 key heads: one for each query
    head; head size 0: hidden / heads), whether its MLP is gated, whether it may have fewer key
    heads or other sizes of heads at all, and whether every version of vLLM computes it too."""

    tied: bool = False
    kv_heads: int = 0
    head_dim: int = 0
    gated: bool = True
    grouped: bool = True
    in_vllm: bool = True


MODEL_TYPES = {
    "cohere": ModelType(tied=True),
    "cohere2": ModelType(tied=True, in_vllm=False),  # its windows are one token wider there
    "gemma": ModelType(tied=True, kv_heads=16, head_dim=256),
    "gemma2": ModelType(tied=True, kv_heads=4, head_dim=256),
    "gemma3_text": ModelType(tied=True, kv_heads=4, head_dim=256),
    "glm": ModelType(kv_heads=2, head_dim=128),
    "glm4": ModelType(kv_heads=2, head_dim=128),
    "gpt_neox": ModelType(gated=False, grouped=False),
    "granite": ModelType(),
    "helium": ModelType(kv_heads=20, head_dim=128),
    "llama": ModelType(),
    "mistral": ModelType(kv_heads=8),
    "olmo": ModelType(),
    "olmo2": ModelType(),
    "olmo3": ModelType(in_vllm=False),  # 0.25 does not start
    "phi": ModelType(gated=False, in_vllm=False),  # newer versions lose the bias of its head
    "phi3": ModelType(),
    "qwen2": ModelType(kv_heads=32),
    "qwen3": ModelType(kv_heads=32, head_dim=128),
    "seed_oss": ModelType(kv_heads=8, head_dim=128),
    "smollm3": ModelType(tied=True, kv_heads=4),
    "starcoder2": ModelType(tied=True, kv_heads=2, gated=False),
}


BIASED = {"qwen3": False, "seed_oss": True}  # whether vLLM gives their attention biases


def sizes(config: Config) -> dict[str, Any]:
    """The fields of a `Shape`, of a model that is supported. An MLP without a gate has two matrices
    instead of three; it counts as a gated one with as many parameters. Raises KeyError."""
    kind = MODEL_TYPES[config["model_type"]]
    heads, width = config["num_attention_heads"], config["intermediate_size"]
    return {
        "hidden": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": heads,
        "kv_heads": (kind.grouped and config.get("num_key_value_heads", kind.kv_heads)) or heads,
        "intermediate": width if kind.gated else -(-2 * width // 3),
        "vocab": config["vocab_size"],
        "head_dim": (kind.grouped and config.get("head_dim", kind.head_dim)) or 0,
        "tied_embeddings": bool(config.get("tie_word_embeddings", kind.tied)),
    }


def obstacle(config: Config) -> str | None:
    """Why a model of this configuration is refused, and what to do; None if it is supported."""
    others = set(config.get("layer_types") or ()) - SOFTMAX
    if config.get("quantization_config") or config.get("compression_config"):
        return "its weights are quantised (quantization_config); use a checkpoint in bf16 or fp32"
    if any(config.get(key) for key in ("vision_config", "audio_config", "text_config")):
        return (
            "it is more than a language model (vision or audio parts); save its language model "
            "alone and name that"
        )
    if config.get("normalize_reward"):
        return "its scores are normalised (normalize_reward of OpenRLHF); fold that into its head"
    if any("expert" in key and value for key, value in config.items()):
        return f"it is a mixture of experts, which is not supported; {_use_another()}"
    if config.get("kv_lora_rank"):
        return f"its attention is latent (kv_lora_rank), which is not supported; {_use_another()}"
    if others or any(key.startswith(("mamba_", "ssm_", "conv_")) for key in config):
        told = ", ".join(sorted(map(str, others))) or "state spaces or convolutions"
        return f"it has layers without softmax attention ({told}); {_use_another()}"
    if config.get("is_encoder_decoder") or config.get("use_bidirectional_attention"):
        return f"its attention is not causal; {_use_another()}"
    if "model_type" not in config:
        return "it names no model_type; save the model again with save_pretrained"
    if config["model_type"] not in MODEL_TYPES:
        return f"model_type {config.get('model_type')!r} is not supported; {_use_another()}"
    for key, value in config.items():
        most = MOST_LABELS if key == "num_labels" else MOST
        if SIZES.search(key) and isinstance(value, int | float) and value > most:
            return f"its {key} is {value:,}, and no model has more than {most:,}; correct it there"
    window = config.get("sliding_window")
    if not _is_size(window) or isinstance(window, float):
        return (
            f"its sliding_window is {window!r}; set it to a number of tokens, or to null for none"
        )
    for rope in _ropes(config):
        for key in ("factor", "original_max_position_embeddings"):
            if not _is_size(rope.get(key, 1)):
                return f"its rotary scaling has {key} = {rope[key]!r}, which is no positive number"
    unknown = {rope["kind"] for rope in _ropes(config)} - FIXED_ROPE - ROPE_BY_LENGTH
    if unknown:
        return f"its rotary scaling {min(unknown)!r} is not supported; {_use_another()}"
    return None


def _is_size(value: Any) -> bool:
    """Whether a value is a positive number, or left out."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (number and value > 0)


def vllm_obstacle(config: Config) -> str | None:
    """What of a supported model vLLM does not compute as transformers does, in one of its versions
    at least; None if there is nothing. `tests/test_vllm_models.py` tries all others."""
    kind = str(config.get("model_type"))
    if not MODEL_TYPES[kind].in_vllm:
        return f"models of type {kind}"
    if kind in ("qwen2", "qwen3") and config.get("use_sliding_window"):
        return f"windows in models of type {kind} (use_sliding_window)"
    if kind == "olmo" and sizes(config)["kv_heads"] < config["num_attention_heads"]:
        return f"fewer key heads than query heads in models of type {kind}"
    usual = BIASED.get(kind)
    if usual is not None and config.get("attention_bias", usual) != usual:
        return f"attention_bias = {not usual} in models of type {kind}"
    return None


def check_vllm(directory: Path, role: str) -> None:
    """Whether vLLM computes a model as transformers does; of a directory that is not here nothing
    is known. Raises UserError."""
    if not (directory / "config.json").is_file():
        return
    reason = vllm_obstacle(read_config(directory, role))
    if reason is not None:
        raise UserError(
            f"{role}: engine vllm cannot be used for {directory}: it does not compute {reason} as "
            "training does; use another model, or engine transformers in the plan"
        )


def _use_another() -> str:
    return f"use a dense model ({', '.join(MODEL_TYPES)})"


def positions(config: Config) -> tuple[int, str] | None:
    """The tokens up to which a model's positions are meant, and the key that says so; None where
    nothing does. Scaling that depends on the length of a batch is the same for all sequences only
    up to the length where it begins."""
    most = config.get("max_position_embeddings")
    if not isinstance(most, int):
        return None
    limit, key = most, "max_position_embeddings"
    for rope in _ropes(config):
        original = rope.get("original_max_position_embeddings") or config.get(
            "original_max_position_embeddings"
        )
        if rope["kind"] == "longrope":
            limit = min(limit, original or most)
            key = "original_max_position_embeddings" if limit < most else key
        elif rope["kind"] in ("linear", "yarn"):
            limit = max(limit, int((original or most) * (rope.get("factor") or 1)))
    return limit, key


def _ropes(config: Config) -> Iterator[dict[str, Any]]:
    """The rotary scalings, with their `kind`: one, or one for each kind of layers."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    for each in [found, *found.values()]:
        if isinstance(each, dict) and (kind := each.get("rope_type") or each.get("type")):
            yield {**each, "kind": str(kind)}


def read_config(directory: Path, named_by: str) -> Config:
    """The `config.json` of a model directory. Raises UserError where there is none, or for a model
    that is not supported."""
    file, adapter = directory / "config.json", directory / "adapter_config.json"
    if adapter.is_file():
        raise UserError(
            f"{named_by}: {adapter} says that this is an adapter (LoRA) of a model; merge the two "
            "(merge_and_unload of PEFT) and name what is saved then"
        )
    if not file.is_file() and any(directory.glob("*.gguf")):
        raise UserError(
            f"{named_by}: {directory} holds GGUF, which cannot be trained; name the directory of "
            "the safetensors that it was made from"
        )
    if not file.is_file():
        raise UserError(
            f"{named_by}: no model directory at {directory} (config.json is missing); check the "
            "path"
        )
    config = read_data(file)
    try:
        reason = obstacle(config)
    except (AttributeError, TypeError):  # lists for tables, and the like
        reason = "it is not what save_pretrained writes; save the model again"
    if reason is not None:
        raise UserError(f"{file}: {reason}")
    return config


def check_length(directory: Path, role: str, longest: int, longest_prompt: int) -> None:
    """Whether a model has positions for the longest sequence. Raises UserError."""
    found = positions(read_config(directory, role))
    if found is None or longest <= found[0]:
        return
    limit, key = found
    response = limit - longest_prompt
    advice = (
        f"let responses have at most {response:,}"
        if response > 0
        else f"prompts alone have up to {longest_prompt:,}; shorten both"
    )
    raise UserError(
        f"{role}: a prompt and its response may have {longest:,} tokens, and {directory}/"
        f"config.json allows {limit:,} ({key}); {advice}"
    )
