"""Running a plan: the one loop, and what each call of a PPO step does."""

import contextlib
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, Protocol

from executor import pools
from executor.rehearse import Rehearsal
from executor.rundir import RunDirectory, check_free, log
from executor.session import ray_session
from executor.supervise import EARLY_CALLS, FLOOR_SECONDS, Deadlines, one_line
from executor.worker import Record, WorkerError, within
from planner.predict.schedule import Task, check, tasks_of
from planner.spec.errors import UserError
from planner.spec.plan import Plan
from planner.spec.timeline import Span


class Progress(Protocol):
    """Told about everything as it happens, on the thread of the loop; must return at once."""

    def on_start(self, task: Task) -> None: ...
    def on_end(self, span: Span) -> None: ...
    def on_step(self, metrics: dict[str, Any]) -> None: ...


class Silent:
    """Progress that nobody watches."""

    def on_start(self, task: Task) -> None: ...
    def on_end(self, span: Span) -> None: ...
    def on_step(self, metrics: dict[str, Any]) -> None: ...


class _Recorded:
    """Progress that also writes the metrics of each step, with its speed."""

    def __init__(self, directory: RunDirectory, progress: Progress) -> None:
        self._directory, self._progress = directory, progress
        self._ends: dict[int, float] = {-1: 0.0}  # of each step's update of the actor

    def on_start(self, task: Task) -> None:
        self._progress.on_start(task)

    def on_end(self, span: Span) -> None:
        if span.call == "update_actor":
            self._ends[span.step] = span.end
        self._progress.on_end(span)

    def on_step(self, metrics: dict[str, Any]) -> None:
        seconds = self._ends[metrics["step"]] - self._ends.pop(metrics["step"] - 1)
        metrics = {**metrics, "seconds": seconds}
        if "tokens" in metrics:
            metrics["tokens_per_second"] = metrics["tokens"] / seconds
        log.info("step %d ended, %.3g s", metrics["step"], seconds)
        self._directory.write_metrics(metrics)
        self._progress.on_step(metrics)


class Backend(Protocol):
    """What the loop drives: real processes (`Training`) or sleeping ones (`Rehearsal`)."""

    deadlines: Deadlines

    def run(self, task: Task) -> tuple[list[Record], int]:
        """Do a call and return its processes' records and its tokens. Runs in a thread of its own."""
        ...

    def end_step(self, step: int) -> dict[str, Any]:
        """Every call of a step has ended: its metrics."""
        ...

    def export(self, directory: Path) -> None:
        """All steps are done: write what is to outlive the run."""
        ...

    def close(self) -> None:
        """End all processes at once."""
        ...


def loop(tasks: Sequence[Task], backend: Backend, spans: dict[int, Span], progress: Progress) -> None:
    """Start each task as soon as all tasks in its `after` have ended, in order of issue; fill `spans` by index.

    Calls run in threads, for they wait for other processes. Raises UserError, with the task named, for a call that
    fails on its processes or passes its deadline, and what else a call raised."""
    graph = TopologicalSorter({task.index: task.after for task in tasks})
    graph.prepare()
    unfinished = Counter(task.step for task in tasks)
    next_step = 0
    issued: Counter[str] = Counter()
    running: dict[Future[tuple[list[Record], int]], Task] = {}
    threads = ThreadPoolExecutor(max_workers=64)
    began = time.perf_counter()
    try:
        while graph.is_active():
            for index in sorted(graph.get_ready()):
                task = tasks[index]
                early = issued[task.call.name] < EARLY_CALLS
                issued[task.call.name] += 1
                running[threads.submit(_call, backend, task, early)] = task
                progress.on_start(task)
            while next_step in unfinished and not unfinished[next_step]:
                progress.on_step(backend.end_step(next_step))
                next_step += 1
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                task = running.pop(future)
                records, tokens = future.result()
                spans[task.index] = _span(task, records, tokens, spans, began)
                graph.done(task.index)
                unfinished[task.step] -= 1
                progress.on_end(spans[task.index])
        while next_step in unfinished:
            progress.on_step(backend.end_step(next_step))
            next_step += 1
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def _call(backend: Backend, task: Task, early: bool) -> tuple[list[Record], int]:
    deadlines = backend.deadlines
    allowed, expected = deadlines.of_call(task, early), deadlines.expected(task)
    limit = f" ({allowed:.3g} s allowed, {'nothing' if expected is None else f'{expected:.2g} s'} predicted)"
    where = f"pool {', '.join(task.pools)}" if task.pools else "the host"
    what = f"{task.call.name} of step {task.step} on {where}"
    with one_line(deadlines.plan, what, task.pools, task.call.name, limit), within(allowed):
        return backend.run(task)


def _span(task: Task, records: Sequence[Record], tokens: int, spans: dict[int, Span], began: float) -> Span:
    """From the earliest process's start to the latest one's end; the parts are those of the process that had most."""
    start = min(record.start for record in records) - began
    end = max(record.end for record in records) - began
    parts = {name: max(record.parts.get(name, 0.0) for record in records) for name in ("wake", "transfer", "offload")}
    parts["compute"] = max(0.0, end - start - sum(parts.values()))
    return Span(
        call=task.call.name,
        role=task.call.roles[0] if task.call.roles else "host",
        pools=task.pools,
        step=task.step,
        chunk=task.chunk,
        attempt=task.attempt,
        issued=max((spans[index].end for index in task.waits), default=0.0),
        ready=max((spans[index].end for index in task.after), default=0.0),
        start=start,
        end=end,
        weights_version=task.weights_version,
        tokens=tokens,
        parts={name: seconds for name, seconds in parts.items() if seconds or name == "compute"},
    )


def execute(
    plan: Plan,
    *,
    name: str,
    runs: Path = Path("runs"),
    steps: int | None = None,
    rehearse: bool = False,
    seconds: Callable[[Task], float] | None = None,
    seed: int | None = None,
    address: str | None = None,
    progress: Progress | None = None,
    deadline_floor: float = FLOOR_SECONDS,
) -> Path:
    """Run `steps` steps (default: the workload's) of a plan and return the run directory `runs/name`.

    With `rehearse` every GPU is a process that sleeps for `seconds(task)`. Without `address` Ray is started on this
    machine's loopback. A call that takes ten times its predicted seconds, and more than `deadline_floor`, ends the run.
    Raises UserError, before anything is started where that can be known before."""
    check(plan)
    steps = steps or plan.workload.steps
    if seed is not None:
        plan = plan.model_copy(update={"workload": plan.workload.model_copy(update={"seed": seed})})
    path = check_free(runs, name)
    deadlines = Deadlines(plan=plan, floor=deadline_floor, predicted=seconds)
    with contextlib.ExitStack() as stack:
        backend: Backend
        if rehearse:
            assert seconds is not None, "a rehearsal needs durations"
            stack.enter_context(ray_session(cpus=pools.needed(plan), address=address))
            backend = _started(deadlines, path, lambda: Rehearsal(plan, seconds, deadlines))
        else:
            from executor import preflight, step  # torch and transformers, which a rehearsal does without

            prompts = preflight.check(plan, local=address is None)
            on_cores = pools.resource_of(plan) == "CPU"
            stack.enter_context(ray_session(cpus=pools.needed(plan) if on_cores else None, address=address))
            backend = _started(deadlines, path, lambda: step.Training(plan, prompts, deadlines=deadlines))
        stack.callback(backend.close)
        _run(plan, steps, backend, RunDirectory(path, tensorboard=not rehearse), progress or Silent())
    return path


def _started(deadlines: Deadlines, path: Path, make: Callable[[], Backend]) -> Backend:
    """A backend with its processes. If they fail, the run directory holds a log that tells why."""
    plan = deadlines.plan
    try:
        with one_line(plan, "the start", tuple(plan.pools), "start", f" ({deadlines.of_start:.3g} s allowed)"):
            return make()
    except UserError as error:
        if isinstance(error.__cause__, WorkerError):
            with contextlib.closing(RunDirectory(path, tensorboard=False)) as directory:
                directory.open(plan)
                _log_end(error)
        raise


def _log_end(error: BaseException) -> None:
    log.error("ended by %s: %s", type(error).__name__, error)
    if isinstance(error.__cause__, WorkerError):
        log.error("".join(traceback.format_exception(error.__cause__)))


def _run(plan: Plan, steps: int, backend: Backend, directory: RunDirectory, progress: Progress) -> None:
    """The loop and what outlives it; whatever way they end, the timeline holds what was done."""
    spans: dict[int, Span] = {}
    try:
        directory.open(plan)
        log.info("plan %s, %d steps, %d GPUs", plan.name, steps, pools.needed(plan))
        loop(tasks_of(plan, steps), backend, spans, _Recorded(directory, progress))
        limit, everywhere = backend.deadlines.of_start, tuple(plan.pools)
        with one_line(plan, "export of the models", everywhere, "export", f" ({limit:.3g} s allowed)"), within(limit):
            backend.export(directory.path / "checkpoints" / "final")
        log.info("done")
    except BaseException as error:
        _log_end(error)
        raise
    finally:
        directory.write_timeline(plan, steps, [spans[index] for index in sorted(spans)])
        directory.close()
