"""What every process of a pool has in common; the controller's end of it is in `asking.py`. Loads
neither torch nor pydantic, so that a rehearsal's processes start quickly."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import ray

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
    offload) within it; `memory`: its peak meanwhile, as `gpu_memory.peak` tells it. `ends`: when
    each sequence of a batch had ended, if it streamed."""

    start: float
    end: float
    parts: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    ends: tuple[float, ...] = ()


class Worker:
    """Base of the Ray actors. The controller calls methods through `call`, which returns their
    records too; so what it may ask is defined once, as a method of a subclass."""

    def __init__(self) -> None:
        self._parts: dict[str, float] = {}
        self._watching = False

    def now(self) -> float:
        return time.perf_counter()

    def call(self, method: str, *args: Any, **kwargs: Any) -> tuple[Any, Record]:
        """Run a method; its record ends when the work is really done, on an accelerator too."""
        self._parts = {}
        if watched := self._watching:
            self.forget_peak()
        start = time.perf_counter()
        try:
            result = getattr(self, method)(*args, **kwargs)
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
        """Let records tell the peak of the memory from here on."""
        self._watching = True

    def synchronize(self) -> None:
        """Wait for work that was only queued. Nothing to do without an accelerator."""

    def forget_peak(self) -> None:
        """Look for a new peak of the memory; called before a call. There is nothing to do without
        an accelerator."""

    def peak(self) -> dict[str, int]:
        """Bytes at the peak, by kind; asked after a call."""
        return {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._parts[name] = self._parts.get(name, 0.0) + time.perf_counter() - start

    def fetch(self, refs: list[ray.ObjectRef[Any]]) -> list[Any]:
        """Fetch the values of references, and count their way here as transfer. They come in a list
        because Ray would fetch bare ones before the method starts."""
        with self.part("transfer"):
            return ray.get(refs)


class WorkerError(Exception):
    """A worker failed; the message says which one, in which method and why."""


class Died(WorkerError):
    """A worker's process is gone."""


class DiedAgain(Died):
    """Every process that was given an order died of it. `number` counts the orders that were given
    at once."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message, number)
        self.number = number

    def __str__(self) -> str:
        return str(self.args[0])


class Overdue(WorkerError):
    """Workers have not answered by the deadline; the message says which ones, in which method and
    for how long."""


class OutOfMemory(WorkerError):
    """A worker's memory did not suffice. `peak`: as `gpu_memory.peak` tells it."""

    def __init__(self, message: str, peak: dict[str, int]) -> None:
        super().__init__(message, peak)
        self.peak = peak

    def __str__(self) -> str:
        return str(self.args[0])


def _out_of_memory(error: BaseException | None) -> str | None:
    """The text of an error if it, or the error that it comes from, is about memory."""
    while error is not None:
        text = " ".join(str(error).split())
        if isinstance(error, MemoryError) or any(words in text.lower() for words in EXHAUSTED):
            return (text or "out of memory")[:200]
        error = error.__cause__ or error.__context__
    return None
