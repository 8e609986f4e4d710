"""Log-probs, entropies and what corrects the rollout's, against verl, OpenRLHF and TRL. What
differs by definition is in docs/peers.md."""

from typing import Any

import pytest
import torch
from peers import (
    compute_rollout_correction_weights,
    compute_rollout_rejection_mask,
    openrlhf,
    trl,
    verl_functional,
)
from random_batches import CAP, Batch, assert_close, seeds
from torch import Tensor

from executor.training import correction, lm_head

pytestmark = pytest.mark.peers
LOW, HIGH = 0.6, 1.7


@seeds
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    ("masking", "called"),
    [
        ("off", None),
        ("token", "token_k1"),
        ("sequence", "seq_sum_k1"),
        ("geometric", "seq_mean_k1"),
    ],
)
def test_importance_weights(seed: int, level: Any, masking: Any, called: str | None) -> None:
    batch = Batch(seed)
    log_ratio = batch.proximal - batch.behaviour
    ours = correction.importance_weights(
        batch.nan("proximal") - batch.nan("behaviour"),
        batch.mask,
        level=level,
        cap=CAP,
        masking=masking,
        low=LOW,
        high=HIGH,
    )
    theirs, _ = compute_rollout_correction_weights(log_ratio, batch.real, level, CAP)
    if called is not None:
        bounds = f"{1 / HIGH}_{1 / LOW}"  # of the rollout's probability by the trainer's
        kept, _ = compute_rollout_rejection_mask(log_ratio, batch.real, called, bounds)
        theirs = theirs * kept
    assert_close(ours, theirs * batch.real)


@seeds
def test_how_many_tokens_stale_ones_are_worth(seed: int) -> None:
    """verl truncates the weights first, we do not."""
    batch = Batch(seed)
    batch.behaviour = batch.proximal - (batch.proximal - batch.behaviour).clamp(max=0.6)
    _, theirs = compute_rollout_correction_weights(
        batch.proximal - batch.behaviour, batch.real, "token", CAP
    )
    ours = correction.off_policy((batch.proximal - batch.behaviour)[batch.mask])
    assert ours["effective_share"] == pytest.approx(theirs["rollout_is_eff_sample_size"], rel=1e-4)
    assert ours["mean"] == pytest.approx(theirs["rollout_is_mean"], rel=1e-4)


@seeds
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_entropies(seed: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, hidden, vocab = 1 + seed, 8, 50
    states = torch.randn(rows, hidden, generator=generator)
    weight = torch.randn(vocab, hidden, generator=generator).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    given = states, weight, targets, temperature, 4  # tokens in a chunk
    ours, entropies = lm_head.log_probs_and_entropies(*given)
    logits = states @ weight.T
    for theirs in (
        verl_functional.logprobs_from_logits_naive(logits / temperature, targets),
        verl_functional.logprobs_from_logits_v2((logits / temperature)[None], targets[None])[0],
        openrlhf.log_probs_from_logits(logits.clone(), targets, temperature),
        trl.selective_log_softmax(logits, targets, temperature),
    ):
        assert_close(ours, theirs)
        same_gradients(ours, theirs, weight)
    assert_close(lm_head.log_probs(*given), ours)
    for function in (
        verl_functional.entropy_from_logits,
        openrlhf.compute_entropy,
        trl.entropy_from_logits,
    ):
        theirs = function(logits / temperature)
        assert_close(entropies, theirs)
        same_gradients(entropies, theirs, weight)


def same_gradients(ours: Tensor, theirs: Tensor, weight: Tensor) -> None:
    gradients = [
        torch.autograd.grad(each.square().sum(), weight, retain_graph=True)[0]
        for each in (ours, theirs)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
