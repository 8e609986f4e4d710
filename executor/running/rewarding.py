"""The rewards of a step: scored beside its generation where they have processes, the others when it
has ended."""

import contextlib
import contextvars
import threading
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from ray.exceptions import RayError

from executor.data.columns import value_at
from executor.data.prompts import Prompts, PromptSource
from executor.data.rating import Ratings, weighable
from executor.data.requests import Ints, Rows
from executor.data.reward_forms import Samples
from executor.fleet.asking import Rank
from executor.fleet.worker import Record
from executor.rollout.tray import HandOver, Tray, taken
from executor.running.judges import Judges
from executor.running.run_directory import log
from executor.running.scoring import ScoredBeside, judge
from planner.spec.workload import Workload

TRAY_SECONDS = 0.05  # between two looks at what has finished
Rated = dict[int, Ratings]  # `[B]`, by the number of the reward


class Rewarding:
    """The rewards of the host. `judges` has those of each, by its number among all rewards."""

    def __init__(
        self,
        workload: Workload,
        source: PromptSource,
        judges: dict[int, Judges],
        tray: Rank[Tray] | None,
    ) -> None:
        self.workload, self.source, self._judges, self._tray = workload, source, judges, tray

    def begin(self, prompts: Prompts) -> "Early | None":
        """Begin to score the sequences of a step as they finish; None if no reward does."""
        beside = self._scored_beside(len(prompts.texts))
        if not beside or self._tray is None:
            return None
        return Early(self, self._tray, prompts, beside)

    def _scored_beside(self, batch: int) -> dict[int, ScoredBeside]:
        beside = {at: each for at, each in self._judges.items() if each.reward.processes}
        return {at: ScoredBeside(judges, batch) for at, judges in beside.items()}

    def score(
        self, prompts: Prompts, responses: list[Ints], early: "Early | None" = None
    ) -> tuple[Rated, list[Record]]:
        """The scores of a batch by all rewards of the host, at the same time; `early` is what has
        been scored of it meanwhile. Raises UserError."""
        start, count = time.perf_counter(), len(responses)
        beside = early.beside if early is not None else self._scored_beside(count)
        whole = {at: judges for at, judges in self._judges.items() if at not in beside}
        rows = range(count if whole or early is None else 0)  # else all have been given
        samples = self.samples(prompts, [responses[row] for row in rows], rows)
        for scored in beside.values() if early is None else ():
            for row in rows:
                scored.give(row, samples.take([row]))
        found, records = Rated(), list[Record]()
        with ThreadPoolExecutor(max_workers=max(1, len(whole))) as threads:
            asked = {
                at: threads.submit(contextvars.copy_context().run, self._batch, judges, samples)
                for at, judges in whole.items()
            }
            for at, future in asked.items():
                found[at], busy = future.result()
                records += busy
        found |= {at: scored.scores() for at, scored in beside.items()}
        if beside:  # what they did before, generation had beside it
            records = [Record(start=start, end=time.perf_counter())]
        return found, records

    def _batch(self, judges: Judges, samples: Samples) -> tuple[Ratings, list[Record]]:
        """Scores of a whole batch. A function gets as many responses at once as a step has, for
        which its limit is meant."""
        scores, records, size = [], [], self.workload.generated
        for begin in range(0, len(samples), size):
            rows = range(begin, min(begin + size, len(samples)))
            found, busy = judge(judges, samples.take(rows))
            scores.append(found)
            records += busy
        return np.concatenate(scores), records

    def evaluated(self, rated: Rated) -> Ratings:
        """The scores of an evaluation: of the rewards of the host alone, as they are given but for
        bounds and weights."""
        rewards = self.workload.all_rewards
        parts = [
            np.float32(rewards[at].weight)
            * weighable(rewards[at].model_copy(update={"normalize": False}), scores)
            for at, scores in rated.items()
        ]
        return np.asarray(np.sum(parts, axis=0, dtype=np.float32))

    def by_name(self, rated: Rated) -> dict[str, Ratings]:
        """Scores by the names of the rewards, where there are several."""
        rewards = self.workload.rewards
        return {rewards[at].label: scores for at, scores in rated.items() if rewards}

    def samples(self, prompts: Prompts, responses: Sequence[Ints], rows: Sequence[int]) -> Samples:
        """Responses to the prompts of some rows, as rewards are told of them."""
        texts = self.source.decode(responses) if responses else []
        return samples(self.workload, prompts, texts, rows)


def samples(
    workload: Workload, prompts: Prompts, responses: list[str], rows: Sequence[int]
) -> Samples:
    """Responses to the prompts of some rows, as rewards are told of them."""
    columns = [prompts.columns[row] if prompts.columns else {} for row in rows]
    texts = [prompts.texts[row] for row in rows]
    return Samples(
        prompts=texts,
        asked=[_asked(workload, of, text) for of, text in zip(columns, texts, strict=True)],
        responses=responses,
        answers=[prompts.answers[row] for row in rows],
        columns=columns,
    )


def _asked(workload: Workload, columns: dict[str, Any], text: str) -> Any:
    """The prompt as the data have it."""
    data = workload.data
    there, asked = value_at(columns, data.prompt) if data is not None else (False, None)
    return asked if there else text


class Early:
    """Sequences of a step that are scored as they finish."""

    def __init__(
        self,
        rewarding: Rewarding,
        tray: Rank[Tray],
        prompts: Prompts,
        beside: dict[int, ScoredBeside],
    ) -> None:
        self.beside = beside
        self._rewarding, self._prompts, self._tray = rewarding, prompts, tray
        self._key = uuid.uuid4().hex
        self._given: dict[int, bytes] = {}  # the response of each row
        self._over = threading.Event()
        self._looking: threading.Thread | None = None

    def hand_over(self, rows: Rows) -> HandOver:
        """How an engine that generates these rows hands them over."""
        if self._looking is None:
            self._looking = threading.Thread(target=self._look, daemon=True)
            self._looking.start()
        return HandOver(tray=self._tray.handle, key=self._key, rows=rows)

    def _look(self) -> None:
        try:
            while not self._over.wait(TRAY_SECONDS):
                finished = taken(self._tray.handle, self._key)
                self.give([row for row, _ in finished], [each for _, each in finished])
        except RayError as error:  # then all that is left is scored at the end
            log.warning("sequences that finish are not scored any more until all have (%s)", error)

    def give(self, rows: list[int], responses: list[Ints]) -> None:
        """Score rows whose responses have finished."""
        self._give(rows, self._cut(responses))

    def _cut(self, responses: list[Ints]) -> list[Ints]:
        """Responses up to their stop strings, where an engine has not ended them there."""
        stopped = self._rewarding.source.stopped(responses)
        return [each[:cut] for each, cut in zip(responses, stopped, strict=True)]

    def _give(self, rows: list[int], responses: list[Ints]) -> None:
        if not rows:
            return
        samples = self._rewarding.samples(self._prompts, responses, rows)
        for place, (row, response) in enumerate(zip(rows, responses, strict=True)):
            self._given[row] = response.tobytes()
            for scored in self.beside.values():
                scored.give(row, samples.take([place]))

    def finish(self, responses: list[Ints]) -> None:
        """All have finished: score those that were not handed over, or were as something else,
        such as by an engine that died since."""
        self.stop()
        left = [row for row, each in enumerate(responses) if self._given.get(row) != each.tobytes()]
        self._give(left, [responses[row] for row in left])

    def stop(self) -> None:
        """Look no longer for what finishes, and leave nothing on the tray."""
        self._over.set()
        if self._looking is None:
            return
        self._looking.join()
        with contextlib.suppress(RayError):
            taken(self._tray.handle, self._key)
