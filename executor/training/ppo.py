"""The mathematics of PPO for language models, as pure tensor functions.

Shapes. `B` sequences, `R` = the longest response of the batch. Everything that belongs to a
response is `[B, R]`, aligned to the response: column j is about the j-th response token. Log-probs,
values and entropies of column j belong to the state *before* that token is emitted. `mask [B, R]`
(bool) is true on real response tokens, the end-of-sequence token included.

Padding. A masked place may hold anything, NaN and infinity too. Inputs are replaced there by zero
before any arithmetic: multiplying by the mask afterwards would leave NaN in the loss, and masking
only the result would leave NaN in the gradient.

Normalisation. Every loss is a sum over real tokens divided by `normalizer`, the token count of the
whole minibatch over all workers. Summed over micro-batches and workers it is the minibatch's mean
per token, however that was split. FSDP2 *averages* gradients over the data-parallel ranks: turn
that into a sum (`set_gradient_divide_factor(1.0)`, or multiply the loss by the number of ranks).

Stats. Losses return `(loss, stats)`; stats are detached sums over real tokens, so they can be added
over micro-batches and workers; `mean_stats` divides by the token count at the end. Shares are
counts before that division.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from planner.spec.algorithm import KLKind

Stats = dict[str, Tensor]

LOG_RATIO_MAX = (
    20.0  # exp(20) = 4.9e8: keeps ratios finite in float32; the gradient is zero beyond it
)
K3_MAX = 10.0  # of one token, as verl and OpenRLHF have it; the gradient is zero beyond it


# --- rewards and advantages ---


def kl_penalty(log_probs: Tensor, ref_log_probs: Tensor, kind: KLKind) -> Tensor:
    """Schulman's estimators of KL(policy || reference) per token, from tokens that the policy
    sampled.

    Any equal shapes. With x = ref_log_probs - log_probs: k1 = -x (unbiased, may be negative), k2 =
    x² / 2 (biased, low variance), k3 = exp(x) - 1 - x (unbiased up to its cap of 10, never
    negative). http://joschu.net/blog/kl-approx.html
    """
    x = ref_log_probs - log_probs
    match kind:
        case "k1":
            return -x
        case "k2":
            return 0.5 * x.square()
        case "k3":
            x = x.clamp(max=LOG_RATIO_MAX)
            return (torch.expm1(x) - x).clamp(max=K3_MAX)
    raise ValueError(f"unknown KL estimator {kind!r}: use k1, k2 or k3")


@torch.no_grad()
def token_rewards(
    scores: Tensor,
    kl: Tensor,
    kl_coef: float,
    mask: Tensor,
    *,
    ended: Tensor | None = None,
    missing_eos_penalty: float = 0.0,
) -> Tensor:
    """Reward per token `[B, R]`: `-kl_coef * kl` everywhere, plus the score on the last response
    token.

    `scores [B]`, `kl [B, R]` (k1 against the reference). Ziegler et al. 2019 (arXiv:1909.08593),
    Ouyang et al. 2022 (arXiv:2203.02155).

    A response that was truncated at the maximum length is an episode that ended there: it is scored
    as it stands and nothing is bootstrapped from the critic. `missing_eos_penalty` is subtracted
    from its score; `ended [B]` (bool, see `Sequences.ended`) says which responses are complete. An
    empty response has no token to carry a score and gets none.
    """
    assert ended is not None or missing_eos_penalty == 0, "missing_eos_penalty needs ended"
    scores = scores.float()
    if ended is not None:
        scores = torch.where(ended, scores, scores - missing_eos_penalty)
    return -kl_coef * _zero(kl, mask) + _zero(scores[:, None], _last(mask))


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over response tokens -> (advantages, returns).

    All `[B, R]`, the results in float32 and 0 where masked. delta_t = r_t + gamma * V_{t+1} - V_t
    and A_t = delta_t + gamma * lam * A_{t+1}, where t + 1 is the next real token and V and A are 0
    after the last one; returns = A + V. Schulman et al. 2015 (arXiv:1506.02438).
    """
    rewards, values = _zero(rewards, mask), _zero(values, mask)
    tokens = mask.shape[1]
    real = torch.where(mask, torch.arange(tokens, device=mask.device), tokens)
    following = (
        real.flip(1).cummin(dim=1).values.flip(1)[:, 1:]
    )  # the next real token's place, or `tokens`
    next_values = torch.nn.functional.pad(values, (0, 1)).gather(1, following)
    deltas = rewards - values
    deltas[:, :-1] += gamma * next_values
    # Where masked, what follows is passed on. Time first: each step of the recurrence is one
    # operation on one row.
    deltas, decays = (
        _zero(deltas, mask).T.contiguous(),
        torch.where(mask, gamma * lam, 1.0).T.contiguous(),
    )
    for t in reversed(range(tokens - 1)):
        deltas[t].addcmul_(decays[t], deltas[t + 1])
    advantages = _zero(deltas.T, mask)
    return advantages, advantages + values


@torch.no_grad()
def whiten(advantages: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """(A - mean) / sqrt(variance + eps) over the real tokens of the batch `[B, R]`, 0 where masked.

    Give it the global batch: whitening each micro-batch or worker by itself would change the
    mathematics with the placement. The variance is the biased one, so a single token gives 0.
    """
    mean, variance = _moments(advantages, mask)
    return _zero((advantages - mean) * torch.rsqrt(variance + eps), mask)


@torch.no_grad()
def advantages(
    *,
    scores: Tensor,
    log_probs: Tensor,
    mask: Tensor,
    ended: Tensor,
    ref_log_probs: Tensor | None = None,
    values: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    kl_coef: float = 0.05,
    kl_kind: KLKind = "k1",
    missing_eos_penalty: float = 0.0,
    whiten_advantages: bool = True,
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Compute (advantages `[B, R]`, returns `[B, R]`, metrics) from the outputs of all roles for
    the global batch.

    `scores [B]`, `ended [B]` bool, all else `[B, R]`. `log_probs` are the proximal ones, which come
    from the same kernels as the reference's. Without a reference there is no KL penalty; with
    kl_kind k2 or k3 it is part of the loss (`kl_loss`) and not of the reward.

    Without a critic (`values` is None) the returns are discounted rewards-to-go and the baseline is
    their mean over the batch's tokens: REINFORCE with a batch baseline (Williams 1992), `lam`
    unused.

    Metrics are means over non-empty responses (score, reward = score - penalties, response_tokens,
    truncated_share) or over real tokens (kl as k1, advantage and its std before whitening, return,
    and with a critic value, explained_variance).
    """
    kl = (
        torch.zeros_like(log_probs)
        if ref_log_probs is None
        else kl_penalty(log_probs, ref_log_probs, "k1")
    )
    reward_kl_coef = kl_coef if kl_kind == "k1" else 0.0
    rewards = token_rewards(
        scores, kl, reward_kl_coef, mask, ended=ended, missing_eos_penalty=missing_eos_penalty
    )
    if values is None:
        _, returns = gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)
        raw = _zero(returns - _moments(returns, mask)[0], mask)
    else:
        raw, returns = gae(rewards, values, mask, gamma, lam)
    metrics = _batch_metrics(scores, rewards, kl, mask, ended) | _estimate_metrics(
        raw, returns, values, mask
    )
    return (whiten(raw, mask) if whiten_advantages else raw), returns, metrics


def _batch_metrics(
    scores: Tensor, rewards: Tensor, kl: Tensor, mask: Tensor, ended: Tensor
) -> dict[str, float]:
    some = mask.any(1)
    return {
        "score": float(_moments(scores, some)[0]),
        "reward": float(_moments(rewards.sum(1), some)[0]),
        "kl": float(_moments(kl, mask)[0]),
        "response_tokens": float(_moments(mask.sum(1), some)[0]),
        "truncated_share": float(_moments(~ended, some)[0]),
    }


def _estimate_metrics(
    raw: Tensor, returns: Tensor, values: Tensor | None, mask: Tensor
) -> dict[str, float]:
    mean, variance = _moments(raw, mask)
    return_mean, return_variance = _moments(returns, mask)
    metrics = {
        "advantage": float(mean),
        "advantage_std": float(variance.sqrt()),
        "return": float(return_mean),
    }
    if values is not None:
        error_variance = float(_moments(returns - values, mask)[1])
        metrics["value"] = float(_moments(values, mask)[0])
        metrics["explained_variance"] = (
            1 - error_variance / float(return_variance) if return_variance > 0 else 0.0
        )
    return metrics


@torch.no_grad()
def off_policy(
    *, proximal_log_probs: Tensor, behaviour_log_probs: Tensor, mask: Tensor
) -> dict[str, float]:
    """How far the policy that sampled is from the proximal one, over the real tokens of the batch;
    both `[B, R]`.

    With w = exp(proximal - behaviour), not yet truncated: its mean (1 in expectation over what the
    behaviour policy samples), 1st and 99th percentile and maximum; and effective_share = (sum w)² /
    (n sum w²), the share of the n tokens that as many equally weighted ones would be worth (Kish
    1965). NaN where there are no tokens.
    """
    weight = (proximal_log_probs - behaviour_log_probs)[mask].double().exp()
    if not (n := weight.numel()):
        return dict.fromkeys(("mean", "p01", "p99", "max", "effective_share"), float("nan"))
    return {
        "mean": float(weight.mean()),
        "p01": float(weight.kthvalue(1 + (n - 1) // 100).values),
        "p99": float(weight.kthvalue(n - (n - 1) // 100).values),
        "max": float(weight.max()),
        "effective_share": float(weight.sum().square() / (n * weight.square().sum())),
    }


# --- losses ---


def policy_loss(
    *,
    log_probs: Tensor,
    proximal_log_probs: Tensor,
    behaviour_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float,
    importance_cap: float,
    normalizer: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Stats]:
    """Clipped policy loss with the decoupled objective; all tensors `[B, R]`, gradient through
    `log_probs` only.

    With r = exp(log_probs - proximal) and w = min(exp(proximal - behaviour), importance_cap), a
    constant: loss = -sum(w * min(r * A, clamp(r, 1 - clip, 1 + clip) * A)) / normalizer.

    The clipping is PPO's (Schulman et al. 2017, arXiv:1707.06347). The proximal policy is the actor
    just before this step, the behaviour policy is the one that sampled, perhaps some versions older
    (Hilton et al. 2022, arXiv:2110.00641; AReaL, arXiv:2505.24298); truncating w bounds the
    variance (Ionides 2008). With the rollout's own log-probs as the proximal ones, w = 1 and this
    is plain PPO. `dual_clip` > 1 bounds the objective of a negative advantage from below by
    dual_clip * A (Ye et al. 2020, arXiv:1912.09729).

    Stats: tokens, policy_loss, ratio (r), clip_share and dual_clip_share (places where the bound is
    what counts), importance_weight (w), cap_share, approx_kl = k3 of KL(proximal || new),
    staleness_kl = k3 of KL(behaviour || proximal).
    """
    log_probs, advantages = _zero(log_probs, mask), _zero(advantages, mask).detach()
    proximal, behaviour = (
        _zero(proximal_log_probs, mask).detach(),
        _zero(behaviour_log_probs, mask).detach(),
    )

    ratio = (log_probs - proximal).clamp(max=LOG_RATIO_MAX).exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantages
    objective = torch.minimum(unclipped, clipped)
    dual_clipped = torch.zeros_like(mask)
    if dual_clip is not None:
        assert dual_clip > 1, (
            f"dual_clip {dual_clip} must be above 1, or it would undo the clipping"
        )
        floor = dual_clip * advantages
        dual_clipped = (advantages < 0) & (objective < floor)
        objective = torch.where(dual_clipped, floor, objective)

    importance = (proximal - behaviour).exp()
    weight = importance.clamp(max=importance_cap)
    token_loss = -weight * objective
    stats = {
        "tokens": mask.float(),
        "policy_loss": token_loss,
        "ratio": ratio,
        "clip_share": clipped < unclipped,
        "dual_clip_share": dual_clipped,
        "importance_weight": weight,
        "cap_share": importance > importance_cap,
        "approx_kl": kl_penalty(proximal, log_probs, "k3"),
        "staleness_kl": kl_penalty(behaviour, proximal, "k3"),
    }
    return _normalize(token_loss, mask, normalizer), _sums(stats, mask)


def value_loss(
    *,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float | None,
    normalizer: float,
) -> tuple[Tensor, Stats]:
    """Clipped value loss; all tensors `[B, R]`, gradient through `values` only.

    loss = sum(0.5 * max((V - G)², (clamp(V, V_old - clip, V_old + clip) - G)²)) / normalizer, as in
    PPO2 (OpenAI Baselines); with `clip` None just the first of the two. Stats: tokens, value_loss,
    value, value_clip_share (places where the clipped error is the larger one).
    """
    values = _zero(values, mask)
    old_values, returns = _zero(old_values, mask).detach(), _zero(returns, mask).detach()
    error = (values - returns).square()
    clipped_values = values if clip is None else values.clamp(old_values - clip, old_values + clip)
    clipped_error = (clipped_values - returns).square()
    token_loss = 0.5 * torch.maximum(error, clipped_error)
    stats = {
        "tokens": mask.float(),
        "value_loss": token_loss,
        "value": values,
        "value_clip_share": clipped_error > error,
    }
    return _normalize(token_loss, mask, normalizer), _sums(stats, mask)


def kl_loss(
    *,
    log_probs: Tensor,
    ref_log_probs: Tensor,
    mask: Tensor,
    kind: KLKind,
    coef: float,
    normalizer: float,
) -> tuple[Tensor, Stats]:
    """coef * sum(kl) / normalizer with k2 or k3; all tensors `[B, R]`, gradient through `log_probs`
    only.

    On fresh samples the gradient of k2 is that of KL(policy || reference) in expectation, that of
    k3 is KL(reference || policy)'s. That of k1 is zero in expectation, so k1 belongs in the reward
    and is refused here. Stats: kl_loss (before coef); no token count, so that it can be merged with
    the stats of `policy_loss`.
    """
    if kind == "k1":
        raise ValueError(
            "k1 has no gradient in expectation as a loss: put it in the reward, or use k2 or k3"
        )
    kl = kl_penalty(_zero(log_probs, mask), _zero(ref_log_probs, mask).detach(), kind)
    return coef * _normalize(kl, mask, normalizer), _sums({"kl_loss": kl}, mask)


def entropy_loss(
    *, entropy: Tensor, mask: Tensor, coef: float, normalizer: float
) -> tuple[Tensor, Stats]:
    """-coef * sum(entropy) / normalizer, a bonus for exploring; `entropy [B, R]`. Stats: entropy
    (cf. `kl_loss`)."""
    return -coef * _normalize(entropy, mask, normalizer), _sums({"entropy": entropy}, mask)


def mean_stats(sums: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Turn stats that were summed over the whole minibatch into means per token, and `tokens`
    itself."""
    tokens = float(sums["tokens"])
    return {
        name: tokens if name == "tokens" else float(total) / max(tokens, 1.0)
        for name, total in sums.items()
    }


# --- masks ---


def _zero(x: Tensor, mask: Tensor) -> Tensor:
    """x in float32 with 0 where masked. The gradient there is 0 too, for any value of x."""
    return torch.where(mask, x.float(), 0.0)


def _last(mask: Tensor) -> Tensor:
    """The last real token of each row, as a bool mask `[B, R]`."""
    return mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))


def _moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of x over the real places; 0 and 0 where there are none."""
    count = mask.sum().clamp(min=1)
    x = _zero(x, mask)
    mean = x.sum() / count
    return mean, _zero(x - mean, mask).square().sum() / count


def _normalize(token_loss: Tensor, mask: Tensor, normalizer: float) -> Tensor:
    return _zero(token_loss, mask).sum() / max(
        normalizer, 1
    )  # a minibatch without tokens has loss 0, not 0 / 0


def _sums(stats: Mapping[str, Tensor], mask: Tensor) -> Stats:
    return {name: _zero(x.detach(), mask).sum() for name, x in stats.items()}
