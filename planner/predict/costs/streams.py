"""Engines that stream, at the speed that a profile or the roofline gives them."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from typing import NamedTuple, cast

import numpy as np

from planner.predict.correction import Corrections, Source
from planner.predict.costs.lengths import SampledLengths
from planner.predict.costs.rollouts import engines_of
from planner.predict.likeness import like_generate
from planner.predict.roofline import Place
from planner.predict.speed import Speed, engine_speed
from planner.predict.stream_run import EngineStream, StreamLengths
from planner.spec.cluster import Device
from planner.spec.plan import RolloutRole
from planner.spec.workload import Workload


class EngineSpeed(NamedTuple):
    """The speed of an engine, and where it comes from."""

    speed: Speed
    source: Source


class Load(NamedTuple):
    """What a batch is, on average over the scenarios: tokens of its responses, their contexts (over
    all steps), tokens of the prompts that are prefilled and their squares, its longest response and
    the shortest prompt."""

    sequences: int
    tokens: float
    contexts: float
    prompts: float
    squares: float
    longest: float
    shortest: int


class StreamCosts:
    """What streams of a workload are made of. `lengths` are those of a batch in each scenario."""

    def __init__(
        self, workload: Workload, lengths: SampledLengths, corrections: Corrections
    ) -> None:
        self._workload, self._corrections = workload, corrections
        self.lengths = StreamLengths(lengths.prompts, lengths.responses, lengths.group)
        self.recomputes = workload.kv == "recompute"

    def stream(self, layout: RolloutRole, places: Sequence[Place]) -> EngineStream:
        """The engines of a layout, with nothing in flight."""
        engines = engines_of(layout, places)
        count, speeds = sum(number for _, number in engines), list[Speed]()
        for device, number in engines:
            found = self.speed(layout.tensor_parallel, layout.concurrency, count, device)
            speeds += [found.speed] * number
        return EngineStream(speeds, layout.concurrency, self.lengths, recompute=self.recomputes)

    @cached_property
    def load(self) -> "Load":
        prompts, responses = self.lengths.prompts, self.lengths.responses
        prefilled = prompts[:, :: self.lengths.group]
        contexts = prompts * responses + responses * (responses - 1) // 2
        return Load(
            sequences=responses.shape[1],
            tokens=float(responses.sum(axis=1).mean()),
            contexts=float(contexts.sum(axis=1).mean()),
            prompts=float(prefilled.sum(axis=1).mean()),
            squares=float((prefilled**2).sum(axis=1).mean()),
            longest=float(responses.max(axis=1).mean()),
            shortest=int(prompts.min()),
        )

    def source(self, layout: RolloutRole, device: Device) -> Source:
        """Where the speed of a layout's engines comes from."""
        size, slots = layout.tensor_parallel, layout.concurrency
        return self.speed(size, slots, layout.replicas, device).source

    def speed(
        self, tensor_parallel: int, concurrency: int, engines: int, device: Device
    ) -> EngineSpeed:
        """The roofline of one of some engines, times the ratio that was measured for engines with
        their share of a batch each."""
        shape, sequences = self._workload.actor.shape, self.lengths.responses.shape[1]
        share = -(-sequences // engines)
        like = like_generate(
            shape,
            device,
            tensor_parallel=tensor_parallel,
            engines=engines,
            concurrency=min(concurrency, share),
            sequences=sequences,
        )
        ratios = self._corrections.ratios(like, np.log([[sequences / engines]]))
        ratio, source = float(ratios.values.item()), cast(Source, ratios.sources.item())
        alone = engine_speed(shape, tensor_parallel, device)
        return EngineSpeed(Speed(**{name: ratio * s for name, s in asdict(alone).items()}), source)
