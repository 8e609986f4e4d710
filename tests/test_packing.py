"""Packing changes nothing but the arithmetic that is saved: packed equals padded, in values and in
gradients."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM

from executor.data.batch import Sequences
from executor.training import lm_head, models, packing, residual
from executor.training.offload import Parking
from executor.training.packing import (
    Packed,
    hidden_states,
    pack,
    packed_attention,
    use_packed_attention,
)
from planner.spec.workload import Shape

SHAPE = Shape(hidden=32, layers=2, heads=4, kv_heads=2, intermediate=64, vocab=48)
PROMPTS, RESPONSES = (3, 1, 4, 2), (5, 2, 0, 7)
TEMPERATURE = 0.7
NAN, INF = math.nan, math.inf


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
        weights_versions=np.zeros((len(lengths), responses.max()), dtype=np.int32),
    )


def make_model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(models.config_of(SHAPE))


def pack_rows(*rows: int) -> Packed:
    return pack(make_sequences(), np.array(rows, dtype=np.int64), torch.device("cpu"))


def padded_log_probs(model: Qwen2ForCausalLM, rows: list[int]) -> tuple[Tensor, Tensor]:
    """The reference: each sequence by itself, the whole logits, log-probs and entropies by torch; 0
    in the padding."""
    sequences = make_sequences()
    log_probs, entropies = [], []
    for row in rows:
        prompt, length = int(sequences.prompt_lengths[row]), int(sequences.lengths[row])
        tokens = torch.tensor(sequences.tokens[row, :length]).long()
        logits = model(tokens[None], use_cache=False).logits[0, prompt - 1 : length - 1]
        log_p = (logits / TEMPERATURE).log_softmax(-1)
        log_probs.append(log_p.gather(-1, tokens[prompt:, None])[:, 0])
        entropies.append(-(log_p.exp() * log_p).sum(-1))
    padded = nn.utils.rnn.pad_sequence
    return padded(log_probs, batch_first=True), padded(entropies, batch_first=True)


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
    given = hidden, weight, batch.targets, TEMPERATURE
    found, entropy = map(batch.columns, lm_head.log_probs_and_entropies(*given, chunk_tokens=3))
    assert torch.equal(batch.columns(lm_head.log_probs(*given, chunk_tokens=3)), found)
    ((found + 0.1 * entropy) * weights).sum().backward()

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-5, atol=1e-5)
    of_policy = models.wrap("actor", model, TEMPERATURE)(batch, entropy=True)
    torch.testing.assert_close(of_policy, torch.stack([found, entropy]), rtol=1e-5, atol=1e-5)
    found_gradients = gradients(model)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-5, atol=1e-5)


def test_what_is_in_the_padding_does_not_matter() -> None:
    model = models.wrap("actor", make_model(), TEMPERATURE)
    sequences, rows = make_sequences(), np.array([0, 1, 2], dtype=np.int64)
    clean = model(pack(sequences, rows, torch.device("cpu")))
    padding = np.arange(sequences.tokens.shape[1]) >= sequences.lengths[:, None]
    sequences.tokens[padding] = -100
    found = model(pack(sequences, rows, torch.device("cpu")))
    assert torch.equal(found, clean) and (found[~torch.tensor(sequences.mask[rows, :5])] == 0).all()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_states_that_no_response_token_follows_do_not_spread(bad: float) -> None:
    torch.manual_seed(0)
    batch = pack_rows(0, 1)
    aside = torch.ones(batch.tokens.shape[1], dtype=torch.bool).index_fill(0, batch.before, False)
    states = torch.randn(len(aside), 4).masked_fill(aside[:, None], bad).requires_grad_()
    weight = torch.randn(SHAPE.vocab, 4)
    hidden = states[batch.before]
    given = hidden, weight, batch.targets, TEMPERATURE
    for values in (lm_head.log_probs(*given), *lm_head.log_probs_and_entropies(*given)):
        states.grad = None
        columns = batch.columns(values)
        assert columns.isfinite().all() and (columns[~batch.mask] == 0).all()
        columns.sum().backward(retain_graph=True)
        assert states.grad is not None and states.grad.isfinite().all()
        assert (states.grad[aside] == 0).all() and states.grad[~aside].any()


def test_an_empty_micro_batch_is_a_pass_without_tokens() -> None:
    model = make_model()
    use_packed_attention(model)
    batch = pack_rows()
    hidden = hidden_states(model, batch)[batch.before]
    found = batch.columns(
        lm_head.log_probs(hidden, model.lm_head.weight, batch.targets, TEMPERATURE)
    )
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
    found, _ = packed_attention(
        nn.Module(), query, key, value, None, scaling=0.3, cu_seq_lens_q=starts, max_length_q=5
    )
    torch.testing.assert_close(found, expected)


# --- the head, by hand: hidden states of one number times a weight of V numbers are logits ---


def logits_of(*logits: float) -> tuple[Tensor, Tensor]:
    """Hidden states `[1, 1]` and a weight `[V, 1]` that make these logits."""
    return torch.ones(1, 1, requires_grad=True), torch.tensor(logits)[:, None].requires_grad_()


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, [0.25, 0.75]), (0.5, [0.1, 0.9])])
def test_log_probs_by_hand(temperature: float, expected: list[float]) -> None:
    # softmax([0, ln 3]) = [1/4, 3/4]; at temperature 1/2 the logits double: softmax([0, ln 9]) =
    # [1/10, 9/10].
    hidden, weight = logits_of(0.0, math.log(3))
    found = lm_head.log_probs(hidden.expand(2, 1), weight, torch.tensor([0, 1]), temperature)
    torch.testing.assert_close(found.exp(), torch.tensor(expected))
    found[0].backward()
    # d log p_0 / d logits = ([1, 0] - p) / temperature
    slope = (1 - expected[0]) / temperature
    torch.testing.assert_close(weight.grad, torch.tensor([[slope], [-slope]]))


@pytest.mark.parametrize(
    ("logits", "temperature", "expected"),
    [
        ((1.0, 1.0, 1.0, 1.0), 1.0, 2 * math.log(2)),  # uniform over 4
        ((0.0, 0.0, -INF, -INF), 1.0, math.log(2)),  # a token of probability 0 adds nothing
        (
            (0.0, math.log(3)),
            0.5,
            0.3250830,
        ),  # [1/10, 9/10]: 0.1 * ln 10 + 0.9 * ln(10/9) = 0.2302585 + 0.0948245
    ],
)
def test_entropy_by_hand(logits: tuple[float, ...], temperature: float, expected: float) -> None:
    hidden, weight = logits_of(*logits)
    _, found = lm_head.log_probs_and_entropies(hidden, weight, torch.tensor([0]), temperature)
    assert found.tolist() == [pytest.approx(expected, abs=1e-6)]
    found.sum().backward()
    assert weight.grad is not None and weight.grad.isfinite().all()


def test_log_probs_of_bf16_logits_are_float32() -> None:
    # 2000 equal logits: -ln 2000 = -7.6009025, which bf16 (8 bits) would round to -7.59375.
    hidden, weight = (
        torch.full((1, 1), 3.0, dtype=torch.bfloat16),
        torch.ones(2000, 1, dtype=torch.bfloat16),
    )
    found = lm_head.log_probs(hidden, weight, torch.tensor([7]), 1.0)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(-7.6009025, abs=1e-5)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
def test_chunks_change_neither_value_nor_gradient(chunk_tokens: int) -> None:
    torch.manual_seed(0)
    targets, factors = torch.randint(7, (9,)), torch.randn(2, 9)
    start = torch.randn(9, 3), torch.randn(7, 3)

    hidden, weight = (x.clone().requires_grad_() for x in start)
    log_p = (hidden @ weight.T / TEMPERATURE).log_softmax(-1)
    plain = torch.stack([log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)])
    (plain * factors).sum().backward()

    h, w = (x.clone().requires_grad_() for x in start)
    found = torch.stack(lm_head.log_probs_and_entropies(h, w, targets, TEMPERATURE, chunk_tokens))
    (found * factors).sum().backward()
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(h.grad, hidden.grad)
    torch.testing.assert_close(w.grad, weight.grad)


def test_entropies_keep_nothing_that_is_as_wide_as_the_vocabulary() -> None:
    """Of each token its log-prob's denominator and its entropy are kept. Its 50 logits are computed
    again, three tokens at a time."""
    hidden, weight = torch.randn(9, 4, requires_grad=True), torch.randn(50, 4, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        given = hidden, weight, torch.arange(9), TEMPERATURE
        both = lm_head.log_probs_and_entropies(*given, chunk_tokens=3)
    assert sorted(tuple(tensor.shape) for tensor in kept) == [(9,), (9,), (9,), (9, 4), (50, 4)]
    assert all(tensor.dtype == torch.float32 for tensor in both)


def test_greedy_sampling_has_no_log_probs() -> None:
    with pytest.raises(AssertionError, match="temperature"):
        lm_head.log_probs(*logits_of(0.0, 0.0), torch.tensor([0]), 0.0)


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
    shape = SHAPE.model_copy(
        update={"hidden": 256, "layers": 12, "intermediate": 512, "head_dim": 64, "vocab": 512}
    )
    torch.manual_seed(0)
    exact = Qwen2ForCausalLM(models.config_of(shape))
    for parameter in exact.parameters():
        parameter.data = parameter.data.bfloat16().float()
    rough, better = copy.deepcopy(exact), copy.deepcopy(exact)
    for model in (rough, better):
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    residual.keep_residual_in_fp32(better, torch.bfloat16)
    batch = pack_rows(0, 1, 3)
    with torch.no_grad():
        states = [
            hidden_states(models.wrap("actor", m, 1.0).model, batch).float()
            for m in (exact, rough, better)
        ]
    assert (states[2] - states[0]).norm() < 0.9 * (states[1] - states[0]).norm()


@pytest.mark.parametrize("shaping", [lm_head.Shaping(0.25), lm_head.Shaping(2.0, 3.0)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_shaped_logits_and_their_gradients_are_those_of_the_formula(
    shaping: lm_head.Shaping, biased: bool
) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(size, requires_grad=True) for size in ((7, 16), (11, 16), (11,))]
    hidden, weight, bias = leaves
    targets = torch.randint(11, (7,))
    used = bias if biased else None

    def of_formula() -> torch.Tensor:
        logits = (hidden @ weight.T + (bias if biased else 0)) * shaping.scale
        if shaping.cap is not None:
            logits = shaping.cap * torch.tanh(logits / shaping.cap)
        log_p = (logits / TEMPERATURE).log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        return log_p.gather(1, targets[:, None])[:, 0] + 0.3 * entropy

    def of_chunks() -> torch.Tensor:
        settings = TEMPERATURE, 3, used, shaping
        both = lm_head.log_probs_and_entropies(hidden, weight, targets, *settings)
        return both[0] + 0.3 * both[1]

    upstream = torch.randn(7)
    results = []
    for compute in (of_formula, of_chunks):
        output = compute()
        (output * upstream).sum().backward()
        results.append([output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
        for leaf in leaves:
            leaf.grad = None
    assert len(results[1]) == (4 if biased else 3)
    for ours, exact in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_capped_attention_in_a_few_rows_at_a_time_is_that_of_the_formula(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    monkeypatch.setattr(packing, "CAPPED_ROWS", 4)
    torch.manual_seed(0)
    given = [torch.randn(2, heads, 10, 8, requires_grad=True) for heads in (4, 2, 2)]
    q, k, v = given
    keys, values = (x.repeat_interleave(2, dim=1) for x in (k, v))
    scores = 2.0 * torch.tanh((q @ keys.transpose(2, 3)) * 0.7 / 2.0)
    place = torch.arange(10)
    distance = place[:, None] - place
    seen = (distance >= 0) & (distance < (window or 10))
    exact = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values
    ours = packing._dense_attention(q, k, v, packing._Scores(0.7, window, 2.0))
    upstream = torch.randn_like(exact)
    wanted = torch.autograd.grad((exact * upstream).sum(), given)
    got = torch.autograd.grad((ours * upstream).sum(), given)
    for mine, theirs in zip((ours, *got), (exact, *wanted), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
