"""What every process of a pool has in common, and what the controller holds of it. Loads neither
torch nor pydantic, so that a rehearsal's processes start quickly."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from planner.spec.errors import UserError

PINGS = 5
SHOWN = 4  # ranks that a message names
EXHAUSTED = (  # what torch, NCCL and vLLM say when memory does not suffice
    "out of memory",
    "can't allocate memory",
    "no available memory for the cache blocks",
    "less than desired gpu memory utilization",
    "available kv cache memory",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """When one process was busy with a call: seconds on its own clock, `parts` (wake, transfer,
    offload) within it; `memory`: its peak meanwhile, as `memory.peak` tells it."""

    start: float
    end: float
    parts: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)


class Worker:
    """Base of the Ray actors. The controller calls methods through `call`, which returns their
    records too."""

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
        try:
            result = getattr(self, method)(*args)
            self.synchronize()
        except Exception as error:
            if (found := _out_of_memory(error)) is None:
                raise
            peak: dict[str, int] = {}
            with contextlib.suppress(Exception):  # the device may answer nothing any more
                peak = self.peak()
            raise OutOfMemory(found, peak) from error
        end = time.perf_counter()
        return result, Record(
            start=start, end=end, parts=self._parts, memory=self.peak() if watched else {}
        )

    def watch_memory(self) -> None:
        """From here on, records tell the peak of the memory."""
        self._watching = True

    def synchronize(self) -> None:
        """Wait for work that was only queued. Nothing to do without an accelerator."""

    def forget_peak(self) -> None:
        """Before a call: look for a new peak of the memory. Nothing to do without an
        accelerator."""

    def peak(self) -> dict[str, int]:
        """After a call: bytes at the peak, by kind."""
        return {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._parts[name] = self._parts.get(name, 0.0) + time.perf_counter() - start

    def fetch(self, refs: list[ray.ObjectRef]) -> list[Any]:
        """What references stand for, their way here counted as transfer. They come in a list
        because Ray would fetch bare ones before the method starts."""
        with self.part("transfer"):
            return ray.get(refs)


class WorkerError(Exception):
    """A worker failed; the message says which one, in which method and why."""


class Died(WorkerError):
    """A worker's process is gone."""


class Overdue(WorkerError):
    """Workers have not answered by the deadline; the message says which ones, in which method and
    for how long."""


class OutOfMemory(WorkerError):
    """A worker's memory did not suffice. `peak`: as `memory.peak` tells it."""

    def __init__(self, message: str, peak: dict[str, int]) -> None:
        super().__init__(message, peak)
        self.peak = peak

    def __str__(self) -> str:
        return str(self.args[0])


def _out_of_memory(error: BaseException | None) -> str | None:
    """What an error says if it, or what it comes from, is about memory."""
    while error is not None:
        text = " ".join(str(error).split())
        if isinstance(error, MemoryError) or any(words in text.lower() for words in EXHAUSTED):
            return (text or "out of memory")[:200]
        error = error.__cause__ or error.__context__
    return None


_deadline: ContextVar[float] = ContextVar(
    "deadline", default=float("inf")
)  # on the monotonic clock
_sending = (
    threading.Lock()
)  # several threads may ask the same ranks, whose collectives must come in one order


@contextlib.contextmanager
def within(seconds: float, *, anew: bool = False) -> Iterator[None]:
    """Let what is asked of processes in a `with` on this thread end after so many seconds at most,
    or sooner if a `with` around it says so, unless its time begins `anew`."""
    end = time.monotonic() + seconds
    token = _deadline.set(end if anew else min(_deadline.get(), end))
    try:
        yield
    finally:
        _deadline.reset(token)


@dataclass(frozen=True, kw_only=True)
class Rank:
    """The controller's end of one process. `offset` is the process's clock less the controller's,
    in seconds."""

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


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What some ranks were asked to do, and may be doing."""

    ranks: list[Rank]
    method: str
    arguments: list[tuple[Any, ...]]  # of each rank
    refs: list[ray.ObjectRef]
    since: float

    def wait(
        self, *, timeout: float | None = None, revive: Callable[[int], Rank] | None = None
    ) -> Outcome:
        """What `ask` returns and raises."""
        ranks, method = list(self.ranks), self.method
        sent = {ref: number for number, ref in enumerate(self.refs)}
        answers: dict[int, tuple[Any, Record]] = {}
        waiting = list(sent)
        end = min(_deadline.get(), self.since + timeout if timeout is not None else float("inf"))
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=_left(end))
            if not done:
                names = [ranks[sent[ref]].name for ref in waiting]
                if end < _deadline.get():
                    raise TimeoutError(f"{method} took longer than {timeout} s on {names[0]}")
                raise _overdue(names, method, time.monotonic() - self.since)
            for ref in done:
                number = sent[ref]
                try:
                    answers[number] = _answer(ref, ranks[number], method)
                except Died:
                    if revive is None:
                        raise
                    died = time.monotonic()
                    ranks[number] = revive(number)
                    lost = time.monotonic() - died
                    _deadline.set(_deadline.get() + lost)  # a start has a limit of its own
                    end += lost
                    again = ranks[number].handle.call.remote(method, *self.arguments[number])
                    sent[again] = number
                    waiting.append(again)
        ordered = [answers[number] for number in range(len(ranks))]
        records = [
            rank.on_our_clock(record) for rank, (_, record) in zip(ranks, ordered, strict=True)
        ]
        return Outcome(results=[result for result, _ in ordered], records=records)


def begin(
    ranks: Sequence[Rank], method: str, *args: Any, each: Sequence[tuple[Any, ...]] | None = None
) -> Asked:
    """Call a method on all ranks at once, without waiting for them. A rank does what it is asked in
    that order."""
    extra = each if each is not None else [()] * len(ranks)
    arguments = [(*args, *more) for more in extra]
    with _sending:
        refs = [
            rank.handle.call.remote(method, *its)
            for rank, its in zip(ranks, arguments, strict=True)
        ]
    return Asked(
        ranks=list(ranks), method=method, arguments=arguments, refs=refs, since=time.monotonic()
    )


def ask(
    ranks: Sequence[Rank],
    method: str,
    *args: Any,
    each: Sequence[tuple[Any, ...]] | None = None,
    timeout: float | None = None,
    revive: Callable[[int], Rank] | None = None,
) -> Outcome:
    """Call a method on all ranks at once, with `each[i]` as further arguments of rank i, and wait
    for all of them.

    Raises UserError as the worker raised it, and WorkerError for any other failure; the first
    failure counts, for the others may be waiting for the failed rank. Raises Overdue at the
    deadline that `within` sets, and TimeoutError if a rank has not answered after `timeout`
    seconds; those ranks go on nevertheless. With `revive` a rank whose process died is asked once
    more: the one that `revive(number)` puts in its place."""
    return begin(ranks, method, *args, each=each).wait(timeout=timeout, revive=revive)


def _left(end: float) -> float | None:
    return None if end == float("inf") else max(0.0, end - time.monotonic())


def _overdue(names: list[str], method: str, seconds: float) -> Overdue:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return Overdue(
        f"no answer to {method!r} for {seconds:.0f} s from {', '.join(names[:SHOWN])}{more}"
    )


def _answer(ref: ray.ObjectRef, rank: Rank, method: str) -> Any:
    began = time.monotonic()
    try:
        return ray.get(ref, timeout=_left(_deadline.get()))
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        if isinstance(error.cause, OutOfMemory):
            line = f"out of memory in {method!r} on {rank.name} ({error.cause})"
            raise OutOfMemory(line, error.cause.peak) from error
        cause = f"{type(error.cause).__name__}: {error.cause}"
        raise WorkerError(f"{method} failed on {rank.name} ({cause})") from error
    except GetTimeoutError:
        raise _overdue([rank.name], method, time.monotonic() - began) from None
    except RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1 if "creation task" in lines[0] else 0] if lines else type(error).__name__
        kind = Died if isinstance(error, RayActorError) else WorkerError
        raise kind(f"{rank.name} died in {method} ({reason})") from error


def measure_offset(rank: Rank) -> float:
    """The process's clock less ours, from the ping with the shortest round trip (Cristian 1989). An
    offset that is not greater than its own error counts as none: processes of one host share the
    clock."""
    best_trip, best_offset = float("inf"), 0.0
    for _ in range(PINGS):
        sent = time.perf_counter()
        theirs = _answer(rank.handle.now.remote(), rank, "now")
        received = time.perf_counter()
        if received - sent < best_trip:
            best_trip, best_offset = received - sent, theirs - (sent + received) / 2
    return best_offset if abs(best_offset) > best_trip / 2 else 0.0
