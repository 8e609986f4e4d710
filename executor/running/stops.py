"""Where a run may stop and be gone on with: right after a `sync_weights`."""

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from executor.fleet.signals import unrepeated
from planner.predict.schedule import Task

EndedCall = tuple[str, int, int | None]  # a call, its step, and the version of its weights


def in_flight(tasks: Sequence[Task], cut: int) -> tuple[EndedCall, ...]:
    """The tasks before a cut whose steps have tasks behind it too."""
    left = {task.step for task in tasks[cut:]}
    return tuple(
        (task.call.name, task.step, task.weights_version)
        for task in tasks[:cut]
        if task.step in left
    )


class Stops:
    """Tells the loop which task must not start yet: the first one behind the next checkpoint, every
    `every` steps (0: never), or behind the next cut of all once somebody has asked to stop."""

    def __init__(self, tasks: Sequence[Task], every: int, passed: int = 0) -> None:
        synced = [task for task in tasks if task.call.name == "sync_weights"]
        self._cuts = {task.index + 1: task.step for task in synced}
        self._saves = {
            cut: step for cut, step in self._cuts.items() if every and (step + 1) % every == 0
        }
        self._passed = passed  # a cut; what was issued before it has ended
        self.asked = False

    def __call__(self, newest: int) -> float:
        """The first task not to start, where `newest` is the latest one that did."""
        cuts = self._cuts if self.asked else self._saves
        return next((cut for cut in cuts if cut > max(newest, self._passed)), math.inf)

    def arrive(self, newest: int) -> tuple[int, int] | None:
        """At the end of the loop: the cut that held it and the updates of the actor before it; None
        if nothing did."""
        cut = self(newest)
        if cut == math.inf:
            return None
        self._passed = int(cut)
        return self._passed, self._cuts[self._passed] + 1

    @contextlib.contextmanager
    def on_signals(self, say: Callable[[str], None]) -> Iterator[None]:
        """Let the first SIGINT or SIGTERM ask to stop, and the second one end everything at
        once."""
        if threading.current_thread() is not threading.main_thread():  # no other may set handlers
            yield
            return

        def handle(number: int, frame: FrameType | None) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True
            say(
                "stopping after this step with a last checkpoint; interrupt again to end at once "
                "without"
            )

        before = {
            number: signal.signal(number, unrepeated(handle))
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, former in before.items():
                signal.signal(number, former)
