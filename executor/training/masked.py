"""Arithmetic on tensors of which only some places count.

Shapes. `B` sequences, `R` = the longest response of the batch. Everything that belongs to a
response is `[B, R]`, aligned to the response: column j is about the j-th response token. Log-probs,
values and entropies of column j belong to the state *before* that token is emitted. `mask [B, R]`
(bool) is true on real response tokens, the end-of-sequence token included.

Padding. A masked place may hold anything, NaN and infinity too. Inputs are replaced there by zero
before any arithmetic: multiplying by the mask afterwards would leave NaN in the loss, and masking
only the result would leave NaN in the gradient.

Blocks. A batch of long responses is worked on some rows at a time: what is allocated for them is
used again, and the system need not find and clear pages for every operation.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# exp(20) = 4.9e8: keeps ratios finite in float32; the gradient is zero beyond it.
LOG_RATIO_MAX = 20.0

BLOCK = 2**21  # places of a block


def zero(x: Tensor, mask: Tensor) -> Tensor:
    """x in float32 with 0 where masked. The gradient there is 0 too, for any value of x."""
    return torch.where(mask, x.float(), 0.0)


def blocks(x: Tensor, group: int = 1) -> Iterator[slice]:
    """Rows of x in blocks, each with whole groups."""
    places = max(1, x[0].numel()) if len(x) else 1
    size = max(1, BLOCK // (places * group)) * group
    return (slice(begin, begin + size) for begin in range(0, len(x), size))


def last_token(mask: Tensor) -> Tensor:
    """The last real token of each row, as a bool mask `[B, R]`."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, columns, -1).amax(1, keepdim=True)
    return mask & (columns == last)


def moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of x over the real places, in float64; 0 and 0 where there are
    none."""
    count = mask.count_nonzero().clamp(min=1)
    parts = [zero(x[rows], mask[rows]).sum(dtype=torch.float64) for rows in blocks(x)]
    mean = _sum(parts) / count
    parts = [_squares(x[rows], mask[rows], mean.float()) for rows in blocks(x)]
    return mean, _sum(parts) / count


def _squares(x: Tensor, mask: Tensor, mean: Tensor) -> Tensor:
    return zero(x.float() - mean, mask).square().sum(dtype=torch.float64)


def _sum(parts: list[Tensor]) -> Tensor:
    return torch.stack([torch.zeros((), dtype=torch.float64), *parts]).sum()


def row_means(x: Tensor, mask: Tensor) -> Tensor:
    """The mean `[B, 1]` of each row of x over its real places; 0 where there are none."""
    return zero(x, mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
