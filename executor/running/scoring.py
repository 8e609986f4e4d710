"""The rewards of the host, asked so that a sample on which one fails costs that sample and not the
run."""

import contextvars
import math
import threading
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import numpy as np
from numpy.typing import NDArray

from executor.data.reward_forms import Samples
from executor.fleet.worker import Record
from executor.running.judges import Broken, Judged, Judges
from executor.running.run_directory import log
from executor.running.supervise import ONE_IN
from planner.spec.errors import UserError

MOST_JUDGES = 32  # processes that try samples alone
PATIENCE_SECONDS = 1.0  # after which there are twice as many of them, as long as samples wait


def judge(judges: Judges, samples: Samples) -> tuple[NDArray[np.float32], list[Record]]:
    """Scores `[B]` of a whole batch, NaN for samples to be dropped. If the batch as a whole raises,
    hangs or returns no finite numbers, each sample is tried again alone. Raises UserError, with the
    prompt named, if more than one in `ONE_IN` fail."""
    with judges.asking:
        trial = _Trial(judges, samples)
        try:
            scores, records = trial.score(0, samples)
            return np.array(scores, dtype=np.float32), records
        except UserError as error:
            log.warning("%s. Each sample is tried again alone", error)
        try:
            trial.run()
        finally:
            judges.keep_first()
        return trial.scores, trial.records


class _Trial:
    """Each sample is tried alone, on several judges at a time: those that hang take their time
    together, while others go on."""

    def __init__(self, judges: Judges, samples: Samples) -> None:
        self._judges, self._samples = judges, samples
        self._waiting = deque(range(len(samples)))  # rows
        self._failed = Failures(len(samples))
        self._over, self._lock = False, threading.Lock()
        self.scores = np.full(len(samples), np.nan, dtype=np.float32)
        self.records: list[Record] = []

    def run(self) -> None:
        """Raises UserError if too many fail."""
        threads = ThreadPoolExecutor(max_workers=MOST_JUDGES)
        running: set[Future[None]] = set()
        started, grown = 0, -PATIENCE_SECONDS
        try:
            while running or not started:
                if self._waiting and time.monotonic() > grown + PATIENCE_SECONDS:
                    more = min(max(1, started), MOST_JUDGES - started)
                    for number in range(started, started + more):
                        context = contextvars.copy_context()  # it has the call's deadline
                        running.add(threads.submit(context.run, self._work, number))
                    started, grown = started + more, time.monotonic()
                done, running = wait(running, PATIENCE_SECONDS, FIRST_COMPLETED)
                for future in done:
                    future.result()
        finally:
            self._over = True
            threads.shutdown(wait=False)

    def _work(self, number: int) -> None:
        """Try one waiting row after the other on the judge of this number."""
        self._judges.add(number)
        while (row := self._next()) is not None:
            sample = self._samples.take([row])
            try:
                scores, records = self.score(number, sample)
            except UserError as error:
                self._failed.count(sample, error)
            else:
                self.scores[row] = scores[0]
                self.records += records

    def _next(self) -> int | None:
        with self._lock:
            return self._waiting.popleft() if self._waiting and not self._over else None

    def score(self, number: int, samples: Samples) -> Judged:
        """Raises UserError; a judge that broke is a fresh one then."""
        try:
            return self._judges.score(number, samples)
        except Broken:
            if not self._over:
                self._judges.restart(number)
            raise


class Failures:
    """The samples of a batch of so many that failed twice."""

    def __init__(self, batch: int) -> None:
        self._batch, self._failed, self._lock = batch, 0, threading.Lock()

    def count(self, sample: Samples, error: UserError) -> None:
        """Count one more, which is dropped. Raises UserError if they are too many."""
        line = f"prompt {sample.prompts[0][:60]!r}: {error}"
        with self._lock:
            self._failed += 1
            count = self._failed
        if count > max(1, self._batch // ONE_IN):
            raise UserError(f"{count} of {self._batch} samples failed twice, the last one {line}")
        log.warning("dropped the sample of %s", line)


class ScoredBeside:
    """Samples of a batch of so many that are scored as they are given, each alone and tried twice
    at most, while others are still being generated."""

    def __init__(self, judges: Judges, batch: int) -> None:
        self._judges, self._failed = judges, Failures(batch)
        self._scores = np.full(batch, np.nan, dtype=np.float32)
        self._running: dict[int, Future[None]] = {}  # by row

    def give(self, row: int, sample: Samples) -> None:
        """Let a sample be scored; it replaces one that was given for this row before."""
        before = self._running.get(row)

        def score(number: int) -> None:
            if before is not None:  # whose score must not come later than ours
                wait([before])
            self._scores[row] = self._score(number, sample)

        self._running[row] = self._judges.beside.submit(score)

    def _score(self, number: int, sample: Samples) -> float:
        for left in (1, 0):
            try:
                scores, _ = self._judges.score(number, sample)
                return scores[0]
            except UserError as error:
                if isinstance(error, Broken):
                    self._judges.restart(number)
                if not left:
                    self._failed.count(sample, error)
        return math.nan

    def scores(self) -> NDArray[np.float32]:
        """Scores `[B]`, NaN for samples to be dropped, once all are there. Raises UserError if too
        many failed."""
        for future in self._running.values():
            future.result()
        return self._scores
