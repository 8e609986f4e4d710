"""Correction for a rollout that samples under other probabilities than the trainer's proximal
policy: its weights are some versions older, or it rounds in another way. See `masked.py` for
shapes."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from executor.training.kl import kl_penalty
from executor.training.masked import BLOCK, LOG_RATIO_MAX, row_means, zero
from planner.spec.algorithm import Masking, Weighting

MOST_RANKED = 2**20  # tokens whose ratios percentiles are taken of, evenly chosen


@torch.no_grad()
def importance_weights(
    log_ratio: Tensor,
    mask: Tensor,
    *,
    level: Weighting = "token",
    cap: float = 2.0,
    masking: Masking = "off",
    low: float = 0.5,
    high: float = 2.0,
) -> Tensor:
    """Weights `[B, R]` of tokens that the behaviour policy sampled, 0 for those that are not to be
    learned from.

    With x = `log_ratio` = proximal - behaviour log-probs, the weight of a token is min(exp(x), cap)
    by `token`, min(exp(sum of the sequence's x), cap) by `sequence`, and 1 if `off`. Truncating it
    bounds the variance (Ionides 2008; of language models Yao et al. 2025, "Your efficient RL
    framework secretly brings you off-policy RL training"). Masked are tokens whose exp(x), or whole
    sequences whose product or `geometric` mean of all exp(x) lies outside of [low, high] (Liu et
    al. 2025, "When speed kills stability"; the geometric mean as in GSPO, arXiv:2507.18071).
    """
    x = zero(log_ratio, mask).clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX)
    weights = _ratio(x, mask, level).clamp(max=cap).expand_as(x)
    kept = mask
    if masking != "off":
        ratio = _ratio(x, mask, masking)
        kept = mask & (ratio >= low) & (ratio <= high)
    return zero(weights, kept)


def _ratio(x: Tensor, mask: Tensor, level: Masking) -> Tensor:
    """exp(x) of tokens `[B, R]`, or one ratio for each sequence `[B, 1]`; 1 if off."""
    match level:
        case "token":
            return x.exp()
        case "sequence":
            return x.sum(1, keepdim=True).clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX).exp()
        case "geometric":
            return row_means(x, mask).exp()
    return torch.ones_like(x[:, :1])


@torch.no_grad()
def off_policy(log_ratio: Tensor) -> dict[str, float]:
    """How far the policy that sampled is from the proximal one, by the log-ratios [n] of the real
    tokens of the batch.

    With w = exp(log_ratio), not truncated: its mean (1 in expectation over what the behaviour
    policy samples), maximum, 1st and 99th percentile (of at most a million tokens, evenly chosen);
    effective_share = (sum w)² / (n sum w²), the share of the n tokens that as many equally weighted
    ones would be worth (Kish 1965); and staleness_kl = k3 of KL(behaviour || proximal). NaN where
    there are no tokens.
    """
    if not (n := len(log_ratio)):
        names = ("mean", "p01", "p99", "max", "effective_share", "staleness_kl")
        return dict.fromkeys(names, float("nan"))
    total = square = kl = 0.0
    for x in log_ratio.split(BLOCK):
        weight = x.clamp(max=LOG_RATIO_MAX).exp()
        total += float(weight.sum(dtype=torch.float64))
        square += float(torch.dot(weight, weight))
        kl += float(kl_penalty(torch.zeros(()), x, "k3").sum())
    few = log_ratio[:: -(-n // MOST_RANKED)].clamp(max=LOG_RATIO_MAX).exp()
    low, high = _percentiles(few.numpy(), 0.01)
    return {
        "mean": total / n,
        "p01": low,
        "p99": high,
        "max": float(log_ratio.max().clamp(max=LOG_RATIO_MAX).exp()),
        "effective_share": total**2 / (n * square),
        "staleness_kl": kl / n,
    }


def _percentiles(values: NDArray[np.float32], share: float) -> tuple[float, float]:
    """The values below and above which this share of them lies."""
    below = int((len(values) - 1) * share)
    ranked = np.partition(values, [below, len(values) - 1 - below])
    return float(ranked[below]), float(ranked[len(values) - 1 - below])
