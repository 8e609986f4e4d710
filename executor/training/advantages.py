"""Advantages from scores, as pure functions on the global batch; see `masked.py` for shapes.

`B` sequences lie group by group: the samples of a prompt are next to each other.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from executor.training.kl import kl_penalty
from executor.training.masked import blocks, last_token, moments, zero
from planner.spec.algorithm import OF_A_GROUP, Advantage, KLKind

STD_EPSILON = 1e-6  # added to the deviation of a group's scores, as verl does


@dataclass(frozen=True, kw_only=True)
class Estimated:
    """`advantages` and `returns` `[B, R]`, 0 where masked, and figures of the batch."""

    advantages: Tensor
    returns: Tensor
    metrics: dict[str, float]


@torch.no_grad()
def token_rewards(
    scores: Tensor,
    kl: Tensor | None,
    kl_coef: float,
    mask: Tensor,
    *,
    ended: Tensor | None = None,
    missing_eos_penalty: float = 0.0,
) -> Tensor:
    """Reward per token `[B, R]`: `-kl_coef * kl` everywhere, plus the score on the last response
    token.

    `scores [B]`, `kl [B, R]` (k1 against the reference; None: there is none). Ziegler et al. 2019
    (arXiv:1909.08593), Ouyang et al. 2022 (arXiv:2203.02155).

    A response that was truncated at the maximum length is an episode that ended there: it is scored
    as it stands and nothing is bootstrapped from the critic. `missing_eos_penalty` is subtracted
    from its score; `ended [B]` (bool, see `Sequences.ended`) says which responses are complete. An
    empty response has no token to carry a score and gets none.
    """
    assert ended is not None or missing_eos_penalty == 0, "missing_eos_penalty needs ended"
    scores = scores.float()
    if ended is not None:
        scores = torch.where(ended, scores, scores - missing_eos_penalty)
    rewards = zero(scores[:, None], last_token(mask))
    return rewards if kl is None or kl_coef == 0 else rewards - kl_coef * zero(kl, mask)


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over response tokens -> (advantages, returns).

    All `[B, R]`, the results in float32 and 0 where masked. delta_t = r_t + gamma * V_{t+1} - V_t
    and A_t = delta_t + gamma * lam * A_{t+1}, where t + 1 is the next real token and V and A are 0
    after the last one; returns = A + V. Schulman et al. 2015 (arXiv:1506.02438).
    """
    rewards, values = zero(rewards, mask), zero(values, mask)
    following, decays = values[:, 1:], torch.tensor(gamma * lam)
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        following = _at_next_real_token(values, mask)
        decays = torch.where(mask, decays, 1.0).T.contiguous()  # where masked, passed on
    deltas = rewards - values
    deltas[:, :-1] += gamma * following
    # Time first: each step of the recurrence is one operation on one row.
    rows = zero(deltas, mask).T.contiguous()
    steps, decay_of = rows.unbind(), decays.expand_as(rows).unbind()
    for now, after, decay in zip(steps[-2::-1], steps[:0:-1], decay_of[-2::-1], strict=True):
        now.addcmul_(decay, after)
    advantages = zero(rows.T, mask)
    return advantages, advantages + values


def _at_next_real_token(values: Tensor, mask: Tensor) -> Tensor:
    """The values `[B, R - 1]` at the next real place behind each, 0 where there is none."""
    tokens = mask.shape[1]
    real = torch.where(mask, torch.arange(tokens, device=mask.device), tokens)
    place = real.flip(1).cummin(dim=1).values.flip(1)[:, 1:]
    return torch.nn.functional.pad(values, (0, 1)).gather(1, place)


@torch.no_grad()
def group_advantages(kind: Advantage, rewards: Tensor, some: Tensor, group: int) -> Tensor:
    """The advantage `[B]` of each sequence over the others of its group, by their `rewards [B]`.

    `some [B]` says which sequences count; the others, and one that is alone in its group, get 0.
    With the mean m and the deviation s (n - 1 in its denominator) of the n rewards of a group:

    - grpo: (r - m) / (s + 1e-6). Shao et al. 2024, arXiv:2402.03300.
    - dr_grpo: r - m. Liu et al. 2025, arXiv:2503.20783.
    - rloo: r - the mean of the others = (r - m) * n / (n - 1). Kool et al. 2019; Ahmadian et al.
      2024, arXiv:2402.14740.
    - reinforce++-baseline: r - m, to be whitened over the batch. Hu et al. 2025, arXiv:2501.03262.
    """
    counted = some.view(-1, group)
    rows = torch.where(counted, rewards.double().view(-1, group), 0.0)
    count = counted.sum(1, keepdim=True)
    centred = torch.where(counted, rows - rows.sum(1, keepdim=True) / count.clamp(min=1), 0.0)
    others = (count - 1).clamp(min=1)
    match kind:
        case "grpo":
            deviation = (centred.square().sum(1, keepdim=True) / others).sqrt()
            found = centred / (deviation + STD_EPSILON)
        case "rloo":
            found = centred * count / others
        case "dr_grpo" | "reinforce++-baseline":
            found = centred
        case _:
            raise ValueError(f"{kind!r} does not compare the samples of a prompt")
    return torch.where(count > 1, found, 0.0).flatten().float()


def varied(scores: Tensor, group: int) -> Tensor:
    """Which groups `[B / group]` have scores that differ; what is not finite does not count."""
    rows = scores.view(-1, group)
    counted = rows.isfinite()
    highest = torch.where(counted, rows, -torch.inf).amax(1)
    lowest = torch.where(counted, rows, torch.inf).amin(1)
    return highest > lowest


@torch.no_grad()
def whiten(advantages: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """(A - mean) / sqrt(variance + eps) over the real tokens of the batch `[B, R]`, 0 where masked.

    Give it the global batch: whitening each micro-batch or worker by itself would change the
    mathematics with the placement. The variance is the biased one, so a single token gives 0.
    """
    mean, variance = (moment.float() for moment in moments(advantages, mask))
    found = torch.empty(advantages.shape)
    for rows in blocks(found):
        centred = advantages[rows] - mean
        found[rows] = zero(centred * torch.rsqrt(variance + eps), mask[rows])
    return found


@torch.no_grad()
def estimate(
    *,
    scores: Tensor,
    log_probs: Tensor,
    mask: Tensor,
    ended: Tensor,
    ref_log_probs: Tensor | None = None,
    values: Tensor | None = None,
    kind: Advantage = "gae",
    group: int = 1,
    gamma: float = 1.0,
    lam: float = 0.95,
    kl_coef: float = 0.05,
    kl_kind: KLKind = "k1",
    missing_eos_penalty: float = 0.0,
    whiten_advantages: bool = True,
) -> Estimated:
    """Advantages and returns from the outputs of all roles for the global batch.

    `scores [B]`, `ended [B]` bool, all else `[B, R]`. `log_probs` are the proximal ones, which come
    from the same kernels as the reference's. Without a reference there is no KL penalty; with
    kl_kind k2 or k3 it is part of the loss (`losses.kl_loss`) and not of the reward.

    - gae needs `values`.
    - The kinds that compare a group give all tokens of a response its advantage, by the sum of its
      rewards (`group_advantages`).
    - reinforce++ has discounted rewards-to-go less their mean over the batch's tokens (Hu et al.
      2025, arXiv:2501.03262; unwhitened it is REINFORCE with a baseline, Williams 1992).

    Metrics are means over non-empty responses (score, reward = score - penalties, response_tokens,
    truncated_share), over groups (groups_without_variance, a share) or over real tokens (kl as k1,
    advantage and its std before whitening, return, and with a critic value, explained_variance).
    """
    raw, returns = torch.empty(mask.shape), torch.empty(mask.shape)
    totals, kl_sums = torch.empty(len(mask)), torch.zeros(len(mask))
    some = mask.any(1)
    for rows in blocks(mask, group):
        real, kl = mask[rows], None
        if ref_log_probs is not None:
            kl = zero(kl_penalty(log_probs[rows], ref_log_probs[rows], "k1"), real)
            kl_sums[rows] = kl.sum(1)
        rewards = token_rewards(
            scores[rows],
            kl,
            kl_coef if kl_kind == "k1" else 0.0,
            real,
            ended=ended[rows],
            missing_eos_penalty=missing_eos_penalty,
        )
        totals[rows] = rewards.sum(1)
        if kind == "gae":
            assert values is not None, "gae needs values"
            raw[rows], returns[rows] = gae(rewards, values[rows], real, gamma, lam)
        elif kind in OF_A_GROUP:
            found = group_advantages(kind, totals[rows], some[rows], group)
            raw[rows], returns[rows] = zero(found[:, None], real), zero(totals[rows, None], real)
        else:
            _, returns[rows] = gae(rewards, torch.zeros_like(rewards), real, gamma, 1.0)
    if kind == "reinforce++":
        raw = zero(returns - moments(returns, mask)[0].float(), mask)
    metrics = _batch_metrics(scores, totals, kl_sums, mask, ended)
    metrics |= _estimate_metrics(raw, returns, values, mask)
    if group > 1:
        scored = torch.where(some, scores, torch.nan)
        metrics["groups_without_variance"] = float((~varied(scored, group)).float().mean())
    advantages = whiten(raw, mask) if whiten_advantages else raw
    return Estimated(advantages=advantages, returns=returns, metrics=metrics)


def _batch_metrics(
    scores: Tensor, totals: Tensor, kl_sums: Tensor, mask: Tensor, ended: Tensor
) -> dict[str, float]:
    some, lengths = mask.any(1), mask.sum(1)
    return {
        "score": float(moments(scores, some)[0]),
        "reward": float(moments(totals, some)[0]),
        "kl": float(kl_sums.double().sum() / lengths.sum().clamp(min=1)),
        "response_tokens": float(moments(lengths, some)[0]),
        "truncated_share": float(moments(~ended, some)[0]),
    }


def _estimate_metrics(
    raw: Tensor, returns: Tensor, values: Tensor | None, mask: Tensor
) -> dict[str, float]:
    mean, variance = moments(raw, mask)
    return_mean, return_variance = moments(returns, mask)
    metrics = {
        "advantage": float(mean),
        "advantage_std": float(variance.sqrt()),
        "return": float(return_mean),
    }
    if values is not None:  # the error of a value is its advantage
        metrics["value"] = float(moments(values, mask)[0])
        explained = 1 - float(variance / return_variance) if return_variance > 0 else 0.0
        metrics["explained_variance"] = explained
    return metrics
