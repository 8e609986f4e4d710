"""A predicted timeline compared with a measured one: pure numbers, no drawing and no printing."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from planner.predict.cycle import plan_cycles
from planner.predict.schedule import tasks_of
from planner.predict.simulate import simulate
from planner.spec.errors import UserError
from planner.spec.plan import Plan
from planner.spec.timeline import Timeline, mean_call_seconds, step_seconds


@dataclass(frozen=True, kw_only=True)
class SecondsCompared:
    """Seconds of one call (mean over the steps that count) or of one step. `error` is predicted
    over measured, less 1."""

    name: str
    pools: tuple[str, ...] = ()
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        return _error(self.predicted, self.measured)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`steps` has a row per step that counts, from the end of one step to the next. The
    re-simulated step time is that of the same program with the measured durations; what the
    measured step takes beyond it is the controller's."""

    calls: tuple[SecondsCompared, ...]
    steps: tuple[SecondsCompared, ...]
    step: SecondsCompared
    resimulated_step_seconds: float
    predicted_busy: dict[str, float]
    measured_busy: dict[str, float]

    @property
    def controller_overhead(self) -> float:
        """Measured step time over the re-simulated one, less 1."""
        return _error(self.step.measured, self.resimulated_step_seconds)


def compare(plan: Plan, predicted: Timeline, measured: Timeline) -> Comparison:
    """Compare two timelines of one plan. Steps that the run did not finish do not count. Raises
    UserError."""
    measured = whole_steps(plan, measured)
    return Comparison(
        calls=_calls_compared(predicted, measured),
        steps=_steps_compared(predicted, measured),
        step=SecondsCompared(
            name="step", predicted=step_seconds(predicted), measured=step_seconds(measured)
        ),
        resimulated_step_seconds=step_seconds(resimulate(plan, measured)),
        predicted_busy=pool_busy(predicted),
        measured_busy=pool_busy(measured),
    )


def _calls_compared(predicted: Timeline, measured: Timeline) -> tuple[SecondsCompared, ...]:
    """The calls that both timelines have."""
    pools = {span.call: span.pools for span in predicted.spans}
    taken = mean_call_seconds(measured)
    rows = []
    for call, seconds in mean_call_seconds(predicted).items():
        if call in taken:
            row = SecondsCompared(
                name=call, pools=pools[call], predicted=seconds, measured=taken[call]
            )
            rows.append(row)
    return tuple(rows)


def _steps_compared(predicted: Timeline, measured: Timeline) -> tuple[SecondsCompared, ...]:
    """The steps that count and that both timelines have."""
    expected = steps_of(predicted)
    rows = []
    for step, seconds in steps_of(measured).items():
        if measured.counts(step) and step in expected:
            row = SecondsCompared(name=str(step), predicted=expected[step], measured=seconds)
            rows.append(row)
    return tuple(rows)


def resimulate(plan: Plan, measured: Timeline) -> Timeline:
    """The plan's program simulated with the measured durations, up to the steps that were begun
    ahead of the last whole one (what did not run takes no time): a run with a controller that costs
    nothing. Raises UserError as `whole_steps` does."""
    measured = whole_steps(plan, measured)
    seconds: dict[tuple[str, int], float] = defaultdict(float)  # of all chunks and attempts
    for span in measured.spans:
        seconds[span.call, span.step] += span.seconds
    spans = simulate(
        tasks_of(plan, measured.steps), lambda task: seconds[task.call.name, task.step]
    )
    return measured.changed(source="simulated", spans=spans)


def whole_steps(plan: Plan, timeline: Timeline) -> Timeline:
    """The leading steps of which every call was run, from the first one that is there (a run that
    was resumed under another plan begins with that). If a run ended early, the steps that it had
    begun ahead stay, as its `drain`. Raises UserError if no whole step follows the warm-up, or if
    the timeline is of another program."""
    _check_program(plan, timeline)
    ran = {(span.call, span.step) for span in timeline.spans}

    def whole(step: int) -> bool:
        return all((c.name, step) in ran for c in plan.dataflow.calls if c.runs_at(step))

    first = steps = min((span.step for span in timeline.spans), default=0)
    while steps < timeline.steps and whole(steps):
        steps += 1
    if steps <= timeline.warmup:
        raise UserError(
            f"the run finished {steps - first} steps, of which {timeline.warmup - first} are "
            "warm-up; there is nothing to compare, execute more steps"
        )
    last = min(steps, timeline.steps - timeline.drain)
    begun = min(steps + plan.staleness, timeline.steps)
    spans = tuple(span for span in timeline.spans if span.step < begun)
    return timeline.changed(steps=begun, drain=begun - last, spans=spans)


def _check_program(plan: Plan, timeline: Timeline) -> None:
    """Raise UserError unless the plan has the calls and pools of a timeline."""
    ran = {span.call for span in timeline.spans}
    used = {pool for span in timeline.spans for pool in span.pools}
    for what, there, known in (
        ("call", ran, plan.dataflow.names),
        ("pool", used, plan.pools),
    ):
        if unknown := there.difference(known):
            raise UserError(
                f"the timeline has a {what} {min(unknown)!r} that plan {plan.name!r} does not "
                "have; give the plan of that run"
            )


def steps_of(timeline: Timeline) -> dict[int, float]:
    """Seconds of each step, from the end of the step before (the run's start for step 0) to its
    own."""
    ends = sorted(timeline.ends.items())
    before = [0.0, *(end for _, end in ends)]
    return {step: end - start for (step, end), start in zip(ends, before, strict=False)}


def pool_busy(timeline: Timeline) -> dict[str, float]:
    """Share of a step in which each pool runs a call, from the steps that count."""
    steps = timeline.steps - timeline.warmup - timeline.drain
    none_counts = steps <= 0  # then all do
    seconds = {pool: 0.0 for span in timeline.spans for pool in span.pools}
    for span in timeline.spans:
        if none_counts or timeline.counts(span.step):
            for pool in span.pools:
                seconds[pool] += span.seconds
    length = step_seconds(timeline) * (max(1, timeline.steps) if none_counts else steps)
    return {pool: min(1.0, busy / length) if length else 0.0 for pool, busy in seconds.items()}


def occupancy(plan: Plan, busy: Mapping[str, float]) -> float:
    """Share of all GPU-seconds of the cluster, idle GPUs included, in which the GPU's pool runs a
    call."""
    used = sum(len(pool.gpus) * busy.get(name, 0.0) for name, pool in plan.pools.items())
    return used / len(plan.cluster.gpus)


def critical_seconds(plan: Plan, call_seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds per step of each call on the cycle that binds the plan's steady state at these
    durations, longest first; their sum is its period. A cycle over several steps counts each call
    by its share."""
    found = plan_cycles(plan)
    seconds = np.array([call_seconds.get(call, 0.0) for call in found.calls])
    critical = found.critical(seconds)
    total = sum(call_seconds.get(call, 0.0) for call in critical)
    share = float(found.periods(seconds)) / total if total else 0.0
    ordered = sorted(critical, key=lambda call: -call_seconds.get(call, 0.0))
    return {call: share * call_seconds.get(call, 0.0) for call in ordered}


def _error(value: float, reference: float) -> float:
    return value / reference - 1 if reference else 0.0
