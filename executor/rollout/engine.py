"""Generation: the seam behind which engines are alike, and the process that an engine runs in."""

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
        return Generated(
            lengths=lengths, tokens=tokens, log_probs=log_probs, weights_version=self.version
        )

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
