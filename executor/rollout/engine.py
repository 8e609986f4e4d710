"""Generation: the seam behind which engines are alike, and the process that an engine runs in."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from executor.data.batch import Generated
from executor.data.requests import Ints, Requests
from executor.fleet import gpu_memory
from executor.fleet.worker import Worker
from executor.rollout.streaming import Collected, Drawn, Stretches, Unfinished
from executor.rollout.tray import HandOver
from executor.training.weights import Arrays
from planner.spec.data import Sampler
from planner.spec.plan import Plan

# How weights come to an engine: from the trainers' GPUs, or from Ray's object store.
Channel = Literal["ipc", "nccl", "store"]


OnFinished = Callable[[Sequence[int], Sequence[Sequence[int]]], None]


class Engine(Protocol):
    """Generates with one version of the weights at a time. The log-probs are of what a sampler
    draws from: at its temperature, and of the tokens that it leaves."""

    def generate(
        self, requests: Requests, sampler: Sampler, hand_over: OnFinished | None = None
    ) -> tuple[Ints, Ints, NDArray[np.float32]]:
        """Lengths `[n]` of the responses, and their tokens and log-probs end to end. Responses that
        finish are handed over meanwhile, by the numbers of their requests."""
        ...

    @property
    def in_flight(self) -> int:
        """The sequences that were submitted and have not ended."""
        ...

    def submit(self, sequences: Sequence[Unfinished], version: int) -> None:
        """Take in sequences that stream, while the weights are of this version. Each begins, or
        goes on, once it has a slot."""
        ...

    def step(self, version: int) -> tuple[int, list[Drawn]]:
        """Decode once, by weights of this version: what was drawn, and the version of the weights
        that it was drawn by. An engine that queues steps answers with an earlier one."""
        ...

    def recompute(self) -> None:
        """Drop the KV caches of what streams: they are computed again by the weights that there
        are."""
        ...

    def abandon(self) -> None:
        """Forget all that streams."""
        ...

    def install(self, arrays: Arrays) -> None:
        """Take over all weights."""
        ...

    def sleep(self) -> None: ...
    def wake(self) -> None: ...


class EngineWorker(Worker, ABC):
    """The process of an engine. It knows the version of its weights and marks what it generates
    with it."""

    engine: Engine
    offload: bool
    version: int
    _peak: dict[str, int] = {}

    def synchronize(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    def forget_peak(self) -> None:
        gpu_memory.forget_peak()
        self._peak = {}

    def peak(self) -> dict[str, int]:
        return self._peak or gpu_memory.peak()

    def import_library(self) -> None:
        """Import what the engine runs on, which needs no GPU. Nothing here: that this module is
        imported suffices."""

    @abstractmethod
    def start(self, plan: Plan, pool: str, channel: Channel) -> list[int]:
        """Become an engine of a plan, which gets its weights by this channel; the tokens that end a
        response."""

    def generate(
        self, requests: Requests, sampler: Sampler, hand_over: HandOver | None = None
    ) -> Generated:
        self._wake()
        lengths, tokens, log_probs = self.engine.generate(requests, sampler, hand_over)
        self._peak = self.peak() if self._watching else {}  # an engine that sleeps holds nothing
        self._sleep()
        versions = np.full(len(tokens), self.version, dtype=np.int32)
        return Generated(
            lengths=lengths, tokens=tokens, log_probs=log_probs, weights_versions=versions
        )

    def go_on(self, sequences: Sequence[Unfinished], seconds: float) -> Stretches:
        """Take in sequences that stream, and decode for so long, once at least, or until none is
        left: what was made. Weights are installed between two such calls."""
        end, collected = time.monotonic() + seconds, Collected()
        self.engine.submit(sequences, self.version)
        while self.engine.in_flight:
            collected.add(*self.engine.step(self.version))
            if time.monotonic() >= end:
                break
        return collected.stretches()

    def recompute(self) -> None:
        """Drop the KV caches of what streams, which older weights have computed."""
        self.engine.recompute()

    def abandon(self) -> None:
        """Forget all that streams."""
        self.engine.abandon()

    def install(self, gathered: Sequence[ray.ObjectRef[Any]], version: int) -> None:
        """Take over weights from the object store as the given version."""
        (arrays,) = self.fetch(list(gathered))
        with self.part("transfer"):
            self.engine.install(arrays)
        self.version = version

    def _wake(self) -> None:
        if self.offload:
            with self.part("wake"):
                self.engine.wake()

    def _sleep(self) -> None:
        if self.offload:
            with self.part("offload"):
                self.engine.sleep()
