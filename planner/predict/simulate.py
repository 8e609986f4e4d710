"""A plan run on a simulated clock. The only user of simpy."""

from collections.abc import Callable, Sequence

import simpy

from planner.predict.schedule import Task
from planner.spec.timeline import Span


def simulate(tasks: Sequence[Task], seconds: Callable[[Task], float]) -> tuple[Span, ...]:
    """Run tasks (from `schedule.unroll`) for the durations that `seconds` gives each; spans in
    order of issue.

    A task waits for its predecessors, takes its duration, and ends, which may start others. That a
    pool does one task at a time is among the predecessors. A task is one simpy event: a timeout,
    set when the last predecessor ends. Durations must be finite and not negative."""
    env = simpy.Environment()
    starts, ends = [0.0] * len(tasks), [0.0] * len(tasks)
    missing = [len(task.after) for task in tasks]  # predecessors that have not ended
    followers: list[list[int]] = [[] for _ in tasks]
    for task in tasks:
        for before in task.after:
            followers[before].append(task.index)

    def start(index: int) -> None:
        starts[index] = env.now
        env.timeout(seconds(tasks[index])).callbacks.append(lambda _: end(index))

    def end(ended: int) -> None:
        ends[ended] = env.now
        for index in followers[ended]:
            missing[index] -= 1
            if not missing[index]:
                start(index)

    for task in tasks:
        if not task.after:
            start(task.index)
    env.run()
    return tuple(_span(task, starts[task.index], ends) for task in tasks)


def _span(task: Task, start: float, ends: Sequence[float]) -> Span:
    return Span(
        call=task.call.name,
        role=task.call.roles[0] if task.call.roles else "host",
        pools=task.pools,
        step=task.step,
        issued=max((ends[index] for index in task.waits), default=0.0),
        ready=start,
        start=start,
        end=ends[task.index],
        weights_version=task.weights_version,
    )
