"""How long a batch is in a stream at least, where a plan takes so many seconds a step."""

from collections import defaultdict
from collections.abc import Callable, Hashable
from functools import partial
from typing import NamedTuple

import numpy as np

from planner.predict.columns import Integers, Seconds
from planner.predict.costs.estimates import Estimates
from planner.predict.costs.rollouts import EngineCounts, RolloutCosts
from planner.predict.costs.streams import StreamCosts
from planner.predict.generation import GenerationRun
from planner.predict.kv_cache import AMPLE
from planner.predict.stream_run import EngineStream
from planner.spec.cluster import Device

BRIEF = 0.1  # of a period: a latency at which batches are taken to be alone
ASSURED = 0.97  # of a simulated latency, which a plan is taken not to be below
APART = (0.92, 0.96, 1.0)  # of a period: how far apart simulated syncs are at least
FILLING_STEPS = 4  # and some for each batch in flight, until a stream is steady


class Arrivals(NamedTuple):
    """How batches come to a stream: one every `period` seconds, no more than so many `batches` at a
    time, and each after a sync that stops engines for `pause` seconds. `counted` is the share of a
    simulated latency that counts."""

    period: float
    batches: int
    pause: float = 0.0
    counted: float = ASSURED

    @property
    def longest(self) -> float:
        """Seconds that a batch may be in flight."""
        return self.batches * self.period


class KnownLatencies:
    """What has been simulated: latencies on some engines at some periods. Fewer engines are no
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
                as_few = engines <= count
                least[as_few] = np.maximum(least[as_few], latency)
        return least


class LeastLatencies(RolloutCosts):
    """Takes the place of `RolloutCosts` in a search for plans that stream, whatever else they
    decide: seconds from the submission of a batch to its end, in a plan with these
    `arrivals`.

    They are taken from simulations (`SteadyStream`). Where batches come faster, there is more in
    flight at a time. What is simulated is not proved to be the least, so no more than a share of it
    counts (`ASSURED`); docs/streaming.md says what is proved. `tests/test_stream_search.py`
    compares it with simulations of plans. Latencies at longer periods may be `known`.

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
        self, streams: StreamCosts, arrivals: Arrivals, known: KnownLatencies | None = None
    ) -> None:
        self._streams, self._arrivals = streams, arrivals
        self._runs = dict[Hashable, SteadyStream]()
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
        known = self.known.least(tensor_parallel, device, engines, self._arrivals.period)
        counted = self._arrivals.counted * np.maximum(found, known)
        return np.repeat(counted[:, None], len(self._streams.lengths.responses), axis=1)

    def _latency(self, tensor_parallel: int, slots: int, engines: int, device: Device) -> float:
        speed = self._streams.speed(tensor_parallel, slots, engines, device).speed
        load = self._streams.load
        tokens, contexts = load.tokens / engines, load.contexts / engines
        prompts = speed.prefill_token * load.prompts + speed.prefill_square * load.squares
        linear = speed.sequence * tokens + speed.attention * contexts + prompts / engines
        period, batches, pause, _ = self._arrivals
        most_active = min(slots, batches * load.sequences / engines)
        by_weights = _Period(linear, speed.weights + speed.step, tokens / most_active)
        by_tokens = _Period(linear + speed.arithmetic * tokens, speed.step, tokens / most_active)
        least = max(by_weights.least, by_tokens.least) + pause
        if period < least:
            return batches * least
        at_work = period - pause
        steps = min(by_weights.steps(at_work), by_tokens.steps(at_work))
        alone = speed.matrices(1) + speed.attention * load.shortest
        return load.longest * max(period / steps, alone) + speed.prefill(load.shortest)

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
        key = tensor_parallel, concurrency, engines
        if key not in self._runs:
            self._runs[key] = self._run(tensor_parallel, concurrency, engines, room)
        return self._runs[key]

    def _run(
        self, tensor_parallel: int, concurrency: int, engines: EngineCounts, room: int
    ) -> "SteadyStream":
        ((device, count),) = engines
        slots = np.array([concurrency])
        floor = self.floors(tensor_parallel, slots, np.array([count]), device, np.array([room]))[0]
        speed = self._streams.speed(tensor_parallel, concurrency, count, device).speed
        lengths, recompute = self._streams.lengths, self._streams.recomputes
        stream = partial(EngineStream, [speed] * count, concurrency, lengths, recompute=recompute)
        add = partial(self.known.add, tensor_parallel, device, count, self._arrivals.period)
        return SteadyStream(stream, self._arrivals, floor, add)


class SteadyStream(GenerationRun):
    """A stream with some `arrivals`, as far as it has been simulated. Its `seconds` [S] are those
    for which a batch is in it, the same in all scenarios; a floor at first.

    Batches that come at even intervals are simulated first. Those of a plan do not: a step whose
    responses are long ends late, so that the batch behind it is submitted late, and others come in
    bunches, with more beside them. So a second simulation closes the circle: a sync ends some
    seconds after generation of its step, for all that trainers do then (`rest`), and no sooner than
    some seconds after the sync before, for trainers do one step after the other. A plan leaves
    trainers the rest of `batches` periods, behind the latency. If a step takes longer
    than a period in the simulation, with syncs at whatever distance it is the shortest, trainers
    have less: each second more takes a second for each of the batches."""

    def __init__(
        self,
        new_stream: Callable[[], EngineStream],
        arrivals: Arrivals,
        floor: Seconds,
        add: Callable[[float], None],
    ) -> None:
        self.seconds, self.known = floor.copy(), 0
        self._new_stream, self._arrivals, self._add = new_stream, arrivals, add
        self._even: float | None = None  # the latency at even intervals
        self._ended = False

    @property
    def done(self) -> bool:
        return self._ended

    def advance(self) -> None:
        """Simulate batches at even intervals first, and then as they come."""
        arrivals, latency = self._arrivals, float(self.seconds.max())
        overlaps = latency > BRIEF * arrivals.period  # else a batch is alone
        if self._even is None and overlaps and latency < arrivals.longest:
            self._even = self._at_even_intervals()
            self._take_up(self._even)
            self._ended = self._even >= arrivals.longest
            return
        if self._even is not None:
            longer = self._least_period(arrivals.longest - self._even) - arrivals.period
            self._take_up(self._even + arrivals.batches * max(longer, 0.0))
        self._ended, self.known = True, len(self.seconds)

    def _take_up(self, latency: float) -> None:
        self._add(latency)
        self.seconds = np.maximum(self.seconds, self._arrivals.counted * latency)

    def _at_even_intervals(self) -> float:
        """The mean latency of batches that come one period apart."""
        stream, (period, batches, pause, _) = self._new_stream(), self._arrivals
        first = batches + FILLING_STEPS
        counted = range(first, first + len(self.seconds))
        for step in range(counted.stop + batches):
            stream.interrupt(step * period - pause, step * period)
            stream.submit(step * period, step)
        return float(np.mean([stream.end_of(step) - step * period for step in counted]))

    def _least_period(self, rest: float) -> float:
        """The least seconds of a step, over several distances between syncs, if trainers need so
        many seconds after generation; not all are tried if one takes no longer than a period."""
        period, least = self._arrivals.period, np.inf
        for part in APART:
            if least > period:
                least = min(least, self._period_with(rest, part * period))
        return least

    def _period_with(self, rest: float, apart: float) -> float:
        """Seconds of a step where a sync ends so many seconds after generation of its step at
        least, and so far `apart` from the one before."""
        stream, (period, batches, pause, _) = self._new_stream(), self._arrivals
        first, synced = 2 * batches + FILLING_STEPS, [0.0]
        for step in range(batches):
            stream.submit(step * period, step)
        for step in range(first + len(self.seconds)):
            end = max(stream.end_of(step) + rest, synced[-1] + apart)
            stream.interrupt(end - pause, end)
            stream.submit(end, step + batches)
            synced.append(end)
        return (synced[-1] - synced[first]) / len(self.seconds)


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
