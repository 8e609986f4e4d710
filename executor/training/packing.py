"""Micro-batches without padding: sequences end to end in one row, and attention that keeps them
apart.

On a GPU attention is PyTorch's variable-length kernel. Elsewhere, and where scores are capped,
which that kernel cannot do, queries, keys and values are padded for the attention alone. That is
exact, because under a causal mask right padding reaches no real token.
"""

import inspect
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel

from executor.data.batch import Sequences
from executor.data.requests import Rows

ATTENTION = "packed"  # the name under which transformers finds it

# Rows of queries whose scores are held at a time where they are capped: about 0.5 GB for 18k tokens
# and 8 heads.
CAPPED_ROWS = 256
SHORT = 64  # sequences of no more tokens are padded together

# Until torch 2.11 the kernel took fewer heads of keys than of queries without being told.
_GROUPED: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A micro-batch of n sequences with T tokens in all, of which S belong to responses. W is the
    length of the longest response, or 1.

    `tokens` and `positions` are `[1, T]`. `starts [n + 1]` (int32) holds the place where each
    sequence begins, and at last where the last one ends; `longest` is the number of tokens of the
    longest sequence. `before [S]` are the places in T of the states before the response tokens
    `targets [S]`, sequence by sequence. `mask [n, W]` is true where a response has a token.
    """

    tokens: Tensor
    positions: Tensor
    starts: Tensor
    longest: int
    before: Tensor
    targets: Tensor
    mask: Tensor

    def columns(self, values: Tensor) -> Tensor:
        """Arrange `values [S]` as response columns `[n, W]`, with 0 where there is no token."""
        return torch.zeros(
            self.mask.shape, dtype=values.dtype, device=values.device
        ).masked_scatter(self.mask, values)


def pack(sequences: Sequences, rows: Rows, device: torch.device) -> Packed:
    """Pack some rows of a batch. No rows become row 0 with an empty response: a forward pass that
    counts for nothing."""
    empty = len(rows) == 0
    rows = np.zeros(1, dtype=np.int64) if empty else rows
    prompts = sequences.prompt_lengths[rows][:, None]
    responses = np.zeros_like(prompts) if empty else sequences.response_lengths[rows][:, None]
    lengths = (prompts + responses)[:, 0]
    place = np.broadcast_to(np.arange(lengths.max()), (len(rows), lengths.max()))
    real = place < lengths[:, None]
    tokens = sequences.tokens[rows, : lengths.max()][real]
    answered = ((place >= prompts) & real)[real]
    starts = np.concatenate([[0], lengths.cumsum()])
    width = max(1, int(responses.max()))

    def tensor(array: NDArray[Any], dtype: torch.dtype = torch.long) -> Tensor:
        return torch.tensor(array, dtype=dtype, device=device)

    return Packed(
        tokens=tensor(tokens[None]),
        positions=tensor(place[real][None]),
        starts=tensor(starts, torch.int32),
        longest=int(lengths.max()),
        before=tensor(answered.nonzero()[0] - 1),
        targets=tensor(tokens[answered]),
        mask=tensor(np.arange(width) < responses, torch.bool),
    )


def hidden_states(model: PreTrainedModel, batch: Packed) -> Tensor:
    """The output `[T, H]` of the last block of a transformers model (prepared by
    `use_packed_attention`) for a micro-batch. It is the input of the model's head."""
    output = model.base_model(
        input_ids=batch.tokens,
        position_ids=batch.positions,
        use_cache=False,
        cu_seq_lens_q=batch.starts,
        max_length_q=batch.longest,
    )
    states: Tensor = output.last_hidden_state
    return states[0]


def use_packed_attention(model: PreTrainedModel) -> None:
    model.set_attn_implementation(ATTENTION)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence, as transformers calls it: `[1, heads, T, D]` -> `[1,
    T, heads, D]`. A window is the number of tokens that a token sees, itself among them; `softcap`
    bounds the scores as `softcap * tanh(score / softcap)`."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if softcap is not None or not query.is_cuda:
        scores = _Scores(scaling, sliding_window, softcap)
        out: Any = _padded_attention(q, k, v, cu_seq_lens_q, max_length_q, scores)
        return out[None], None
    grouped = _GROUPED if q.shape[1] != k.shape[1] else {}
    window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
    out = varlen_attn(
        q,
        k,
        v,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=window,
        **grouped,
    )
    return out[None], None


class _Scores(NamedTuple):
    """What attention does with its scores: their scale, the window, and their cap."""

    scaling: float
    window: int | None
    cap: float | None


@torch.compiler.disable  # type: ignore[untyped-decorator]  # one compilation for every length
def _padded_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scores: _Scores
) -> Tensor:
    """The same attention on `[T, heads, D]`, through batches of sequences of like length, each
    padded to the longest."""
    lengths = starts.diff()
    if q.is_cuda:
        return _of_padded(q, k, v, lengths, longest, scores)
    out = torch.zeros_like(q)
    sizes = lengths.clamp(min=SHORT).log2().ceil().long()
    for size in sizes.unique():
        alike = sizes == size
        tokens = alike.repeat_interleave(lengths).nonzero()[:, 0]
        own = lengths[alike]
        found = _of_padded(q[tokens], k[tokens], v[tokens], own, int(own.max()), scores)
        out = out.index_copy(0, tokens, found)
    return out


def _of_padded(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, longest: int, scores: _Scores
) -> Tensor:
    """The same for sequences of these lengths."""
    real = torch.arange(longest, device=q.device) < lengths[:, None]

    def padded(x: Tensor) -> Tensor:
        return x.new_zeros(*real.shape, *x.shape[1:]).index_put((real,), x).transpose(1, 2)

    out = _dense_attention(padded(q), padded(k), padded(v), scores)
    return out.transpose(1, 2)[real]


def _dense_attention(q: Tensor, k: Tensor, v: Tensor, scores: _Scores) -> Tensor:
    """Causal attention on `[n, heads, L, D]`."""
    length, grouped = q.shape[2], q.shape[1] != k.shape[1]
    windowed = scores.window is not None and scores.window < length
    if not windowed and scores.cap is None:
        return scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scores.scaling, enable_gqa=grouped
        )
    seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    if scores.window is not None:
        seen &= seen.new_ones(seen.shape).triu(1 - scores.window)
    if scores.cap is None:
        return scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=scores.scaling, enable_gqa=grouped
        )
    if grouped:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    rows = []
    for begin in range(0, length, CAPPED_ROWS):
        end = min(begin + CAPPED_ROWS, length)
        given = q[:, :, begin:end], k[:, :, :end], v[:, :, :end], seen[begin:end, :end], scores
        rows.append(checkpoint(_capped, *given, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(rows, dim=2)


def _capped(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scores: _Scores) -> Tensor:
    """Attention with capped scores, for a few rows of queries."""
    assert scores.cap is not None
    raw = (q @ k.transpose(2, 3)).float() * scores.scaling
    capped = scores.cap * torch.tanh(raw / scores.cap)
    weights = capped.masked_fill(~seen, -torch.inf).softmax(-1)
    return weights.to(v.dtype) @ v


AttentionInterface.register(ATTENTION, packed_attention)
