"""What the calls of a step have made so far, on the controller."""

from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from executor.data.batch import Sequences
from executor.data.prompts import Prompts
from executor.data.requests import Rows
from executor.fleet.worker import Record
from executor.running.rewarding import Early, Rated
from executor.training.trainer import COLUMNS

Done = tuple[list[Record], int]  # the records of a call's processes, and its tokens


@dataclass(kw_only=True)
class StepData:
    """What the calls of a step have made so far."""

    prompts: Prompts
    sequences: Sequences
    batch: ray.ObjectRef[Any]  # the sequences in Ray's object store
    early: Early | None = None  # what is scored beside generation
    rated: Rated = field(default_factory=dict)
    scores: NDArray[np.float32] | None = None  # [B], of all rewards together
    selected: Rows | None = None  # [B], of all that were generated
    sampled: int = 0  # tokens of all responses that were generated, whatever became of them
    columns: COLUMNS = field(default_factory=dict)  # [B, R] by the name of the datum
    metrics: dict[str, Any] = field(default_factory=dict)

    def take(self, rows: Rows) -> None:
        """Go on with these sequences alone."""
        assert self.scores is not None
        self.selected, self.prompts = rows, self.prompts.take(rows)
        self.sequences, self.scores = self.sequences.take(rows), self.scores[rows]
        self.rated = {number: scores[rows] for number, scores in self.rated.items()}
        self.batch = ray.put(self.sequences)

    def drop_unscored(self) -> None:
        """Sequences without a finite score become prompts with empty responses, from which nothing
        is learned."""
        assert self.scores is not None
        unscored = ~np.isfinite(self.scores)
        self.metrics["dropped"] = int(unscored.sum())
        if unscored.any():
            lengths = np.where(unscored, 0, self.sequences.response_lengths).astype(np.int32)
            self.sequences = replace(self.sequences, response_lengths=lengths)
            self.batch = ray.put(self.sequences)
            self.scores = np.where(unscored, np.float32(0), self.scores)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The data that a checkpoint keeps of it, without the metrics; prompts can be had again."""
        found = {f"sequences/{f.name}": getattr(self.sequences, f.name) for f in fields(Sequences)}
        found |= {f"columns/{name}": column for name, column in self.columns.items()}
        if self.sampled:
            found["sampled"] = np.array([self.sampled])
        for name in ("scores", "selected"):
            if (array := getattr(self, name)) is not None:
                found[name] = array
        found |= {f"rated/{number}": scores for number, scores in self.rated.items()}
        return found

    @classmethod
    def restored(
        cls, prompts: Prompts, arrays: dict[str, NDArray[Any]], metrics: dict[str, Any]
    ) -> "StepData":
        given = {f.name: arrays[f"sequences/{f.name}"] for f in fields(Sequences)}
        if (versions := given["weights_versions"]).ndim == 1:  # as checkpoints once had them
            given["weights_versions"] = np.repeat(versions[:, None], given["log_probs"].shape[1], 1)
        sequences = Sequences(**given)
        columns = {
            name.removeprefix("columns/"): x
            for name, x in arrays.items()
            if name.startswith("columns/")
        }
        selected = arrays.get("selected")
        rated = {
            int(name.removeprefix("rated/")): x
            for name, x in arrays.items()
            if name.startswith("rated/")
        }
        return cls(
            prompts=prompts if selected is None else prompts.take(selected),
            sequences=sequences,
            batch=ray.put(sequences),
            rated=rated,
            scores=arrays.get("scores"),
            selected=selected,
            sampled=int(arrays.get("sampled", np.zeros(1))[0]),
            columns=columns,
            metrics=metrics,
        )
