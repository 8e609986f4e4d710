"""The loss of a minibatch from those of its tokens.

Every loss is a sum over real tokens, each divided by its normalizer, which `normalizer` computes
from figures of the whole minibatch over all workers. Summed over micro-batches and workers it is
the same mean however the minibatch was split. FSDP2 *averages* gradients over the data-parallel
ranks: turn that into a sum (`set_gradient_divide_factor(1.0)`, or multiply the loss by the number
of ranks).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from executor.training.masked import zero
from planner.spec.algorithm import Aggregation

Stats = dict[str, Tensor]  # sums over tokens


def normalizer(
    kind: Aggregation, mask: Tensor, *, tokens: int, sequences: int, longest: int
) -> Tensor:
    """What the loss of each token of a row is divided by, `[B, 1]`.

    `tokens` and `sequences` are those of the minibatch that count, and `longest` is the longest
    response that there may be. With l the tokens of a row:

    - token: tokens. Each token counts the same (DAPO, Yu et al. 2025, arXiv:2503.14476).
    - sequence: l * sequences. Each sequence counts the same (GRPO, Shao et al. 2024,
      arXiv:2402.03300).
    - constant: longest * sequences. Each token counts the same in every minibatch (Dr. GRPO, Liu et
      al. 2025, arXiv:2503.20783).
    """
    lengths = mask.sum(1, keepdim=True)
    match kind:
        case "token":
            return torch.full_like(lengths, tokens).clamp(min=1)
        case "sequence":
            return (lengths * sequences).clamp(min=1)
        case "constant":
            return torch.full_like(lengths, longest * sequences).clamp(min=1)
    raise ValueError(f"unknown aggregation {kind!r}: use token, sequence or constant")


def normalized(token_loss: Tensor, mask: Tensor, normalizer: float | Tensor) -> Tensor:
    """The sum of all `[B, R]`, divided by a normalizer `[B, 1]` or a number. A minibatch without
    tokens has loss 0, not 0 / 0."""
    if isinstance(normalizer, Tensor):
        return (zero(token_loss, mask) / normalizer).sum()
    return zero(token_loss, mask).sum() / max(normalizer, 1)


def sums(stats: Mapping[str, Tensor], mask: Tensor) -> Stats:
    """Stats `[B, R]` summed over the real tokens, without gradients: so they can be added over
    micro-batches and workers."""
    return {name: zero(x.detach(), mask).sum() for name, x in stats.items()}


def mean_stats(sums: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Turn stats that were summed over the whole minibatch into means per token, and `tokens`
    itself. Shares are counts before that."""
    tokens = float(sums["tokens"])
    return {
        name: tokens if name == "tokens" else float(total) / max(tokens, 1.0)
        for name, total in sums.items()
    }
