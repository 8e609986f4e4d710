"""The losses of actor and critic, as pure functions; see `masked.py` for shapes and
`aggregation.py` for what a `normalizer` is.

Losses return `(loss, stats)`; stats are sums over real tokens (`aggregation.mean_stats`).
"""

import torch
from torch import Tensor

from executor.training.aggregation import Stats, normalized, sums
from executor.training.kl import kl_penalty
from executor.training.masked import LOG_RATIO_MAX, row_means, zero
from planner.spec.algorithm import KLKind, Loss


def policy_loss(
    *,
    log_probs: Tensor,
    proximal_log_probs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    mask: Tensor,
    clip: float,
    normalizer: float | Tensor,
    kind: Loss = "ppo",
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[Tensor, Stats]:
    """The clipped policy loss; all tensors `[B, R]`, gradient through `log_probs` only.

    With r = exp(log_probs - proximal), c = clamp(r, 1 - clip, 1 + clip_high) and the constant
    `weights` w (`correction.importance_weights`), loss = -sum(w * objective / normalizer):

    - ppo: min(r * A, c * A). Schulman et al. 2017, arXiv:1707.06347; the proximal policy is the
      actor just before this step, the one that sampled is corrected by w (decoupled: Hilton et al.
      2022, arXiv:2110.00641; AReaL, arXiv:2505.24298); a `clip_high` above `clip` is DAPO's
      (arXiv:2503.14476).
    - gspo: the same with r = exp(mean of the sequence's log_probs - proximal) for each of its
      tokens, of which each passes on its own gradient. Zheng et al. 2025, arXiv:2507.18071.
    - cispo: c * A * log_probs, c without gradient: no token's gradient is cut off. MiniMax 2025,
      arXiv:2506.13585.

    `dual_clip` > 1 bounds the objective of a negative advantage from below by dual_clip * A (Ye et
    al. 2020, arXiv:1912.09729).

    Stats: tokens, policy_loss, ratio (r), clip_share and dual_clip_share (places where the bound is
    what counts), importance_weight (w), approx_kl = k3 of KL(proximal || new).
    """
    log_probs, advantages = zero(log_probs, mask), zero(advantages, mask).detach()
    proximal, weights = zero(proximal_log_probs, mask).detach(), zero(weights, mask).detach()
    log_ratio = log_probs - proximal
    if kind == "gspo":
        log_ratio = log_probs - log_probs.detach() + row_means(log_ratio.detach(), mask)
    ratio = log_ratio.clamp(max=LOG_RATIO_MAX).exp()
    bounded = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    if kind == "cispo":
        objective = bounded.detach() * advantages * log_probs
        clipped = bounded != ratio
    else:
        objective = torch.minimum(ratio * advantages, bounded * advantages)
        clipped = bounded * advantages < ratio * advantages
    dual_clipped = torch.zeros_like(mask)
    if dual_clip is not None:
        assert dual_clip > 1, (
            f"dual_clip {dual_clip} must be above 1, or it would undo the clipping"
        )
        floor = dual_clip * advantages
        dual_clipped = (advantages < 0) & (objective < floor)
        objective = torch.where(dual_clipped, floor, objective)
    token_loss = -weights * objective
    stats = {
        "tokens": mask.float(),
        "policy_loss": token_loss,
        "ratio": ratio,
        "clip_share": clipped,
        "dual_clip_share": dual_clipped,
        "importance_weight": weights,
        "approx_kl": kl_penalty(proximal, log_probs, "k3"),
    }
    return normalized(token_loss, mask, normalizer), sums(stats, mask)


def value_loss(
    *,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float | None,
    normalizer: float | Tensor,
) -> tuple[Tensor, Stats]:
    """Clipped value loss; all tensors `[B, R]`, gradient through `values` only.

    loss = sum(0.5 * max((V - G)², (clamp(V, V_old - clip, V_old + clip) - G)²)) / normalizer, as in
    PPO2 (OpenAI Baselines); with `clip` None just the first of the two. Stats: tokens, value_loss,
    value, value_clip_share (places where the clipped error is the larger one).
    """
    values = zero(values, mask)
    old_values, returns = zero(old_values, mask).detach(), zero(returns, mask).detach()
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
    return normalized(token_loss, mask, normalizer), sums(stats, mask)


def kl_loss(
    *,
    log_probs: Tensor,
    ref_log_probs: Tensor,
    mask: Tensor,
    kind: KLKind,
    coef: float,
    normalizer: float | Tensor,
) -> tuple[Tensor, Stats]:
    """coef * sum(kl / normalizer) with k2 or k3; all tensors `[B, R]`, gradient through `log_probs`
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
    kl = kl_penalty(zero(log_probs, mask), zero(ref_log_probs, mask).detach(), kind)
    return coef * normalized(kl, mask, normalizer), sums({"kl_loss": kl}, mask)


def entropy_loss(
    *, entropy: Tensor, mask: Tensor, coef: float, normalizer: float | Tensor
) -> tuple[Tensor, Stats]:
    """-coef * sum(entropy / normalizer), a bonus for exploring; `entropy [B, R]`. Stats: entropy
    (cf. `kl_loss`)."""
    return -coef * normalized(entropy, mask, normalizer), sums({"entropy": entropy}, mask)
