"""Engines that stream, at the speed that a profile or the roofline gives them."""

from collections.abc import Sequence
from dataclasses import asdict
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


class StreamCosts:
    """What streams of a workload are made of. `lengths` are those of a batch in each scenario."""

    def __init__(
        self, workload: Workload, lengths: SampledLengths, corrections: Corrections
    ) -> None:
        self._workload, self._corrections = workload, corrections
        self.lengths = StreamLengths(lengths.prompts, lengths.responses, lengths.group)

    def stream(self, layout: RolloutRole, places: Sequence[Place]) -> EngineStream:
        """The engines of a layout, with nothing in flight."""
        engines = engines_of(layout, places)
        count, speeds = sum(number for _, number in engines), list[Speed]()
        for device, number in engines:
            found = self.speed(layout.tensor_parallel, layout.concurrency, count, device)
            speeds += [found.speed] * number
        recompute = self._workload.kv == "recompute"
        return EngineStream(speeds, layout.concurrency, self.lengths, recompute=recompute)

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
