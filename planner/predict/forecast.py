"""What the planner expects of a plan: its simulated timeline and its figures."""

from collections.abc import Callable, Sequence

import numpy as np

from planner.predict.cost import CostModel, Estimate
from planner.predict.cycle import cycles
from planner.predict.memory import plan_memory
from planner.predict.objective import Objective
from planner.predict.profile import Profile
from planner.predict.schedule import Task, steady_edges, tasks_of
from planner.predict.simulate import simulate
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
    estimates = durations(plan, profiles)

    def seconds(task: Task) -> float:
        drawn = estimates[task.call.name].seconds
        return float(drawn[task.step % len(drawn)])

    return seconds


def forecast(plan: Plan, steps: int, profiles: Sequence[Profile] = ()) -> Timeline:
    """The simulated timeline of `steps` steps. The warm-up is the filling of the pipeline and one
    step more."""
    estimates = durations(plan, profiles)
    tasks = tasks_of(plan, steps)
    spans = simulate(tasks, task_seconds(plan, profiles))
    detailed = tuple(_with_parts(span, estimates[span.call]) for span in spans)
    warmup = min(plan.staleness + 1, max(0, steps - 1))
    return Timeline(
        source="simulated",
        plan=plan.name,
        steps=steps,
        warmup=warmup,
        step_ends_with=plan.dataflow.ends_step.name,
        spans=detailed,
    )


def forecast_of(plan: Plan, measured: Timeline, profiles: Sequence[Profile] = ()) -> Timeline:
    """What was to be expected of a measured timeline: as many steps, of which the same ones
    count."""
    counted = {"warmup": measured.warmup, "drain": measured.drain}
    return forecast(plan, measured.steps, profiles).model_copy(update=counted)


def _with_parts(span: Span, estimate: Estimate) -> Span:
    parts = {name: float(s[span.step % len(s)]) for name, s in estimate.parts.items()}
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
    percentile. `bound` is one of what the proof's objective says.

    Evaluations and other monitors are left out of the step time."""
    estimates = durations(plan, profiles, model)
    names = plan.dataflow.steady.names
    drawn = np.stack(
        [np.broadcast_to(estimates[name].seconds, _scenarios(estimates)) for name in names]
    )
    edges = steady_edges(plan.dataflow, plan.program, plan.pools_of)
    periods = cycles(names, edges).periods(drawn)
    step, p95 = (float(Objective(name).of(periods)) for name in ("mean", "p95"))
    minimised = float(Objective(proof.objective if proof else "mean").of(periods))
    mean = dict(zip(names, drawn.mean(axis=1).tolist(), strict=True))
    calls = {call.name: call for call in plan.dataflow.calls}
    busy = {
        pool: sum(mean[n] for n in names if pool in plan.pools_of(calls[n])) / step
        for pool in plan.pools
    }
    by_source: dict[str, float] = {}
    for name in names:
        source = estimates[name].source
        by_source[source] = by_source.get(source, 0.0) + mean[name] / sum(mean.values())
    return Predicted(
        step_seconds=step,
        step_seconds_p95=p95,
        tokens_per_second=(float(model.tokens.mean()) if model else tokens_per_step(plan)) / step,
        lower_bound_seconds=bound,
        gap=max(0.0, minimised / bound - 1.0) if bound else 0.0,
        proof=proof or Proof(status="none", scenarios=drawn.shape[1]),
        memory_bytes={pool: memory.peak for pool, memory in plan_memory(plan).items()},
        call_seconds=mean,
        busy=busy,
        sources=by_source,
    )


def _scenarios(estimates: dict[str, Estimate]) -> tuple[int]:
    return (max(len(estimate.seconds) for estimate in estimates.values()),)


def tokens_per_step(plan: Plan) -> float:
    """Prompt and response tokens that one step trains on, as expected from the length
    distributions."""
    model = CostModel(plan.workload, plan.cluster)
    return float(model.tokens.mean())
