"""The engines that a rollout may have on the GPUs of a kind, and what generation takes with them as
far as is known."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.predict.cost import CostModel
from planner.predict.generation import Simulation
from planner.predict.layouts import concurrencies, engine_counts, tensor_parallels
from planner.predict.memory import RoleMemory, process_bytes, rollout_fraction, rollout_memory
from planner.search.space.size_boxes import NEVER
from planner.spec.cluster import Device
from planner.spec.engines import engine_for
from planner.spec.plan import RolloutRole
from planner.spec.workload import Workload

Array = NDArray[np.float64]
Rows = NDArray[np.int64]

LEVELS = 32  # of memory, in which layouts are told apart
ALONE = LEVELS + 1  # the level of an engine that shares its GPUs with no other role


def with_mean(seconds: Array) -> Array:
    """Seconds [..., S + 1]: those [..., S] in each scenario, and their mean. One scenario is its
    own mean."""
    if seconds.shape[-1] == 1:
        return seconds
    return np.concatenate([seconds, seconds.mean(axis=-1, keepdims=True)], axis=-1)


def level_of(size: Any, device: Device) -> NDArray[np.int64]:
    """Levels of memory that so many bytes need: what fits has no higher a level than the room."""
    share = np.asarray(size) / device.memory_bytes
    return np.clip(np.ceil(share * LEVELS), 0, LEVELS).astype(np.int64)


class RolloutTable:
    """A row is a tensor-parallel size, a number of engines and their slots; it may use fewer
    engines than there is room for. `seconds` [n, S] of `generate` are floors until the row has been
    simulated. `least` [sizes, levels of memory, numbers of engines, S + 1] are those, and their
    mean, of all rows that need no more of either."""

    def __init__(
        self,
        workload: Workload,
        model: CostModel,
        device: Device,
        node: int,
        gpus: int,
        statistic: Callable[[Array], Array],
    ) -> None:
        self._workload, self._model, self._device, self._statistic = (
            workload,
            model,
            device,
            statistic,
        )
        self.sizes = [size for size in tensor_parallels(workload, device) if size <= node]
        self.counts = np.array(engine_counts(gpus, workload.batch))
        self._memory: dict[tuple[int, int, bool], RoleMemory] = {}
        columns, most = list[tuple[int, int, int, int]](), list[int]()
        for number, size in enumerate(self.sizes):
            for at in range(int(np.searchsorted(self.counts, gpus // size, "right"))):
                for slots in concurrencies(workload, size, int(self.counts[at]), device):
                    columns.append(
                        (
                            number,
                            at,
                            slots,
                            round(100 * rollout_fraction(workload, size, slots, device)),
                        )
                    )
                most += [len(columns) - 1] if columns and columns[-1][:2] == (number, at) else []
        self.number, self.at, self.slots, self.percent = (
            np.array(columns).reshape(-1, 4).T.astype(np.int64)
        )
        self.most = np.isin(
            np.arange(len(columns)), most
        )  # all that engines may have which share GPUs with no role
        self.queued = self.slots * self.counts[self.at] < workload.batch  # slow to simulate
        needed = self.percent / 100 * device.memory_bytes - process_bytes(device)
        self.level = level_of(needed * (device.kind == "cuda"), device)
        self._row = {
            key: row
            for row, key in enumerate(zip(*map(np.ndarray.tolist, self._keys()), strict=True))
        }
        self.seconds = self._simulated = np.full((len(columns), model.scenarios), NEVER)
        for number, size in enumerate(self.sizes):
            rows = np.flatnonzero(self.number == number)
            self._simulated[rows] = model.floors(
                size, self.slots[rows], self.counts[self.at[rows]], device
            )
        self.seconds = self._simulated.copy()
        self._known = 0
        self._refilled(np.arange(len(columns)))

    def _keys(self) -> tuple[Rows, Rows, Rows]:
        return np.array(self.sizes)[self.number], self.slots, self.counts[self.at]

    # --- what fits ---

    def rows_on(self, parts: Sequence[Sequence[int]], shared: bool) -> Rows:
        """The rows that pools with such GPUs per node have room for, each of them for one engine at
        least."""
        found = []
        for number, size in enumerate(self.sizes):
            engines = [sum(part // size for part in pool) for pool in parts]
            if all(engines):
                fits = (self.number == number) & (self.counts[self.at] <= sum(engines))
                found.append(np.flatnonzero(fits if shared else fits & self.most))
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def _fitting(self, pools: Rows) -> Iterator[tuple[int, Rows, NDArray[np.bool_]]]:
        """Of each size the index of the most engines that fit pools of these sizes [n, P] (-1: not
        the rollout's), and whether each of them has one."""
        for number, size in enumerate(self.sizes):
            each = np.where(pools >= 0, pools // size, 0)
            able = np.asarray(((each > 0) | (pools < 0)).all(axis=1), dtype=np.bool_)
            yield number, np.searchsorted(self.counts, each.sum(axis=1), "right") - 1, able

    def layout(self, row: int, pools: tuple[str, ...], offload: bool) -> RolloutRole:
        return RolloutRole(
            engine=engine_for(self._device.kind),
            pools=pools,
            tensor_parallel=self.sizes[self.number[row]],
            replicas=int(self.counts[self.at[row]]),
            memory_fraction=int(self.percent[row]) / 100,
            concurrency=int(self.slots[row]),
            offload=offload,
        )

    def memory(self, row: int, offload: bool) -> RoleMemory:
        """Of an engine on each of its GPUs."""
        key = int(self.number[row]), int(self.slots[row]), offload
        if key not in self._memory:
            self._memory[key] = rollout_memory(
                self._workload, self.layout(row, ("p",), offload), self._device
            )
        return self._memory[key]

    def offloads(self, shared: bool) -> tuple[bool, ...]:
        """Whether engines may sleep: only where that makes room for others."""
        return (False, True) if shared and self._device.kind == "cuda" else (False,)

    def moves(self, row: int, offload: bool) -> float:
        """Seconds of waking the engines and putting them to sleep."""
        return self._model.engine_moves(self.sizes[self.number[row]], offload, self._device)

    # --- what it takes ---

    def simulation(self, row: int) -> Simulation:
        """Of a row, as far as it has been run."""
        size, slots, engines = (int(column[row]) for column in self._keys())
        return self._model.generation(size, slots, ((self._device, engines),))

    def advance(self, row: int) -> None:
        """Simulate one more scenario of a row, or all if it has no queue."""
        self.simulation(row).advance()
        self.refresh()

    def refresh(self) -> bool:
        """Take up what has been simulated meanwhile; whether that is anything new."""
        runs = self._model.generations
        known = sum(run.known for run in runs.values())
        if known == self._known:
            return False
        changed = []
        for (size, slots, engines), run in runs.items():
            row = (
                self._row.get((size, slots, engines[0][1]))
                if engines[0][0] == self._device
                else None
            )
            if row is not None and len(engines) == 1 and (run.seconds > self._simulated[row]).any():
                self._simulated[row] = np.maximum(self._simulated[row], run.seconds)
                changed.append(row)
        self._known = known
        if changed:
            self._refilled(np.array(changed))
        return bool(changed)

    def _refilled(self, rows: Rows) -> None:
        """Make the tables anew after the seconds of some rows have changed."""
        for number in set(self.number[rows].tolist()):
            own = rows[self.number[rows] == number]
            self.seconds[own] = self._model.generate_least(
                self._simulated[own],
                self.sizes[number],
                self.slots[own],
                self.counts[self.at[own]],
                self._device,
            )
        seconds = with_mean(self.seconds)
        self.least = np.full(
            (len(self.sizes), ALONE + 1, len(self.counts), seconds.shape[-1]), NEVER
        )
        np.minimum.at(self.least, (self.number, self.level, self.at), seconds)
        np.minimum.accumulate(self.least, axis=1, out=self.least)
        self.least[:, ALONE] = NEVER
        self.least[self.number[self.most], ALONE, self.at[self.most]] = seconds[self.most]
        np.minimum.accumulate(self.least, axis=2, out=self.least)

    def least_on(self, pools: Rows, room: Rows) -> Array:
        """Seconds [n, S + 1] with the engines that fit pools of these sizes [n, P] (-1: not the
        rollout's), each of which needs one, in a level of memory [n]."""
        found = np.full((len(pools), self.least.shape[-1]), NEVER)
        for number, count, able in self._fitting(pools):
            found = np.minimum(
                found, np.where(able[:, None], self.least[number, room, count], NEVER)
            )
        return found

    def sharpen(self, pools: Rows, room: Rows, times: float, queues: bool) -> bool:
        """Simulate, of what fits pools of these sizes [1, P], all that might be fastest (with
        `queues` or without), until nothing is below so many `times` the least floor or something is
        known to be; whether that told more."""
        fits = self.most if room[0] == ALONE else self.level <= room[0]
        rows = np.concatenate([
            np.flatnonzero((self.number == number) & (self.at <= count[0]) & fits)
            for number, count, able in self._fitting(pools) if able[0]
        ] or [np.zeros(0, np.int64)])  # fmt: skip
        floors, queued = self._statistic(self._simulated[rows]), self.queued[rows]
        enough = 1.001 * times * float(floors.min(initial=NEVER))
        for at in np.lexsort((floors, queued)).tolist():
            if floors[at] < enough and (queues or not queued[at]):
                run = self.simulation(int(rows[at]))
                while not run.done and float(self._statistic(run.seconds)) < enough:
                    run.advance()
                if float(self._statistic(run.seconds)) < enough:
                    break
        return self.refresh()
