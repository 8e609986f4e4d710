"""What the model said, as lines for samples.jsonl: some sequences of a step, all of an
evaluation."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from executor.data.batch import Sequences
from executor.data.prompts import Prompts

Said = dict[str, Any]  # one line of it
Scores = Mapping[str, NDArray[np.float32]]  # [B], by the name of the reward


class Listener:
    """Collects what the model says: of every `every`-th step `count` sequences, spread evenly over
    the batch (0: none), and all responses of evaluations. Calls run in threads of their own; the
    loop takes what there is."""

    def __init__(self, *, every: int = 0, count: int = 0) -> None:
        self._every, self._count = every, count
        self._lines: SimpleQueue[Said] = SimpleQueue()

    def rows(self, step: int, batch: int) -> NDArray[np.int64]:
        """The sequences of a step to tell of."""
        if not self._every or step % self._every:
            return np.zeros(0, dtype=np.int64)
        count = min(self._count, batch)
        return np.arange(count) * batch // max(1, count)

    @property
    def listens(self) -> bool:
        return bool(self._every and self._count)

    def add(self, lines: Sequence[Said]) -> None:
        for line in lines:
            self._lines.put(line)

    def take(self) -> list[Said]:
        """What was said since the last time."""
        found = []
        while True:
            try:
                found.append(self._lines.get_nowait())
            except Empty:
                return found


def lines_of(
    *,
    step: int,
    evaluation: str | None,
    prompts: Prompts,
    sequences: Sequences,
    responses: Sequence[str],
    ended: NDArray[np.bool_],
    scores: Scores,
    rows: NDArray[np.int64],
) -> list[Said]:
    """A line for each of these rows; `responses` and `ended` are those of the rows alone. What
    got no score has `null` there."""
    found = []
    for number, row in enumerate(rows.tolist()):
        segments = sequences.segments(row)
        version = segments[0][0]
        found.append(
            {
                "step": step,
                "evaluation": evaluation,
                "row": row,
                "prompt": prompts.texts[row],
                "response": responses[number],
                "answer": prompts.answers[row],
                "scores": {name: _finite(of_all[row]) for name, of_all in scores.items()},
                "response_tokens": int(sequences.response_lengths[row]),
                "truncated": not bool(ended[number]),
                "weights_version": version,
                "staleness": None if evaluation else step - version,
                **({"segments": segments} if len(segments) > 1 else {}),
                "where": prompts.where[row] if prompts.where else None,
            }
        )
    return found


def _finite(score: np.float32) -> float | None:
    return float(score) if math.isfinite(score) else None


def text_of(lines: Sequence[Said]) -> str:
    """Lines as they are in the file. An answer that JSON has no form for, such as a date, is told
    as a text."""
    return "".join(json.dumps(_plain(line), default=str) + "\n" for line in lines)


def _plain(value: Any) -> Any:
    """The value without numbers that JSON does not know, and with texts for keys."""
    match value:
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {str(key): _plain(part) for key, part in value.items()}
        case list() | tuple():
            return [_plain(part) for part in value]
    return value


def kept(content: str, steps: int, trained: Collection[int], evaluated: Collection[int]) -> str:
    """The lines of a run that goes on after so many steps: those of these steps, and of later ones
    what is not done again, of `trained` on samples and of `evaluated` steps."""
    found = []
    for line in content.splitlines(keepends=True):
        try:
            said = json.loads(line)
            later = trained if said["evaluation"] is None else evaluated
            if said["step"] < steps or said["step"] in later:
                found.append(line)
        except (ValueError, RecursionError, KeyError, TypeError):  # of a run that was killed
            continue
    return "".join(found)
