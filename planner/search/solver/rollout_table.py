"""The layouts that a rollout may have on the GPUs of a kind, and what is known of the seconds that
generation takes with each."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from planner.predict.cost import CostModel
from planner.predict.generation import GenerationRun
from planner.predict.kv_cache import AMPLE
from planner.predict.layouts import engine_counts, engine_sizes, stream_size, tensor_parallels
from planner.predict.memory import RoleMemory, kv_room, process_bytes, rollout_memory
from planner.predict.objective import with_mean
from planner.search.space.arrays import Array, Indices, Mask
from planner.search.space.size_boxes import NEVER
from planner.spec.cluster import Device
from planner.spec.engines import engine_for
from planner.spec.plan import RolloutRole
from planner.spec.workload import Workload

LEVELS = 32  # of memory, by which layouts are told apart
ALONE = LEVELS + 1  # the level of an engine that shares its GPUs with no other role
ENOUGH = 1.001  # times the least floor: simulating further would not matter


def level_of(size: Any, device: Device) -> Indices:
    """The level of memory of some bytes [...], in 32nds of a GPU's and rounded up. A layout that
    fits into some room is of no higher level than the room."""
    share = np.asarray(size) / device.memory_bytes
    return np.clip(np.ceil(share * LEVELS), 0, LEVELS).astype(np.int64)


class Fitting(NamedTuple):
    """Engines of one size on some pools: the index of the size in `RolloutTable.sizes`, the index
    [n] in `counts` of the most engines that fit, and whether each pool has room for one [n]."""

    size: int
    most: Indices
    able: Mask


class RolloutTable:
    """All layouts of the rollout on one kind of GPU, a row for each: `sizes[size]` GPUs for an
    engine (tensor parallel), `counts[count]` engines, and `slots` for sequences in each of them. A
    row may have fewer engines than there is room for.

    `seconds` [rows, S] of `generate` are floors, until simulation replaces them: whoever needs to
    know more of a row calls `advance`. `least` [sizes, levels of memory, counts, S + 1] has the
    least of these, and of their means, among all rows that need no more memory and no more
    engines."""

    def __init__(
        self,
        workload: Workload,
        model: CostModel,
        device: Device,
        node: int,
        gpus: int,
        statistic: Callable[[Array], Array],
        batches: int | None = None,
    ) -> None:
        self._batches = batches  # that are in flight at once, where generation streams
        self._workload, self._model, self._device = workload, model, device
        self._statistic = statistic
        self._memory: dict[tuple[int, int, int, bool], RoleMemory] = {}
        self.sizes = [size for size in tensor_parallels(workload, device) if size <= node]
        self.counts = np.array(engine_counts(gpus, workload.generated))
        self._list_rows(gpus)
        rows = len(self.size)
        self.room = np.array([self._kv_room(row) for row in range(rows)], dtype=np.int64)
        preempting = self.room < AMPLE
        queued = self.slots * self.counts[self.count] < workload.generated
        self.queued = queued | preempting
        self.effort = queued + 2 * preempting  # of a simulation
        needed = self.percent / 100 * device.memory_bytes - process_bytes(device)
        self.level = level_of(needed * (device.kind == "cuda"), device)
        self._take_floors()

    def _take_floors(self) -> None:
        """Start with floors of the seconds that generation takes."""
        rows = len(self.size)
        self._simulated = np.full((rows, self._model.scenarios), NEVER)  # without call overheads
        self._done = np.zeros(rows, dtype=bool)
        for size, gpus_of_engine in enumerate(self.sizes):
            own = np.flatnonzero(self.size == size)
            self._simulated[own] = self._model.rollouts.floors(
                gpus_of_engine,
                self.slots[own],
                self.counts[self.count[own]],
                self._device,
                self.room[own],
            )
        self.seconds = self._simulated.copy()
        self._refill(np.arange(rows))

    def with_model(self, model: CostModel) -> "RolloutTable":
        """The same layouts with the floors of another model."""
        table = copy.copy(self)
        table._model = model
        table._take_floors()
        return table

    def _list_rows(self, gpus: int) -> None:
        """List the rows: `size`, `count`, `slots`, and the share of a GPU's memory that an engine
        takes, in `percent`. `fullest` tells the rows with the most memory of their size and count:
        engines that share GPUs with no other role gain nothing from less."""
        workload, device = self._workload, self._device
        rows = list[tuple[int, int, int, int]]()
        fullest = list[bool]()
        for size, gpus_of_engine in enumerate(self.sizes):
            fit = int(np.searchsorted(self.counts, gpus // gpus_of_engine, "right"))
            for count in range(fit):
                engines = int(self.counts[count])
                if self._batches is None:
                    listed = engine_sizes(workload, gpus_of_engine, engines, device)
                else:
                    listed = stream_size(workload, gpus_of_engine, engines, device, self._batches)
                most = max((percent for _, percent in listed), default=0)
                for slots, percent in listed:
                    rows.append((size, count, slots, percent))
                    fullest.append(percent == most)
        columns = np.array(rows).reshape(-1, 4).T.astype(np.int64)
        self.size, self.count, self.slots, self.percent = columns
        self.fullest = np.array(fullest, dtype=bool)

    # --- what fits ---

    def rows_on(self, parts: Sequence[Sequence[int]], shared: bool) -> Indices:
        """The rows that pools with these GPUs per node have room for, if each pool has room for one
        engine at least; `shared` with other roles or not."""
        found = [np.zeros(0, np.int64)]
        for size, gpus_of_engine in enumerate(self.sizes):
            engines = [sum(part // gpus_of_engine for part in pool) for pool in parts]
            if all(engines):
                fits = (self.size == size) & (self.counts[self.count] <= sum(engines))
                found.append(np.flatnonzero(fits if shared else fits & self.fullest))
        return np.concatenate(found)

    def _fitting(self, pools: Indices) -> Iterator[Fitting]:
        """What fits pools of these sizes [n, P] (-1: not a pool of the rollout), for each size of
        an engine."""
        for size, gpus_of_engine in enumerate(self.sizes):
            engines = np.where(pools >= 0, pools // gpus_of_engine, 0)
            able = np.asarray(((engines > 0) | (pools < 0)).all(axis=1), dtype=np.bool_)
            most = np.searchsorted(self.counts, engines.sum(axis=1), "right") - 1
            yield Fitting(size, most, able)

    def layout(self, row: int, pools: tuple[str, ...], offload: bool) -> RolloutRole:
        return RolloutRole(
            engine=engine_for(self._device.kind),
            pools=pools,
            tensor_parallel=self.sizes[self.size[row]],
            replicas=int(self.counts[self.count[row]]),
            memory_fraction=int(self.percent[row]) / 100,
            concurrency=int(self.slots[row]),
            offload=offload,
        )

    def memory(self, row: int, offload: bool) -> RoleMemory:
        """What an engine needs on each of its GPUs."""
        key = int(self.size[row]), int(self.slots[row]), int(self.percent[row]), offload
        if key not in self._memory:
            layout = self.layout(row, ("p",), offload)
            self._memory[key] = rollout_memory(self._workload, layout, self._device)
        return self._memory[key]

    def _kv_room(self, row: int) -> int:
        return kv_room(self._workload, self.layout(row, ("p",), False), self._device)

    def offloads(self, shared: bool) -> tuple[bool, ...]:
        """Whether engines may sleep: only where that makes room for other roles."""
        return (False, True) if shared and self._device.kind == "cuda" else (False,)

    def moves(self, row: int, offload: bool) -> float:
        """Seconds of waking the engines and putting them to sleep."""
        if not offload:
            return 0.0
        moves = self._model.rollouts.moves(self.sizes[self.size[row]], self._device)
        return float(moves.both.item())

    # --- what generation takes ---

    def row_of(self, layout: RolloutRole) -> int:
        """The row of a layout."""
        gpus = self.sizes.index(layout.tensor_parallel)
        engines = int(np.searchsorted(self.counts, layout.replicas))
        own = (self.size == gpus) & (self.count == engines) & (self.slots == layout.concurrency)
        return int(np.flatnonzero(own)[0])

    def simulated(self, row: int) -> Array:
        """The seconds [S] of a row, all of them simulated."""
        while not self.done(row):
            self.advance(row)
        return np.asarray(self.seconds[row])

    def done(self, row: int) -> bool:
        """Whether a row's seconds are those of the simulation, in every scenario."""
        return bool(self._done[row])

    def advance(self, row: int) -> None:
        """Simulate one more scenario of a row, or all of them if it has no queue."""
        simulation = self._simulation(row)
        if not simulation.done:
            simulation.advance()
        longer = self._take_up(row, simulation)
        if len(longer):
            self._refill(longer)

    def _simulation(self, row: int) -> GenerationRun:
        """The simulation of a row, as far as it has been run."""
        engines = int(self.counts[self.count[row]])
        size, slots, room = self.sizes[self.size[row]], int(self.slots[row]), int(self.room[row])
        return self._model.rollouts.run(size, slots, ((self._device, engines),), room)

    def _take_up(self, row: int, simulation: GenerationRun) -> Indices:
        """Take up what has been simulated; the rows of which more is known now. Fewer engines are
        no faster. With boundaries that is left to the simulation, for a batch is not always dealt
        to them as evenly; a stream has many batches."""
        rows = np.array([row])
        if self._batches is not None:
            rows = np.flatnonzero((self.size == self.size[row]) & (self.count <= self.count[row]))
        more = (simulation.seconds > self._simulated[rows]).any(axis=1)
        longer: Indices = rows[np.flatnonzero(more)]
        self._simulated[longer] = np.maximum(self._simulated[longer], simulation.seconds)
        self._done[row] = simulation.done
        return longer

    def _refill(self, changed: Indices) -> None:
        """Fill `seconds` and `least` after the simulated seconds of some rows have changed."""
        for size in set(self.size[changed].tolist()):
            own = changed[self.size[changed] == size]
            estimates = self._model.rollouts.calls(
                self._simulated[own],
                self.sizes[size],
                self.slots[own],
                self.counts[self.count[own]],
                self._device,
            )
            self.seconds[own] = estimates.seconds
        seconds = with_mean(self.seconds)
        shape = len(self.sizes), ALONE + 1, len(self.counts), seconds.shape[-1]
        self.least = np.full(shape, NEVER)
        np.minimum.at(self.least, (self.size, self.level, self.count), seconds)
        np.minimum.accumulate(self.least, axis=1, out=self.least)
        full = self.fullest
        self.least[:, ALONE] = NEVER
        alone = self.size[full], np.full(full.sum(), ALONE), self.count[full]
        np.minimum.at(self.least, alone, seconds[full])
        np.minimum.accumulate(self.least, axis=2, out=self.least)

    def least_on(self, pools: Indices, room: Indices) -> Array:
        """The least seconds [n, S + 1] of generation on pools of these sizes [n, P] (-1: not a pool
        of the rollout), in a level of memory [n]. NEVER where a pool has no room for an engine."""
        found = np.full((len(pools), self.least.shape[-1]), NEVER)
        for size, most, able in self._fitting(pools):
            seconds = np.where(able[:, None], self.least[size, room, most], NEVER)
            found = np.minimum(found, seconds)
        return found

    def sharpen(self, pools: Indices, room: Indices, times: float, queues: bool) -> bool:
        """Simulate rows that fit pools of these sizes [1, P] and might be the fastest, in the order
        of their floors; rows with a queue only if `queues`. It ends when no other row can be below
        `times` the least floor, or some row is known to be. Return whether that told more."""
        rows = self._rows_in(pools, room)
        floors = self._statistic(self._simulated[rows])
        enough = ENOUGH * times * float(floors.min(initial=NEVER))
        changed: list[int] = []
        for row in rows[np.lexsort((floors, self.effort[rows]))].tolist():
            if self.queued[row] and not queues:
                continue
            if self._statistic(self._simulated[row]) >= enough:
                continue
            simulation = self._simulation(row)
            while not simulation.done and self._statistic(simulation.seconds) < enough:
                simulation.advance()
            changed += self._take_up(row, simulation).tolist()
            if self._statistic(simulation.seconds) < enough:
                break
        if changed:
            self._refill(np.unique(changed))
        return bool(changed)

    def _rows_in(self, pools: Indices, room: Indices) -> Indices:
        """The rows that fit pools of these sizes [1, P] in a level of memory [1]."""
        in_memory = self.fullest if room[0] == ALONE else self.level <= room[0]
        found = [np.zeros(0, np.int64)]
        for size, most, able in self._fitting(pools):
            if able[0]:
                fits = (self.size == size) & (self.count <= most[0]) & in_memory
                found.append(np.flatnonzero(fits))
        return np.concatenate(found)
