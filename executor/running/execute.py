"""A run from its start to its end: processes, the loop, checkpoints, and starting again after a
failure."""

import contextlib
import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from executor.fleet import pools
from executor.fleet.session import last_words, ray_session
from executor.fleet.worker import OutOfMemory, WorkerError, within
from executor.running.loop import Backend, Course, Progress, Silent, loop
from executor.running.rehearse import Rehearsal
from executor.running.run_directory import RunDirectory, check_free, lock, log, timeline_of
from executor.running.stops import Stops
from executor.running.supervise import FLOOR_SECONDS, Deadlines, one_line
from planner.predict.schedule import Task, check, tasks_of
from planner.spec.errors import UserError
from planner.spec.plan import Plan
from planner.spec.timeline import Span, Timeline

if TYPE_CHECKING:  # it loads torch, which a rehearsal does without
    from executor.running.checkpoint import Checkpoint, Saver


@dataclass(frozen=True, kw_only=True)
class Survival:
    """A checkpoint every `save_every` steps (0: never), of which the last `keep` stay; after a
    failure of processes the run starts again from the last one by itself, at most `max_restarts`
    times."""

    save_every: int = 10
    keep: int = 2
    max_restarts: int = 3


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
    survival: Survival = Survival(),
    track: Sequence[str] = (),
) -> Path:
    """Run `steps` steps (default: the workload's) of a plan and return the run directory
    `runs/name`.

    `track` names trackers beside TensorBoard (wandb, mlflow). With `rehearse` every GPU is a
    process that sleeps for `seconds(task)`. Without `address` Ray is started on this machine's
    loopback. A call that takes ten times its predicted seconds, and more than `deadline_floor`,
    counts as failed. Raises UserError, before anything is started where that can be known
    before."""
    check(plan)
    steps = steps or plan.workload.steps
    if seed is not None:
        plan = plan.changed(workload=plan.workload.changed(seed=seed))
    path, progress = check_free(runs, name), progress or Silent()
    deadlines = Deadlines(plan=plan, floor=deadline_floor, predicted=seconds)
    if not rehearse:
        _train(plan, path, steps, address, progress, deadlines, survival, track, None)
        return path
    assert seconds is not None, "a rehearsal needs durations"
    with contextlib.ExitStack() as stack:
        stack.enter_context(ray_session(cpus=pools.needed(plan), address=address))
        backend = _started(deadlines, path, lambda: Rehearsal(plan, seconds, deadlines))
        stack.callback(backend.close)
        _run(plan, steps, backend, RunDirectory(path, tensorboard=False), progress)
    return path


def resume(
    resumed: "Checkpoint",
    *,
    plan: Plan | None = None,
    steps: int | None = None,
    address: str | None = None,
    progress: Progress | None = None,
    deadline_floor: float = FLOOR_SECONDS,
    survival: Survival = Survival(),
    track: Sequence[str] = (),
) -> Path:
    """Go on with a run from one of its checkpoints, up to `steps` steps in all (default: the
    workload's), under its own plan or another one; later checkpoints and metrics of the run are
    dropped. A run that has ended is left as it is. Raises UserError."""
    plan, progress = plan or resumed.plan, progress or Silent()
    check(plan)
    resumed.check(plan)
    steps = steps or plan.workload.steps
    if (done := resumed.manifest.step) > steps:
        raise UserError(
            f"{resumed.directory}: {done} steps are done; choose --steps {done} or more"
        )
    if done == steps and not resumed.manifest.done and resumed.has_ended(plan):
        progress.on_note(f"all {steps} steps are done; --steps goes on for longer")
        return resumed.run
    os.close(lock(resumed.run))  # before anything is started
    deadlines = Deadlines(plan=plan, floor=deadline_floor)
    _train(plan, resumed.run, steps, address, progress, deadlines, survival, track, resumed)
    return resumed.run


def _train(
    plan: Plan,
    path: Path,
    steps: int,
    address: str | None,
    progress: Progress,
    deadlines: Deadlines,
    survival: Survival,
    track: Sequence[str],
    resumed: "Checkpoint | None",
) -> None:
    """Attempts to do all steps, each from the last checkpoint of the one before."""
    from executor.running import (  # torch, transformers: a rehearsal does without
        checkpoint,
        preflight,
        step,
        trackers,
    )

    trackers.check(track)
    prompts = preflight.check(plan, local=address is None)
    on_cores = pools.resource_of(plan) == "CPU"
    saver = checkpoint.Saver(path / "checkpoints", survival.keep) if survival.save_every else None
    with ray_session(cpus=pools.needed(plan) if on_cores else None, address=address):
        begun = resumed is not None
        for restarts in count():
            try:

                def make(at: Any = resumed) -> Any:
                    return step.Training(plan, prompts, deadlines=deadlines, resumed=at)

                with contextlib.closing(_started(deadlines, path, make)) as backend:
                    directory, begun = (
                        RunDirectory(path, tensorboard=True, track=track, again=begun),
                        True,
                    )
                    _run(
                        plan,
                        steps,
                        backend,
                        directory,
                        progress,
                        survival.save_every,
                        saver,
                        resumed,
                    )
                return
            except UserError as error:
                # What cannot start the first time will not the second time either.
                if (
                    saver is None
                    or restarts == survival.max_restarts
                    or not begun
                    or not _of_processes(error)
                ):
                    raise
                saver.wait()
                resumed = checkpoint.latest(path) or resumed
                where = f"step {resumed.manifest.step}" if resumed else "the beginning"
                progress.on_note(
                    f"{error}. Restart {restarts + 1} of {survival.max_restarts}, from {where}"
                )


def _of_processes(error: UserError) -> bool:
    """Whether fresh processes may help: one died, failed or hung, but not for want of memory."""
    return isinstance(error.__cause__, WorkerError) and not isinstance(error.__cause__, OutOfMemory)


def _started(deadlines: Deadlines, path: Path, make: Callable[[], Backend]) -> Backend:
    """A backend with its processes. If they fail, the run directory holds a log that tells why."""
    plan = deadlines.plan
    try:
        with one_line(
            plan, "the start", tuple(plan.pools), "start", f" ({deadlines.of_start:.3g} s allowed)"
        ):
            return make()
    except UserError as error:
        if isinstance(error.__cause__, WorkerError) and not path.exists():
            with contextlib.closing(RunDirectory(path, tensorboard=False)) as directory:
                directory.open(plan)
                _log_end(error)
        raise


def _log_end(error: BaseException) -> None:
    log.error("ended by %s: %s", type(error).__name__, error)
    if isinstance(error.__cause__, WorkerError):
        log.error("".join(traceback.format_exception(error.__cause__)))
        log.error("what processes wrote last:\n%s", last_words())


class _Recorded:
    """Progress that also writes the metrics of each step, with its speed."""

    def __init__(self, directory: RunDirectory, progress: Progress, past: Sequence[Span]) -> None:
        self._directory, self._progress = directory, progress
        self._ends = {span.step: span.end for span in past if span.call == "update_actor"}

    def on_start(self, task: Task) -> None:
        self._progress.on_start(task)

    def on_end(self, span: Span) -> None:
        if span.call == "update_actor":
            self._ends[span.step] = span.end
        self._progress.on_end(span)

    def on_step(self, metrics: dict[str, Any]) -> None:
        seconds = self._ends[metrics["step"]] - self._ends.pop(metrics["step"] - 1, 0.0)
        metrics = {**metrics, "seconds": seconds}
        if "tokens" in metrics:
            metrics["tokens_per_second"] = metrics["tokens"] / seconds
        log.info("step %d ended, %.3g s", metrics["step"], seconds)
        self._directory.write_metrics(metrics)
        self._progress.on_step(metrics)

    def on_note(self, text: str) -> None:
        log.info(text)
        self._progress.on_note(text)


def _run(
    plan: Plan,
    steps: int,
    backend: Backend,
    directory: RunDirectory,
    progress: Progress,
    save_every: int = 0,
    saver: "Saver | None" = None,
    resumed: "Checkpoint | None" = None,
) -> None:
    """The loop, checkpoints, and what outlives it; whatever way they end, the timeline holds what
    was done."""
    tasks, course, cut = tasks_of(plan, steps), Course(), 0
    past: Sequence[Span] = ()
    if resumed is not None:
        tasks, course.ended, cut = resumed.left(tasks)
        if resumed.is_of(plan):
            past = resumed.spans
    course.since = max((span.end for span in past), default=0.0)
    course.began -= course.since
    spans: dict[int, Span] = {}
    stops = Stops(tasks, save_every, passed=cut)
    recorded = _Recorded(directory, progress, past)
    timeline = lambda: timeline_of(plan, steps, [*past, *_ordered(spans)])  # noqa: E731
    with contextlib.ExitStack() as stack:
        try:
            _open(directory, plan, resumed)
            log.info("plan %s, %d steps, %d GPUs", plan.name, steps, pools.needed(plan))
            if saver is not None:
                stack.enter_context(stops.on_signals(recorded.on_note))
            while True:
                loop(tasks, backend, spans, recorded, course, until=stops)
                if (arrived := stops.arrive(course.newest)) is None or saver is None:
                    break
                saver.wait()
                if saver.error is not None:
                    progress.on_note(f"the checkpoint before could not be written ({saver.error})")
                _save(backend, saver, *arrived, tasks, timeline(), directory, plan)
                if stops.asked:
                    _end_asked(saver, recorded, directory.path, steps)
            limit, everywhere = backend.deadlines.of_start, tuple(plan.pools)
            line = one_line(
                plan, "export of the models", everywhere, "export", f" ({limit:.3g} s allowed)"
            )
            with line, within(limit):
                backend.export(directory.path / "checkpoints" / "final")
            if saver is not None:
                saver.wait()
            directory.write_timeline(timeline())
            log.info("done")
        except BaseException as error:
            _log_end(error)
            with contextlib.suppress(UserError):  # on a full disk, which the error is about
                directory.write_timeline(timeline())
            raise
        finally:
            directory.close()


def _end_asked(saver: "Saver", progress: Progress, path: Path, steps: int) -> NoReturn:
    saver.wait()
    if saver.error is not None:
        raise UserError(
            f"interrupted, and the last checkpoint could not be written ({saver.error}); see "
            f"{path}/log.txt"
        )
    progress.on_note(f"saved; go on with: plan execute --resume {path} --steps {steps}")
    raise KeyboardInterrupt


def _ordered(spans: dict[int, Span]) -> list[Span]:
    return [spans[index] for index in sorted(spans)]


def _open(directory: RunDirectory, plan: Plan, resumed: "Checkpoint | None") -> None:
    if resumed is None:
        directory.open(plan)
        return
    try:
        resumed.take_up(plan)
    except OSError as error:
        raise UserError(
            f"{directory.path}: cannot be changed ({error.strerror}); may you write there?"
        ) from None
    directory.open(plan, metrics=resumed.metrics, step=resumed.manifest.step)
    log.info("resumed from %s", resumed.directory)


def _save(
    backend: Backend,
    saver: "Saver",
    cut: int,
    step: int,
    tasks: Sequence[Task],
    timeline: Timeline,
    directory: RunDirectory,
    plan: Plan,
) -> None:
    from executor.running.checkpoint import in_flight

    limit = backend.deadlines.of_start
    with (
        one_line(plan, "a checkpoint", tuple(plan.pools), "save", f" ({limit:.3g} s allowed)"),
        within(limit),
    ):
        saver.save(
            backend.snapshot,
            step=step,
            done=in_flight(tasks, cut),
            plan=plan,
            timeline=timeline,
            metrics=directory.path / "metrics.jsonl",
        )
