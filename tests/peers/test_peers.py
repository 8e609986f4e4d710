"""Every formula that verl, OpenRLHF or TRL has too, against theirs: on random batches whose masks
have holes, with empty and single-token responses, and with NaN in what we are given where there is
no token. What differs by definition is in docs/peers.md."""

import hollow  # isort: skip  # before the peers

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from openrlhf.models import utils as openrlhf
from openrlhf.models.loss import PolicyLoss, ValueLoss, aggregate_loss
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from torch import Tensor, nan
from trl.trainer import utils as trl
from trl.trainer.grpo_trainer import GRPOTrainer
from verl.trainer.ppo import core_algos as verl
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
from verl.utils import torch_functional as verl_functional
from verl.workers.config import ActorConfig

from executor.training import lm_head
from executor.training.advantages import estimate, gae, token_rewards, whiten
from executor.training.aggregation import Stats, mean_stats
from executor.training.correction import importance_weights, off_policy
from executor.training.kl import kl_penalty
from executor.training.losses import entropy_loss, kl_loss, policy_loss, value_loss

hollow.end()
pytestmark = pytest.mark.peers
torch.compiler.set_stance("force_eager")  # OpenRLHF compiles its entropy
seeds = pytest.mark.parametrize("seed", range(20))
CLIP, DUAL, CAP, VALUE_CLIP, KL_COEF = 0.2, 3.0, 2.0, 0.3, 0.1
K3_MAX = 10.0


class Batch:
    """A random batch: what the peers are given has 0 where there is no token, and what we are given
    (`nan`) has NaN. The last three responses are empty, of one token, and whole."""

    def __init__(self, seed: int, holes: bool = True) -> None:
        generator = torch.Generator().manual_seed(seed)
        rows, width = 4 + seed % 5, 1 + (7 * seed) % 23

        def normal(scale: float) -> Tensor:
            return scale * torch.randn(rows, width, generator=generator)

        lengths = torch.randint(0, width + 1, (rows,), generator=generator)
        lengths[-3:] = torch.tensor([0, 1, width])
        self.mask = torch.arange(width) < lengths[:, None]
        if holes:
            self.mask &= torch.rand(rows, width, generator=generator) < 0.7
            self.mask[-2:, 0] = True
        self.real = self.mask.float()
        self.proximal = (-2 + normal(1.0)) * self.real
        self.behaviour = self.proximal + normal(0.6) * self.real
        self.log_probs = self.proximal + normal(0.6) * self.real
        self.reference = self.proximal + normal(2.0) * self.real
        self.advantages, self.returns = normal(1.0) * self.real, normal(1.0) * self.real
        self.values, self.old_values = normal(1.0) * self.real, normal(1.0) * self.real
        self.rewards = normal(1.0) * self.real
        self.scores = torch.randn(rows, generator=generator)
        self.tokens = int(self.mask.sum())

    def nan(self, name: str) -> Tensor:
        given: Tensor = getattr(self, name)
        return given.masked_fill(~self.mask, nan).requires_grad_()

    def plain(self, name: str) -> Tensor:
        given: Tensor = getattr(self, name)
        return given.clone().requires_grad_()


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


def same_loss(ours: Tensor, theirs: Tensor, our_input: Tensor, their_input: Tensor) -> None:
    """A loss and its gradient."""
    close(ours, theirs)
    (our_gradient,) = torch.autograd.grad(ours, our_input)
    (their_gradient,) = torch.autograd.grad(theirs, their_input)
    close(our_gradient, their_gradient)


# --- KL, rewards, advantages ---


@seeds
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl(seed: int, kind: Any) -> None:
    batch = Batch(seed)
    ours = kl_penalty(batch.log_probs, batch.reference, kind)
    close(ours, verl.kl_penalty(batch.log_probs, batch.reference, kind))
    theirs = openrlhf.compute_approx_kl(batch.log_probs, batch.reference, kl_estimator=kind)
    close(ours.clamp(-K3_MAX, K3_MAX), theirs)  # OpenRLHF caps k1 and k2 too


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_kl_far_away(kind: Any) -> None:
    """Up to log-ratios at which k3 is capped, and a ratio would not be finite."""
    x = torch.linspace(-120, 120, 481, requires_grad=True)
    ours = kl_penalty(x, torch.zeros_like(x), kind).sum()
    same_loss(ours, verl.kl_penalty(x, torch.zeros_like(x), kind).sum(), x, x)


@seeds
def test_rewards_of_tokens(seed: int) -> None:
    batch = Batch(seed)
    kl = kl_penalty(batch.nan("proximal"), batch.nan("reference"), "k1")
    ours = token_rewards(batch.scores, kl, KL_COEF, batch.mask)
    last = batch.mask & (batch.real.cumsum(1) == batch.real.sum(1, keepdim=True))
    scores = batch.scores[:, None] * last
    close(ours, verl.compute_rewards(scores, batch.proximal, batch.reference, KL_COEF))
    their_kl = batch.proximal - batch.reference
    theirs = openrlhf.compute_reward(batch.scores, KL_COEF, their_kl, batch.mask)
    close(ours, theirs * batch.real)  # an empty response has a score in its last column


@seeds
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae(seed: int, gamma: float, lam: float) -> None:
    batch = Batch(seed)
    advantages, returns = gae(batch.nan("rewards"), batch.nan("values"), batch.mask, gamma, lam)
    given = batch.rewards, batch.values, batch.real, gamma, lam
    whitened, their_returns = verl.compute_gae_advantage_return(*given)
    close(returns, their_returns * batch.real)
    close(_unbiased(advantages, batch), whitened * batch.real)


def _unbiased(advantages: Tensor, batch: Batch) -> Tensor:
    """Our whitened advantages with verl's unbiased variance."""
    bessel = (batch.tokens - 1) / batch.tokens
    whitened: Tensor = whiten(advantages, batch.mask, eps=1e-8 * bessel)
    return whitened * math.sqrt(bessel)


@seeds
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5)])
def test_gae_without_holes(seed: int, gamma: float, lam: float) -> None:
    batch = Batch(seed, holes=False)
    ours = gae(batch.nan("rewards"), batch.nan("values"), batch.mask, gamma, lam)
    theirs = RemoteExperienceMaker.get_advantages_and_returns(
        None, batch.values, batch.rewards, batch.mask, gamma, lam
    )
    for mine, other in zip(ours, theirs, strict=True):
        close(mine, other * batch.real)


@seeds
def test_rewards_to_go(seed: int) -> None:
    """The returns without a critic."""
    batch = Batch(seed)
    zeros = torch.zeros_like(batch.rewards)
    _, ours = gae(batch.nan("rewards"), zeros, batch.mask, 0.9, 1.0)
    config = SimpleNamespace(gamma=0.9)
    _, theirs = verl.compute_reinforce_plus_plus_outcome_advantage(
        batch.rewards, batch.real, config
    )
    close(ours, theirs)


@seeds
@pytest.mark.parametrize("kind", ["gae", "reinforce"])
def test_from_scores_to_whitened_advantages(seed: int, kind: str) -> None:
    """All of it at once, as OpenRLHF does it: KL in the rewards, GAE or the returns, whitening with
    the biased variance."""
    batch = Batch(seed, holes=False)
    batch.scores[-3] = 0.0  # the empty response, which OpenRLHF gives a reward
    gamma, lam = (1.0, 0.95) if kind == "gae" else (0.9, 1.0)
    ours = estimate(
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
    experience = _experience(batch, 1)
    _openrlhf_maker(kind, gamma, lam).compute_advantages_and_returns([experience])
    close(ours.advantages, experience.advantages * batch.real)
    close(ours.returns, experience.returns * batch.real)


def _experience(batch: Batch, samples: int) -> SimpleNamespace:
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


# --- losses ---


def our_weights(batch: Batch) -> Tensor:
    log_ratio = batch.nan("proximal") - batch.nan("behaviour")
    return importance_weights(log_ratio, batch.mask, cap=CAP)


def our_policy_loss(batch: Batch, log_probs: Tensor, **settings: Any) -> tuple[Tensor, Stats]:
    return policy_loss(
        log_probs=log_probs,
        proximal_log_probs=batch.nan("proximal"),
        advantages=batch.nan("advantages"),
        weights=our_weights(batch),
        mask=batch.mask,
        clip=CLIP,
        normalizer=batch.tokens,
        **settings,
    )


@seeds
def test_policy_loss_of_verl(seed: int) -> None:
    """Dual clip is always on there, and the importance weights are truncated."""
    batch = Batch(seed)
    ours, theirs = batch.nan("log_probs"), batch.plain("log_probs")
    our_loss, stats = our_policy_loss(batch, ours, dual_clip=DUAL)
    weights, facts = compute_rollout_correction_weights(
        batch.proximal - batch.behaviour, batch.real, "token", CAP
    )
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio=CLIP,
        clip_ratio_low=CLIP,
        clip_ratio_high=CLIP,
        clip_ratio_c=DUAL,
    )
    their_loss, said = verl.compute_policy_loss_vanilla(
        batch.proximal, theirs, batch.advantages, batch.real, "token-mean", config, weights
    )
    same_loss(our_loss, their_loss, ours, theirs)
    means = mean_stats(stats)
    assert means["clip_share"] == pytest.approx(said["actor/pg_clipfrac"])
    assert means["dual_clip_share"] == pytest.approx(said["actor/pg_clipfrac_lower"])
    assert means["importance_weight"] == pytest.approx(facts["rollout_is_mean"], rel=1e-4) or (
        (our_weights(batch) == CAP).any()  # verl's mean is that of what is not truncated
    )


@seeds
@pytest.mark.parametrize("dual", [None, DUAL])
def test_policy_loss_of_openrlhf(seed: int, dual: float | None) -> None:
    batch = Batch(seed)
    ours, theirs = batch.nan("log_probs"), batch.plain("log_probs")
    our_loss, stats = our_policy_loss(batch, ours, dual_clip=dual)
    loss = PolicyLoss(
        CLIP,
        CLIP,
        dual,
        is_correction_level="token",
        is_correction_mode="clip",
        is_correction_threshold=(0.0, CAP),
    )
    given = batch.proximal, batch.advantages, batch.real, batch.behaviour
    their_loss, clipped, _, _, filtered = loss(theirs, *given)
    same_loss(our_loss, their_loss, ours, theirs)
    means = mean_stats(stats)
    assert means["clip_share"] == pytest.approx(clipped.item())
    capped = (our_weights(batch) == CAP).sum() / batch.tokens
    assert capped.item() == pytest.approx(filtered.item())


def trl_loss(batch: Batch, log_probs: Tensor, **settings: Any) -> Tensor:
    """TRL's loss of a micro-batch, in which all weights of the rollout are 1."""
    keep = SimpleNamespace(
        gather=lambda given: given, reduce=lambda given, reduction: given, num_processes=1
    )
    trainer = GRPOTrainer.__new__(GRPOTrainer)
    defaults: dict[str, Any] = {
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "beta": 0.0,
        "loss_type": "bnpo",
        "epsilon_low": CLIP,
        "epsilon_high": CLIP,
        "use_vllm": False,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": log_probs.shape[1],
        "_entropy_bonus_enabled": False,
        "_metrics": {"train": _Discard()},
        "model": SimpleNamespace(training=True),
        "accelerator": keep,
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        "_get_per_token_logps_and_entropies": lambda *_, **__: (
            log_probs,
            torch.zeros_like(log_probs),
            None,
        ),
    }
    vars(trainer).update(defaults | settings)
    ids = torch.zeros_like(batch.mask, dtype=torch.long)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": ids,
        "completion_mask": batch.mask.long(),
        "advantages": batch.advantages,
        "old_per_token_logps": batch.proximal,
        "ref_per_token_logps": batch.reference,
        "num_items_in_batch": torch.tensor(batch.tokens),
    }
    loss: Tensor = trainer._compute_loss(None, inputs)
    return loss


class _Discard(dict[str, list[float]]):
    def __missing__(self, name: str) -> list[float]:
        return []


@seeds
def test_policy_loss_of_trl(seed: int) -> None:
    """Its type bnpo is a mean over tokens. On fresh samples: behaviour and proximal are one."""
    batch = Batch(seed)
    batch.behaviour = batch.proximal
    ours, theirs = batch.nan("log_probs"), batch.plain("log_probs")
    our_loss, _ = our_policy_loss(batch, ours)
    same_loss(our_loss, trl_loss(batch, theirs), ours, theirs)


@seeds
def test_kl_loss_of_trl(seed: int) -> None:
    """Its k3 has no cap."""
    batch = Batch(seed)
    batch.behaviour = batch.proximal
    batch.reference = batch.log_probs + (batch.reference - batch.log_probs).clamp(-2, 2)
    ours, theirs = batch.nan("log_probs"), batch.plain("log_probs")
    our_loss, _ = our_policy_loss(batch, ours)
    kl, _ = kl_loss(
        log_probs=ours,
        ref_log_probs=batch.nan("reference"),
        mask=batch.mask,
        kind="k3",
        coef=KL_COEF,
        normalizer=batch.tokens,
    )
    same_loss(our_loss + kl, trl_loss(batch, theirs, beta=KL_COEF), ours, theirs)


@seeds
@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_kl_loss(seed: int, kind: Any) -> None:
    batch = Batch(seed)
    ours, theirs = batch.nan("log_probs"), batch.plain("log_probs")
    our_loss, _ = kl_loss(
        log_probs=ours,
        ref_log_probs=batch.nan("reference"),
        mask=batch.mask,
        kind=kind,
        coef=KL_COEF,
        normalizer=batch.tokens,
    )
    kl = verl.kl_penalty(theirs, batch.reference, kind)
    same_loss(our_loss, KL_COEF * verl.agg_loss(kl, batch.real, "token-mean"), ours, theirs)


@seeds
@pytest.mark.parametrize("clip", [VALUE_CLIP, None])
def test_value_loss(seed: int, clip: float | None) -> None:
    batch = Batch(seed)
    ours, theirs = batch.nan("values"), batch.plain("values")
    our_loss, stats = value_loss(
        values=ours,
        old_values=batch.nan("old_values"),
        returns=batch.nan("returns"),
        mask=batch.mask,
        clip=clip,
        normalizer=batch.tokens,
    )
    (our_gradient,) = torch.autograd.grad(our_loss, ours, retain_graph=True)
    of_openrlhf = ValueLoss(clip)(theirs, batch.old_values, batch.returns, batch.real)
    same_loss(our_loss, of_openrlhf, ours, theirs)
    if clip is None:
        return  # it cannot be turned off in verl
    theirs = batch.plain("values")
    of_verl, clipped = verl.compute_value_loss(
        theirs, batch.returns, batch.old_values, batch.real, clip
    )
    close(our_loss, of_verl)
    (their_gradient,) = torch.autograd.grad(of_verl, theirs)
    close(our_gradient, their_gradient)
    assert mean_stats(stats)["value_clip_share"] == pytest.approx(clipped.item())


@seeds
def test_micro_batches_add_up(seed: int) -> None:
    """Sums of micro-batches over the tokens of the minibatch, as the peers aggregate by token."""
    batch = Batch(seed)
    entropy = batch.nan("values")
    parts = [slice(0, 2), slice(2, None)]
    ours = sum(
        entropy_loss(
            entropy=entropy[part], mask=batch.mask[part], coef=-1.0, normalizer=batch.tokens
        )[0]
        for part in parts
    )
    of_verl = verl.agg_loss(batch.values, batch.real, "token-mean")
    of_openrlhf = aggregate_loss(batch.values, batch.real)
    close(ours, of_verl)
    close(ours, of_openrlhf)


# --- log-probs and entropies ---


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
        close(ours, theirs)
        same_gradients(ours, theirs, weight)
    close(lm_head.log_probs(*given), ours)
    for function in (
        verl_functional.entropy_from_logits,
        openrlhf.compute_entropy,
        trl.entropy_from_logits,
    ):
        theirs = function(logits / temperature)
        close(entropies, theirs)
        same_gradients(entropies, theirs, weight)


def same_gradients(ours: Tensor, theirs: Tensor, weight: Tensor) -> None:
    gradients = [
        torch.autograd.grad(each.square().sum(), weight, retain_graph=True)[0]
        for each in (ours, theirs)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


# --- what differs by definition ---


def test_one_token_cannot_be_whitened_by_verl() -> None:
    """Its variance is the unbiased one."""
    values, mask = torch.tensor([[3.0, nan]]), torch.tensor([[True, False]])
    assert whiten(values, mask).tolist() == [[0.0, 0.0]]
    with pytest.raises(ValueError, match="division by zero"):
        verl_functional.masked_whiten(values, mask)


@seeds
def test_how_many_tokens_stale_ones_are_worth(seed: int) -> None:
    """verl truncates the weights first, we do not."""
    batch = Batch(seed)
    batch.behaviour = batch.proximal - (batch.proximal - batch.behaviour).clamp(max=0.6)
    _, theirs = compute_rollout_correction_weights(
        batch.proximal - batch.behaviour, batch.real, "token", CAP
    )
    ours = off_policy((batch.proximal - batch.behaviour)[batch.mask])
    assert ours["effective_share"] == pytest.approx(theirs["rollout_is_eff_sample_size"], rel=1e-4)
    assert ours["mean"] == pytest.approx(theirs["rollout_is_mean"], rel=1e-4)
