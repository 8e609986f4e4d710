"""From scores to advantages, against verl and OpenRLHF. What differs by definition is in
docs/peers.md."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peers import AdaptiveKLController, RemoteExperienceMaker, openrlhf, verl, verl_functional
from random_batches import KL_COEF, Batch, Groups, assert_close, assert_same_loss, seeds
from torch import Tensor, nan

from executor.training import advantages, kl

pytestmark = pytest.mark.peers
K3_MAX = 10.0


@seeds
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl(seed: int, kind: Any) -> None:
    batch = Batch(seed)
    ours = kl.kl_penalty(batch.log_probs, batch.reference, kind)
    assert_close(ours, verl.kl_penalty(batch.log_probs, batch.reference, kind))
    theirs = openrlhf.compute_approx_kl(batch.log_probs, batch.reference, kl_estimator=kind)
    assert_close(ours.clamp(-K3_MAX, K3_MAX), theirs)  # OpenRLHF caps k1 and k2 too


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_kl_far_away(kind: Any) -> None:
    """Up to log-ratios at which k3 is capped, and a ratio would not be finite."""
    x = torch.linspace(-120, 120, 481, requires_grad=True)
    ours = kl.kl_penalty(x, torch.zeros_like(x), kind).sum()
    assert_same_loss(ours, verl.kl_penalty(x, torch.zeros_like(x), kind).sum(), x, x)


@seeds
def test_rewards_of_tokens(seed: int) -> None:
    batch = Batch(seed)
    penalty = kl.kl_penalty(batch.nan("proximal"), batch.nan("reference"), "k1")
    ours = advantages.token_rewards(batch.scores, penalty, KL_COEF, batch.mask)
    last = batch.mask & (batch.real.cumsum(1) == batch.real.sum(1, keepdim=True))
    scores = batch.scores[:, None] * last
    assert_close(ours, verl.compute_rewards(scores, batch.proximal, batch.reference, KL_COEF))
    their_kl = batch.proximal - batch.reference
    theirs = openrlhf.compute_reward(batch.scores, KL_COEF, their_kl, batch.mask)
    assert_close(ours, theirs * batch.real)  # an empty response has a score in its last column


@seeds
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae(seed: int, gamma: float, lam: float) -> None:
    batch = Batch(seed)
    mine = batch.nan("rewards"), batch.nan("values"), batch.mask, gamma, lam
    found, returns = advantages.gae(*mine)
    given = batch.rewards, batch.values, batch.real, gamma, lam
    whitened, their_returns = verl.compute_gae_advantage_return(*given)
    assert_close(returns, their_returns * batch.real)
    assert_close(_unbiased(found, batch), whitened * batch.real)


def _unbiased(found: Tensor, batch: Batch) -> Tensor:
    """Our whitened advantages with verl's unbiased variance."""
    bessel = (batch.tokens - 1) / batch.tokens
    whitened: Tensor = advantages.whiten(found, batch.mask, eps=1e-8 * bessel)
    return whitened * math.sqrt(bessel)


@seeds
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5)])
def test_gae_without_holes(seed: int, gamma: float, lam: float) -> None:
    batch = Batch(seed, holes=False)
    ours = advantages.gae(batch.nan("rewards"), batch.nan("values"), batch.mask, gamma, lam)
    theirs = RemoteExperienceMaker.get_advantages_and_returns(
        None, batch.values, batch.rewards, batch.mask, gamma, lam
    )
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other * batch.real)


@seeds
def test_rewards_to_go(seed: int) -> None:
    """The returns without a critic."""
    batch = Batch(seed)
    zeros = torch.zeros_like(batch.rewards)
    _, ours = advantages.gae(batch.nan("rewards"), zeros, batch.mask, 0.9, 1.0)
    config = SimpleNamespace(gamma=0.9)
    _, theirs = verl.compute_reinforce_plus_plus_outcome_advantage(
        batch.rewards, batch.real, config
    )
    assert_close(ours, theirs)


@seeds
@pytest.mark.parametrize("kind", ["gae", "reinforce"])
def test_from_scores_to_whitened_advantages(seed: int, kind: str) -> None:
    """All of it at once, as OpenRLHF does it: KL in the rewards, GAE or the returns, whitening with
    the biased variance."""
    batch = Batch(seed, holes=False)
    batch.scores[-3] = 0.0  # the empty response, which OpenRLHF gives a reward
    gamma, lam = (1.0, 0.95) if kind == "gae" else (0.9, 1.0)
    found = advantages.estimate(
        kind="gae" if kind == "gae" else "reinforce++",
        scores=batch.scores,
        log_probs=batch.nan("proximal"),
        ref_log_probs=batch.nan("reference"),
        values=batch.nan("values") if kind == "gae" else None,
        mask=batch.mask,
        ended=batch.mask.any(1),
        gamma=gamma,
        lam=lam,
        kl_coef=KL_COEF,
    )
    experience = _experience(batch)
    _openrlhf_maker(kind, gamma, lam).compute_advantages_and_returns([experience])
    assert_close(found.advantages, experience.advantages * batch.real)
    assert_close(found.returns, experience.returns * batch.real)


def _experience(batch: Batch) -> SimpleNamespace:
    rows = len(batch.scores)
    return SimpleNamespace(
        index=list(range(rows)),
        rewards=batch.scores.clone(),
        kl=batch.proximal - batch.reference,
        values=batch.values,
        action_mask=batch.mask,
        info={},
    )


def _openrlhf_maker(kind: str, gamma: float, lam: float, samples: int = 1) -> Any:
    """What of OpenRLHF's maker of experiences its formulas use."""
    advantage = SimpleNamespace(estimator=kind, gamma=gamma, lambd=lam, no_std_norm=False)
    args = SimpleNamespace(
        algo=SimpleNamespace(advantage=advantage),
        reward=SimpleNamespace(clip_range=None),
        rollout=SimpleNamespace(n_samples_per_prompt=samples),
    )
    maker = RemoteExperienceMaker.__new__(RemoteExperienceMaker)
    maker.strategy = SimpleNamespace(args=args)
    maker.kl_ctl, maker.advantage_estimator = SimpleNamespace(value=KL_COEF), kind
    return maker


@seeds
@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_advantages_over_a_group_of_verl(seed: int, kind: str) -> None:
    batch = Groups(seed)
    given = batch.rewarded, batch.real, batch.index
    if kind == "rloo":
        theirs, _ = verl.compute_rloo_outcome_advantage(*given)
    else:
        theirs, _ = verl.compute_grpo_outcome_advantage(
            *given, norm_adv_by_std_in_grpo=kind == "grpo"
        )
    assert_close(batch.ours(kind, whiten=False), theirs)


@seeds
def test_reinforce_with_a_baseline_of_verl(seed: int) -> None:
    batch = Groups(seed)
    theirs, _ = verl.compute_reinforce_plus_plus_baseline_outcome_advantage(
        batch.rewarded, batch.real, index=batch.index
    )
    raw = batch.ours("reinforce++-baseline", whiten=False)
    assert_close(_unbiased(raw, batch), theirs)


@seeds
@pytest.mark.parametrize(
    ("kind", "called"),
    [
        ("rloo", "rloo"),
        ("dr_grpo", "dr_grpo"),
        ("grpo", "group_norm"),
        ("reinforce++-baseline", "reinforce_baseline"),
    ],
)
def test_advantages_over_a_group_of_openrlhf(seed: int, kind: str, called: str) -> None:
    batch = Groups(seed, holes=False)
    experience = _experience(batch)
    _openrlhf_maker(called, 1.0, 1.0, samples=4).compute_advantages_and_returns([experience])
    ours, theirs = batch.ours(kind, whiten=called == "reinforce_baseline"), experience.advantages
    if kind == "grpo":  # 1e-9 is added to the deviation, and not 1e-6
        torch.testing.assert_close(ours, theirs * batch.real, rtol=1e-4, atol=1e-5)
    else:
        assert_close(ours, theirs * batch.real)


@pytest.mark.parametrize("current", [0.0, 0.05, 0.11, 0.3])
def test_the_weight_of_the_kl_adapts(current: float) -> None:
    ours = kl.adapted_coef(KL_COEF, current, 0.1, 64, 1000.0)
    for controller in (
        verl.AdaptiveKLController(KL_COEF, 0.1, 1000.0),
        AdaptiveKLController(KL_COEF, 0.1, 1000.0),
    ):
        controller.update(current, 64)
        assert ours == pytest.approx(controller.value)


def test_one_token_cannot_be_whitened_by_verl() -> None:
    """Its variance is the unbiased one."""
    values, mask = torch.tensor([[3.0, nan]]), torch.tensor([[True, False]])
    assert advantages.whiten(values, mask).tolist() == [[0.0, 0.0]]
    with pytest.raises(ValueError, match="division by zero"):
        verl_functional.masked_whiten(values, mask)
