"""Steps of a real run, and what engines and trainers make of the same tokens."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from executor.fleet.pools import Fleet
from executor.running import preflight
from executor.running.loop import Silent, loop
from executor.running.step import Training
from planner.predict.schedule import tasks_of
from planner.spec.plan import Plan


class Recording(Training):
    """Keeps each step's differences between the log-probs of engines and of trainers, and its
    metrics."""

    def __init__(self, plan: Plan, fleet: Fleet | None = None) -> None:
        super().__init__(plan, preflight.check(plan, local=True), fleet)
        self.differences: list[NDArray[np.float32]] = []
        self.metrics: list[dict[str, Any]] = []

    def end_step(self, number: int) -> dict[str, Any]:
        step = self.steps[number]
        difference = step.columns["proximal_log_probs"] - step.sequences.log_probs
        self.differences.append(np.abs(difference[step.sequences.mask]))
        self.metrics.append(super().end_step(number))
        return self.metrics[-1]

    def take(self, steps: int) -> None:
        """Steps, and the end."""
        try:
            loop(tasks_of(self.plan, steps), self, {}, Silent())
        finally:
            self.close()
