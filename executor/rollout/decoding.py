"""Sequences that a transformers model decodes together while they come and go."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from executor.data.requests import Ints
from executor.rollout.columns_cache import joined, rows_of
from executor.rollout.sampling import draw, uniform_at, without
from executor.rollout.stop_strings import StopStrings
from executor.rollout.streaming import Drawn, Unfinished

JOINING = 8  # a step takes new sequences in when one in so many slots is free
ENDED = 4  # and drops the rows of those that have ended when they are one in so many


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


class Decoding:
    """Decodes at most `concurrency` sequences at a time; others wait for their turn in the order in
    which they came.

    A step either takes in sequences that wait, by computing all that they have, or decodes those
    that were taken in. Both draw one token of each. The row of a sequence that has ended is kept
    until others are taken in: to drop it is to copy the whole cache. The cache is padded on the
    left, so that all sequences end in one column:

        slot    cached                 then drawn
        0       .  .  a  b  c          d
        1       k  l  m  n  o          p
    """

    def __init__(
        self,
        model: PreTrainedModel,
        eos: Tensor,
        concurrency: int,
        stops: StopStrings | None = None,
    ) -> None:
        self.model, self.eos, self.concurrency, self.stops = model, eos, concurrency, stops
        self._waiting: list[_Slot] = []
        self._slots: list[_Slot] = []
        self._cache = DynamicCache()
        self._mask = torch.zeros((0, 0), dtype=torch.long, device=eos.device)

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
                uniform = uniform_at(np.array([sequence.key]), sequence.max_tokens)[0]
            slot = _Slot(sequence=sequence, tokens=sequence.response.tolist(), uniform=uniform)
            self._waiting.append(slot)

    def recompute(self) -> None:
        """Drop what is cached. It is computed again by the weights of the next step."""
        self._waiting = [*self._live, *self._waiting]
        self._slots = []
        self._cache, self._mask = DynamicCache(), self._mask[:0, :0]

    def abandon(self) -> None:
        """Forget all sequences."""
        self._slots, self._waiting = [], []
        self.recompute()

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
        if (len(self._slots) - live) * ENDED >= len(self._slots):
            self._drop_ended()
        return self._draw(self._slots, self._decode())

    def _decode(self) -> Tensor:
        last = self._tensor([[slot.tokens[-1]] for slot in self._slots])
        positions = self._mask.sum(1, keepdim=True)
        self._mask = torch.cat([self._mask, torch.ones_like(last)], dim=1)
        return self._logits(last, self._mask, positions, self._cache)

    def _take_in(self, joining: list[_Slot]) -> Tensor:
        """Compute all that the sequences have; logits of the next token."""
        there = [np.concatenate([slot.sequence.prompt, slot.tokens]) for slot in joining]
        width = max(len(tokens) for tokens in there)
        padded, mask = (np.zeros((len(there), width), dtype=np.int64) for _ in range(2))
        for row, tokens in enumerate(there):
            padded[row, width - len(tokens) :] = tokens
            mask[row, width - len(tokens) :] = 1
        of_new, cache = self._tensor(mask), DynamicCache()
        positions = (of_new.cumsum(1) - 1).clamp(min=0)
        logits = self._logits(self._tensor(padded), of_new, positions, cache)
        self._join(joining, of_new, cache)
        return logits

    def _join(self, joining: list[_Slot], of_new: Tensor, new: DynamicCache) -> None:
        """Let new sequences decode beside those that have not ended."""
        keep = [row for row, slot in enumerate(self._slots) if not slot.ended]
        self._slots = [*(self._slots[row] for row in keep), *joining]
        kept = self._tensor(keep).long()
        old = self._mask[kept]
        longest = int(max((mask.sum(1).max() for mask in (old, of_new) if len(mask)), default=0))
        self._cache = joined(self._cache if keep else new, kept, new, longest)
        self._mask = torch.cat([_columns(mask, longest) for mask in (old, of_new)])

    def _drop_ended(self) -> None:
        """Forget the rows of sequences that have ended, and columns that only they had."""
        keep = [row for row, slot in enumerate(self._slots) if not slot.ended]
        self._slots = [self._slots[row] for row in keep]
        kept = self._tensor(keep)
        self._mask = self._mask[kept]
        longest = int(self._mask.sum(1).max())
        self._cache = rows_of(self._cache, kept, longest)
        self._mask = _columns(self._mask, longest)

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
        drawn = []
        live = [row for row, slot in enumerate(slots) if not slot.ended]
        for sampler in dict.fromkeys(slots[row].sequence.sampler for row in live):
            rows = [row for row in live if slots[row].sequence.sampler == sampler]
            mine = [slots[row] for row in rows]
            of_mine = logits[self._tensor(rows)]
            early = [not s.sequence.exact and len(s.tokens) < sampler.min_tokens for s in mine]
            if any(early):
                of_mine = without(self.eos, of_mine, self._tensor(early))
            uniform = self._tensor([s.at() for s in mine]) if sampler.temperature else None
            chosen, log_probs = draw(of_mine, sampler, uniform)
            stops = torch.isin(chosen, self.eos).tolist()
            found = zip(mine, chosen.tolist(), log_probs.tolist(), stops, strict=True)
            for slot, token, log_prob, stop in found:
                sequence = slot.sequence
                slot.tokens.append(token)
                slot.ended = len(slot.tokens) == sequence.max_tokens
                if not sequence.exact:
                    slot.ended |= stop or self._completes(slot.tokens)
                drawn.append(Drawn(sequence.number, [token], [log_prob], slot.ended))
        return drawn

    def _completes(self, tokens: list[int]) -> bool:
        return self.stops is not None and self.stops.completed(tokens)

    def _tensor(self, values: Sequence[Any] | Ints | NDArray[np.int64]) -> Tensor:
        dtype = torch.float64 if len(values) and isinstance(values[0], float) else None
        return torch.tensor(values, dtype=dtype, device=self.eos.device)


def _columns(mask: Tensor, count: int) -> Tensor:
    """The last so many columns of a mask `[n, T]`, with zeros on the left where it has fewer."""
    width = min(mask.shape[1], count)
    found = mask.new_zeros(len(mask), count)
    found[:, count - width :] = mask[:, mask.shape[1] - width :]
    return found
