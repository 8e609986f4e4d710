"""Spans of calls on pools, simulated or measured. Both have one type."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, NonNegativeInt, model_validator

from planner.spec.files import File
from planner.spec.limits import MOST_STEPS


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """One call of one step. Times are seconds from the run's start on the controller's clock;
    `ready` is when its last predecessor ended, `parts` are seconds of wake, transfer and compute
    within it."""

    call: str
    role: str
    pools: tuple[str, ...]
    step: NonNegativeInt
    chunk: int = 0
    attempt: int = 0
    issued: float
    ready: float
    start: float
    end: float
    weights_version: int | None = None
    tokens: int = 0
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What the autopilot of a run decided when so many steps were done, `seconds` after the run's
    start: whether it is to go on under another plan, and why. `saves` are the seconds that a step
    of that plan is surely shorter, `costs` those of a switch."""

    steps_done: NonNegativeInt
    seconds: float
    switches: bool
    why: str
    saves: float | None = None
    costs: float | None = None


ENDED_PARTS = 16  # of a batch that streams, whose ends a timeline has
STEP_ENDS_WITH = "update_actor"  # where a file does not say otherwise


class Timeline(File):
    """Spans in the order of their issue. A step ends when its call `step_ends_with` does. Two kinds
    of steps do not count in the step time: the first `warmup` steps, in which a pipeline fills, and
    the last `drain` steps. In a study those are the steps in which nothing more is generated; in a
    run there are none, because they would be few of many."""

    SCHEMA: ClassVar[str] = "splitplan/timeline/1"

    source: Literal["simulated", "measured"]
    plan: str
    steps: Annotated[int, Field(ge=0, le=MOST_STEPS)]
    warmup: NonNegativeInt
    drain: NonNegativeInt = 0
    step_ends_with: Annotated[str, Field(exclude_if=lambda call: call == STEP_ENDS_WITH)] = (
        STEP_ENDS_WITH
    )
    spans: tuple[Span, ...]
    # Of steps whose generation streams: when each of some equal parts of the batch had ended.
    ended_parts: Annotated[
        dict[NonNegativeInt, tuple[float, ...]], Field(exclude_if=lambda parts: not parts)
    ] = Field(default_factory=dict)
    # Of a run with an autopilot, under earlier plans too.
    decisions: Annotated[
        tuple[Decision, ...], Field(exclude_if=lambda decisions: not decisions)
    ] = ()

    @model_validator(mode="after")
    def _forward(self) -> Self:
        for number, span in enumerate(self.spans):
            if span.end < span.start:
                raise ValueError(
                    f"spans.{number}: {span.call} of step {span.step} ends before it starts"
                )
        return self

    def counts(self, step: int) -> bool:
        return self.warmup <= step < self.steps - self.drain

    @property
    def ends(self) -> dict[int, float]:
        """The end of each step, in seconds from the run's start."""
        return {span.step: span.end for span in self.spans if span.call == self.step_ends_with}

    @property
    def makespan(self) -> float:
        return max((span.end for span in self.spans), default=0.0)


def ended_parts(ends: Sequence[float]) -> tuple[float, ...]:
    """When each of some equal parts of a batch had ended, by the ends of its sequences."""
    shares = np.arange(1, ENDED_PARTS + 1) / ENDED_PARTS
    return tuple(np.quantile(ends, shares).tolist())


def step_seconds(timeline: Timeline) -> float:
    """Seconds of one step: (end of the last step that counts - end of the last warm-up step) /
    steps between. A step ends with the actor's update.

    The one definition, for predicted and for measured runs. With no step that counts it is the
    makespan by the number of steps."""
    ends = timeline.ends
    last, first = max(filter(timeline.counts, ends), default=-1), timeline.warmup - 1
    if first in ends and last > first:
        return (ends[last] - ends[first]) / (last - first)
    return timeline.makespan / max(1, len(ends))


def occupied_seconds(
    spans: Sequence[Span], begin: float = -math.inf, end: float = math.inf
) -> dict[str, float]:
    """Seconds within a window in which each pool of the spans runs a call or, where generation
    streams, several at once."""
    found = {pool: 0.0 for span in spans for pool in span.pools}
    until = dict.fromkeys(found, begin)
    for span in sorted(spans, key=lambda span: span.start):
        for pool in span.pools:
            last = min(span.end, end)
            found[pool] += max(0.0, last - max(span.start, until[pool]))
            until[pool] = max(until[pool], last)
    return found


def mean_call_seconds(timeline: Timeline) -> dict[str, float]:
    """Mean duration of each call in the steps that count (of those before too if there are
    none)."""
    found: dict[str, list[Span]] = {}
    for span in timeline.spans:
        if span.step < timeline.steps - timeline.drain:
            found.setdefault(span.call, []).append(span)
    counted = {
        call: [span for span in spans if timeline.counts(span.step)] or spans
        for call, spans in found.items()
    }
    return {
        call: float(np.mean([span.seconds for span in spans])) for call, spans in counted.items()
    }
