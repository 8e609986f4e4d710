"""Whether what is computed for a role is what transformers computes, tried on a small model of the
same kind before anything starts.

The small model has the configuration of the role's own, with everything that shapes a forward pass
(scales, caps, windows, biases, rotary scaling, norms, dropout), but few layers, heads and tokens,
and random weights that are large enough for each of these to show. It is written to a directory and
read back as the role's would be. So the check takes about a second for a model of any size, sharded
or not. That the role's own tensors are all there, of the right shapes and nothing else, is checked
in `loading.StoredWeights`.
"""

import math
import tempfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from executor.data.batch import Sequences
from executor.training import models
from executor.training.packing import pack
from executor.training.residual import keep_residual_in_fp32
from planner.spec.errors import UserError
from planner.spec.wording import reason_of
from planner.spec.workload import Model
from planner.spec.workload_file import shape_of

CPU, DTYPES = torch.device("cpu"), (torch.float32, torch.bfloat16)
PROMPTS, RESPONSES = (2, 3), (7, 3)  # tokens; longer than the window
FEW_TOKENS, WINDOW, MOST_HEADS = 128, 4, 4
WIDEST_HEAD = 512  # of any model that exists; wider ones would take gigabytes
TEMPERATURE = 0.7
EXACT = 2e-4  # most that outputs may differ in fp32; they are of the order of 1
ROUNDED = 4.0  # in bf16, most times that transformers' own pass may differ
ROUGH = 2**-4  # what outputs may differ in bf16 in any case, as a part of the largest or of LARGE
LARGE = 2.0  # two scores may both be near 0, and their rounding is not


def check(role: str, model: Model, device: torch.device, dtype: torch.dtype) -> None:
    """Compare a small model of a role's kind with transformers, on a device and in the type that it
    computes in. Raises UserError if they differ."""
    try:
        found, allowed = _differences(role, models.config_for(role, model), device, dtype)
    except UserError:
        raise
    except Exception as error:  # whatever a kind of model may raise: it is not supported
        reason = reason_of(error, named=True)
        raise _refusal(role, model, f"cannot be computed here ({reason})") from None
    if not found <= allowed:
        what = {"critic": "values", "reward": "scores"}.get(role, "log-probs")
        raise _refusal(
            role, model, f"gets {what} that differ from transformers' by {found:.2g} on {device}"
        )


def _refusal(role: str, model: Model, what: str) -> UserError:
    name = model.path or "a model of random weights"
    return UserError(f"{role}: {name} {what}; it is not supported, use another model")


def _differences(
    role: str, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """The largest difference between our outputs and the exact ones, and how large it may be."""
    with tempfile.TemporaryDirectory(prefix="splitplan-") as name:
        directory = Path(name)
        written = _write(role, small(config), directory)
        shape = shape_of(directory, role)
        ours = models.load(role, Model(shape=shape, path=directory), 0, dtype, device)
    for mine, own in zip(ours.parameters(), written.parameters(), strict=True):
        own.data = mine.detach().to("cpu", torch.float32)  # with the same rounding
    exact = _of_transformers(role, written)
    if dtype != torch.float32:
        keep_residual_in_fp32(ours, dtype)
    module = models.wrap(role, ours, TEMPERATURE).train()
    batch = pack(_sequences(), np.arange(len(PROMPTS)), device)
    with torch.no_grad():
        found = module(batch).float().cpu()
    if role != "reward":
        found = found[batch.mask.cpu()]
    difference = float((found - exact).abs().max())
    if dtype == torch.float32:
        return difference, EXACT
    cast(nn.Module, written).to(dtype)
    rounding = float((_of_transformers(role, written) - exact).abs().max())
    return difference, max(ROUNDED * rounding, ROUGH * max(LARGE, float(exact.abs().max())))


def small(config: PreTrainedConfig) -> PreTrainedConfig:
    """A configuration with few layers, heads and tokens, and a short window. Layers of every kind
    are kept."""
    settings: dict[str, Any] = config.to_dict()
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    few, head_dim = min(heads, MOST_HEADS), min(head_dim, WIDEST_HEAD)
    by_layer = {
        key: value
        for key, value in settings.items()
        if isinstance(value, list | tuple) and len(value) == layers
    }
    kept = _every_kind(by_layer, layers)
    settings |= {key: [value[layer] for layer in kept] for key, value in by_layer.items()}
    settings |= {
        "num_hidden_layers": len(kept),
        "num_attention_heads": few,
        "hidden_size": few * head_dim,
        "intermediate_size": 2 * few * head_dim,
        "vocab_size": FEW_TOKENS,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_labels": 1,
    }
    if settings.get("head_dim"):
        settings["head_dim"] = head_dim
    if getattr(config, "num_key_value_heads", None):
        settings["num_key_value_heads"] = few if key_heads == heads else max(1, few // 2)
    if isinstance(settings.get("sliding_window"), int):
        settings["sliding_window"] = WINDOW
    for key in ("dtype", "torch_dtype", "architectures", "id2label", "label2id", "model_type"):
        settings.pop(key, None)
    return AutoConfig.for_model(config.model_type, **settings)


def _every_kind(by_layer: dict[str, Any], layers: int) -> list[int]:
    """The first layer of every kind, by what is said of each; two at least, if there are."""
    first: dict[Any, int] = {}
    for layer in range(layers):
        first.setdefault(tuple(value[layer] for value in by_layer.values()), layer)
    kept = {*first.values(), *range(min(2, layers))}
    return sorted(kept)


def _write(role: str, config: PreTrainedConfig, directory: Path) -> PreTrainedModel:
    """Write a small model, by transformers' own code; the model, in fp32 on the CPU."""
    with torch.random.fork_rng(devices=[]):
        model = models.build(role, config, torch.float32)
    model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:  # a norm or a bias
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(1.5 * noise / math.sqrt(parameter.shape[1]))
    model.eval()
    models.export(model, model.state_dict(), directory)
    return model


def _sequences() -> Sequences:
    rng = np.random.default_rng(0)
    prompts, responses = np.array(PROMPTS, np.int32), np.array(RESPONSES, np.int32)
    lengths = prompts + responses
    tokens = rng.integers(3, FEW_TOKENS, (len(lengths), lengths.max()), dtype=np.int32)
    return Sequences(
        tokens=tokens,
        prompt_lengths=prompts,
        response_lengths=responses,
        log_probs=np.zeros((len(lengths), responses.max()), np.float32),
        weights_versions=np.zeros((len(lengths), responses.max()), np.int32),
    )


@torch.no_grad()
def _of_transformers(role: str, model: PreTrainedModel) -> Tensor:
    """The outputs of all sequences by the model's own forward pass, one sequence at a time."""
    sequences, found = _sequences(), []
    for row, length in enumerate(sequences.lengths):
        prompt = PROMPTS[row]
        tokens = torch.tensor(sequences.tokens[row, :length]).long()
        logits = model(input_ids=tokens[None], use_cache=False).logits.float()
        if role == "reward":
            found.append(logits.reshape(-1)[:1])
        elif role == "critic":
            found.append(logits[0, prompt - 1 : -1, 0])
        else:
            log_p = (logits[0, prompt - 1 : -1] / TEMPERATURE).log_softmax(-1)
            found.append(log_p.gather(1, tokens[prompt:, None])[:, 0])
    return torch.cat(found)
