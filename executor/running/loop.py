"""The one loop over the tasks of a run. What each call does is in `step.py`, what lies around it in
`run.py`."""

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from executor.fleet.asking import within
from executor.fleet.signals import check_interrupted
from executor.fleet.worker import Record
from executor.running.supervise import EARLY_CALLS, Deadlines, one_line
from planner.predict.schedule import Task
from planner.spec.errors import UserError
from planner.spec.plan import Plan
from planner.spec.timeline import Span, ended_parts

if TYPE_CHECKING:  # it loads torch, which a rehearsal does without
    from executor.running.said import Said
    from executor.running.saving import Snapshot

LOOK_SECONDS = 1.0  # between two looks at how long calls take


class Progress(Protocol):
    """Told about everything as it happens, on the thread of the loop; must return at once."""

    def on_start(self, task: Task) -> None: ...
    def on_end(self, span: Span) -> None: ...
    def on_step(self, metrics: dict[str, Any]) -> None: ...
    def on_note(self, text: str) -> None: ...
    def on_plan(self, plan: Plan) -> None: ...


class Silent:
    """Progress that nobody watches."""

    def on_start(self, task: Task) -> None: ...
    def on_end(self, span: Span) -> None: ...
    def on_step(self, metrics: dict[str, Any]) -> None: ...
    def on_note(self, text: str) -> None: ...
    def on_plan(self, plan: Plan) -> None: ...


class Backend(Protocol):
    """What the loop drives: real processes (`Training`) or sleeping ones (`Rehearsal`)."""

    deadlines: Deadlines

    def run(self, task: Task) -> tuple[list[Record], int]:
        """Do a call and return its processes' records and its tokens. Runs in a thread of its
        own."""
        ...

    def evaluate_first(self) -> dict[str, float]:
        """Evaluate what the run begins with: the figures."""
        ...

    def end_step(self, step: int) -> dict[str, Any]:
        """Every call of a step has ended: its metrics."""
        ...

    def said(self) -> list["Said"]:
        """What the model has said since this was asked before."""
        ...

    def snapshot(self, directory: Path) -> "Snapshot":
        """Take the state for a checkpoint, between calls. Processes write their parts into
        `directory`."""
        ...

    def export(self, directory: Path) -> None:
        """All steps are done: write what is to outlive the run."""
        ...

    def close(self) -> None:
        """End all processes at once."""
        ...


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A task that was started, on the monotonic clock; `early` ones are the first of a call."""

    task: Task
    early: bool
    since: float = field(default_factory=time.monotonic)


@dataclass(kw_only=True)
class Course:
    """How far a run is. `began` is the zero of its spans on our clock, `since` when its processes
    were ready; `streaming` are the calls that stream and go on during a pause. `ended_parts` are
    those of a timeline."""

    ended: set[int] = field(default_factory=set)  # tasks
    newest: int = -1  # the latest task that was started
    next_step: int = 0  # the first one whose metrics are not written
    issued: Counter[str] = field(
        default_factory=Counter
    )  # how often each call was, since the processes started
    streaming: dict[Future[tuple[list[Record], int]], "Begun"] = field(default_factory=dict)
    ended_parts: dict[int, tuple[float, ...]] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)
    since: float = 0.0


def loop(
    tasks: Sequence[Task],
    backend: Backend,
    spans: dict[int, Span],
    progress: Progress,
    course: Course | None = None,
    until: Callable[[int], float] = lambda newest: math.inf,
) -> None:
    """Start each task as soon as all tasks in its `after` have ended, in order of issue, up to
    `until(newest)`; fill `spans` by index. Returns when nothing runs that could let more start;
    calls that stream may still run then, and are gone on with the next time.

    Calls run in threads, for they wait for other processes. Raises UserError, with the task named,
    for a call that fails on its processes or passes its deadline, and what else a call raised."""
    course = course or Course()
    graph = _graph(tasks, course)
    unfinished: Counter[int] = Counter()
    for task in tasks:
        unfinished[task.step] += task.index not in course.ended
    held: list[int] = []
    running = course.streaming
    begun_before = {begun.task.index for begun in running.values()}
    threads = ThreadPoolExecutor(max_workers=64)
    try:
        while True:
            check_interrupted()
            fresh = [index for index in graph.get_ready() if index not in begun_before]
            ready, limit = sorted([*held, *fresh]), until(course.newest)
            held = [index for index in ready if index >= limit]
            for task in [tasks[index] for index in ready if index < limit]:
                begun = Begun(task=task, early=course.issued[task.call.name] < EARLY_CALLS)
                running[threads.submit(_call, backend, begun)] = begun
                course.issued[task.call.name] += 1
                course.newest = max(course.newest, task.index)
                progress.on_start(task)
            while course.next_step in unfinished and not unfinished[course.next_step]:
                progress.on_step(backend.end_step(course.next_step))
                course.next_step += 1
            if not running or _only_streams(tasks, running.values(), course, limit):
                break
            done, _ = wait(running, timeout=LOOK_SECONDS, return_when=FIRST_COMPLETED)
            for begun in running.values():
                _check_answered(begun, backend.deadlines)
            for future in done:
                task = _end(running.pop(future).task, future, backend, spans, progress, course)
                graph.done(task.index)
                unfinished[task.step] -= 1
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def end_streams(
    backend: Backend,
    spans: dict[int, Span],
    progress: Progress,
    course: Course,
    steps: Collection[int],
) -> None:
    """End the calls of these steps that have gone on streaming while the loop paused, and are
    complete."""
    for future, begun in list(course.streaming.items()):
        if begun.task.step in steps:
            del course.streaming[future]
            _end(begun.task, future, backend, spans, progress, course)


def _end(
    task: Task,
    future: Future[tuple[list[Record], int]],
    backend: Backend,
    spans: dict[int, Span],
    progress: Progress,
    course: Course,
) -> Task:
    """Keep the span of a task, which has ended."""
    records, tokens = future.result()
    spans[task.index] = span = _span(task, records, tokens, spans, course)
    ends = [end - course.began for record in records for end in record.ends]
    if ends and task.call.streams:
        course.ended_parts[task.step] = ended_parts(ends)
    backend.deadlines.note(span)
    course.ended.add(task.index)
    progress.on_end(span)
    return task


def _only_streams(
    tasks: Sequence[Task], running: Collection[Begun], course: Course, limit: float
) -> bool:
    """Whether all has ended that may start before the limit, but for calls that stream."""
    if limit == math.inf or not all(begun.task.call.streams for begun in running):
        return False
    open_ones = {task.index for task in tasks if task.index < limit} - course.ended
    return open_ones <= {begun.task.index for begun in running}


def _graph(tasks: Sequence[Task], course: Course) -> TopologicalSorter[int]:
    left = [task for task in tasks if task.index not in course.ended]
    graph = TopologicalSorter(
        {task.index: [i for i in task.after if i not in course.ended] for task in left}
    )
    graph.prepare()
    return graph


def _check_answered(begun: Begun, deadlines: Deadlines) -> None:
    """Raise UserError for a call that is still there long after its deadline: it does not wait for
    processes, but for Ray itself, which is to take or to give data."""
    task, seconds = begun.task, time.monotonic() - begun.since
    if seconds > deadlines.of_silence(task, begun.early):
        raise UserError(
            f"{task.call.name} of step {task.step}: Ray itself has not answered for {seconds:.0f} "
            "s; look at whether its processes run (raylet, gcs_server) and whether the machine has "
            "memory left, and go on with --resume"
        ) from TimeoutError("Ray")


def _call(backend: Backend, begun: Begun) -> tuple[list[Record], int]:
    task, deadlines = begun.task, backend.deadlines
    allowed = deadlines.of_call(task, begun.early)
    limit = deadlines.why(task, allowed)
    where = f"pool {', '.join(task.pools)}" if task.pools else "the host"
    what = f"{task.call.name} of step {task.step} on {where}"
    with one_line(deadlines.plan, what, task.pools, task.call.name, limit), within(allowed):
        return backend.run(task)


def _span(
    task: Task, records: Sequence[Record], tokens: int, spans: dict[int, Span], course: Course
) -> Span:
    """The span of a task, from the earliest process's start to the latest one's end. Each part is
    that of the process that spent most time on it."""
    start = min(record.start for record in records) - course.began
    end = max(record.end for record in records) - course.began
    parts = {
        name: max(record.parts.get(name, 0.0) for record in records)
        for name in ("wake", "transfer", "offload")
    }
    parts["compute"] = max(0.0, end - start - sum(parts.values()))
    return Span(
        call=task.call.name,
        role=task.call.roles[0] if task.call.roles else "host",
        pools=task.pools,
        step=task.step,
        chunk=task.chunk,
        attempt=task.attempt,
        issued=max(
            (spans[index].end for index in task.waits if index in spans), default=course.since
        ),
        ready=max(
            (spans[index].end for index in task.after if index in spans), default=course.since
        ),
        start=start,
        end=end,
        weights_version=task.weights_version,
        tokens=tokens,
        parts={name: seconds for name, seconds in parts.items() if seconds or name == "compute"},
    )
