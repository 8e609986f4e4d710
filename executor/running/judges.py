"""Who gives the rewards of the host: the processes of a function, or the server that is asked."""

import contextvars
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol

from executor.data import reward_server
from executor.data.reward import RewardWorker, import_hangs
from executor.data.reward_forms import Samples
from executor.fleet import pools
from executor.fleet.asking import Rank, ask
from executor.fleet.worker import Died, Record, WorkerError
from planner.spec.errors import UserError
from planner.spec.rewards import HostReward, RewardFunction, RewardServer

Judged = tuple[list[float], list[Record]]  # scores, and when processes were busy


class Broken(UserError):
    """A judge hung, or ended."""


class Judges(Protocol):
    """Those of one reward, by number. They are asked one at a time; `asking` is held while a whole
    batch is: an evaluation and a step may score at once. `beside` has a thread for each that scores
    beside generation."""

    asking: threading.Lock
    beside: "Beside"

    @property
    def reward(self) -> HostReward: ...

    def set_up(self) -> None:
        """Let them be ready. Raises UserError."""
        ...

    def add(self, number: int) -> None:
        """Let there be one of this number."""
        ...

    def score(self, number: int, samples: Samples) -> Judged:
        """Raises UserError, and Broken for one that has to be started again."""
        ...

    def restart(self, number: int) -> None:
        """A fresh one in the place of one that is broken."""
        ...

    def keep_first(self) -> None:
        """End those that were added besides the ones that there always are."""
        ...

    def close(self) -> None:
        """Start none from here on."""
        ...


class Beside:
    """Threads that score one sample after the other, on a judge each, in the order in which they
    were given."""

    def __init__(self, count: int) -> None:
        self._threads = ThreadPoolExecutor(max_workers=max(1, count))
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(count):
            self._free.put(number)

    def submit(self, score: Callable[[int], None]) -> Future[None]:
        """Let `score` be called with the number of a judge that is free."""

        def run() -> None:
            number = self._free.get()
            try:
                score(number)
            finally:
                self._free.put(number)

        return self._threads.submit(contextvars.Context().run, run)  # of no call's deadline

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class FunctionJudges:
    """The processes of a reward function, of which the first ones live as long as the run: as many
    as its `processes`, or one. It is reward number `at` of the workload."""

    def __init__(self, fleet: pools.Fleet, reward: RewardFunction, at: int) -> None:
        """Begin to start the first ones."""
        self.reward, self.asking = reward, threading.Lock()
        self.beside = Beside(reward.processes or 0)
        self._fleet, self._at = fleet, at
        self._closed, self._lock = False, threading.Lock()
        self._always = range(reward.processes or 1)
        self._first = [
            fleet.process(RewardWorker, (), self._made_for(number)) for number in self._always
        ]
        self._judges: dict[int, Rank[RewardWorker]] = {}

    def __len__(self) -> int:
        return len(self._judges)

    def set_up(self) -> None:
        for number, started in zip(self._always, self._connected(self._first), strict=True):
            self._judges[number] = started
        self._import(list(self._judges.values()))

    def add(self, number: int) -> None:
        if number not in self._judges:
            self.restart(number)

    def restart(self, number: int) -> None:
        """A fresh process in the place of one that hangs or died, unless all are being ended: a
        call that this interrupts sees its processes die."""
        with self._lock:
            if self._closed:
                raise WorkerError(f"{self._named(number)} was ended")
            fresh = self._fleet.again(RewardWorker, (), self._made_for(number))
        (judge,) = pools.connect([replace(fresh, name=self._named(number))])
        self._import([judge])
        self._judges[number] = judge

    def _connected(self, started: list[Rank[RewardWorker]]) -> list[Rank[RewardWorker]]:
        named = [replace(rank, name=self._named(n)) for n, rank in enumerate(started)]
        return pools.connect(named)

    def _import(self, judges: list[Rank[RewardWorker]]) -> None:
        orders = [judge.order(RewardWorker.import_function, self.reward) for judge in judges]
        try:
            ask(orders, timeout=self.reward.timeout_seconds)
        except TimeoutError:
            raise import_hangs(self.reward) from None

    def score(self, number: int, samples: Samples) -> Judged:
        count = f"{len(samples)} response{'s' if len(samples) > 1 else ''}"
        called, limit = f"reward function {self.reward.function!r}", self.reward.timeout_seconds
        try:
            answers = ask([self._judges[number].order(RewardWorker.score, samples)], timeout=limit)
            return answers.results[0], answers.records
        except TimeoutError:
            problem = (
                f"{called} took longer than {limit:g} s for {count}; make it faster or raise "
                "timeout_seconds"
            )
        except Died:
            problem = (
                f"{called} ended its process, for {count}: it crashed (in code that is not "
                "Python), left by os._exit, or was killed for want of memory; run it on them alone"
            )
        raise Broken(problem)

    def keep_first(self) -> None:
        for number in [number for number in self._judges if number not in self._always]:
            del self._judges[number]
            self._fleet.end(RewardWorker, (), self._made_for(number))

    def close(self) -> None:
        self.beside.close()
        with self._lock:
            self._closed = True

    def _named(self, number: int) -> str:
        return f"process {number} of reward {self.reward.label}"

    def _made_for(self, number: int) -> str:
        return f"reward {self._at}, judge {number}"


class ServerJudges:
    """A server, which threads of ours ask."""

    def __init__(self, reward: RewardServer) -> None:
        self.reward, self.asking = reward, threading.Lock()
        self.beside = Beside(reward.processes or 0)

    def set_up(self) -> None: ...
    def add(self, number: int) -> None: ...
    def restart(self, number: int) -> None: ...
    def keep_first(self) -> None: ...

    def score(self, number: int, samples: Samples) -> Judged:
        start = time.perf_counter()
        scores = reward_server.score(self.reward, samples)
        return scores, [Record(start=start, end=time.perf_counter())]

    def close(self) -> None:
        self.beside.close()


def judges_of(fleet: pools.Fleet, reward: HostReward, at: int) -> Judges:
    """The judges of reward number `at` of a workload."""
    if isinstance(reward, RewardServer):
        return ServerJudges(reward)
    return FunctionJudges(fleet, reward, at)
