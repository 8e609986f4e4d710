"""The processes of a reward function: one, and more while samples are tried alone."""

import threading
from dataclasses import replace

from executor.data.reward import RewardWorker, import_hangs
from executor.fleet import pools
from executor.fleet.asking import Rank, ask
from executor.fleet.worker import WorkerError
from planner.spec.rewards import RewardFunction


class Judges:
    """The processes by number, of which 0 lives as long as the run. `asking` is held while they
    are asked: an evaluation and a step may score at once."""

    def __init__(self, fleet: pools.Fleet, reward: RewardFunction) -> None:
        """Begin to start the first one."""
        self.reward, self.asking = reward, threading.Lock()
        self._fleet, self._closed, self._lock = fleet, False, threading.Lock()
        self._first = fleet.process(RewardWorker, ())
        self._judges: dict[int, Rank[RewardWorker]] = {}

    def __getitem__(self, number: int) -> Rank[RewardWorker]:
        return self._judges[number]

    def __len__(self) -> int:
        return len(self._judges)

    def set_up(self) -> None:
        """Wait for the first one, and let it import the function. Raises UserError."""
        self._judges[0] = self._ready(0, self._first)

    def add(self, number: int) -> None:
        """Let there be a process of this number."""
        if number not in self._judges:
            self.restart(number)

    def restart(self, number: int) -> None:
        """A fresh process in the place of one that hangs or died, unless all are being ended: a
        call that this interrupts sees its processes die."""
        with self._lock:
            if self._closed:
                raise WorkerError(f"{_named(number)} was ended")
            fresh = self._fleet.again(RewardWorker, (), _made_for(number))
        self._judges[number] = self._ready(number, fresh)

    def _ready(self, number: int, fresh: Rank[RewardWorker]) -> Rank[RewardWorker]:
        (judge,) = pools.connect([replace(fresh, name=_named(number))])
        importing = judge.order(RewardWorker.import_function, self.reward)
        try:
            ask([importing], timeout=self.reward.timeout_seconds)
        except TimeoutError:
            raise import_hangs(self.reward) from None
        return judge

    def keep_first(self) -> None:
        """End all others."""
        for number in [number for number in self._judges if number]:
            del self._judges[number]
            self._fleet.end(RewardWorker, (), _made_for(number))

    def close(self) -> None:
        """Start none from here on."""
        with self._lock:
            self._closed = True


def _named(number: int) -> str:
    return f"process {number} of the reward function"


def _made_for(number: int) -> str:
    return f"judge {number}" if number else ""
