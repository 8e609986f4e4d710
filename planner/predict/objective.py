"""What is minimised: one figure made of the step times in the length scenarios."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from planner.predict.columns import Seconds

ObjectiveName = Literal["mean", "p95", "cost"]


@dataclass(frozen=True)
class Objective:
    """The `mean` of the step times, their 95th percentile (`p95`), or the `cost` of a step. All
    GPUs of a cluster are paid for, idle ones too, so on one cluster the cost is the mean times a
    constant, and has the same best plan. `name` is one of `ObjectiveName`. No step takes less than
    `least` seconds, whatever the plan: what scores on the host has to keep up."""

    name: str = "mean"
    least: float = 0.0

    @property
    def linear(self) -> bool:
        """Whether the objective of a sum is the sum of the objectives. That holds for means, and
        allows to bound the summands one by one; it does not hold for percentiles."""
        return self.name != "p95"

    @property
    def of_parts(self) -> "Objective":
        """The objective for parts of a step, which may take less than a step does."""
        return Objective(self.name)

    def of(self, periods: Seconds) -> Seconds:
        """The objective in seconds [...] of step times [..., S] in S scenarios.

        >>> float(Objective("mean").of(np.array([1.0, 3.0])))
        2.0
        >>> float(Objective("mean", least=2.0).of(np.array([1.0, 3.0])))
        2.5
        """
        periods = np.maximum(periods, self.least)
        if self.linear:
            return np.asarray(periods.mean(axis=-1))
        return np.asarray(np.percentile(periods, 95, axis=-1))

    def of_bounds(self, bounds: Seconds) -> Seconds:
        """A bound [...] on the objective, from bounds [..., S + 1] on the step times in each
        scenario and, last, on the step time at the mean durations (see `with_mean`).

        A step time is a maximum of sums of durations, hence convex: at the mean durations it is at
        most the mean of the step times. So the last column bounds the mean too, and the larger of
        both bounds counts. It says nothing about a percentile."""
        bounds = np.maximum(bounds, self.least)
        if bounds.shape[-1] == 1:
            return np.asarray(bounds[..., 0])
        over_scenarios = self.of(bounds[..., :-1])
        return np.maximum(over_scenarios, bounds[..., -1]) if self.linear else over_scenarios


MEAN = Objective("mean")


def with_mean(seconds: Seconds) -> Seconds:
    """Seconds [..., S + 1]: those [..., S] in each scenario, and last their mean. A single scenario
    is its own mean, and gets no second column.

    >>> with_mean(np.array([1.0, 3.0])).tolist()
    [1.0, 3.0, 2.0]
    """
    if seconds.shape[-1] == 1:
        return seconds
    return np.concatenate([seconds, seconds.mean(axis=-1, keepdims=True)], axis=-1)
