"""Attention of sequences that decode together, each over about as many columns as it has: what is
cached of all of them is as wide as the longest."""

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "by_length"  # under which transformers finds it
LIKE = 3  # sequences are of like length if the longest is at most so many times as long
FEW_COLUMNS = 128  # or no longer than this


class Part(NamedTuple):
    """Rows of a cache, and the last columns that these have."""

    rows: slice
    columns: int


parts: ContextVar[Sequence[Part]] = ContextVar("parts", default=())


def parts_of(lengths: Sequence[int]) -> list[Part]:
    """Rows of like length, of rows that are sorted by it, the longest first."""
    found: list[Part] = []
    for row, length in enumerate(lengths):
        if found and found[-1].columns <= max(FEW_COLUMNS, LIKE * length):
            found[-1] = Part(slice(found[-1].rows.start, row + 1), found[-1].columns)
        else:
            found.append(Part(slice(row, row + 1), length))
    return found


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' own attention, part by part."""
    found = []
    for part in parts.get() or [Part(slice(None), key.shape[2])]:
        rows, first = part.rows, key.shape[2] - part.columns
        mask = None if attention_mask is None else attention_mask[rows, ..., first:]
        own = query[rows], key[rows, :, first:], value[rows, :, first:]
        found.append(sdpa_attention_forward(module, *own, mask, **options)[0])
    return torch.cat(found) if len(found) > 1 else found[0], None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
