"""The stops of a run: the places, right after a `sync_weights`, where it may end and go on
later."""

import contextlib
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from executor.fleet.signals import (
    ENDING,
    check_interrupted,
    in_main_thread,
    interrupt,
    leave_terminal,
    unrepeated,
)
from planner.predict.schedule import Task

EndedCall = tuple[str, int, int | None]  # a call, its step, and the version of its weights


def in_flight(tasks: Sequence[Task], stop: int) -> tuple[EndedCall, ...]:
    """The tasks before a stop whose steps have tasks behind it too."""
    left = {task.step for task in tasks[stop:]}
    return tuple(
        (task.call.name, task.step, task.weights_version)
        for task in tasks[:stop]
        if task.step in left
    )


class Stops:
    """Tells the loop which task must not start yet: the first one behind the next checkpoint, or,
    once somebody has asked to stop or a switch to another plan is wanted, the first one behind the
    next stop. Each number in `every` asks for a checkpoint every so many steps (0: never)."""

    def __init__(self, tasks: Sequence[Task], every: Sequence[int], passed: int = 0) -> None:
        synced = [task for task in tasks if task.call.kind == "transfer"]
        self._stops = {task.index + 1: task.step for task in synced}
        self._saves = {
            stop: step
            for stop, step in self._stops.items()
            if any(steps and (step + 1) % steps == 0 for steps in every)
        }
        self._passed = passed  # a stop; what was issued before it has ended
        self.asked = self.switching = False

    def __call__(self, newest: int) -> float:
        """The first task not to start, where `newest` is the latest one that did."""
        stops = self._stops if self.asked or self.switching else self._saves
        return next((stop for stop in stops if stop > max(newest, self._passed)), math.inf)

    def arrive(self, newest: int) -> tuple[int, int] | None:
        """The stop that held the loop at its end, and the updates of the actor before it; None if
        nothing held it."""
        stop = self(newest)
        if stop == math.inf:
            return None
        self._passed = int(stop)
        return self._passed, self._stops[self._passed] + 1

    @contextlib.contextmanager
    def on_signals(self, say: Callable[[str], None]) -> Iterator[None]:
        """Let the first SIGINT, SIGTERM or SIGHUP ask to stop, and the second one end everything at
        once."""
        if not in_main_thread():  # no other may set handlers
            yield
            return

        def handle(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGHUP:
                leave_terminal()
            if self.asked:
                interrupt()
            self.asked = True
            say(
                "stopping after this step with a last checkpoint; interrupt again to stop "
                "immediately, without a checkpoint"
            )

        before = {
            number: signal.signal(number, unrepeated(handle))
            for number in ENDING
            if signal.getsignal(number) != signal.SIG_IGN  # as nohup(1) has it
        }
        try:
            check_interrupted()
            yield
        finally:
            for number, former in before.items():
                signal.signal(number, former)
