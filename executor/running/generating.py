"""Responses of the engines to prompts, seen from the controller."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from executor.data.batch import Generated, Sequences, assign, collate
from executor.data.prompts import Prompts, PromptSource
from executor.fleet.asking import Answers, ask
from executor.fleet.worker import DiedAgain
from executor.rollout.engine import EngineWorker
from executor.running.processes import Processes
from executor.running.rewarding import Early
from planner.spec.data import Sampler
from planner.spec.engines import ENGINES
from planner.spec.errors import UserError
from planner.spec.plan import Plan

# Between log-probs of an engine and of training with the same weights, on average. Rounding to bf16
# made at most 0.05 on GPUs.
LARGEST_GAP = 0.5
Responses = tuple[Sequences, Answers[Generated]]


class Generating:
    """Asks the engines of a run for responses to the prompts of its source."""

    def __init__(self, processes: Processes, source: PromptSource) -> None:
        self._processes, self._source = processes, source
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
        try:
            sequences, answers = self._generated(version, prompts, sampler, group, early)
        except BaseException:
            if early is not None:
                early.stop()
            raise
        if early is not None:
            early.finish(sequences.responses())
        return sequences, answers

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
        sequences = collate(requests, shares, answers.results)
        used = set(sequences.weights_versions.tolist())
        assert used == {version}, f"sampled with weights {used}, the plan says {version}"
        return self._cut(sequences), answers

    def _cut(self, sequences: Sequences) -> Sequences:
        """End responses behind their stop strings, which engines do not look for."""
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
