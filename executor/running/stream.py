"""The stream of a run: it keeps the engines at work on the sequences of several steps."""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from executor.data.prompts import Prompts
from executor.fleet.asking import MOST_DEATHS, Rank, ask, more_time, to_each, within
from executor.fleet.worker import Died, DiedAgain, Record, WorkerError
from executor.rollout.engine import EngineWorker
from executor.rollout.streaming import Stretches, Unfinished
from executor.running.growing import Growing, GrowingBatch, Kept, OnRows, named
from executor.running.processes import Processes
from executor.running.shares import Shares
from executor.running.supervise import EARLY
from planner.spec.data import Sampler

# An engine decodes for so long before it is asked again; weights come between two slices. With many
# engines for longer: what they made takes the controller some milliseconds.
SLICE_SECONDS, SECONDS_OF_ENGINE = 0.05, 0.005
SLOTS_PER_SPARE = 8  # an engine has one sequence more than slots for each so many slots


class _Lost(NamedTuple):
    """An engine that died, and the sequences that it had."""

    number: int
    sequences: list[Growing]
    error: Died


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
        room = layout.concurrency + max(1, layout.concurrency // SLOTS_PER_SPARE)
        self._recompute, self._staleness = plan.workload.kv == "recompute", plan.staleness
        self.version = 0  # of the weights that engines have
        self.sampled = 0  # tokens, since the run began
        self._numbers = 0  # of sequences so far
        self._steps: dict[int, GrowingBatch] = {}
        count = len(processes.engines)
        self._slice_seconds = max(SLICE_SECONDS, SECONDS_OF_ENGINE * count)
        self._shares = Shares(count, room)
        self._ranks: list[Rank[EngineWorker]] = list(processes.engines)  # that were given sequences
        self._starting: set[int] = set()  # engines whose processes are being started again
        self._changed, self._reviving = threading.Condition(), threading.Lock()
        self._syncing = threading.Lock()  # while weights come to engines
        self._interrupts = self._busy = 0
        self._error: BaseException | None = None
        self._over = False
        for number in range(count):
            threading.Thread(target=self._serve, args=(number,), daemon=True).start()

    # --- for the calls of a step ---

    def begin(
        self, step: int, prompts: Prompts, sampler: Sampler, tell: OnRows | None = None
    ) -> GrowingBatch:
        """The batch of a step, whose sequences are submitted unless a checkpoint has them."""
        with self._changed:
            batch = self._steps.get(step)
            if batch is not None:
                batch.tell = tell
                return batch
            batch = self._steps[step] = self._batch(prompts, sampler, step, tell)
            self._shares.wait(batch.growing)
            self._changed.notify_all()
            return batch

    def begin_first(self, prompts: Prompts, sampler: Sampler) -> GrowingBatch:
        """Sequences that belong to no step, and take the next free slots."""
        with self._changed:
            batch = self._batch(prompts, sampler, None, None)
            self._shares.wait(batch.growing)
            self._changed.notify_all()
            return batch

    def _batch(
        self, prompts: Prompts, sampler: Sampler, step: int | None, tell: OnRows | None
    ) -> GrowingBatch:
        first, self._numbers = self._numbers, self._numbers + len(prompts.requests)
        return GrowingBatch(prompts, sampler, first=first, step=step, tell=tell)

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
        with self._interrupted(), self._syncing:
            absent = frozenset(self._starting)
            records = self._processes.sync_weights(version, absent)
            if self._recompute:
                there = self._processes.without(absent)
                recompute = to_each(there, EngineWorker.recompute)
                records += ask(recompute, revive=self._processes.revive).records
            with self._changed:
                self.version = version
                self._shares.away &= absent
            return records

    @contextlib.contextmanager
    def _interrupted(self) -> Iterator[None]:
        began = time.monotonic()
        with self._changed:
            if self.window is not None:
                self._changed.wait_for(lambda: self._error is not None or self._rests())
            self._interrupts += 1
            self._changed.wait_for(lambda: self._error is not None or self._is_still())
            error = self._error
        more_time(time.monotonic() - began)  # an engine may have been started again
        try:
            if error is not None:
                raise error
            yield
        finally:
            with self._changed:
                self._interrupts -= 1
                self._changed.notify_all()

    def _is_still(self) -> bool:
        """Whether no engine decodes, and there is one that weights can come to."""
        return not self._busy and len(self._starting) < len(self._ranks)

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

    def restore(self, step: int, prompts: Prompts, sampler: Sampler, arrays: Kept) -> None:
        """Go on with the sequences of a step, of which a checkpoint has some tokens."""
        with self._changed:
            batch = self._steps[step] = self._batch(prompts, sampler, step, None)
            batch.restore(arrays)
            self._shares.wait(each for each in batch.growing if not each.ended)
            self._changed.notify_all()

    def close(self) -> None:
        """Ask no engine any more. Whoever waits for sequences is told so."""
        self._fail(WorkerError("the run was ended"))

    # --- one engine ---

    def _serve(self, number: int) -> None:
        """The thread of an engine: ask it for slices until all is over. Whatever goes wrong is told
        to the calls that wait."""
        try:
            deaths, early = 0, True  # in a row; an engine's first slice takes longer
            while (given := self._next(number)) is not None:
                died = self._ask_for_slice(number, given, early)
                deaths, early = (deaths + 1, True) if died else (0, False)
                if died:
                    self._check_lost(died, deaths)
                    self._replace(number)
        except BaseException as error:
            self._fail(error)

    def _ask_for_slice(self, number: int, given: list[Unfinished], early: bool) -> _Lost | None:
        """Let an engine decode for a while, with what it is given beside what it has, and keep what
        it made. If it dies, others may go on with its sequences: which it had."""
        limit = self._processes.deadlines.floor * (EARLY if early else 1.0)
        try:
            with within(limit):
                made = self._slice(self._ranks[number], given)
            self._add(number, made)
            return None
        except Died as error:
            return _Lost(number, self._lose(number), error)
        except BaseException as error:
            self._fail(error)  # before weights come, which wait for this engine
            raise
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
                self._shares.take_back(number)  # it died while weights were installed
                self._ranks[number] = self._processes.engines[number]
            taken = self._shares.take(number, self._may_go_on)
            return [growing.unfinished(self._limit(growing)) for growing in taken]

    def _has_work(self, number: int) -> bool:
        if self._interrupts or number in self._shares.away:
            return False
        return self._shares.has_some(number) or self._shares.any_waits(self._may_go_on)

    def _add(self, number: int, made: Stretches) -> None:
        """Add to the sequences what an engine made of them."""
        finished: dict[GrowingBatch, list[Growing]] = {}
        with self._changed:
            for stretch in made:
                growing = self._shares.given(number, stretch.number)
                growing.add(stretch)
                if growing.batch.step is not None:
                    self.sampled += len(stretch.tokens)
                if not stretch.ended:
                    continue
                self._shares.release(number, stretch.number)
                if growing.is_whole(self._limit(growing), self._processes.eos):
                    growing.ended = True  # so says a checkpoint that is taken from here on
                    finished.setdefault(growing.batch, []).append(growing)
                else:
                    self._shares.wait([growing])
        for batch, some in finished.items():
            if batch.tell is not None:
                batch.tell([each.row for each in some], [each.tokens for each in some])
        with self._changed:
            for batch, some in finished.items():
                batch.left -= len(some)
                batch.ends += [time.perf_counter()] * len(some)
            self._changed.notify_all()

    def _lose(self, number: int) -> list[Growing]:
        """An engine died: others may go on at once with its sequences, which are returned."""
        with self._changed:
            lost = self._shares.take_back(number)
            for growing in lost:
                growing.deaths += 1
            self._shares.away.add(number)
            self._starting.add(number)
            return lost

    def _check_lost(self, lost: _Lost, deaths: int) -> None:
        """Raise DiedAgain if engines die of some sequences, wherever these go, or if every process
        in the place of an engine does."""
        guilty = [growing for growing in lost.sequences if growing.deaths >= MOST_DEATHS]
        if guilty or deaths == MOST_DEATHS:
            line = f"{lost.error}, and so did {MOST_DEATHS - 1} before it"
            given = f"they were given {named(guilty or lost.sequences)}"
            raise DiedAgain(f"{line}; {given}", lost.number) from lost.error

    def _replace(self, number: int) -> None:
        """Put another engine in the place of one that died. It takes part once it has weights."""
        with self._changed:
            if self._over:
                return
        with self._reviving:  # engines start one after the other
            fresh = self._processes.start_again(number)
        with self._syncing:  # so that no weights come while it is put in place
            alone = self._is_alone()
            has_weights = self._put(number, fresh, alone=alone)
        if alone and not has_weights:
            self._await_weights(number)

    def _is_alone(self) -> bool:
        """Whether no engine has weights: then nothing goes on before one does."""
        with self._changed:
            return len(self._shares.away) == len(self._ranks)

    def _put(self, number: int, fresh: Rank[EngineWorker], *, alone: bool) -> bool:
        """Put a fresh engine in its place; whether it has weights, or gets them with the next ones
        that all get."""
        absent = frozenset(self._starting - {number})
        has_weights = self._processes.put(number, fresh, alone=alone, absent=absent)
        with self._changed:
            self._ranks[number] = fresh
            self._starting.discard(number)
            if has_weights:  # and so have all others that are there
                self._shares.away &= self._starting
            self._changed.notify_all()
        return has_weights

    def _await_weights(self, number: int) -> None:
        """Wait for newer weights, which the trainers have made and are about to send, unless what
        they do before needs sequences that no engine has weights for."""
        limit = self._processes.deadlines.of_start
        with self._changed:
            came = self._changed.wait_for(
                lambda: self._over or number not in self._shares.away, limit
            )
        if not came:
            raise WorkerError(f"{self._ranks[number].name} died, and its weights are gone")

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
        return not self._shares.any_given() and not self._shares.any_waits(self._may_go_on)
