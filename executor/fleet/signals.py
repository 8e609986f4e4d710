"""Signals that end a run: each is handled once, and none is lost."""

import contextlib
import math
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

Handler = Callable[[int, FrameType | None], None]
# The same signal within so long is the same request: timeout(1) sends it to us and to our group.
REPEAT_SECONDS = 0.2
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # each ends a run as Ctrl-C does
_asked = threading.Event()  # somebody has asked for the end


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt during a `with`. Python loses it where
    it is raised in a callback, such as those that each import ends with; `check_interrupted` raises
    it again. Within another such `with` this changes nothing."""
    before = {number: signal.getsignal(number) for number in ENDING}
    is_outer = in_main_thread() and _handle not in before.values()
    take_signals()
    try:
        yield
    finally:
        if is_outer:
            _asked.clear()
            for number, former in before.items():
                signal.signal(number, former)


def take_signals() -> None:
    """Make them raise KeyboardInterrupt, except for those that the shell has ignored: SIGHUP under
    nohup(1), SIGINT of a script's background job."""
    if not in_main_thread():  # no other may set handlers
        return
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _handle)


def check_interrupted() -> None:
    """Raise KeyboardInterrupt if it was raised before and lost."""
    if _asked.is_set():
        raise KeyboardInterrupt


def interrupt() -> NoReturn:
    """Raise KeyboardInterrupt, and remember it."""
    _asked.set()
    raise KeyboardInterrupt


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def leave_terminal() -> None:
    """Let what is printed from now on go nowhere, unless it goes into a file: the terminal is gone,
    and so is a program that a pipe led to. Writing to either would fail."""
    for number in (1, 2):
        if not stat.S_ISREG(os.fstat(number).st_mode):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


def unrepeated(handle: Handler) -> Handler:
    """A signal handler that is not disturbed by a signal that comes twice. One that raised again,
    while what waits for a lock is being left, would end as another error."""
    handled, busy = -math.inf, threading.Lock()

    def once(number: int, frame: FrameType | None) -> None:
        nonlocal handled
        if not busy.acquire(blocking=False):  # it comes in the middle of this very function
            return
        try:
            now = time.monotonic()
            repeated = now - handled <= REPEAT_SECONDS
            handled = handled if repeated else now
        finally:
            busy.release()
        if not repeated:
            handle(number, frame)

    return once


@unrepeated
def _handle(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGHUP:
        leave_terminal()
    interrupt()
