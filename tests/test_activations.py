"""The memory model against what a block keeps for its backward pass, and against what tensors took
on H200s.

The block is compiled as on a GPU, but by no code generator; in place of the variable-length kernel
stands an operator that keeps what that keeps: its inputs, its output and a log-sum-exp per head."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM

from executor.data.batch import minibatches, spread
from executor.training import models, residual
from planner.predict.memory import activation_bytes, trainer_memory
from planner.predict.points import TrainerPoint
from planner.predict.profile import Profile
from planner.spec.cluster import load_device
from planner.spec.files import profiles_dir
from planner.spec.plan import TrainerRole
from planner.spec.workload import Shape, Workload
from planner.spec.workload_file import load_workload

TOKENS = 64
H200 = load_device("h200")
STEPS = 15  # as many as a profile has at most


@torch.library.custom_op("splitplan_test::attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return query.clone(), query.new_zeros(query.shape[1], query.shape[0], dtype=torch.float32)


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(
        query.shape[1], query.shape[0], dtype=torch.float32
    )


@torch.library.custom_op("splitplan_test::attention_backward", mutates_args=())
def attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, log_sum_exp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)


@attention_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = attention_backward(gradient, *ctx.saved_tensors)
    return found


attention.register_autograd(_backward, setup_context=_keep)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
) -> tuple[Tensor, None]:
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    return attention(query, key, value)[0][None], None


AttentionInterface.register("counted", _attend)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(64, 4, 2, 160), (96, 6, 6, 512)])
def test_a_compiled_block_keeps_what_is_counted(
    size: tuple[int, int, int, int], monkeypatch: Any
) -> None:
    hidden, heads, kv_heads, intermediate = size
    shape = Shape(
        hidden=hidden, layers=1, heads=heads, kv_heads=kv_heads, intermediate=intermediate, vocab=32
    )
    model = AutoModelForCausalLM.from_config(models.config_of(shape), dtype=torch.bfloat16)
    model.set_attn_implementation("counted")
    residual.keep_residual_in_fp32(model, torch.bfloat16)
    compiler = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda f, dynamic: compiler(f, dynamic=dynamic, backend="aot_eager_decomp_partition"),
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
        held = residual.blocks(model)[0](
            hidden_states, position_embeddings=rotary, attention_mask=None
        )
    assert sum(kept.values()) == TOKENS * activation_bytes(shape, H200)[0]
    del held


@pytest.mark.parametrize(("name", "gpus"), [("1.5b-1gpu", 1), ("1.5b-2gpu", 2), ("0.5b-2gpu", 2)])
def test_updates_on_h200s_took_what_is_predicted(name: str, gpus: int) -> None:
    """Tensors at the peak of each update that was measured with all roles awake on the same
    GPUs."""
    workload = load_workload(profiles_dir() / "workloads" / f"h200-{name.partition('-')[0]}.toml")
    profile = Profile.read(profiles_dir() / "h200" / f"{name}.json")
    points = [
        p
        for p in (*profile.points, *profile.held_out)
        if isinstance(p, TrainerPoint) and p.call == "train" and p.gpus == gpus
    ]
    assert len(points) >= 8
    for point in points:
        assert predicted(workload, point) == pytest.approx(point.allocated_bytes, rel=0.06)


def predicted(workload: Workload, point: TrainerPoint) -> int:
    """With the tokens of the largest micro-batch that the update had."""
    lengths = np.array(point.response_lengths) + point.prompt_tokens // point.sequences
    assert point.minibatch and point.micro_batch_tokens
    shares = [
        spread(rows, lengths, point.gpus, point.micro_batch_tokens)
        for step in range(STEPS)
        for rows in minibatches(len(lengths), point.minibatch, workload.seed, step, 0)
    ]
    tokens = max(
        int(lengths[rows].sum())
        for share in shares
        for micro_batches in share
        for rows in micro_batches
    )
    layout = TrainerRole(
        pools=("all",),
        shard=point.shard,
        replicas=point.gpus // point.shard,
        micro_batch_tokens=tokens,
        recompute=point.recompute,
    )
    roles = {role: trainer_memory(workload, role, layout, H200) for role in workload.models}
    tensors = roles[point.role].running - roles[point.role].detail["spare"]
    others = [memory for role, memory in roles.items() if role != point.role]
    return tensors + sum(
        memory.idle - memory.detail["gradients"] for memory in others
    )  # theirs have gone
