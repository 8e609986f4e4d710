"""Generation with transformers: on cores, and as the reference that other engines are tested
against."""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from executor.data.requests import Ints, Requests
from executor.rollout import by_length
from executor.rollout.decoding import Decoding
from executor.rollout.engine import Channel, EngineWorker, OnFinished
from executor.rollout.stop_strings import StopStrings, stops_of
from executor.rollout.streaming import Drawn, Unfinished, unfinished
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
        if self.device.type == "cpu" and model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(by_length.NAME)
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
        decoding = Decoding(self.model, self.eos, self.concurrency, self.stops)
        decoding.submit(unfinished(requests, sampler))
        responses: list[list[int]] = [[] for _ in range(len(requests))]
        log_probs: list[list[float]] = [[] for _ in range(len(requests))]
        while len(decoding):
            drawn = decoding.step()
            for each in drawn:
                responses[each.number] += each.tokens
                log_probs[each.number] += each.log_probs
            ended = [each.number for each in drawn if each.ended]
            if hand_over is not None and ended:
                hand_over(ended, [responses[number] for number in ended])
        lengths = np.array([len(response) for response in responses], dtype=np.int32)
        tokens = np.array(list(chain.from_iterable(responses)), dtype=np.int32)
        return lengths, tokens, np.array(list(chain.from_iterable(log_probs)), dtype=np.float32)
