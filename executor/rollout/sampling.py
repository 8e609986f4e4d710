"""Tokens that a sampler draws, by uniform numbers that the key of a sequence fixes."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from planner.spec.data import Sampler, Sampling


def without(tokens: Tensor, logits: Tensor, rows: Tensor) -> Tensor:
    """Logits `[n, V]` by which some rows (`[n]`) draw none of these tokens."""
    numbers = torch.arange(logits.shape[-1], device=logits.device)
    return logits.masked_fill(rows[:, None] & torch.isin(numbers, tokens), -torch.inf)


def draw(logits: Tensor, sampler: Sampler, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens `[n]` that a sampler draws from logits `[n, V]` where `uniform [n]` says, or the
    likeliest ones without that; and their log-probs `[n]`."""
    log_p = (logits / (sampler.temperature or 1.0)).log_softmax(-1)
    if uniform is None:
        chosen = log_p.argmax(-1)
    else:
        log_p = cut(log_p, sampler)
        chosen = invert(log_p, uniform)
    return chosen, log_p.gather(-1, chosen[:, None])[:, 0]


def uniform_at(keys: NDArray[np.int64], positions: int) -> NDArray[np.float64]:
    """`[n, positions]` in [0, 1), each row fixed by its key."""
    return np.stack([np.random.default_rng(key).random(positions) for key in keys.tolist()])


def cut(log_p: Tensor, sampler: Sampling) -> Tensor:
    """Log-probs `[n, V]` of the tokens that a sampler leaves, -infinity for the others: first
    `min_p` (Nguyen et al. 2024, arXiv:2407.01082), then `top_k` (Fan et al. 2018,
    arXiv:1805.04833), then of what is left `top_p` (Holtzman et al. 2019, arXiv:1904.09751)."""
    if sampler.min_p:
        least = log_p.max(-1, keepdim=True).values + math.log(sampler.min_p)
        log_p = log_p.masked_fill(log_p < least, -torch.inf)
    if not sampler.top_k and sampler.top_p == 1:
        return log_p.log_softmax(-1) if sampler.min_p else log_p
    ranked, order = log_p.sort(stable=True, dim=-1, descending=True)
    if sampler.top_k:
        ranked[:, sampler.top_k :] = -torch.inf
    ranked = ranked.log_softmax(-1)
    if sampler.top_p < 1:
        likelier = ranked.exp().cumsum(-1) - ranked.exp()
        ranked = ranked.masked_fill(likelier >= sampler.top_p, -torch.inf)
    return torch.empty_like(log_p).scatter_(-1, order, ranked).log_softmax(-1)


def invert(log_p: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the distribution function `[n, V]` passes `uniform [n]`, in float64; never
    one that has no probability."""
    distribution = log_p.double().exp().cumsum(-1)
    target = uniform[:, None] * distribution[:, -1:]
    return torch.searchsorted(distribution, target, right=True)[:, 0].clamp(max=log_p.shape[-1] - 1)
