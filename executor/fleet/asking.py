"""The controller's end of processes: what each is to do, how long it may take, what it answered.

    sending = to_each(actors, Trainer.send_weights, version)
    receiving = to_each(engines, VllmWorker.receive_weights, version, weights)
    records = ask([*sending, *receiving]).records

A method is passed as a function of its class, so that its arguments are checked and a reader can
go to it; what is sent is its name.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from executor.fleet.worker import (
    Died,
    DiedAgain,
    OutOfMemory,
    Overdue,
    Record,
    Worker,
    WorkerError,
)
from planner.spec.errors import UserError

PINGS = 5
SHOWN = 4  # ranks that a message names
MOST_DEATHS = 3  # of processes with the same order; then it is the order that ends them

P = ParamSpec("P")
R = TypeVar("R")
W = TypeVar("W", bound=Worker)
W_co = TypeVar("W_co", bound=Worker, covariant=True)

# On the monotonic clock.
_deadline: ContextVar[float] = ContextVar("deadline", default=float("inf"))
# Several threads may ask the same ranks, whose collectives must come in one order.
_sending = threading.Lock()


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


def more_time(seconds: float) -> None:
    """Let what is asked on this thread end so much later: it went by with something that has a
    limit of its own."""
    _deadline.set(_deadline.get() + seconds)


@dataclass(frozen=True, kw_only=True)
class Rank(Generic[W_co]):
    """The controller's end of one process. `offset` is the process's clock less the controller's,
    in seconds."""

    name: str
    handle: ActorHandle[Any]
    offset: float = 0.0

    def order(
        self, method: Callable[Concatenate[W_co, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> "Order[R]":
        """This process is to run a method of its class, such as `Trainer.infer`."""
        return Order(rank=self, method=method.__name__, args=args, kwargs=kwargs)

    def on_our_clock(self, record: Record) -> Record:
        return replace(record, start=record.start - self.offset, end=record.end - self.offset)


Revive = Callable[[Rank[Any]], Rank[Any]]  # the rank in the place of one that died


@dataclass(frozen=True, kw_only=True)
class Order(Generic[R]):
    """A method that one process is to run, with its arguments. The process will answer with an
    R."""

    rank: Rank[Any]
    method: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def send(self) -> ray.ObjectRef[Any]:
        reference: ray.ObjectRef[Any] = self.rank.handle.call.remote(
            self.method, *self.args, **self.kwargs
        )
        return reference


def to_each(
    ranks: Sequence[Rank[W]],
    method: Callable[Concatenate[W, P], R],
    *args: P.args,
    **kwargs: P.kwargs,
) -> list[Order[R]]:
    """All of these processes are to do the same."""
    return [rank.order(method, *args, **kwargs) for rank in ranks]


@dataclass(frozen=True, kw_only=True)
class Answers(Generic[R]):
    """What the processes returned, in the order of their orders, and their records on the
    controller's clock."""

    results: list[R]
    records: list[Record]


@dataclass(frozen=True, kw_only=True)
class Pending(Generic[R]):
    """Orders that were sent, and are being carried out."""

    orders: list[Order[R]]
    refs: list[ray.ObjectRef[Any]]
    since: float

    def wait(self, *, timeout: float | None = None, revive: Revive | None = None) -> Answers[R]:
        """What `ask` returns and raises."""
        orders, deaths = list(self.orders), [0] * len(self.orders)
        sent = {ref: number for number, ref in enumerate(self.refs)}
        answers: dict[int, tuple[R, Record]] = {}
        waiting = list(sent)
        end = min(_deadline.get(), self.since + timeout if timeout is not None else float("inf"))
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=_left(end))
            if not done:
                late = [orders[sent[ref]] for ref in waiting]
                if end < _deadline.get():
                    first = late[0]
                    raise TimeoutError(
                        f"{first.method} took longer than {timeout} s on {first.rank.name}"
                    )
                raise _overdue(late, time.monotonic() - self.since)
            for ref in done:
                number = sent[ref]
                try:
                    answers[number] = _answer(ref, orders[number])
                except Died as error:
                    if revive is None:
                        raise
                    deaths[number] += 1
                    if deaths[number] == MOST_DEATHS:
                        line = f"{error}, and so did the {MOST_DEATHS - 1} in its place"
                        raise DiedAgain(line, number) from error
                    died = time.monotonic()
                    order = orders[number]
                    orders[number] = replace(order, rank=revive(order.rank))
                    lost = time.monotonic() - died
                    more_time(lost)
                    end += lost
                    again = orders[number].send()
                    sent[again] = number
                    waiting.append(again)
        ordered = [answers[number] for number in range(len(orders))]
        return Answers(
            results=[result for result, _ in ordered],
            records=[
                order.rank.on_our_clock(record)
                for order, (_, record) in zip(orders, ordered, strict=True)
            ],
        )


def begin(orders: Sequence[Order[R]]) -> Pending[R]:
    """Send all orders at once, without waiting for answers. A process carries out what it is sent
    in that order."""
    with _sending:
        refs = [order.send() for order in orders]
    return Pending(orders=list(orders), refs=refs, since=time.monotonic())


def ask(
    orders: Sequence[Order[R]],
    *,
    timeout: float | None = None,
    revive: Revive | None = None,
) -> Answers[R]:
    """Send all orders at once and wait for all answers.

    Raises UserError as the worker raised it, and WorkerError for any other failure; the first
    failure counts, for the others may be waiting for the failed rank. Raises Overdue at the
    deadline that `within` sets, and TimeoutError if a rank has not answered after `timeout`
    seconds; those ranks go on nevertheless. With `revive` an order whose process died is sent
    again, to the rank that `revive(rank)` puts in its place; raises DiedAgain when `MOST_DEATHS`
    have died of it."""
    return begin(orders).wait(timeout=timeout, revive=revive)


def _left(end: float) -> float | None:
    return None if end == float("inf") else max(0.0, end - time.monotonic())


def _overdue(late: Sequence[Order[Any]], seconds: float) -> Overdue:
    names = [order.rank.name for order in late]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    shown = ", ".join(names[:SHOWN])
    return Overdue(f"no answer to {late[0].method!r} for {seconds:.0f} s from {shown}{more}")


def _answer(ref: ray.ObjectRef[Any], order: Order[Any]) -> Any:
    began, name, method = time.monotonic(), order.rank.name, order.method
    try:
        return ray.get(ref, timeout=_left(_deadline.get()))
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        if isinstance(error.cause, OutOfMemory):
            line = f"out of memory in {method!r} on {name} ({error.cause})"
            raise OutOfMemory(line, error.cause.peak) from error
        cause = f"{type(error.cause).__name__}: {error.cause}"
        raise WorkerError(f"{method} failed on {name} ({cause})") from error
    except GetTimeoutError:
        raise _overdue([order], time.monotonic() - began) from None
    except RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1 if "creation task" in lines[0] else 0] if lines else type(error).__name__
        kind = Died if isinstance(error, RayActorError) else WorkerError
        raise kind(f"{name} died in {method} ({reason})") from error


def measure_offset(rank: Rank[Any]) -> float:
    """The process's clock less ours, from the ping with the shortest round trip (Cristian 1989). An
    offset that is not greater than its own error counts as none: processes of one host share the
    clock."""
    best_trip, best_offset = float("inf"), 0.0
    ping = rank.order(Worker.now)
    for _ in range(PINGS):
        sent = time.perf_counter()
        theirs = _answer(rank.handle.now.remote(), ping)
        received = time.perf_counter()
        if received - sent < best_trip:
            best_trip, best_offset = received - sent, theirs - (sent + received) / 2
    return best_offset if abs(best_offset) > best_trip / 2 else 0.0
