"""What every process of a pool has in common, and what the controller holds of it. Loads neither torch nor pydantic,
so that a rehearsal's processes start quickly."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from planner.spec.errors import UserError

PINGS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """When one process was busy with a call: seconds on its own clock, `parts` (wake, transfer, offload) within it;
    `memory`: bytes at its peak meanwhile, as `memory.peak` names them."""

    start: float
    end: float
    parts: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)


class Worker:
    """Base of the Ray actors. The controller calls methods through `call`, which returns their records too."""

    def __init__(self) -> None:
        self._parts: dict[str, float] = {}
        self._watching = False

    def now(self) -> float:
        return time.perf_counter()

    def call(self, method: str, *args: Any) -> tuple[Any, Record]:
        """Run a method; its record ends when the work is really done, on an accelerator too."""
        self._parts = {}
        if watched := self._watching:
            self.forget_peak()
        start = time.perf_counter()
        result = getattr(self, method)(*args)
        self.synchronize()
        end = time.perf_counter()
        return result, Record(start=start, end=end, parts=self._parts, memory=self.peak() if watched else {})

    def watch_memory(self) -> None:
        """From here on, records tell the peak of the memory."""
        self._watching = True

    def synchronize(self) -> None:
        """Wait for work that was only queued. Nothing to do without an accelerator."""

    def forget_peak(self) -> None:
        """Before a call: look for a new peak of the memory. Nothing to do without an accelerator."""

    def peak(self) -> dict[str, int]:
        """After a call: bytes at the peak, by kind."""
        return {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._parts[name] = self._parts.get(name, 0.0) + time.perf_counter() - start

    def fetch(self, refs: list[ray.ObjectRef]) -> list[Any]:
        """What references stand for, their way here counted as transfer. They come in a list because Ray would fetch
        bare ones before the method starts."""
        with self.part("transfer"):
            return ray.get(refs)


class WorkerError(Exception):
    """A worker failed; the message says which one, in which method and why."""


@dataclass(frozen=True, kw_only=True)
class Rank:
    """The controller's end of one process. `offset` is the process's clock less the controller's, in seconds."""

    name: str
    handle: ActorHandle
    offset: float = 0.0

    def on_our_clock(self, record: Record) -> Record:
        return replace(record, start=record.start - self.offset, end=record.end - self.offset)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the ranks returned, in their order, and their records on the controller's clock."""

    results: list[Any]
    records: list[Record]


def ask(
    ranks: Sequence[Rank],
    method: str,
    *args: Any,
    each: Sequence[tuple[Any, ...]] | None = None,
    timeout: float | None = None,
) -> Outcome:
    """Call a method on all ranks at once, with `each[i]` as further arguments of rank i, and wait for all of them.

    Raises UserError as the worker raised it, and WorkerError for any other failure; the first failure counts, for the
    others may be waiting for the failed rank. Raises TimeoutError if a rank has not answered after `timeout` seconds;
    it goes on nevertheless."""
    extra = each if each is not None else [()] * len(ranks)
    sent = {
        rank.handle.call.remote(method, *args, *more): number
        for number, (rank, more) in enumerate(zip(ranks, extra, strict=True))
    }
    answers: dict[int, tuple[Any, Record]] = {}
    waiting = list(sent)
    deadline = None if timeout is None else time.monotonic() + timeout
    while waiting:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        done, waiting = ray.wait(waiting, num_returns=1, timeout=left)
        if not done:
            raise TimeoutError(f"{method} took longer than {timeout} s on {ranks[sent[waiting[0]]].name}")
        for ref in done:
            answers[sent[ref]] = _answer(ref, ranks[sent[ref]], method)
    ordered = [answers[number] for number in range(len(ranks))]
    records = [rank.on_our_clock(record) for rank, (_, record) in zip(ranks, ordered, strict=True)]
    return Outcome(results=[result for result, _ in ordered], records=records)


def _answer(ref: ray.ObjectRef, rank: Rank, method: str) -> tuple[Any, Record]:
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        cause = f"{type(error.cause).__name__}: {error.cause}"
        raise WorkerError(f"{method} failed on {rank.name} ({cause})") from error
    except RayActorError as error:
        raise WorkerError(f"{rank.name} died in {method}") from error


def measure_offset(handle: ActorHandle) -> float:
    """The process's clock less ours, from the ping with the shortest round trip (Cristian 1989). An offset that is
    not greater than its own error counts as none: processes of one host share the clock."""
    best_trip, best_offset = float("inf"), 0.0
    for _ in range(PINGS):
        sent = time.perf_counter()
        theirs = ray.get(handle.now.remote())
        received = time.perf_counter()
        if received - sent < best_trip:
            best_trip, best_offset = received - sent, theirs - (sent + received) / 2
    return best_offset if abs(best_offset) > best_trip / 2 else 0.0
