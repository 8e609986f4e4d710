"""A plan run on a simulated clock. The only user of simpy."""

from collections.abc import Callable, Collection, Mapping, Sequence

import simpy

from planner.predict.schedule import Task
from planner.spec.timeline import Span


def simulate(
    tasks: Sequence[Task],
    seconds: Callable[[Task], float],
    busy: Mapping[str, float] | None = None,
    early: Collection[str] = (),
) -> tuple[Span, ...]:
    """Run tasks (from `schedule.unroll`) for the durations that `seconds` gives each; spans in
    order of issue.

    A task waits for its predecessors, takes its duration, and ends, which may start others. That a
    pool does one task at a time is among the predecessors. A task is one simpy event: a timeout,
    set when the last predecessor ends. Durations must be finite and not negative. A call that is
    `busy` for so many seconds a step, beside others, ends no sooner than that after its task
    before. What goes on before its call starts (`early`) takes its seconds from where generation of
    its step has ended."""
    env = simpy.Environment()
    starts, ends = [0.0] * len(tasks), [0.0] * len(tasks)
    missing = [len(task.after) for task in tasks]  # predecessors that have not ended
    followers: list[list[int]] = [[] for _ in tasks]
    for task in tasks:
        for before in task.after:
            followers[before].append(task.index)

    busy, free = busy or {}, dict[str, float]()  # when what is busy will have ended

    def start(index: int) -> None:
        task, starts[index] = tasks[index], env.now
        lasts = seconds(task)
        if task.call.name in early:
            lasts = max(0.0, _generated(task, tasks, ends) + lasts - env.now)
        if task.call.name in busy:
            name = task.call.name
            lasts = max(lasts, free.get(name, 0.0) + busy[name] - env.now)
            free[name] = env.now + lasts
        env.timeout(lasts).callbacks.append(lambda _: end(index))

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
    return tuple(span_of(task, starts[task.index], ends) for task in tasks)


def _generated(task: Task, tasks: Sequence[Task], ends: Sequence[float]) -> float:
    """When generation of a task's step, which it needs, has ended."""
    needed = [tasks[index] for index in task.after]
    return max(
        ends[before.index]
        for before in needed
        if before.call.kind == "generate" and before.step == task.step
    )


def span_of(task: Task, start: float, ends: Sequence[float]) -> Span:
    """The span of a task, by when each task ends."""
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
