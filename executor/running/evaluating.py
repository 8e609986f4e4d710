"""Evaluations: what the model makes of held-out prompts, seen from the controller. Their figures
are in `evaluation.py`."""

import numpy as np
from numpy.typing import NDArray

from executor.data.batch import Sequences
from executor.data.prompts import HeldOut, Prompts, PromptSource
from executor.fleet.worker import Record
from executor.running import evaluation
from executor.running.generating import Generating
from executor.running.rewarding import Rewarding
from executor.running.said import Listener, Scores, lines_of
from executor.running.step_data import Done


class Evaluating:
    """Evaluates weights on the held-out prompts of a source."""

    def __init__(
        self,
        source: PromptSource,
        generating: Generating,
        rewarding: Rewarding,
        listener: Listener,
    ) -> None:
        self._source, self._generating = source, generating
        self._rewarding, self._listener = rewarding, listener
        self._by_rewards = bool(rewarding.workload.host_rewards)

    def evaluate(self, step: int, version: int) -> tuple[dict[str, float], Done]:
        """The figures of each evaluation with the weights of a version, and what was done for
        them."""
        figures: dict[str, float] = {}
        records: list[Record] = []
        tokens = 0
        for held_out in self._source.evaluations():
            settings, prompts = held_out.settings, held_out.prompts
            sequences, of_engines = self._generating.responses(
                version, prompts, settings, settings.samples
            )
            responses = self._source.decode(sequences.responses())
            scores, of_judges = self._scores(prompts, sequences, responses)
            records += [*of_engines, *of_judges]
            figures |= evaluation.figures(settings, scores["score"], responses, self._by_rewards)
            if self._listener.listens:
                self._tell(step, held_out, sequences, responses, scores)
            tokens += int(sequences.response_lengths.sum())
        return figures, (records, tokens)

    def _scores(
        self, prompts: Prompts, sequences: Sequences, responses: list[str]
    ) -> tuple[dict[str, NDArray[np.float32]], list[Record]]:
        """The `score` of each response by the reward functions, and by each of them where there
        are several; without one, whether it equals the answer."""
        if not self._by_rewards:
            return {"score": evaluation.equal(responses, prompts.answers)}, []
        rated, records = self._rewarding.score(prompts, sequences.responses())
        scores = {"score": self._rewarding.evaluated(rated)}
        return scores | self._rewarding.by_name(rated), records

    def _tell(
        self,
        step: int,
        held_out: HeldOut,
        sequences: Sequences,
        responses: list[str],
        scores: Scores,
    ) -> None:
        """Tell the listener of all responses."""
        lines = lines_of(
            step=step,
            evaluation=held_out.settings.name,
            prompts=held_out.prompts,
            sequences=sequences,
            responses=responses,
            ended=self._generating.ended(held_out.prompts, sequences),
            scores=scores,
            rows=np.arange(len(responses)),
        )
        self._listener.add(lines)
