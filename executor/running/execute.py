"""The three ways to start a run: execute a plan, rehearse it, or resume a checkpoint; and starting
again after a failure."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from executor.fleet import pools
from executor.fleet.session import ray_session
from executor.fleet.worker import DiedAgain, OutOfMemory, WorkerError
from executor.running import hosts
from executor.running.loop import Backend, Progress, Silent
from executor.running.options import RunOptions
from executor.running.pilot import Pilot
from executor.running.rehearse import Rehearsal
from executor.running.run import Run, log_end
from executor.running.run_directory import RunDirectory, claimed, held
from executor.running.supervise import Deadlines, one_line
from planner.predict.schedule import Task, check
from planner.spec.errors import UserError
from planner.spec.plan import Plan

if TYPE_CHECKING:  # they load torch, which a rehearsal does without
    from executor.data.prompts import PromptSource
    from executor.running.checkpoint import Checkpoint
    from executor.running.saving import Saver

DEFAULT = RunOptions()


def execute(
    plan: Plan,
    *,
    name: str,
    runs: Path = Path("runs"),
    options: RunOptions = DEFAULT,
    progress: Progress | None = None,
    pilot: Pilot | None = None,
) -> Path:
    """Run a plan, or where a pilot decides so another one from some step on, and return the run
    directory `runs/name`. Raises UserError, before anything is started where that can be known
    before."""
    check(plan)
    with claimed(runs, name) as path:
        _train(plan, path, options, progress or Silent(), None, pilot)
    return path


def rehearse(
    plan: Plan,
    seconds: Callable[[Task], float],
    *,
    name: str,
    runs: Path = Path("runs"),
    options: RunOptions = DEFAULT,
    progress: Progress | None = None,
) -> Path:
    """Run a plan with a process instead of each GPU, which sleeps for `seconds(task)`; nothing is
    saved. Returns the run directory `runs/name`. Raises UserError as `execute` does."""
    check(plan)
    deadlines = Deadlines(plan=plan, floor=options.deadline_floor, predicted=seconds)
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(claimed(runs, name))
        stack.enter_context(ray_session(cpus=pools.needed(plan), address=options.address))
        backend = started(deadlines, path, lambda: Rehearsal(plan, seconds, deadlines))
        stack.callback(backend.close)
        steps = options.steps or plan.workload.steps
        directory = RunDirectory(path, tensorboard=False)
        Run(plan, steps, backend, directory, progress or Silent()).finish()
    return path


def resume(
    resumed: "Checkpoint",
    *,
    plan: Plan | None = None,
    options: RunOptions = DEFAULT,
    progress: Progress | None = None,
    pilot: Pilot | None = None,
) -> Path:
    """Go on with a run from one of its checkpoints, up to `options.steps` steps in all, under its
    own plan or another one, or where a pilot decides so several; later checkpoints and metrics of
    the run are dropped. A run that has ended is left as it is. Raises UserError."""
    plan, progress = plan or resumed.plan, progress or Silent()
    check(plan)
    resumed.check(plan)
    steps = options.steps or plan.workload.steps
    if (done := resumed.manifest.step) > steps:
        raise UserError(
            f"{resumed.directory}: {done} steps are done; choose --steps {done} or more"
        )
    if done == steps and not resumed.manifest.done and resumed.has_ended(plan):
        progress.on_note(f"all {steps} steps are done; --steps goes on for longer")
        return resumed.run
    with held(resumed.run):
        progress.on_note(f"going on from {resumed.directory}")
        _train(plan, resumed.run, options, progress, resumed, pilot)
    return resumed.run


def _train(
    plan: Plan,
    path: Path,
    options: RunOptions,
    progress: Progress,
    resumed: "Checkpoint | None",
    pilot: Pilot | None,
) -> None:
    """All steps, under one plan after the other if a pilot switches. Where a run does not come up
    under another plan, it goes back to the one before."""
    # They load torch and transformers: a rehearsal does without.
    from executor.running import checkpoint, prometheus, trackers

    trackers.check(options.track)
    prometheus.check(options.prometheus)
    options = replace(options, steps=options.steps or plan.workload.steps)
    with contextlib.ExitStack() as ray:  # which stays from plan to plan
        other = _under(plan, ray, path, options, progress, resumed, pilot)
        while pilot is not None and other is not None:
            resumed = checkpoint.latest(path)
            progress.on_plan(other)
            try:
                plan, other = other, _under(other, ray, path, options, progress, resumed, pilot)
            except UserError as error:
                latest = checkpoint.latest(path)
                if resumed is None or latest is None or latest.directory != resumed.directory:
                    raise
                pilot.went_back()
                progress.on_plan(plan)
                said = f"{error}. The run goes back to the plan before"
                other = _under(plan, ray, path, options, progress, resumed, pilot, said)


def _under(
    plan: Plan,
    ray: contextlib.ExitStack,
    path: Path,
    options: RunOptions,
    progress: Progress,
    resumed: "Checkpoint | None",
    pilot: Pilot | None,
    *said: str,
) -> Plan | None:
    """Attempts to do all steps under a plan, each from the last checkpoint of the one before, until
    they are done or a pilot wants the plan that is returned. `said` is told when it begins."""
    from executor.running import checkpoint, preflight

    saves = bool(options.save_every)
    prompts = preflight.check(plan, local=options.address is None, saves=saves)
    attempts = Attempts(plan, path, options, progress, prompts, pilot, said)
    cpus = pools.needed(plan)
    if pilot is not None:
        pilot.starting()
        cpus = len(plan.cluster.gpus)  # for other plans too
    on_cores = pools.resource_of(plan) == "CPU"
    ray.enter_context(ray_session(cpus=cpus if on_cores else None, address=options.address))
    if options.address is not None:
        hosts.check_each(plan, pools.memory_of_nodes(plan), saves)
    for restarts in count():
        try:
            return attempts.make(resumed)
        except UserError as error:
            if restarts == options.max_restarts or not attempts.may_help(error):
                raise
            resumed = checkpoint.latest(path) or resumed
            where = f"step {resumed.manifest.step}" if resumed else "the beginning"
            progress.on_note(
                f"{error}. Restart {restarts + 1} of {options.max_restarts}, from {where}"
            )
    raise AssertionError("the last attempt returns or raises")


class Attempts:
    """Attempts to run a plan, one after the other, with fresh processes each."""

    def __init__(
        self,
        plan: Plan,
        path: Path,
        options: RunOptions,
        progress: Progress,
        prompts: "PromptSource",
        pilot: Pilot | None,
        said: Sequence[str],
    ) -> None:
        from executor.running import first_batch

        self._plan, self._path, self._options = plan, path, options
        self._progress, self._prompts, self._pilot = progress, prompts, pilot
        self._saver = _saver(path / "checkpoints", options)
        self._deadlines = Deadlines(
            plan=plan, floor=options.deadline_floor, held_out=prompts.held_out
        )
        self._begun = False
        self._notes = [*said, *prompts.notes, *first_batch.beforehand(plan.workload)]  # said once

    def make(self, resumed: "Checkpoint | None") -> Plan | None:
        """Start processes, and do what is left behind a checkpoint, up to where the pilot wants
        another plan, which is returned. Raises UserError."""
        self._begun = self._begun or resumed is not None
        steps = self._options.steps or self._plan.workload.steps
        begin = functools.partial(self._training, resumed)
        with contextlib.closing(started(self._deadlines, self._path, begin)) as backend:
            self._begun = True
            notes, self._notes = self._notes, []
            return Run(
                self._plan,
                steps,
                backend,
                self._directory(),
                self._progress,
                saver=self._saver,
                resumed=resumed,
                notes=notes,
                pilot=self._pilot,
            ).finish()

    def _directory(self) -> RunDirectory:
        options = self._options
        return RunDirectory(
            self._path, tensorboard=True, track=options.track, prometheus=options.prometheus
        )

    def _training(self, resumed: "Checkpoint | None") -> Backend:
        from executor.running import step
        from executor.running.said import Listener

        options, refills = self._options, False
        if resumed is not None:
            steps = options.steps or self._plan.workload.steps
            refills = resumed.left(self._plan, steps).refills
        training = step.Training(
            self._plan,
            self._prompts,
            deadlines=self._deadlines,
            resumed=resumed,
            listener=Listener(every=options.samples_every, count=options.samples),
            refills=refills,
        )
        self._notes.append(training.processes.times.line())
        return training

    def may_help(self, error: UserError) -> bool:
        """Whether another attempt may end otherwise; what is being saved has been when this
        returns. What cannot start the first time will not the second time either."""
        if self._saver is None or not self._begun or not _of_processes(error):
            return False
        self._saver.wait()
        return True


def _saver(directory: Path, options: RunOptions) -> "Saver | None":
    """What saves checkpoints in a directory; None if the run has none."""
    from executor.running import saving

    if not options.save_every and not options.export_every:
        return None
    return saving.Saver(
        directory,
        every=options.save_every,
        keep=options.keep,
        export_every=options.export_every,
    )


def _of_processes(error: UserError) -> bool:
    """Whether fresh processes may help: one died, failed or hung. They do not help against want of
    memory, nor where fresh ones have died of the same."""
    cause = error.__cause__
    return isinstance(cause, WorkerError) and not isinstance(cause, OutOfMemory | DiedAgain)


def started(deadlines: Deadlines, path: Path, make: Callable[[], Backend]) -> Backend:
    """A backend with its processes. If they fail, the run directory `path` holds a log that tells
    why. Raises UserError."""
    plan = deadlines.plan
    limit = f" ({deadlines.of_start:.3g} s allowed)"
    try:
        with one_line(plan, "the start", tuple(plan.pools), "start", limit):
            return make()
    except UserError as error:
        if isinstance(error.__cause__, WorkerError) and not (path / "log.txt").exists():
            with contextlib.closing(RunDirectory(path, tensorboard=False)) as directory:
                directory.open(plan)
                log_end(error)
        raise
