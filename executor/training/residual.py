"""A sum of the blocks' outputs in fp32, in a model that computes in bf16."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from transformers import PreTrainedModel

Forward = Callable[..., Any]


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer's layers: what FSDP shards one by one."""
    lists = [module for module in model.base_model.children() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len)


def keep_residual_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let a model that computes in `dtype` add up the outputs of its blocks in fp32. Much of the
    rounding that sets its log-probs apart from an engine's is in that sum.

    Norms read the sum and give `dtype`. What reads it without a norm, as the attention of OLMo-2
    does, gets it in `dtype`."""
    embedding = model.get_input_embeddings()
    embedding.forward = _giving(torch.float32, embedding.forward)
    base_parts = [part for part in model.base_model.children() if part is not embedding]
    for part in [*base_parts, *(part for block in blocks(model) for part in block.children())]:
        kind = type(part).__name__.lower()
        if "norm" in kind:
            computed = _norm_of(part) if isinstance(part, nn.LayerNorm) else part.forward
            part.forward = _giving(dtype, computed)
        elif "rotary" in kind:
            part.forward = _giving(dtype, part.forward)
        elif not isinstance(part, nn.ModuleList):
            part.forward = _taking(dtype, part.forward)


def _norm_of(norm: nn.LayerNorm) -> Forward:
    """A LayerNorm in fp32: torch's own wants inputs of its weights' type."""

    def forward(hidden: Tensor) -> Tensor:
        weight, bias = (None if x is None else x.float() for x in (norm.weight, norm.bias))
        return layer_norm(hidden.float(), norm.normalized_shape, weight, bias, norm.eps)

    return forward


def _giving(dtype: torch.dtype, forward: Forward) -> Forward:
    def cast(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        return tuple(x.to(dtype) for x in output) if isinstance(output, tuple) else output.to(dtype)

    return cast


def _taking(dtype: torch.dtype, forward: Forward) -> Forward:
    def given(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.dtype == torch.float32 else x

    def cast(*args: Any, **kwargs: Any) -> Any:
        converted = {name: given(value) for name, value in kwargs.items()}
        return forward(*map(given, args), **converted)

    return cast
