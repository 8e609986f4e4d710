"""A plan played by light processes that sleep: the real controller, Ray and loop, without GPUs and
models."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from executor.fleet import pools
from executor.fleet.asking import ask, to_each, within
from executor.fleet.worker import Record, Worker
from executor.running.supervise import Deadlines
from planner.predict.schedule import Task
from planner.spec.plan import Plan


class Sleeper(Worker):
    """A rank of a rehearsal."""

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class Rehearsal:
    """One sleeping process per GPU; every rank of a call's pools sleeps for `seconds(task)`. Host
    calls sleep on the controller."""

    def __init__(
        self, plan: Plan, seconds: Callable[[Task], float], deadlines: Deadlines | None = None
    ) -> None:
        self.seconds = seconds
        self.generated: dict[int, float] = {}  # when generation of a step ended
        self.deadlines = deadlines or Deadlines(plan=plan, predicted=seconds)
        started = {
            name: [pools.start(Sleeper) for _ in pool.gpus] for name, pool in plan.pools.items()
        }
        named = {
            name: [
                replace(rank, name=f"process {number} of pool {name}")
                for number, rank in enumerate(ranks)
            ]
            for name, ranks in started.items()
        }
        with within(self.deadlines.of_start):
            self.ranks = {name: pools.connect(ranks) for name, ranks in named.items()}

    def run(self, task: Task) -> tuple[list[Record], int]:
        if not task.pools:
            start = time.perf_counter()
            early = task.call.since_generation
            since = self.generated.get(task.step, start) if early else start
            time.sleep(max(0.0, since + self.seconds(task) - start))
            return [Record(start=start, end=time.perf_counter())], 0
        if task.call.streams:  # several at once on the same processes
            start = time.perf_counter()
            time.sleep(self.seconds(task))
            self.generated[task.step] = time.perf_counter()
            return [Record(start=start, end=self.generated[task.step])], 0
        ranks = [rank for pool in task.pools for rank in self.ranks[pool]]
        answers = ask(to_each(ranks, Sleeper.sleep, self.seconds(task)))
        if task.call.kind == "generate" and not task.call.monitor:
            self.generated[task.step] = time.perf_counter()
        return answers.records, 0

    def evaluate_first(self) -> dict[str, float]:
        return {}

    def end_step(self, step: int) -> dict[str, Any]:
        return {"step": step}

    def said(self) -> list[Any]:
        return []

    def snapshot(self, directory: Path) -> Any:
        raise AssertionError("a rehearsal has nothing to save")

    def export(self, directory: Path) -> None:
        """There are no models."""

    def close(self) -> None:
        pools.stop([rank for ranks in self.ranks.values() for rank in ranks])
