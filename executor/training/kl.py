"""Distances between two policies, from the tokens that one of them sampled; see `masked.py` for
shapes."""

import torch
from torch import Tensor

from executor.training.masked import LOG_RATIO_MAX
from planner.spec.algorithm import KLKind

K3_MAX = 10.0  # of one token, as verl and OpenRLHF have it: one outlier must not outweigh all else
MOST_ERROR = 0.2  # by which a KL is taken to miss its target, relative to it


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


def adapted_coef(coef: float, kl: float, target: float, sequences: int, horizon: float) -> float:
    """The weight of the KL penalty after a batch of `sequences` whose mean KL of a token was `kl`.

    It grows where the KL is above its target, and shrinks where it is below: coef * (1 + e *
    sequences / horizon), where e = kl / target - 1, but at most 0.2 either way. Ziegler et al.
    2019, arXiv:1909.08593, section 2.2.
    """
    error = min(max(kl / target - 1, -MOST_ERROR), MOST_ERROR)
    return coef * (1 + error * sequences / horizon)
