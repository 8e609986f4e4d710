"""The reward function of a user, asked so that a sample on which it fails costs that sample and not
the run."""

import contextvars
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import numpy as np
from numpy.typing import NDArray

from executor.data.reward import RewardWorker
from executor.fleet.asking import Answers, ask
from executor.fleet.worker import Died, Record
from executor.running.judges import Judges
from executor.running.run_directory import log
from executor.running.supervise import ONE_IN
from planner.spec.errors import UserError

MOST_JUDGES = 32  # processes that try samples alone
PATIENCE_SECONDS = 1.0  # after which there are twice as many of them, as long as samples wait


def judge(
    judges: Judges,
    prompts: Sequence[str],
    responses: Sequence[str],
    answers: Sequence[str | None],
) -> tuple[NDArray[np.float32], list[Record]]:
    """Scores `[B]`, NaN for samples to be dropped. If the batch as a whole raises, hangs or returns
    no finite numbers, each sample is tried again alone. Raises UserError, with the prompt named, if
    more than one in `ONE_IN` fail."""
    with judges.asking:
        trial = _Trial(judges, prompts, responses, answers)
        try:
            outcome = trial.ask(0, range(len(responses)))
            return np.array(outcome.results[0], dtype=np.float32), outcome.records
        except UserError as error:
            log.warning("%s. Each sample is tried again alone", error)
        try:
            trial.run()
        finally:
            judges.keep_first()
        return trial.scores, trial.records


class _Trial:
    """Each sample is tried alone, on several processes at a time: those that hang take their time
    together, while others go on."""

    def __init__(
        self,
        judges: Judges,
        prompts: Sequence[str],
        responses: Sequence[str],
        answers: Sequence[str | None],
    ) -> None:
        self._judges, self._prompts = judges, prompts
        self._responses, self._answers = responses, answers
        self._waiting = deque(range(len(responses)))  # rows
        self._failed: list[int] = []  # rows
        self._over, self._lock = False, threading.Lock()
        self.scores = np.full(len(responses), np.nan, dtype=np.float32)
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
        """Try one waiting row after the other on the process of this number."""
        self._judges.add(number)
        while (row := self._next()) is not None:
            try:
                outcome = self.ask(number, [row])
            except UserError as error:
                self._count_failed(row, error)
            else:
                self.scores[row] = outcome.results[0][0]
                self.records += outcome.records

    def _next(self) -> int | None:
        with self._lock:
            return self._waiting.popleft() if self._waiting and not self._over else None

    def _count_failed(self, row: int, error: UserError) -> None:
        self._failed.append(row)
        line = f"prompt {self._prompts[row][:60]!r}: {error}"
        count = len(self._failed)
        if count > max(1, len(self._responses) // ONE_IN):
            raise UserError(
                f"{count} of {len(self._responses)} samples failed twice, the last one {line}"
            )
        log.warning("dropped the sample of %s", line)

    def ask(self, number: int, rows: Sequence[int]) -> Answers[list[float]]:
        """Raises UserError; the process is a fresh one then if it hung or died."""
        texts = [self._prompts[row] for row in rows]
        answers = [self._answers[row] for row in rows]
        given = [self._responses[row] for row in rows]
        count = f"{len(rows)} response{'s' if len(rows) > 1 else ''}"
        judge, reward = self._judges[number], self._judges.reward
        called, limit = f"reward function {reward.function!r}", reward.timeout_seconds
        try:
            return ask([judge.order(RewardWorker.score, texts, given, answers)], timeout=limit)
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
        if not self._over:
            self._judges.restart(number)
        raise UserError(problem)
