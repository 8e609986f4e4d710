"""Sequences that a transformers model decodes together while they come and go."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from executor.rollout import by_length
from executor.rollout.columns_cache import gathered
from executor.rollout.sampling import draw, uniform_at, without
from executor.rollout.stop_strings import StopStrings
from executor.rollout.streaming import Drawn, Unfinished
from planner.spec.data import Sampler

JOINING = 8  # a step takes new sequences in when one in so many slots is free
ENDED = 2  # and drops the rows of those that have ended when they are one in so many


@dataclass(kw_only=True)
class _Slot:
    """A sequence that is decoded. `uniform` has a number for each token that it may still draw;
    none where the likeliest one is taken."""

    sequence: Unfinished
    tokens: list[int]  # of the response
    uniform: NDArray[np.float64] | None
    ended: bool = False

    def at(self) -> float:
        assert self.uniform is not None
        return float(self.uniform[len(self.tokens)])

    @property
    def is_early(self) -> bool:
        """Whether it has too few tokens to end."""
        least = self.sequence.sampler.min_tokens
        return len(self.tokens) < least and not self.sequence.exact


class _Rows(NamedTuple):
    """Sequences, and where they are: the `rows` [n] of a cache and of its mask."""

    slots: list[_Slot]
    cache: DynamicCache
    mask: Tensor
    rows: Tensor


class Decoding:
    """Decodes at most `concurrency` sequences at a time; others wait for their turn in the order in
    which they came.

    A step either takes in sequences that wait, by computing all that they have, or decodes those
    that were taken in. Both draw one token of each. The row of a sequence that has ended is kept
    until others are taken in or there are some of them: to drop it is to copy the whole cache. The
    cache is padded on the left, so that all sequences end in one column, and the longest are first:

        slot    cached                 then drawn
        0       k  l  m  n  o          p
        1       .  .  a  b  c          d
    """

    def __init__(
        self,
        model: PreTrainedModel,
        eos: Tensor,
        concurrency: int,
        stops: StopStrings | None = None,
    ) -> None:
        self.model, self.eos, self.concurrency, self.stops = model, eos, concurrency, stops
        self._ends = frozenset(eos.tolist())
        self._waiting: list[_Slot] = []
        self._forget_rows()

    def _forget_rows(self) -> None:
        self._slots: list[_Slot] = []
        self._cache = DynamicCache()
        self._mask = torch.zeros((0, 0), dtype=torch.long, device=self.eos.device)

    def __len__(self) -> int:
        """The sequences that have not ended."""
        return len(self._waiting) + len(self._live)

    @property
    def _live(self) -> list[_Slot]:
        return [slot for slot in self._slots if not slot.ended]

    def submit(self, sequences: Sequence[Unfinished]) -> None:
        for sequence in sequences:
            uniform = None
            if sequence.sampler.temperature:
                uniform = uniform_at(sequence.key, sequence.max_tokens)
            slot = _Slot(sequence=sequence, tokens=sequence.response.tolist(), uniform=uniform)
            self._waiting.append(slot)

    def recompute(self) -> None:
        """Drop what is cached. It is computed again by the weights of the next step."""
        self._waiting = [*self._live, *self._waiting]
        self._forget_rows()

    def abandon(self) -> None:
        """Forget all sequences."""
        self._waiting = []
        self._forget_rows()

    @torch.inference_mode()
    def step(self) -> list[Drawn]:
        """Draw the next token of some sequences."""
        live = len(self._live)
        free = self.concurrency - live
        if self._waiting and (not live or free * JOINING >= self.concurrency):
            joining, self._waiting = self._waiting[:free], self._waiting[free:]
            return self._draw(joining, self._take_in(joining))
        if not live:
            return []
        ended = len(self._slots) - live
        if ended * ENDED >= len(self._slots):
            self._keep_live()
        return self._draw(self._slots, self._decode())

    def _decode(self) -> Tensor:
        last = self._tensor([[slot.tokens[-1]] for slot in self._slots])
        positions = self._mask.sum(1, keepdim=True)
        self._mask = torch.cat([self._mask, torch.ones_like(last)], dim=1)
        lengths = [n + 1 for n in positions[:, 0].tolist()]
        token = by_length.parts.set(by_length.parts_of(lengths))
        try:
            return self._logits(last, self._mask, positions, self._cache)
        finally:
            by_length.parts.reset(token)

    def _take_in(self, joining: list[_Slot]) -> Tensor:
        """Compute all that the sequences have, once for those that have the same; logits of the
        next token."""
        there = [(*slot.sequence.prompt.tolist(), *slot.tokens) for slot in joining]
        row_of = {tokens: row for row, tokens in enumerate(dict.fromkeys(there))}
        width = max(map(len, row_of))
        padded, mask = (np.zeros((len(row_of), width), dtype=np.int64) for _ in range(2))
        for tokens, row in row_of.items():
            padded[row, width - len(tokens) :] = tokens
            mask[row, width - len(tokens) :] = 1
        of_rows, cache = self._tensor(mask), DynamicCache()
        positions = (of_rows.cumsum(1) - 1).clamp(min=0)
        logits = self._logits(self._tensor(padded), of_rows, positions, cache)
        rows = self._tensor([row_of[tokens] for tokens in there])
        self._keep_live(_Rows(joining, cache, of_rows, rows))
        return logits[rows]

    def _keep_live(self, *new: _Rows) -> None:
        """Keep the rows of sequences that have not ended, and new ones beneath them; and the
        columns that one of them has."""
        live = [row for row, slot in enumerate(self._slots) if not slot.ended]
        parts = list(new)
        if live:
            kept = [self._slots[row] for row in live]
            parts.insert(0, _Rows(kept, self._cache, self._mask, self._tensor(live)))
        masks = [part.mask[part.rows] for part in parts]
        longest = max(int(mask.sum(1).max()) for mask in masks)
        mask = torch.cat([_columns(mask, longest) for mask in masks])
        slots = [slot for part in parts for slot in part.slots]
        order = mask.sum(1).argsort(descending=True, stable=True)
        self._slots = [slots[row] for row in order.tolist()]
        self._cache = gathered([(part.cache, part.rows) for part in parts], longest, order)
        self._mask = mask[order]

    def _logits(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """`[n, V]`, of the token behind the last one."""
        output = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def _draw(self, slots: list[_Slot], logits: Tensor) -> list[Drawn]:
        """The next token of those that have not ended."""
        rows_of: dict[Sampler, list[int]] = {}
        for row, slot in enumerate(slots):
            if not slot.ended:
                rows_of.setdefault(slot.sequence.sampler, []).append(row)
        drawn: list[Drawn] = []
        for sampler, rows in rows_of.items():
            own = [slots[row] for row in rows]
            tokens, log_probs = self._chosen(own, sampler, logits[self._tensor(rows)])
            drawn += map(self._add, own, tokens.tolist(), log_probs.tolist())
        return drawn

    def _chosen(
        self, slots: list[_Slot], sampler: Sampler, logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The tokens and log-probs `[n]` that a sampler draws of sequences, by logits `[n, V]`."""
        early = [slot.is_early for slot in slots]
        if any(early):
            logits = without(self.eos, logits, self._tensor(early))
        uniform = None
        if sampler.temperature:
            uniform = self._tensor(np.array([slot.at() for slot in slots]))
        return draw(logits, sampler, uniform)

    def _add(self, slot: _Slot, token: int, log_prob: float) -> Drawn:
        """Add a token to a sequence."""
        slot.tokens.append(token)
        slot.ended = self._is_last(slot, token)
        return Drawn(slot.sequence.number, [token], [log_prob], slot.ended)

    def _is_last(self, slot: _Slot, token: int) -> bool:
        if len(slot.tokens) == slot.sequence.max_tokens:
            return True
        if slot.sequence.exact:
            return False
        return token in self._ends or self._completes(slot.tokens)

    def _completes(self, tokens: list[int]) -> bool:
        return self.stops is not None and self.stops.completed(tokens)

    def _tensor(self, values: Sequence[Any] | NDArray[Any]) -> Tensor:
        return torch.as_tensor(values, device=self.eos.device)


def _columns(mask: Tensor, count: int) -> Tensor:
    """The last so many columns of a mask `[n, T]`, with zeros on the left where it has fewer."""
    width = min(mask.shape[1], count)
    found = mask.new_zeros(len(mask), count)
    found[:, count - width :] = mask[:, mask.shape[1] - width :]
    return found
