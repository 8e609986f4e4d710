"""What a step learns from: the groups that are selected, and the advantages and weights of their
tokens. Plain functions on the arrays of the controller."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from executor.data.requests import Rows
from executor.training import advantages, correction
from executor.training.masked import blocks
from executor.training.trainer import COLUMNS
from planner.spec.algorithm import Algorithm
from planner.spec.workload import Workload


def select(scores: NDArray[np.float32], group: int, batch: int) -> tuple[Rows, dict[str, float]]:
    """The rows [batch] of the first groups whose scores differ; where there are too few of them,
    the first others fill the batch. Rows keep their order.

    Metrics: the groups that were generated, how many of them had no variance, how many of these
    were used nevertheless, and how many others were not.

    >>> select(np.array([1, 1, 0, 1, 2, 2, 3, 2], dtype=np.float32), 2, 4)[0]
    array([2, 3, 6, 7])
    """
    varied = advantages.varied(torch.from_numpy(scores), group).numpy()
    wanted = batch // group
    preferred = np.argsort(~varied, kind="stable")
    chosen = np.sort(preferred[:wanted])
    filled = int((~varied[chosen]).sum())
    rows = (chosen[:, None] * group + np.arange(group)).ravel()
    return rows, {
        "groups/generated": len(varied),
        "groups/without_variance": int((~varied).sum()),
        "groups/used_without_variance": filled,
        "groups/unused": int(varied.sum()) - (wanted - filled),
    }


def estimate(
    workload: Workload,
    columns: COLUMNS,
    *,
    scores: NDArray[np.float32],
    mask: NDArray[np.bool_],
    ended: NDArray[np.bool_],
    kl_coef: float,
) -> tuple[COLUMNS, dict[str, float]]:
    """The columns `[B, R]` that updates need: advantages, returns, and the weights of tokens, 0 for
    those that the actor does not learn from; and metrics. Of a batch's `columns` it takes the
    log-probs and values; `scores` and `ended` are `[B]`."""
    settings = workload.algorithm
    given = {name: _tensor(column) for name, column in columns.items()}
    real, complete = _tensor(mask), _tensor(ended)
    proximal = given["proximal_log_probs"]
    found = advantages.estimate(
        scores=_tensor(scores),
        log_probs=proximal,
        mask=real,
        ended=complete,
        ref_log_probs=given.get("ref_log_probs"),
        values=given.get("values"),
        kind=settings.advantage,
        group=workload.group,
        gamma=settings.gamma,
        lam=settings.lam,
        kl_coef=kl_coef,
        kl_kind=settings.kl_kind,
        missing_eos_penalty=settings.missing_eos_penalty,
        whiten_advantages=settings.whitens,
    )
    weights, log_ratio = _weights(settings, proximal, given["log_probs"], real, complete)
    learned: COLUMNS = {"advantages": found.advantages.numpy(), "weights": weights.numpy()}
    if settings.needs_critic:
        learned["returns"] = found.returns.numpy()
    tokens = max(1, len(log_ratio))
    importance = correction.off_policy(log_ratio) | {
        "cap_share": int((weights >= settings.importance_cap).count_nonzero()) / tokens,
        "masked_share": 1 - int(weights.count_nonzero()) / tokens,
    }
    # Actor against engine: the engine's rounding where the data are fresh, staleness where they are
    # not.
    metrics = {**found.metrics, "log_prob_gap": float(log_ratio.abs().sum() / tokens)}
    return learned, metrics | {f"importance/{name}": value for name, value in importance.items()}


def _weights(
    settings: Algorithm, proximal: Tensor, behaviour: Tensor, mask: Tensor, ended: Tensor
) -> tuple[Tensor, Tensor]:
    """The weights `[B, R]` of all tokens, and the log-ratios of the real ones."""
    weights, log_ratios = torch.empty(mask.shape), []
    for rows in blocks(mask):
        real, log_ratio = mask[rows], proximal[rows] - behaviour[rows]
        weights[rows] = correction.importance_weights(
            log_ratio,
            real,
            level=settings.importance,
            cap=settings.importance_cap,
            masking=settings.ratio_mask,
            low=settings.ratio_mask_low,
            high=settings.ratio_mask_high,
        )
        log_ratios.append(log_ratio[real])
    if settings.mask_truncated:
        weights *= ended[:, None]
    return weights, torch.cat(log_ratios)


def _tensor(array: NDArray[Any]) -> Tensor:
    """The same memory as a tensor; a copy of what is read-only, as Ray's arrays are."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())
