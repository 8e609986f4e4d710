"""The stream of a run, driven by itself: its engines are objects of this process."""

import random
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from typing import Any

import pytest
from test_stream_run import streamed

from executor.data.prompts import Synthetic
from executor.fleet.asking import Rank
from executor.fleet.worker import Died, DiedAgain, Record, WorkerError
from executor.rollout.engine import EngineWorker
from executor.rollout.streaming import Stretches, Unfinished
from executor.rollout.transformers_engine import TransformersWorker
from executor.running.growing import GrowingBatch
from executor.running.processes import Processes
from executor.running.stream import RolloutStream
from executor.running.supervise import Deadlines
from planner.spec.plan import Plan

PATIENCE = 30.0


class Here(Processes):
    """A plan's engines in this process, and nothing else of it."""

    def __init__(self, plan: Plan, engines: int) -> None:
        self.plan, self.deadlines, self.engines = plan, Deadlines(plan=plan), []
        self.has_weights, self.alone = True, list[bool]()  # of engines that are put in place
        self.may_start, self.started = Event(), 0
        self.may_start.set()
        self.synced: list[frozenset[int]] = []  # those that were absent
        for number in range(engines):
            self.engines.append(self._started(f"engine {number}"))

    def _started(self, name: str) -> Rank[EngineWorker]:
        worker: Any = TransformersWorker()
        self.eos = worker.start(self.plan, "r", "store")
        return Rank(name=name, handle=worker)

    def start_again(self, number: int) -> Rank[EngineWorker]:
        self.may_start.wait(PATIENCE)
        self.started += 1
        return self._started(self.engines[number].name)

    def put(
        self,
        number: int,
        engine: Rank[EngineWorker],
        *,
        alone: bool = True,
        absent: frozenset[int] = frozenset(),
    ) -> bool:
        self.engines[number] = engine
        self.alone.append(alone)
        return self.has_weights

    def sync_weights(self, version: int, absent: frozenset[int] = frozenset()) -> list[Record]:
        self.synced.append(absent)
        return []


class Stream(RolloutStream):
    """Asks engines of this process for one step of decoding at a time. An engine dies of a
    sequence that is `deadly`."""

    def __init__(
        self,
        processes: Here,
        deadly: int | None = None,
        dies: str = "",
        last: Collection[int] = (),
    ) -> None:
        self.deadly, self.dies, self.asked = deadly, dies, list[str]()
        self.last = last  # whoever is asked for such a slice dies
        super().__init__(processes)

    def _slice(self, rank: Rank[EngineWorker], given: list[Unfinished]) -> Stretches:
        self.asked.append(rank.name)
        if len(self.asked) in self.last:
            raise Died(f"{rank.name} died")
        if rank.name == self.dies:
            self.dies = ""
            raise Died(f"{rank.name} died")
        if any(each.number == self.deadly for each in given):
            raise Died(f"{rank.name} died")
        worker: Any = rank.handle
        made: Stretches = worker.go_on(given, 0.0)
        return made


@contextmanager
def streams(plan: Plan, engines: int = 1) -> Iterator[Stream]:
    stream = Stream(Here(plan, engines))
    try:
        yield stream
    finally:
        stream.close()


def begin(stream: RolloutStream, plan: Plan, step: int, **options: Any) -> GrowingBatch:
    prompts = Synthetic(plan.workload).step(step)
    return stream.begin(step, prompts, plan.workload.sampler, **options)


def waited(stream: RolloutStream, batch: GrowingBatch) -> None:
    """Wait for a batch, but not for ever."""
    with ThreadPoolExecutor() as threads:
        try:
            threads.submit(stream.wait, batch).result(PATIENCE)
        finally:
            stream.close()


def lengths(batch: GrowingBatch) -> list[int]:
    return [growing.count for growing in batch.growing]


def test_sequences_of_a_checkpoint_go_on_although_nothing_else_begins() -> None:
    plan = streamed(k=2)
    source = Synthetic(plan.workload)
    with streams(plan) as stream:
        whole = begin(stream, plan, 3)
        stream.wait(whole)
    kept = GrowingBatch(source.step(3), plan.workload.sampler, first=0, step=3).arrays()
    with streams(plan) as stream:
        stream.restore(3, source.step(3), plan.workload.sampler, kept)
        again = begin(stream, plan, 3)
        waited(stream, again)
    assert lengths(again) == lengths(whole) == source.step(3).requests.max_tokens.tolist()


def test_others_go_on_for_an_engine_that_is_started_again() -> None:
    """Weights come meanwhile, and to that one later."""
    plan = streamed(k=1)
    processes = Here(plan, engines=2)
    processes.may_start.clear()
    stream = Stream(processes, dies="engine 0")
    batch = begin(stream, plan, 0)
    stream.wait(batch)
    stream.sync_weights(1)
    assert processes.synced == [{0}] and processes.started == 0
    processes.may_start.set()
    waited(stream, begin(stream, plan, 1))
    expected = Synthetic(plan.workload).step(0).requests.max_tokens.tolist()
    assert lengths(batch) == expected


@pytest.mark.parametrize("engines", [1, 2])
def test_an_engine_that_is_started_again_takes_part_when_it_has_weights(engines: int) -> None:
    """Which others do not wait for."""
    plan = streamed(k=1)
    processes = Here(plan, engines)
    processes.has_weights = False
    stream = Stream(processes, dies="engine 0")
    batch = begin(stream, plan, 0)
    if engines == 2:
        stream.wait(batch)
    while not (stream.asked if engines == 1 else processes.alone):
        time.sleep(0.01)
    stream.sync_weights(1)
    assert processes.alone == [engines == 1] and processes.synced == [frozenset()]
    assert stream.asked.count("engine 0") == 1
    waited(stream, begin(stream, plan, 1))
    assert stream.asked.count("engine 0") > 1 and not batch.left


def test_a_sequence_that_engines_die_of_is_named() -> None:
    """Whatever engines it goes to, and although others advance there."""
    plan = streamed(k=1)
    stream = Stream(Here(plan, engines=2), deadly=5)
    with pytest.raises(DiedAgain, match="so did 2 before it; they were given"):
        waited(stream, begin(stream, plan, 0))


def test_engines_that_die_at_random_times_lose_and_double_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tokens are those of engines that live: they follow from the keys and the places."""
    monkeypatch.setattr("executor.running.stream.MOST_DEATHS", 6)  # no sequence is to blame
    plan, chance = streamed(k=2), random.Random(0)
    with streams(plan) as stream:
        lived = [begin(stream, plan, step) for step in range(3)]
        for batch in lived:
            stream.wait(batch)
    last, at = set[int](), 0
    for _ in range(5):
        at += chance.randint(1, 9)
        last.add(at)
    processes = Here(plan, engines=2)
    died = Stream(processes, last=last)
    batches = [begin(died, plan, step) for step in range(3)]
    for batch in batches:
        died.wait(batch)
    died.close()
    assert len(died.asked) > max(last) and processes.started >= 4
    for ours, theirs in zip(batches, lived, strict=True):
        assert lengths(ours) == lengths(theirs)
        assert ours.generated().tokens.tolist() == theirs.generated().tokens.tolist()
    assert died.sampled == sum(batch.tokens for batch in batches)


def test_who_waits_for_a_stream_that_is_closed_is_told() -> None:
    plan = streamed(k=1)
    stream = Stream(Here(plan, engines=0))
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(stream.wait, begin(stream, plan, 0))
        stream.close()
        with pytest.raises(WorkerError, match="the run was ended"):
            waiting.result(PATIENCE)


def test_a_checkpoint_has_what_has_finished_as_finished() -> None:
    """Also while the rewards are told of it."""
    plan, kept = streamed(k=1), []

    def tell(rows: list[int], responses: list[Any]) -> None:
        found = stream.arrays()
        ended = found["stream/0/ended"]
        kept.append(all(ended[rows]))
        assert found["stream/0/lengths"][rows].tolist() == list(map(len, responses))

    with streams(plan) as stream:
        stream.wait(begin(stream, plan, 0, tell=tell))
    assert kept and all(kept)
