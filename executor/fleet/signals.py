"""Signal handlers that run once for one request."""

import math
import os
import stat
import threading
import time
from collections.abc import Callable
from types import FrameType

Handler = Callable[[int, FrameType | None], None]
# The same signal within so long is the same request: timeout(1) sends it to us and to our group.
REPEAT_SECONDS = 0.2


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
