"""Packing changes nothing but the arithmetic that is saved: packed equals padded, in values and in gradients."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM

from executor import lm_head, models, ppo
from executor.data import Sequences
from executor.offload import Parking
from executor.packing import Packed, hidden_states, pack, packed_attention, use_packed_attention
from planner.spec.workload import Shape

SHAPE = Shape(hidden=32, layers=2, heads=4, kv_heads=2, intermediate=64, vocab=48)
PROMPTS, RESPONSES = (3, 1, 4, 2), (5, 2, 0, 7)
TEMPERATURE = 0.7


def make_sequences() -> Sequences:
    rng = np.random.default_rng(0)
    prompts, responses = np.array(PROMPTS, dtype=np.int32), np.array(RESPONSES, dtype=np.int32)
    lengths = prompts + responses
    tokens = rng.integers(1, SHAPE.vocab, (len(lengths), lengths.max()), dtype=np.int32)
    tokens[np.arange(lengths.max()) >= lengths[:, None]] = 0
    return Sequences(
        tokens=tokens,
        prompt_lengths=prompts,
        response_lengths=responses,
        log_probs=np.zeros((len(lengths), responses.max()), dtype=np.float32),
        weights_versions=np.zeros(len(lengths), dtype=np.int32),
    )


def make_model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(models.config_of(SHAPE))


def pack_rows(*rows: int) -> Packed:
    return pack(make_sequences(), np.array(rows, dtype=np.int64), torch.device("cpu"))


def padded_log_probs(model: Qwen2ForCausalLM, rows: list[int]) -> tuple[Tensor, Tensor]:
    """The reference: right-padded, the whole logits, log-probs from `ppo.py`."""
    sequences = make_sequences()
    tokens = torch.tensor(sequences.tokens[rows]).long()
    prompts = torch.tensor(sequences.prompt_lengths[rows])
    width = max(1, int(sequences.response_lengths[rows].max()))
    mask = ppo.response_mask(torch.tensor(sequences.response_lengths[rows]), width)
    logits = ppo.before_response(model(tokens, use_cache=False).logits, prompts, width)
    targets = ppo.response_tokens(tokens, prompts, width)
    return ppo.response_log_probs(logits, targets, TEMPERATURE, mask), ppo.response_entropy(logits, TEMPERATURE, mask)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [3, 0], [1]])
def test_packed_equals_padded(rows: list[int]) -> None:
    model = make_model()
    weights = torch.rand(len(rows), max(RESPONSES[row] for row in rows))
    expected, expected_entropy = padded_log_probs(model, rows)
    ((expected + 0.1 * expected_entropy) * weights).sum().backward()
    expected_gradients = gradients(model)

    use_packed_attention(model)
    batch = pack_rows(*rows)
    hidden = hidden_states(model, batch)[batch.before]
    weight = model.lm_head.weight
    found = batch.columns(lm_head.log_probs(hidden, weight, batch.targets, TEMPERATURE, chunk_tokens=3))
    entropy = batch.columns(lm_head.entropies(hidden, weight, TEMPERATURE, chunk_tokens=3))
    ((found + 0.1 * entropy) * weights).sum().backward()

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-5, atol=1e-5)
    found_gradients = gradients(model)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-5, atol=1e-5)


def test_an_empty_micro_batch_is_a_pass_without_tokens() -> None:
    model = make_model()
    use_packed_attention(model)
    batch = pack_rows()
    hidden = hidden_states(model, batch)[batch.before]
    found = batch.columns(lm_head.log_probs(hidden, model.lm_head.weight, batch.targets, TEMPERATURE))
    assert found.shape == (1, 1) and not batch.mask.any()
    found.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_what_is_packed() -> None:
    batch = pack_rows(1, 2)
    assert batch.tokens.shape == (1, 3 + 4) and batch.longest == 4
    assert batch.starts.tolist() == [0, 3, 7]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert batch.before.tolist() == [0, 1]  # the prompt of row 1 has one token
    assert batch.targets.tolist() == batch.tokens[0, [1, 2]].tolist()
    assert batch.mask.tolist() == [[True, True], [False, False]]
    assert batch.columns(torch.tensor([1.0, 2.0])).tolist() == [[1, 2], [0, 0]]


def test_attention_equals_a_block_diagonal_mask() -> None:
    torch.manual_seed(0)
    lengths = [3, 1, 5]
    query, key, value = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    sequence = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    mask = (sequence[:, None] == sequence).tril()
    expected = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    starts = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    found, _ = packed_attention(nn.Module(), query, key, value, None, scaling=0.3, cu_seq_lens_q=starts, max_length_q=5)
    torch.testing.assert_close(found, expected)


def test_log_probs_in_bfloat16_are_close_to_those_in_float32() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(11, 16), torch.randn(48, 16) / 4
    targets = torch.randint(48, (11,))

    def both(dtype: torch.dtype) -> tuple[Tensor, Any]:
        h, w = (x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight))
        found = lm_head.log_probs(h, w, targets, 1.0, chunk_tokens=4)
        found.sum().backward()
        return found, w.grad

    (exact, exact_gradient), (rough, rough_gradient) = both(torch.float32), both(torch.bfloat16)
    assert rough.dtype == torch.float32 and (rough - exact).abs().max() < 0.05
    assert (rough_gradient.float() - exact_gradient).norm() < 0.02 * exact_gradient.norm()


def test_parked_tensors_come_back() -> None:
    tensors = [torch.rand(5), torch.rand(3, 2)]
    tensors.append(tensors[0][1:3])  # a view of another one
    before = [tensor.clone() for tensor in tensors]
    parking = Parking()
    for _ in range(2):
        parking.park(tensors)
        assert all(tensor.untyped_storage().nbytes() == 0 for tensor in tensors)
        parking.fetch()
        assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True))


def test_a_residual_in_float32_comes_nearer_to_the_exact_log_probs() -> None:
    shape = SHAPE.model_copy(update={"hidden": 256, "layers": 12, "intermediate": 512, "head_dim": 64, "vocab": 512})
    torch.manual_seed(0)
    exact = Qwen2ForCausalLM(models.config_of(shape))
    for parameter in exact.parameters():
        parameter.data = parameter.data.bfloat16().float()
    rough, better = copy.deepcopy(exact), copy.deepcopy(exact)
    for model in (rough, better):
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    models.keep_residual_in_fp32(better, torch.bfloat16)
    batch = pack_rows(0, 1, 3)
    with torch.no_grad():
        states = [hidden_states(models.wrap("actor", m, 1.0).model, batch).float() for m in (exact, rough, better)]
    assert (states[2] - states[0]).norm() < 0.9 * (states[1] - states[0]).norm()
