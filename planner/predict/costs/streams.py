"""Engines that stream, at the speed that a profile or the roofline gives them."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from typing import NamedTuple, cast

import numpy as np

from planner.predict.columns import Integers, Seconds
from planner.predict.correction import Corrections, Source
from planner.predict.costs.estimates import Estimates
from planner.predict.costs.lengths import SampledLengths
from planner.predict.costs.rollouts import EngineCounts, RolloutCosts, engines_of
from planner.predict.generation import GenerationRun
from planner.predict.kv_cache import AMPLE
from planner.predict.likeness import like_generate
from planner.predict.roofline import Place
from planner.predict.speed import Speed, engine_speed
from planner.predict.stream_run import EngineStream, StreamLengths
from planner.spec.cluster import Device
from planner.spec.plan import RolloutRole
from planner.spec.workload import Workload

BRIEF = 0.1  # of a period: a latency at which batches are taken to be alone
ASSURED = 0.98  # of a simulated latency, whose batches come more evenly than those of a plan
FILLING_STEPS = 4  # and one for each batch in flight, until a stream is steady


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


class LeastLatencies(RolloutCosts):
    """Takes the place of `RolloutCosts` in a search for plans that stream, as stale as `staleness`
    at most: seconds from the submission of a batch to its end, in a plan that takes `period`
    seconds a step.

    They are taken from a simulation in which batches come at even intervals (`SteadyStream`). Where
    they come faster, there is more in flight at a time. The batches of a plan do not come quite
    evenly: the one behind a long one is submitted late, has less beside it, and takes up to 1.7%
    less, where lengths differ most (sigma 1.6). So of what is simulated no more than a share
    (`ASSURED`) is taken to be the least. `tests/test_stream_search.py` compares it with simulations
    of plans.

    A floor tells many layouts that need no simulation. An engine has the tokens, contexts and
    prompts of its share of one batch to do in a period. What they take themselves leaves time for N
    decoding steps of so many seconds for the weights, at most. So a response of r tokens takes r
    steps of period / N on average, and the shorter a period, the longer these. That is the mean of
    whole periods. Of its last one, a response misses the part between its end and the next sync,
    and the steps of that part are taken to be no slower than others, since fewer sequences are
    active before a sync than after it, when a batch is submitted.

    Where a period is too short for a batch, whatever the latency, it is put so that a cycle with it
    through staleness + 1 steps is as long as the shortest period that is not."""

    def __init__(
        self,
        streams: StreamCosts,
        period: float,
        staleness: int,
        pause: float = 0.0,
        known: "KnownLatencies | None" = None,
        share: float = ASSURED,
    ) -> None:
        self._streams, self._period, self._batches = streams, period, staleness + 1
        self._pause, self._share = pause, share
        self.known = KnownLatencies() if known is None else known

    def floors(
        self,
        tensor_parallel: int,
        concurrency: Integers,
        engines: Integers,
        device: Device,
        room: Integers,
    ) -> Seconds:
        shares = zip(concurrency.tolist(), engines.tolist(), strict=True)
        found = np.array([self._latency(tensor_parallel, *share, device) for share in shares])
        found = np.maximum(found, self.known.least(tensor_parallel, device, engines, self._period))
        scenarios = len(self._streams.lengths.responses)
        return np.repeat(self._share * found[:, None], scenarios, axis=1)

    def _latency(self, tensor_parallel: int, slots: int, engines: int, device: Device) -> float:
        speed = self._streams.speed(tensor_parallel, slots, engines, device).speed
        load = self._streams.load
        tokens, contexts = load.tokens / engines, load.contexts / engines
        prompts = speed.prefill_token * load.prompts + speed.prefill_square * load.squares
        linear = speed.sequence * tokens + speed.attention * contexts + prompts / engines
        most_active = min(slots, self._batches * load.sequences / engines)
        by_weights = _Period(linear, speed.weights + speed.step, tokens / most_active)
        by_tokens = _Period(linear + speed.arithmetic * tokens, speed.step, tokens / most_active)
        least = max(by_weights.least, by_tokens.least) + self._pause
        if self._period < least:
            return self._batches * least
        at_work = self._period - self._pause
        steps = min(by_weights.steps(at_work), by_tokens.steps(at_work))
        alone = speed.matrices(1) + speed.attention * load.shortest
        return load.longest * max(self._period / steps, alone) + speed.prefill(load.shortest)

    def calls(
        self,
        simulated: Seconds,
        tensor_parallel: int,
        concurrency: Integers,
        engines: Integers,
        device: Device,
    ) -> Estimates:
        seconds = simulated + device.overhead_seconds
        sources = np.full(len(seconds), "roofline")
        return Estimates(compute=seconds, transfer=np.zeros_like(seconds), sources=sources)

    def run(
        self, tensor_parallel: int, concurrency: int, engines: EngineCounts, room: int = AMPLE
    ) -> GenerationRun:
        ((device, count),) = engines
        slots = np.array([concurrency])
        floor = self.floors(tensor_parallel, slots, np.array([count]), device, np.array([room]))[0]
        speed = self._streams.speed(tensor_parallel, concurrency, count, device).speed
        stream = EngineStream(
            [speed] * count, concurrency, self._streams.lengths, recompute=self._streams.recomputes
        )
        known = partial(self.known.add, tensor_parallel, device, count, self._period)
        return SteadyStream(stream, self._period, self._batches, floor, self._pause, known, self._share)


class KnownLatencies:
    """What has been simulated: the latency on some engines at a period. Fewer engines are no
    faster, nor are batches that come faster."""

    def __init__(self) -> None:
        self._found = defaultdict[tuple[int, Device], list[tuple[int, float, float]]](list)

    def add(
        self, tensor_parallel: int, device: Device, engines: int, period: float, latency: float
    ) -> None:
        self._found[tensor_parallel, device].append((engines, period, latency))

    def least(
        self, tensor_parallel: int, device: Device, engines: Integers, period: float
    ) -> Seconds:
        """Seconds [n] that latencies on so many engines [n] are not below at a period."""
        least = np.zeros(len(engines))
        for count, longer, latency in self._found[tensor_parallel, device]:
            if longer >= period:
                least[engines <= count] = np.maximum(least[engines <= count], latency)
        return least


class SteadyStream(GenerationRun):
    """A stream that gets a batch every `period` seconds, and no more than so many `batches` at a
    time. Its `seconds` [S] are the mean latency of a batch, the same in all scenarios; a floor,
    until it has been simulated."""

    def __init__(
        self,
        stream: EngineStream,
        period: float,
        batches: int,
        floor: Seconds,
        pause: float,
        found: Callable[[float], None],
        share: float,
    ) -> None:
        self.seconds, self.known = floor.copy(), 0
        self._stream, self._period, self._batches = stream, period, batches
        self._pause, self._found, self._share = pause, found, share

    def advance(self) -> None:
        """Simulate the stream until it is steady, and then each scenario once."""
        scenarios, period = len(self.seconds), self._period
        first, self.known = self._batches + FILLING_STEPS, scenarios
        latency = float(self.seconds.max())
        if latency >= self._batches * period or latency <= BRIEF * period:
            return  # more batches at a time than there may be, or never two
        for step in range(first + scenarios + self._batches):
            self._stream.interrupt(step * period - self._pause, step * period)
            self._stream.submit(step * period, step)
        counted = range(first, first + scenarios)
        took = [self._stream.end_of(step) - step * period for step in counted]
        self._found(float(np.mean(took)))
        self.seconds = np.maximum(self.seconds, self._share * float(np.mean(took)))


class _Period(NamedTuple):
    """A period of an engine: `linear` seconds whatever the number of decoding steps, and `step`
    seconds for each of them. There are `fewest` of them at least. What is prefilled again for new
    weights is left out: where all sequences are as long, nothing is in flight at a sync."""

    linear: float
    step: float
    fewest: float

    @property
    def least(self) -> float:
        """The seconds of the shortest period."""
        return self.linear + self.step * self.fewest

    def steps(self, seconds: float) -> float:
        """The most steps in a period of so many seconds, which is not below the shortest."""
        return (seconds - self.linear) / self.step
