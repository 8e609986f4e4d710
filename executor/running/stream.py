"""The stream of a run: it keeps the engines at work on the sequences of several steps."""

import contextlib
import threading
from collections import deque
from collections.abc import Iterator

import numpy as np

from executor.data.requests import Requests
from executor.fleet.asking import MOST_DEATHS, Rank, ask, to_each, within
from executor.fleet.worker import Died, DiedAgain, Record, WorkerError
from executor.rollout.engine import EngineWorker
from executor.rollout.streaming import Stretches, Unfinished
from executor.running.growing import Growing, GrowingBatch, Kept, OnRows
from executor.running.processes import Processes
from executor.running.supervise import EARLY
from planner.spec.data import Sampler

# An engine decodes for so long before it is asked again; weights come between two slices. With many
# engines for longer: what they made takes the controller some milliseconds.
SLICE_SECONDS, SECONDS_OF_ENGINE = 0.05, 0.005
SLOTS_PER_SPARE = 8  # an engine has one sequence more than slots for each so many slots


class RolloutStream:
    """Sequences wait in the order of the steps; engines take the next ones as slots become free,
    each its share. A thread for each engine asks it for slices of decoding, and adds to the
    sequences what it made. So the controller knows all tokens: whatever becomes of an engine,
    others go on with its sequences.

    With a `window`, versions fall at fixed places instead of whenever weights arrive: each version
    samples so many tokens of a sequence, and the newest one the rest. Weights wait for that. What a
    run makes then depends on time no more, which tests need."""

    window: int | None = None

    def __init__(self, processes: Processes) -> None:
        self._processes, plan = processes, processes.plan
        layout = plan.rollout
        self._room = layout.concurrency + max(1, layout.concurrency // SLOTS_PER_SPARE)
        self._recompute, self._staleness = plan.workload.kv == "recompute", plan.staleness
        self.version = 0  # of the weights that engines have
        self.sampled = 0  # tokens, since the run began
        self._numbers = 0  # of sequences so far
        self._steps: dict[int, GrowingBatch] = {}
        self._waiting: deque[Growing] = deque()
        count = len(processes.engines)
        self._slice_seconds = max(SLICE_SECONDS, SECONDS_OF_ENGINE * count)
        self._given: list[dict[int, Growing]] = [{} for _ in range(count)]
        self._ranks: list[Rank[EngineWorker]] = list(processes.engines)  # that were given them
        self._changed, self._reviving = threading.Condition(), threading.Lock()
        self._interrupts = self._busy = 0
        self._error: BaseException | None = None
        self._over = False
        for number in range(count):
            threading.Thread(target=self._serve, args=(number,), daemon=True).start()

    # --- for the calls of a step ---

    def begin(
        self, step: int, requests: Requests, sampler: Sampler, tell: OnRows | None = None
    ) -> GrowingBatch:
        """The batch of a step, whose sequences are submitted unless a checkpoint has them."""
        with self._changed:
            batch = self._steps.get(step)
            if batch is not None:
                batch.tell = tell
                return batch
            batch = self._steps[step] = self._batch(requests, sampler, step, tell)
            self._waiting.extend(batch.growing)
            self._changed.notify_all()
            return batch

    def begin_first(self, requests: Requests, sampler: Sampler) -> GrowingBatch:
        """Sequences that belong to no step, and take the next free slots."""
        with self._changed:
            batch = self._batch(requests, sampler, None, None)
            self._waiting.extendleft(reversed(batch.growing))
            self._changed.notify_all()
            return batch

    def _batch(
        self, requests: Requests, sampler: Sampler, step: int | None, tell: OnRows | None
    ) -> GrowingBatch:
        first, self._numbers = self._numbers, self._numbers + len(requests)
        return GrowingBatch(requests, sampler, first=first, step=step, tell=tell)

    def wait(self, batch: GrowingBatch) -> None:
        """Wait until all sequences of a batch have ended. Raises what went wrong with an engine."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or not batch.left)
            if self._error is not None:
                raise self._error

    def hand_on(self, step: int) -> int:
        """Forget the batch of a step, which is complete and kept elsewhere; its tokens."""
        with self._changed:
            return self._steps.pop(step).tokens

    def sync_weights(self, version: int) -> list[Record]:
        """Interrupt all engines between two decoding steps, and let them go on with the actor's
        weights of this version."""
        with self._interrupted():
            records = self._processes.sync_weights(version)
            if self._recompute:
                records += ask(to_each(self._processes.engines, EngineWorker.recompute)).records
            self.version = version
            return records

    @contextlib.contextmanager
    def _interrupted(self) -> Iterator[None]:
        with self._changed:
            if self.window is not None:
                self._changed.wait_for(lambda: self._error is not None or self._rests())
            self._interrupts += 1
            self._changed.wait_for(lambda: self._error is not None or not self._busy)
            error = self._error
        try:
            if error is not None:
                raise error
            yield
        finally:
            with self._changed:
                self._interrupts -= 1
                self._changed.notify_all()

    def ledger(self) -> tuple[int, int, int]:
        """The sequences that have not ended, the tokens of batches that are not complete, and all
        tokens that were sampled since the run began, those of evaluations left out."""
        with self._changed:
            batches = list(self._steps.values())
            left, tokens = (sum(getattr(b, name) for b in batches) for name in ("left", "tokens"))
            return left, tokens, self.sampled

    # --- checkpoints ---

    def arrays(self) -> Kept:
        """What a checkpoint keeps."""
        with self._changed:
            found = {
                f"stream/{step}/{name}": array
                for step, batch in self._steps.items()
                for name, array in batch.arrays().items()
            }
            return {**found, "stream/sampled": np.array([self.sampled])}

    def restore(self, step: int, requests: Requests, sampler: Sampler, arrays: Kept) -> None:
        """Go on with the sequences of a step, of which a checkpoint has some tokens."""
        with self._changed:
            batch = self._steps[step] = self._batch(requests, sampler, step, None)
            batch.restore(arrays)
            self._waiting.extend(each for each in batch.growing if not each.ended)
            self._changed.notify_all()

    def close(self) -> None:
        """Ask no engine any more. Whoever waits for sequences is told so."""
        self._fail(WorkerError("the run was ended"))

    # --- one engine ---

    def _serve(self, number: int) -> None:
        deaths, early = 0, True
        while (given := self._next(number)) is not None:
            rank = self._ranks[number]
            limit = self._processes.deadlines.floor * (EARLY if early else 1.0)
            try:
                with within(limit):
                    made = self._slice(rank, given)
                self._add(number, made)
                deaths, early = 0, False
            except Died as error:
                deaths, early = deaths + 1, True
                try:
                    self._replace(number, rank, deaths, error)
                except BaseException as failure:  # which the calls that wait are told
                    self._fail(failure)
            except BaseException as error:
                self._fail(error)
            finally:
                with self._changed:
                    self._busy -= 1
                    self._changed.notify_all()

    def _slice(self, rank: Rank[EngineWorker], given: list[Unfinished]) -> Stretches:
        """Let an engine decode for a while, with what it is given beside what it has."""
        (made,) = ask([rank.order(EngineWorker.go_on, given, self._slice_seconds)]).results
        return made

    def _next(self, number: int) -> list[Unfinished] | None:
        """What the engine is given beside what it has, once there is something to do; None when all
        is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._has_work(number))
            if self._over:
                return None
            self._busy += 1
            if self._ranks[number] is not self._processes.engines[number]:
                self._take_back(number)  # it died while weights were installed
                self._ranks[number] = self._processes.engines[number]
            given = []
            for growing in self._taken(number):
                self._given[number][growing.number] = growing
                given.append(growing.unfinished(self._limit(growing)))
            return given

    def _has_work(self, number: int) -> bool:
        if self._interrupts:
            return False
        return bool(self._given[number]) or any(map(self._may_go_on, self._waiting))

    def _taken(self, number: int) -> list[Growing]:
        """The sequences that an engine takes next: it has at most its share of all, and what it has
        room for."""
        engines, has = len(self._given), len(self._given[number])
        ready = [growing for growing in self._waiting if self._may_go_on(growing)]
        share = -(-(len(ready) + sum(map(len, self._given))) // engines)
        taken = ready[: max(0, min(self._room, share) - has)]
        if len(taken) == len(self._waiting):
            self._waiting.clear()
        else:
            for growing in taken:
                self._waiting.remove(growing)
        return taken

    def _add(self, number: int, made: Stretches) -> None:
        """Add to the sequences what an engine made of them."""
        finished: dict[GrowingBatch, list[Growing]] = {}
        with self._changed:
            for stretch in made:
                growing = self._given[number][stretch.number]
                growing.add(stretch)
                if growing.batch.step is not None:
                    self.sampled += len(stretch.tokens)
                if not stretch.ended:
                    continue
                del self._given[number][stretch.number]
                if growing.is_whole(self._limit(growing), self._processes.eos):
                    growing.ended = True  # so says a checkpoint that is taken from here on
                    finished.setdefault(growing.batch, []).append(growing)
                else:
                    self._waiting.appendleft(growing)
        for batch, some in finished.items():
            if batch.tell is not None:
                batch.tell([each.row for each in some], [each.tokens for each in some])
        with self._changed:
            for batch, some in finished.items():
                batch.left -= len(some)
            self._changed.notify_all()

    def _replace(self, number: int, rank: Rank[EngineWorker], deaths: int, error: Died) -> None:
        """An engine died: others may go on with its sequences at once, and so may the one in its
        place."""
        with self._changed:
            if self._over:
                return
            self._take_back(number)
            self._changed.notify_all()
        if deaths == MOST_DEATHS:
            line = f"{error}, and so did the {MOST_DEATHS - 1} in its place"
            raise DiedAgain(line, number) from error
        with self._reviving:
            fresh = self._processes.revive(rank)
        with self._changed:
            self._ranks[number] = fresh

    def _take_back(self, number: int) -> None:
        self._waiting.extendleft(reversed(self._given[number].values()))
        self._given[number] = {}

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._over = True
            self._changed.notify_all()

    # --- where versions fall ---

    def _limit(self, growing: Growing) -> int | None:
        """The tokens that a sequence may have before the next weights come; None for all."""
        step = growing.batch.step
        if self.window is None or step is None or self.version >= step:
            return None
        first = max(0, step - self._staleness)
        return self.window * (self.version - first + 1)

    def _may_go_on(self, growing: Growing) -> bool:
        limit = self._limit(growing)
        return limit is None or growing.count < limit

    def _rests(self) -> bool:
        """Whether nothing can go on before the next weights come."""
        return not any(self._given) and not any(map(self._may_go_on, self._waiting))
