"""Generation with transformers: on cores, and as the reference that other engines are tested
against."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from executor.data.requests import Ints, Requests, pad
from executor.rollout.decoding import Decoding
from executor.rollout.engine import Channel, EngineWorker, OnFinished
from executor.rollout.sampling import draw, uniform_at, without
from executor.rollout.stop_strings import StopStrings, stops_of
from executor.rollout.streaming import Drawn, Unfinished
from executor.training import models, weights
from planner.spec.data import Sampler
from planner.spec.plan import Plan
from planner.spec.tokenizers import stop_tokens


class TransformersWorker(EngineWorker):
    """The process of a transformers engine, on one GPU or core."""

    def start(self, plan: Plan, pool: str, channel: Channel) -> list[int]:
        """Start as any engine does. This one has the actor's initial weights."""
        assert channel == "store", f"transformers takes no weights by {channel}"
        self.offload = plan.rollout.offload
        self.version = 0
        on_cpu = plan.device_of(pool).kind == "cpu"
        if on_cpu:
            torch.set_num_threads(1)
        workload = plan.workload
        device, dtype = ("cpu", torch.float32) if on_cpu else ("cuda", torch.bfloat16)
        model = models.load("actor", workload.actor, workload.seed, dtype, torch.device(device))
        eos = [*models.eos_tokens(model), *stop_tokens(workload)]
        stops = stops_of(workload)
        self.engine = TransformersEngine(model, eos, plan.rollout.concurrency, stops)
        self._sleep()
        return eos


class TransformersEngine:
    """Decoding with a transformers model and its KV cache, `concurrency` sequences at a time.

    The token at a position is drawn by inverting the distribution function at a uniform number that
    the request's key and the position fix. So a sequence depends on neither the batch nor the
    engine it is generated in, except for rounding."""

    def __init__(
        self,
        model: PreTrainedModel,
        eos: Sequence[int],
        concurrency: int,
        stops: StopStrings | None = None,
    ) -> None:
        self.model, self.concurrency = model.eval().requires_grad_(False), concurrency
        self.stops = stops
        self.device = next(model.parameters()).device
        self.eos = torch.tensor(list(eos), dtype=torch.long, device=self.device)
        self._decoding = Decoding(model, self.eos, concurrency, stops)

    def install(self, arrays: weights.Arrays) -> None:
        weights.install(self.model, arrays)

    def sleep(self) -> None:
        if self.device.type != "cpu":
            self.model.to("cpu")

    def wake(self) -> None:
        if self.device.type != "cpu":
            self.model.to(self.device)

    # --- sequences that stream ---

    @property
    def in_flight(self) -> int:
        return len(self._decoding)

    def submit(self, sequences: Sequence[Unfinished], version: int) -> None:
        self._decoding.submit(sequences)

    def step(self, version: int) -> tuple[int, list[Drawn]]:
        return version, self._decoding.step()

    def recompute(self) -> None:
        self._decoding.recompute()

    def abandon(self) -> None:
        self._decoding.abandon()

    # --- a batch ---

    def generate(
        self, requests: Requests, sampler: Sampler, hand_over: OnFinished | None = None
    ) -> tuple[Ints, Ints, NDArray[np.float32]]:
        waves = []
        for begin in range(0, len(requests), self.concurrency):
            rows = np.arange(begin, min(begin + self.concurrency, len(requests)))
            waves.append(self._wave(requests.take(rows), sampler, hand_over, begin))
        empty = (
            np.zeros(0, dtype=np.int32),
            np.zeros(0, dtype=np.int32),
            np.zeros(0, dtype=np.float32),
        )
        lengths, tokens, log_probs = (
            np.concatenate(parts) for parts in zip(empty, *waves, strict=True)
        )
        return lengths, tokens, log_probs

    @torch.inference_mode()
    def _wave(
        self, requests: Requests, sampler: Sampler, hand_over: OnFinished | None, first: int
    ) -> tuple[Ints, Ints, NDArray[np.float32]]:
        """Decode some sequences together until the last one ends; the ended ones leave the batch
        now and then. Those of one prompt, in a row, share its prefill. `first` is
        the number of the first of them among all requests."""
        prompts, prompt_of = requests.distinct()
        tokens, mask = self._left_padded(requests.take(prompts))
        count, longest = len(requests), int(requests.max_tokens.max())
        budget, exact = self._tensor(requests.max_tokens), self._tensor(requests.exact)
        greedy = sampler.temperature == 0
        uniform = None if greedy else self._tensor(uniform_at(requests.keys, longest))
        out_tokens = torch.zeros((count, longest), dtype=torch.long, device=self.device)
        out_log_probs = torch.zeros((count, longest), device=self.device)
        lengths = torch.zeros(count, dtype=torch.long, device=self.device)

        cache = DynamicCache(config=self.model.config)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        rows = torch.arange(count, device=self.device)  # of the sequences in the batch
        alive = torch.ones(
            count, dtype=torch.bool, device=self.device
        )  # of the batch: still decoding
        for position in range(longest):
            logits = self.model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            if len(logits) < len(rows):  # each prompt was computed once for all of its samples
                samples = self._tensor(prompt_of)
                cache.batch_select_indices(samples)
                logits, positions, mask = logits[samples], positions[samples], mask[samples]
            logits = logits.float()
            if position < sampler.min_tokens:
                logits = without(self.eos, logits, ~exact[rows])
            at = None if uniform is None else uniform[rows, position]
            chosen, log_prob = draw(logits, sampler, at)
            live = rows[alive]
            out_tokens[live, position] = chosen[alive]
            out_log_probs[live, position] = log_prob[alive]
            lengths[live] = position + 1
            before = alive
            alive = before & (budget[rows] > position + 1)
            alive &= exact[rows] | ~torch.isin(chosen, self.eos)
            if self.stops is not None:
                for place in alive.nonzero()[:, 0].tolist():
                    response = out_tokens[rows[place], : position + 1].tolist()
                    alive[place] = not self.stops.completed(response)
            if hand_over is not None and (ended := rows[before & ~alive].tolist()):
                responses = out_tokens[ended, : position + 1].tolist()
                hand_over([first + row for row in ended], responses)
            left = int(alive.sum())
            if left == 0:
                break
            tokens, positions = chosen[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
            if 2 * left <= len(rows):
                keep = alive.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                tokens, positions, mask = tokens[keep], positions[keep], mask[keep]
                rows, alive = rows[keep], alive[keep]
        real = torch.arange(longest, device=self.device) < lengths[:, None]
        found = lengths.int(), out_tokens[real].int(), out_log_probs[real]
        ours, theirs, log_probs = (tensor.cpu().numpy() for tensor in found)
        return ours, theirs, log_probs

    def _left_padded(self, requests: Requests) -> tuple[Tensor, Tensor]:
        """Tokens and attention mask `[n, longest prompt]`."""
        longest = int(requests.lengths.max())
        begin = longest - requests.lengths
        tokens = pad(requests.tokens, requests.lengths, longest, begin)
        return self._tensor(tokens).long(), self._tensor(
            np.arange(longest) >= begin[:, None]
        ).long()

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.tensor(array, device=self.device)
