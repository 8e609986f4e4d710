"""Tokens that a sampler draws, by uniform numbers that the key of a sequence fixes."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from planner.spec.data import Sampler, Sampling


def without(tokens: Tensor, logits: Tensor, rows: Tensor) -> Tensor:
    """Logits `[n, V]` by which some rows (`[n]`) draw none of these tokens."""
    every = torch.arange(logits.shape[-1], device=logits.device)
    left_out = torch.isin(every, tokens)
    return logits.masked_fill(rows[:, None] & left_out, -torch.inf)


def draw(logits: Tensor, sampler: Sampler, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens `[n]` that a sampler draws from logits `[n, V]` where `uniform [n]` says, or the
    likeliest ones without that; and their log-probs `[n]`."""
    temperature = sampler.temperature or 1.0
    log_p = (logits / temperature).log_softmax(-1)
    if uniform is None:
        chosen = log_p.argmax(-1)
    else:
        log_p = cut(log_p, sampler)
        chosen = invert(log_p, uniform)
    log_probs = log_p.gather(-1, chosen[:, None])
    return chosen, log_probs[:, 0]


def uniform_at(key: Sequence[int], count: int) -> NDArray[np.float64]:
    """So many numbers in [0, 1), which a key fixes."""
    return np.random.default_rng(key).random(count)


def cut(log_p: Tensor, sampler: Sampling) -> Tensor:
    """Log-probs `[n, V]` of the tokens that a sampler leaves, -infinity for the others: first
    `min_p` (Nguyen et al. 2024, arXiv:2407.01082), then `top_k` (Fan et al. 2018,
    arXiv:1805.04833), then of what is left `top_p` (Holtzman et al. 2019, arXiv:1904.09751)."""
    if sampler.min_p:
        log_p = _probable(log_p, sampler.min_p)
    if not sampler.top_k and sampler.top_p == 1:
        return log_p
    ranked, order = log_p.sort(stable=True, dim=-1, descending=True)
    if sampler.top_k:
        ranked[:, sampler.top_k :] = -torch.inf
    ranked = ranked.log_softmax(-1)
    if sampler.top_p < 1:
        ranked = _nucleus(ranked, sampler.top_p)
    left = torch.empty_like(log_p)
    left.scatter_(-1, order, ranked)
    return left.log_softmax(-1)


def _probable(log_p: Tensor, share: float) -> Tensor:
    """The tokens that have at least this share of the likeliest one's probability."""
    likeliest = log_p.max(-1, keepdim=True).values
    least = likeliest + math.log(share)
    left = log_p.masked_fill(log_p < least, -torch.inf)
    return left.log_softmax(-1)


def _nucleus(ranked: Tensor, share: float) -> Tensor:
    """The tokens, the likeliest first, whose likelier ones have less than this share together."""
    p = ranked.exp()
    likelier = p.cumsum(-1) - p
    return ranked.masked_fill(likelier >= share, -torch.inf)


def invert(log_p: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the distribution function `[n, V]` passes `uniform [n]`, in float64; never
    one that has no probability."""
    distribution = log_p.double().exp().cumsum(-1)
    whole = distribution[:, -1:]
    target = uniform[:, None] * whole
    chosen = torch.searchsorted(distribution, target, right=True)
    last = log_p.shape[-1] - 1
    return chosen[:, 0].clamp(max=last)
