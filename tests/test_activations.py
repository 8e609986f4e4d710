"""What a block keeps for its backward pass is what the memory model counts. Compiled as on a GPU, but by no code
generator; in place of the variable-length kernel stands an operator that keeps what that keeps: its inputs, its output
and a log-sum-exp per head."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM

from executor import models
from planner.predict.memory import activation_bytes
from planner.spec.cluster import load_device
from planner.spec.workload import Shape

TOKENS = 64


@torch.library.custom_op("splitplan_test::attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return query.clone(), query.new_zeros(query.shape[1], query.shape[0], dtype=torch.float32)


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)


@torch.library.custom_op("splitplan_test::attention_backward", mutates_args=())
def attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, log_sum_exp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)


@attention_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = attention_backward(gradient, *ctx.saved_tensors)
    return found


attention.register_autograd(_backward, setup_context=_keep)


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    return attention(query, key, value)[0][None], None


AttentionInterface.register("counted", _attend)


@pytest.mark.parametrize("size", [(64, 4, 2, 160), (96, 6, 6, 512)])
def test_a_compiled_block_keeps_what_is_counted(size: tuple[int, int, int, int], monkeypatch: Any) -> None:
    hidden, heads, kv_heads, intermediate = size
    shape = Shape(hidden=hidden, layers=1, heads=heads, kv_heads=kv_heads, intermediate=intermediate, vocab=32)
    model = AutoModelForCausalLM.from_config(models.config_of(shape), dtype=torch.bfloat16)
    model.set_attn_implementation("counted")
    models.keep_residual_in_fp32(model, torch.bfloat16)
    compiler = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, dynamic: compiler(f, dynamic=dynamic, backend="aot_eager_decomp_partition")
    )
    models.compile_blocks(model)

    hidden_states = model.base_model.embed_tokens(torch.zeros(1, TOKENS, dtype=torch.long))
    rotary = model.base_model.rotary_emb(hidden_states, torch.arange(TOKENS)[None])
    weights = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *rotary)}
    kept: dict[int, int] = {}

    def note(tensor: Any) -> Any:
        if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        held = models.blocks(model)[0](hidden_states, position_embeddings=rotary, attention_mask=None)
    assert sum(kept.values()) == TOKENS * activation_bytes(shape, load_device("h200"))[0]
    del held
