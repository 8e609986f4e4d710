"""Generation with transformers: on cores, and as the reference that other engines are tested
against."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from executor.data.requests import Ints, Requests, pad
from executor.rollout.engine import Channel, EngineWorker, OnFinished
from executor.training import models, weights
from planner.spec.data import Sampler, Sampling
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
        self.engine = TransformersEngine(model, eos, plan.rollout.concurrency)
        self._sleep()
        return eos


class TransformersEngine:
    """Decoding with a transformers model and its KV cache, `concurrency` sequences at a time.

    The token at a position is drawn by inverting the distribution function at a uniform number that
    the request's key and the position fix. So a sequence depends on neither the batch nor the
    engine it is generated in, except for rounding."""

    def __init__(self, model: PreTrainedModel, eos: Sequence[int], concurrency: int) -> None:
        self.model, self.concurrency = model.eval().requires_grad_(False), concurrency
        self.device = next(model.parameters()).device
        self.eos = torch.tensor(list(eos), dtype=torch.long, device=self.device)

    def install(self, arrays: weights.Arrays) -> None:
        weights.install(self.model, arrays)

    def sleep(self) -> None:
        if self.device.type != "cpu":
            self.model.to("cpu")

    def wake(self) -> None:
        if self.device.type != "cpu":
            self.model.to(self.device)

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
        uniform = None if greedy else self._tensor(_uniform(requests.keys, longest))
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
                early = ~exact[rows, None] & torch.isin(self._numbers(logits), self.eos)
                logits = logits.masked_fill(early, -torch.inf)
            log_p = (logits / (1.0 if greedy else sampler.temperature)).log_softmax(-1)
            if not greedy:
                log_p = cut(log_p, sampler)
            chosen = (
                log_p.argmax(-1) if uniform is None else _invert(log_p, uniform[rows, position])
            )
            live = rows[alive]
            out_tokens[live, position] = chosen[alive]
            out_log_probs[live, position] = log_p.gather(-1, chosen[:, None])[alive, 0]
            lengths[live] = position + 1
            before = alive
            alive = before & (budget[rows] > position + 1)
            alive &= exact[rows] | ~torch.isin(chosen, self.eos)
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

    def _numbers(self, logits: Tensor) -> Tensor:
        return torch.arange(logits.shape[-1], device=self.device)

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.tensor(array, device=self.device)


def _uniform(keys: NDArray[np.int64], positions: int) -> NDArray[np.float64]:
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


def _invert(log_p: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the distribution function `[n, V]` passes `uniform [n]`, in float64; never
    one that has no probability."""
    distribution = log_p.double().exp().cumsum(-1)
    target = uniform[:, None] * distribution[:, -1:]
    return torch.searchsorted(distribution, target, right=True)[:, 0].clamp(max=log_p.shape[-1] - 1)
