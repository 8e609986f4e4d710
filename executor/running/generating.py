"""Responses of the engines to prompts, seen from the controller."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from executor.data.batch import Sequences, assign, collate
from executor.data.prompts import Prompts, PromptSource
from executor.fleet.asking import ask
from executor.fleet.worker import DiedAgain, Record
from executor.rollout.engine import EngineWorker
from executor.running.growing import GrowingBatch
from executor.running.processes import Processes
from executor.running.rewarding import Early
from executor.running.stream import RolloutStream
from planner.spec.data import Sampler
from planner.spec.engines import ENGINES
from planner.spec.errors import UserError
from planner.spec.plan import Plan

# Between log-probs of an engine and of training with the same weights, on average. Rounding to bf16
# made at most 0.05 on GPUs.
LARGEST_GAP = 0.5
Responses = tuple[Sequences, list[Record]]


class Generating:
    """Asks the engines of a run for responses to the prompts of its source, or the stream that they
    are at work on."""

    def __init__(
        self, processes: Processes, source: PromptSource, stream: RolloutStream | None = None
    ) -> None:
        self._processes, self._source, self._stream = processes, source, stream
        self._longest = processes.plan.workload.response.longest

    def responses(
        self,
        version: int,
        prompts: Prompts,
        sampler: Sampler,
        group: int,
        early: Early | None = None,
    ) -> Responses:
        """Responses to some prompts, by weights of a version; those that finish are scored
        `early`."""
        with _scored(early):
            if self._stream is None:
                sequences, records = self._generated(version, prompts, sampler, group, early)
            else:
                batch = self._stream.begin_first(prompts, sampler)
                sequences, records = self._of_stream(self._stream, prompts, batch)
            used = set(sequences.weights_versions[sequences.mask].tolist())
            assert used <= {version}, f"sampled with weights {used}, the plan says {version}"
            if early is not None:
                early.finish(sequences.responses())
        return sequences, records

    def streamed(
        self, step: int, prompts: Prompts, sampler: Sampler, early: Early | None = None
    ) -> Responses:
        """Responses to the prompts of a step, in a stream; those that finish are scored `early`."""
        assert self._stream is not None
        with _scored(early):
            tell = None if early is None else early.give
            batch = self._stream.begin(step, prompts, sampler, tell)
            sequences, records = self._of_stream(self._stream, prompts, batch)
            if early is not None:
                early.finish(sequences.responses())
        return sequences, records

    def _of_stream(self, stream: RolloutStream, prompts: Prompts, batch: GrowingBatch) -> Responses:
        stream.wait(batch)
        record = Record(start=batch.since, end=time.perf_counter(), ends=tuple(batch.ends))
        rows = np.arange(len(prompts.requests))
        return self._cut(collate(prompts.requests, [rows], [batch.generated()])), [record]

    def _generated(
        self, version: int, prompts: Prompts, sampler: Sampler, group: int, early: Early | None
    ) -> Responses:
        requests, engines = prompts.requests, self._processes.engines
        shares = assign(requests.lengths, len(engines), self._longest, group)
        orders = [
            engine.order(
                EngineWorker.generate,
                requests.take(rows),
                sampler,
                early.hand_over(rows) if early is not None else None,
            )
            for engine, rows in zip(engines, shares, strict=True)
        ]
        try:
            answers = ask(orders, revive=self._processes.revive)
        except DiedAgain as error:
            given = prompts.named(shares[error.number])
            raise DiedAgain(f"{error}; they were given {given}", error.number) from error
        return self._cut(collate(requests, shares, answers.results)), answers.records

    def _cut(self, sequences: Sequences) -> Sequences:
        """End responses behind their stop strings, where an engine has not done so."""
        stopped = self._source.stopped(sequences.responses())
        if stopped == [None] * len(stopped):
            return sequences
        pairs = zip(stopped, sequences.response_lengths.tolist(), strict=True)
        lengths = [whole if cut is None else cut for cut, whole in pairs]
        return replace(sequences, response_lengths=np.array(lengths, dtype=np.int32))

    def ended(self, prompts: Prompts, sequences: Sequences) -> NDArray[np.bool_]:
        """Whether a response ended by itself, `[B]`."""
        stopped = [cut is not None for cut in self._source.stopped(sequences.responses())]
        return prompts.requests.exact | sequences.ended(self._processes.eos) | stopped


@contextlib.contextmanager
def _scored(early: Early | None) -> Iterator[None]:
    """Look no longer for what finishes if generation fails."""
    try:
        yield
    except BaseException:
        if early is not None:
            early.stop()
        raise


def check_agreement(gap: float, plan: Plan) -> None:
    """Whether an engine computes what training computes, given the mean difference of their
    log-probs with the same weights. Raises UserError."""
    if gap > LARGEST_GAP:
        others = " or ".join(name for name in ENGINES if name != plan.rollout.engine)
        raise UserError(
            f"log-probs of the first batch differ by {gap:.2g} a token between the engine "
            f"({plan.rollout.engine}) and training: the engine does not compute this model right; "
            f"plan with engine {others}, or use another model"
        )
