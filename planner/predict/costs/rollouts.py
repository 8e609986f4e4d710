"""Seconds of generating the batch on the rollout's engines, and of waking them and putting them to
sleep."""

from collections.abc import Sequence

import numpy as np

from planner.predict.columns import Integers, Seconds
from planner.predict.correction import Corrections
from planner.predict.costs.estimates import Estimates, Moves, moves_of
from planner.predict.costs.lengths import SampledLengths
from planner.predict.generation import GenerationRun
from planner.predict.generation_floors import BatchLengths
from planner.predict.kv_cache import AMPLE
from planner.predict.layouts import tensor_parallels
from planner.predict.likeness import Likeness, MoveCall, like_engine_move, like_generate
from planner.predict.memory import engine_weight_bytes
from planner.predict.roofline import Cost, Place
from planner.predict.speed import Speed, engine_speed
from planner.spec.cluster import Device
from planner.spec.plan import RolloutRole
from planner.spec.workload import Workload

EngineCounts = tuple[tuple[Device, int], ...]  # how many on which device, in their order


class RolloutCosts:
    """`runs` holds every simulation that was asked for, by tensor-parallel size, slots, engines and
    the room for tokens of each: floors until it has been run."""

    def __init__(
        self, workload: Workload, lengths: SampledLengths, corrections: Corrections
    ) -> None:
        self._workload, self._corrections = workload, corrections
        self._batch = BatchLengths(lengths.prompts, lengths.responses, lengths.group)
        self._sequences = int(lengths.prompts.shape[1])
        self._wave_floors: dict[tuple[int, int, Device], Seconds] = {}
        self.runs: dict[tuple[int, int, EngineCounts, int], GenerationRun] = {}

    def calls(
        self,
        simulated: Seconds,
        tensor_parallel: int,
        concurrency: Integers,
        engines: Integers,
        device: Device,
    ) -> Estimates:
        """What `simulated` seconds [n, S] of so many engines [n], each with so many slots [n],
        become with the call's overhead and what was measured."""
        seconds = simulated + device.overhead_seconds
        like = like_generate(
            self._workload.actor.shape,
            device,
            tensor_parallel=tensor_parallel,
            engines=engines,
            concurrency=concurrency,
            sequences=self._sequences,
        )
        share = np.log(self._sequences / engines)
        sizes = np.broadcast_to(share[:, None], seconds.shape)
        cost = Cost(compute=seconds, transfer=np.zeros_like(seconds))
        return Estimates.corrected(cost, self._corrections.ratios(like, sizes))

    def moves(self, tensor_parallel: int, device: Device) -> Moves:
        """Seconds [1] of waking engines and putting them to sleep."""
        shape = self._workload.actor.shape
        moved = np.array([engine_weight_bytes(shape, tensor_parallel, device)])

        def like(call: MoveCall) -> Likeness:
            return like_engine_move(call, shape, device, tensor_parallel=tensor_parallel)

        return moves_of(self._corrections, like, moved, device)

    def run(
        self, tensor_parallel: int, concurrency: int, engines: EngineCounts, room: int = AMPLE
    ) -> GenerationRun:
        """The simulation of some engines, as far as it has been run."""
        count = sum(number for _, number in engines)
        share = -(-self._sequences // count)
        if concurrency > share and self._batch.even:
            concurrency = share  # equal prompts are dealt evenly: further slots stay empty
        key = tensor_parallel, concurrency, engines, room
        if key not in self.runs:
            self.runs[key] = self._started(*key)
        return self.runs[key]

    def _started(
        self, tensor_parallel: int, concurrency: int, engines: EngineCounts, room: int
    ) -> GenerationRun:
        shape, limit = self._workload.actor.shape, self._workload.response.longest
        speeds = list[Speed]()
        for device, number in engines:
            speeds += [engine_speed(shape, tensor_parallel, device)] * number
        floor = None
        if len(engines) == 1:
            (device, number), slots = engines[0], np.array([concurrency])
            rooms = np.array([room])
            floor = self.floors(tensor_parallel, slots, np.array([number]), device, rooms)[0]
        return GenerationRun(self._batch, speeds, concurrency, limit, floor, room)

    def floors(
        self,
        tensor_parallel: int,
        concurrency: Integers,
        engines: Integers,
        device: Device,
        room: Integers,
    ) -> Seconds:
        """Seconds [n, S] that the simulation of so many engines [n], each with so many slots [n]
        and room [n] for tokens, is not below."""
        speed = engine_speed(self._workload.actor.shape, tensor_parallel, device)
        found = self._batch.floors(speed, engines, concurrency, room)
        if self._batch.even:
            one_wave = (engines * concurrency >= self._sequences) & (room == AMPLE)
            for row in np.flatnonzero(one_wave).tolist():
                floor = self._wave_floor(int(engines[row]), tensor_parallel, device)
                found[row] = np.maximum(found[row], floor)
        return found

    def _wave_floor(self, engines: int, tensor_parallel: int, device: Device) -> Seconds:
        """The floor [S] of engines with a slot for every sequence. Those of all engine sizes of a
        device are found at once: they share most of the work."""
        key = engines, tensor_parallel, device
        if key not in self._wave_floors:
            shape = self._workload.actor.shape
            sizes = tensor_parallels(self._workload, device)
            if tensor_parallel not in sizes:
                sizes.append(tensor_parallel)
            speeds = [engine_speed(shape, size, device) for size in sizes]
            floors = self._batch.wave_floors(speeds, engines)
            for size, seconds in zip(sizes, floors, strict=True):
                self._wave_floors[engines, size, device] = seconds
        return self._wave_floors[key]


def engines_of(layout: RolloutRole, places: Sequence[Place]) -> EngineCounts:
    """How many engines of a layout there are on which device, in the order of the places."""
    found, left = list[tuple[Device, int]](), layout.replicas
    for place in places:
        room = sum(part // layout.tensor_parallel for part in place.parts)
        count = min(left, room)
        if found and found[-1][0] == place.device:
            found[-1] = place.device, found[-1][1] + count
        else:
            found.append((place.device, count))
        left -= count
    return tuple((device, count) for device, count in found if count)
