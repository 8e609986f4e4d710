"""What the planner expects of a plan: its simulated timeline and its figures."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from planner.predict.cost import SCENARIOS, CostModel, Estimate
from planner.predict.cycle import plan_cycles
from planner.predict.memory import plan_memory
from planner.predict.objective import Objective
from planner.predict.profile import Profile
from planner.predict.schedule import Task, tasks_of
from planner.predict.simulate import simulate, span_of
from planner.predict.streamed import stream_run
from planner.spec.plan import Plan, Predicted, Proof
from planner.spec.timeline import Span, Timeline


def durations(
    plan: Plan, profiles: Sequence[Profile] = (), model: CostModel | None = None
) -> dict[str, Estimate]:
    """The estimate of every call of a plan, seconds over the length scenarios [S]; from a `model`
    of its workload and cluster, if there is one."""
    model = model or CostModel(plan.workload, plan.cluster, profiles)
    return {call.name: model.call(call, plan) for call in plan.dataflow.calls}


def task_seconds(plan: Plan, profiles: Sequence[Profile] = ()) -> Callable[[Task], float]:
    """Seconds of a task: step t has the response lengths of scenario t (modulo their number)."""
    return _seconds_by_step(durations(plan, profiles))


def _seconds_by_step(estimates: Mapping[str, Estimate]) -> Callable[[Task], float]:
    def seconds(task: Task) -> float:
        drawn = estimates[task.call.name].seconds
        return float(drawn[task.step % len(drawn)])

    return seconds


def forecast(plan: Plan, steps: int, profiles: Sequence[Profile] = ()) -> Timeline:
    """The simulated timeline of `steps` steps, each with lengths of its own, unless there are very
    many: those that a run of synthetic prompts has at this step. The warm-up is the filling of the
    pipeline and one step more. What is left counts but for the steps in which the pipeline drains:
    nothing is generated beside them, so they are shorter."""
    model = CostModel(plan.workload, plan.cluster, profiles, scenarios=max(SCENARIOS, steps))
    estimates = durations(plan, model=model)
    tasks, parts = tasks_of(plan, steps), dict[int, tuple[float, ...]]()
    if plan.streams:
        run = stream_run(plan, model, tasks)
        ends, parts = run.ends.tolist(), run.stream.ended_parts()
        spans = tuple(span_of(task, float(run.starts[task.index]), ends) for task in tasks)
    else:
        spans = _spans(plan, tasks, model, estimates)
    detailed = tuple(_with_parts(span, estimates[span.call]) for span in spans)
    warmup = min(plan.staleness + 1, max(0, steps - 1))
    drain = min(plan.staleness, max(0, steps - warmup - 1))
    return Timeline(
        source="simulated",
        plan=plan.name,
        steps=steps,
        warmup=warmup,
        drain=drain,
        step_ends_with=plan.dataflow.ends_step.name,
        spans=detailed,
        ended_parts=parts,
    )


def _spans(
    plan: Plan, tasks: Sequence[Task], model: CostModel, estimates: Mapping[str, Estimate]
) -> tuple[Span, ...]:
    """Tasks of a plan with boundaries on a simulated clock."""
    scoring = [call.name for call in plan.dataflow.calls if call.scores and not call.roles]
    busy = dict.fromkeys(scoring, model.least_period)
    early = [call.name for call in plan.dataflow.calls if call.since_generation]
    return simulate(tasks, _seconds_by_step(estimates), busy, early)


def forecast_of(plan: Plan, measured: Timeline, profiles: Sequence[Profile] = ()) -> Timeline:
    """The forecast to compare a measured timeline with: as many steps, of which the same ones
    count."""
    counted = {"warmup": measured.warmup, "drain": measured.drain}
    return forecast(plan, measured.steps, profiles).changed(**counted)


def _with_parts(span: Span, estimate: Estimate) -> Span:
    parts = {name: float(s[span.step % len(s)]) for name, s in estimate.parts.items()}
    if estimate.is_mean:  # of several spans, none of which took just that long
        parts = dict.fromkeys(parts, span.seconds)
    return Span(
        call=span.call,
        role=span.role,
        pools=span.pools,
        step=span.step,
        issued=span.issued,
        ready=span.ready,
        start=span.start,
        end=span.end,
        weights_version=span.weights_version,
        parts=parts,
    )


def predict(
    plan: Plan,
    profiles: Sequence[Profile] = (),
    proof: Proof | None = None,
    bound: float = 0.0,
    model: CostModel | None = None,
) -> Predicted:
    """The figures of a plan: its exact period in each length scenario, their mean and 95th
    percentile; where generation streams, those of the steps of one simulation. `bound` is one of
    what the proof's objective says.

    Evaluations and other monitors are left out of the step time."""
    model = model or CostModel(plan.workload, plan.cluster, profiles)
    estimates = durations(plan, model=model)
    names = plan.dataflow.steady.names
    drawn = np.stack([estimates[name].seconds for name in names])
    periods = model.streamed(plan).steps if plan.streams else plan_cycles(plan).periods(drawn)
    least, named = model.least_period, proof.objective if proof else "mean"
    if plan.streams:
        least = 0.0  # which the simulation has seen to
    step, p95 = (float(Objective(name, least).of(periods)) for name in ("mean", "p95"))
    minimised = float(Objective(named, least).of(periods))
    call_seconds = dict(zip(names, drawn.mean(axis=1).tolist(), strict=True))
    return Predicted(
        step_seconds=step,
        step_seconds_p95=p95,
        tokens_per_second=float(model.tokens.mean()) / step,
        lower_bound_seconds=bound,
        gap=max(0.0, minimised / bound - 1.0) if bound else 0.0,
        proof=proof or Proof(status="none", scenarios=model.scenarios),
        memory_bytes={pool: memory.peak for pool, memory in plan_memory(plan).items()},
        call_seconds=call_seconds,
        busy=_busy(plan, call_seconds, step),
        sources=_sources(estimates, call_seconds),
    )


def _busy(plan: Plan, call_seconds: dict[str, float], step: float) -> dict[str, float]:
    """The share of a step in which each pool runs a call; one that streams runs several at once."""
    calls = {call.name: call for call in plan.dataflow.calls}
    found = {}
    for pool in plan.pools:
        used = sum(call_seconds[n] for n in call_seconds if pool in plan.pools_of(calls[n]))
        found[pool] = min(1.0, used / step) if plan.streams else used / step
    return found


def _sources(estimates: dict[str, Estimate], call_seconds: dict[str, float]) -> dict[str, float]:
    """The share of all calls' seconds that comes from each source."""
    found: dict[str, float] = {}
    for name, seconds in call_seconds.items():
        source = estimates[name].source
        found[source] = found.get(source, 0.0) + seconds / sum(call_seconds.values())
    return found
