"""A plan run on a simulated clock. The only user of simpy."""

from collections.abc import Callable, Generator, Sequence
from typing import Any

import simpy

from planner.predict.schedule import Task
from planner.spec.timeline import Span


def simulate(tasks: Sequence[Task], seconds: Callable[[Task], float]) -> tuple[Span, ...]:
    """Run tasks (from `schedule.unroll`) for the durations that `seconds` gives each; spans in order of issue.

    Each task is a process: it waits for its predecessors, holds its pools for its duration, and ends. Durations must
    be finite and not negative."""
    env = simpy.Environment()
    ended: list[simpy.Event] = []
    spans: list[Span] = []
    for task in tasks:
        done = env.process(_run(env, task, seconds(task), ended, spans))
        ended.append(done)
    env.run()
    order = {(task.call.name, task.step): task.index for task in tasks}
    return tuple(sorted(spans, key=lambda span: order[span.call, span.step]))


def _run(
    env: simpy.Environment, task: Task, seconds: float, ended: list[simpy.Event], spans: list[Span]
) -> Generator[simpy.Event, Any, None]:
    if task.waits:
        yield env.all_of([ended[index] for index in task.waits])
    issued = env.now
    if task.after:
        yield env.all_of([ended[index] for index in task.after])
    ready = env.now
    yield env.timeout(seconds)
    spans.append(
        Span(
            call=task.call.name,
            role=task.call.roles[0] if task.call.roles else "host",
            pools=task.pools,
            step=task.step,
            issued=issued,
            ready=ready,
            start=ready,
            end=env.now,
            weights_version=task.weights_version,
        )
    )
