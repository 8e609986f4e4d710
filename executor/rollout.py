"""Generation: the seam behind which engines are alike, and the engine that runs on transformers."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from executor import models, weights
from executor.data import Generated, Request
from executor.worker import Worker
from planner.spec.plan import Plan


class Engine(Protocol):
    """Generates with one version of the weights at a time. Without a temperature it takes the likeliest token."""

    def generate(self, requests: Sequence[Request], temperature: float | None) -> list[tuple[list[int], list[float]]]:
        """Tokens and their log-probs, of each request in order."""
        ...

    def load(self, arrays: weights.Arrays) -> None: ...
    def sleep(self) -> None: ...
    def wake(self) -> None: ...


class EngineWorker(Worker):
    """The process of an engine. It knows the version of its weights and marks what it generates with it."""

    def __init__(self, plan: Plan, pool: str) -> None:
        super().__init__()
        self.plan = plan
        self.on_cpu = plan.device_of(pool).kind == "cpu"
        if self.on_cpu:
            torch.set_num_threads(1)
        self.version = 0
        self.engine: Engine

    def synchronize(self) -> None:
        if not self.on_cpu:
            torch.cuda.synchronize()

    def start(self) -> list[int]:
        """Load the actor's initial weights; the tokens that end a response."""
        workload = self.plan.workload
        device = torch.device("cpu" if self.on_cpu else "cuda")
        model = models.load("actor", workload.actor, workload.seed, torch.float32 if self.on_cpu else torch.bfloat16)
        eos = models.eos_tokens(model)
        self.engine = TransformersEngine(model.to(device), eos, self.plan.rollout.concurrency)
        self._sleep()
        return eos

    def generate(self, requests: Sequence[Request], temperature: float | None) -> Generated:
        self._wake()
        made = self.engine.generate(requests, temperature)
        self._sleep()
        return Generated(
            lengths=np.array([len(tokens) for tokens, _ in made], dtype=np.int32),
            tokens=np.array([token for tokens, _ in made for token in tokens], dtype=np.int32),
            log_probs=np.array([value for _, values in made for value in values], dtype=np.float32),
            weights_version=self.version,
        )

    def install(self, gathered: Sequence[ray.ObjectRef], version: int) -> None:
        """Take over weights from the object store as the given version."""
        (arrays,) = self.fetch(list(gathered))
        with self.part("transfer"):
            self.engine.load(arrays)
        self.version = version

    def _wake(self) -> None:
        if self.plan.rollout.offload:
            with self.part("wake"):
                self.engine.wake()

    def _sleep(self) -> None:
        if self.plan.rollout.offload:
            with self.part("wake"):
                self.engine.sleep()


class TransformersEngine:
    """Decoding with a transformers model and its KV cache, `concurrency` sequences at a time.

    The token at a position is drawn by inverting the distribution function at a uniform number that the request's key
    and the position fix. So a sequence depends on neither the batch nor the engine it is generated in, but for
    rounding."""

    def __init__(self, model: PreTrainedModel, eos: Sequence[int], concurrency: int) -> None:
        self.model, self.concurrency = model.eval().requires_grad_(False), concurrency
        self.device = next(model.parameters()).device
        self.eos = torch.tensor(list(eos), dtype=torch.long, device=self.device)

    def load(self, arrays: weights.Arrays) -> None:
        weights.install(self.model, arrays)

    def sleep(self) -> None:
        if self.device.type != "cpu":
            self.model.to("cpu")

    def wake(self) -> None:
        if self.device.type != "cpu":
            self.model.to(self.device)

    def generate(self, requests: Sequence[Request], temperature: float | None) -> list[tuple[list[int], list[float]]]:
        made: list[tuple[list[int], list[float]]] = []
        for begin in range(0, len(requests), self.concurrency):
            made += self._wave(requests[begin : begin + self.concurrency], temperature)
        return made

    @torch.inference_mode()
    def _wave(self, requests: Sequence[Request], temperature: float | None) -> list[tuple[list[int], list[float]]]:
        """Decode some sequences together until the last one ends; the ended ones leave the batch now and then."""
        tokens, mask = self._left_padded(requests)
        budget = torch.tensor([request.max_tokens for request in requests], device=self.device)
        exact = torch.tensor([request.exact for request in requests], device=self.device)
        uniform = torch.tensor(_uniform(requests), device=self.device) if temperature else None
        longest = int(budget.max())
        out_tokens = torch.zeros((len(requests), longest), dtype=torch.long, device=self.device)
        out_log_probs = torch.zeros((len(requests), longest), device=self.device)
        lengths = torch.zeros(len(requests), dtype=torch.long, device=self.device)

        cache = DynamicCache(config=self.model.config)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        rows = torch.arange(len(requests), device=self.device)  # of the sequences in the batch
        alive = torch.ones(len(requests), dtype=torch.bool, device=self.device)  # of the batch: still decoding
        for position in range(longest):
            logits = self.model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            log_p = (logits.float() / (temperature or 1.0)).log_softmax(-1)
            chosen = log_p.argmax(-1) if uniform is None else _invert(log_p, uniform[rows, position])
            live = rows[alive]
            out_tokens[live, position] = chosen[alive]
            out_log_probs[live, position] = log_p.gather(-1, chosen[:, None])[alive, 0]
            lengths[live] = position + 1
            alive &= (budget[rows] > position + 1) & (exact[rows] | ~torch.isin(chosen, self.eos))
            left = int(alive.sum())
            if left == 0:
                break
            tokens, positions = chosen[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
            if 2 * left <= len(rows):
                keep = alive.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                tokens, positions, mask, rows, alive = (
                    tokens[keep],
                    positions[keep],
                    mask[keep],
                    rows[keep],
                    alive[keep],
                )
        ends = lengths.tolist()
        return [(out_tokens[row, :end].tolist(), out_log_probs[row, :end].tolist()) for row, end in enumerate(ends)]

    def _left_padded(self, requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
        longest = max(len(request.prompt) for request in requests)
        tokens = np.zeros((len(requests), longest), dtype=np.int64)
        mask = np.zeros_like(tokens)
        for row, request in enumerate(requests):
            tokens[row, longest - len(request.prompt) :] = request.prompt
            mask[row, longest - len(request.prompt) :] = 1
        return torch.tensor(tokens, device=self.device), torch.tensor(mask, device=self.device)


def _uniform(requests: Sequence[Request]) -> NDArray[np.float64]:
    """`[requests, positions]` in [0, 1), each row fixed by the key of its request."""
    longest = max(request.max_tokens for request in requests)
    return np.stack([np.random.default_rng(request.key).random(longest) for request in requests])


def _invert(log_p: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the distribution function `[n, V]` passes `uniform [n]`, in float64; never one that has no
    probability."""
    distribution = log_p.double().exp().cumsum(-1)
    target = uniform[:, None] * distribution[:, -1:]
    return torch.searchsorted(distribution, target, right=True)[:, 0].clamp(max=log_p.shape[-1] - 1)
