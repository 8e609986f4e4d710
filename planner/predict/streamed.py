"""What a plan takes whose generation streams, by a simulation of some steps.

Batches that follow one another are in flight together, so there is one run over the length
scenarios, not one for each: step t has the lengths of scenario t (modulo their number). The first
steps are left out, in which engines fill, and of what follows each scenario counts as often.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from planner.predict.columns import Seconds
from planner.predict.costs.estimates import Estimate
from planner.predict.schedule import Task, unroll
from planner.predict.stream_run import StreamRun
from planner.spec.plan import Plan, Wait

if TYPE_CHECKING:  # a cost model has the streamed figures of a plan
    from planner.predict.cost import CostModel

FILLING, FILLING_PER_STALENESS = 8, 4  # steps until a stream is steady
COUNTED_STEPS = 32  # steps that count, or as many as there are scenarios


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """The estimate of `generate` from its start to its end over the scenarios [S], and the seconds
    of each step that counts [n]."""

    generate: Estimate
    steps: Seconds


def streamed(plan: Plan, model: "CostModel") -> Streamed:
    """Simulate a plan until it is steady; evaluations and other monitors are left out."""
    flow = plan.dataflow.steady
    program = [item for item in plan.program if isinstance(item, Wait) or item.call in flow.names]
    scenarios = model.scenarios
    first = FILLING + FILLING_PER_STALENESS * plan.staleness
    counted = max(COUNTED_STEPS // scenarios, 1) * scenarios
    tasks = unroll(flow, program, plan.pools_of, first + counted + plan.staleness + 1)
    run = stream_run(plan, model, tasks)
    step_ends = np.array([run.ends[t.index] for t in _of(tasks, plan.dataflow.ends_step.name)])
    steps = np.diff(step_ends[first - 1 : first + counted])
    took = np.zeros(scenarios)
    for task in _of(tasks, plan.dataflow.generates.name):
        if first <= task.step < first + counted:
            lasted = run.ends[task.index] - run.starts[task.index]
            took[task.step % scenarios] += lasted * scenarios / counted
    source = model.streams.source(plan.rollout, plan.device_of(plan.rollout.pools[0]))
    generate = Estimate(seconds=took, parts={"compute": took}, source=source, is_mean=True)
    return Streamed(generate=generate, steps=steps)


def stream_run(plan: Plan, model: "CostModel", tasks: Sequence[Task]) -> StreamRun:
    """Run tasks of a plan that streams."""
    calls = dict.fromkeys(task.call for task in tasks)
    beside = {call.name for call in calls if model.scores_beside(call)}
    alone = {
        call.name: (
            model.host(call.name) if call.name in beside else model.call(call, plan)
        ).seconds
        for call in calls
        if not call.streams
    }
    scoring = [call.name for call in calls if call.scores and not call.roles]

    def seconds(task: Task, generated: float) -> float:
        name, drawn = task.call.name, alone[task.call.name]
        scenario = task.step % len(drawn)
        if name not in beside:
            return float(drawn[scenario])
        after = model.scoring.after(np.full(model.scenarios, generated))
        return float(drawn[scenario] + after[scenario])

    return StreamRun(
        tasks=tasks,
        stream=model.stream_of(plan),
        seconds=seconds,
        busy=dict.fromkeys(scoring, model.least_period),
        overhead=plan.device_of(plan.rollout.pools[0]).overhead_seconds,
    )


def _of(tasks: Sequence[Task], call: str) -> list[Task]:
    return [task for task in tasks if task.call.name == call]
