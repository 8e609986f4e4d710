"""One attempt at a run, once its processes have started: the loop, its checkpoints, the export of
the models, and what is written of them."""

import contextlib
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn

from executor.fleet import pools
from executor.fleet.asking import within
from executor.fleet.session import last_words
from executor.fleet.worker import Overdue, WorkerError
from executor.running.loop import Backend, Course, Progress, end_streams, loop
from executor.running.pilot import Pilot
from executor.running.recorded import Recorded
from executor.running.run_directory import RunDirectory, log, timeline_of
from executor.running.stops import Stops, in_flight
from executor.running.supervise import one_line
from planner.predict.schedule import tasks_of
from planner.spec.errors import UserError
from planner.spec.plan import Plan
from planner.spec.timeline import Decision, Span, Timeline

if TYPE_CHECKING:  # it loads torch, which a rehearsal does without
    from executor.running.checkpoint import Checkpoint
    from executor.running.saving import Saver, Snapshot


class Run:
    """The steps of a plan on a backend, from the beginning or from the checkpoint `resumed`.
    Without a saver there are no checkpoints. `notes` are said when it begins. A `pilot` may end it
    at a checkpoint, to go on under another plan."""

    def __init__(
        self,
        plan: Plan,
        steps: int,
        backend: Backend,
        directory: RunDirectory,
        progress: Progress,
        *,
        saver: "Saver | None" = None,
        resumed: "Checkpoint | None" = None,
        notes: Sequence[str] = (),
        pilot: Pilot | None = None,
    ) -> None:
        self._plan, self._steps, self._backend = plan, steps, backend
        self._directory, self._saver, self._resumed = directory, saver, resumed
        self._tasks, self._course, stop = tasks_of(plan, steps), Course(), 0
        self._past: Sequence[Span] = ()
        self._pilot, self._decisions = pilot, list[Decision]()
        self._notes = notes  # to say at the beginning
        self._differs = ""
        if resumed is not None:
            left = resumed.left(plan, steps)
            self._tasks, self._course.ended, stop = left.tasks, left.ended, left.stop
            self._differs = left.differs
            self._course.next_step = resumed.written
            self._decisions += resumed.timeline.decisions
            if resumed.is_of(plan):
                self._past = resumed.spans
                self._course.ended_parts |= resumed.timeline.ended_parts
            for span in resumed.spans:
                backend.deadlines.note(span)
        self._course.since = max((span.end for span in self._past), default=0.0)
        self._course.began -= self._course.since
        self._spans: dict[int, Span] = {}
        self._stops = Stops(self._tasks, saver.every if saver else (), passed=stop)
        self._recorded = Recorded(plan, backend, self._course, directory, progress, self._past)

    @property
    def timeline(self) -> Timeline:
        """What was done so far."""
        done = [self._spans[index] for index in sorted(self._spans)]
        course, spans = self._course, [*self._past, *done]
        return timeline_of(self._plan, self._steps, spans, self._decisions, course.ended_parts)

    def finish(self) -> Plan | None:
        """Do the steps that are left, save on the way, and export the models; or end at a
        checkpoint, and return the plan to go on under.

        However this ends, the timeline is written and the directory is closed. Raises UserError,
        and KeyboardInterrupt when the run was asked to stop."""
        try:
            self._open()
            log.info(
                "plan %s, %d steps, %d GPUs", self._plan.name, self._steps, pools.needed(self._plan)
            )
            with self._signals():
                self._evaluate_first()
                if (other := self._loop()) is not None:
                    self._directory.write_timeline(self.timeline)
                    log.info("ends here, to go on under another plan")
                    return other
                if self._saver is not None:
                    self._saver.wait()  # its copies go before those for the export come
                self._export()
                self._directory.write_timeline(self.timeline)
                self._check_last()
                log.info("done")
                return None
        except BaseException as error:
            log_end(error)
            with contextlib.suppress(UserError):  # on a full disk, which the error is about
                self._directory.write_timeline(self.timeline)
            self._finish_saving(error)
            raise
        finally:
            self._directory.close()

    def _open(self) -> None:
        self._open_directory()
        for line in self._notes:
            self._recorded.on_note(line)

    def _open_directory(self) -> None:
        if self._resumed is None:
            self._directory.open(self._plan)
            return
        changed = self._resumed.check(self._plan)
        try:
            self._resumed.take_up(self._plan)
        except OSError as error:
            raise UserError(
                f"{self._directory.path}: cannot be changed ({error.strerror}); check write "
                "permission"
            ) from None
        metrics, step = self._resumed.metrics, self._resumed.manifest.step
        samples = self._resumed.samples(again=bool(self._differs))
        self._directory.open(self._plan, metrics=metrics, samples=samples, step=step)
        log.info("resumed from %s", self._resumed.directory)
        for line in [*changed, self._differs]:
            if line:
                self._recorded.on_note(line)

    def _signals(self) -> contextlib.AbstractContextManager[None]:
        """A run that can be saved is saved before a signal ends it."""
        if self._saver is None:
            return contextlib.nullcontext()
        return self._stops.on_signals(self._recorded.on_note)

    def _evaluate_first(self) -> None:
        """Evaluate before the first step, if the workload wants it. The run's clock begins after
        it."""
        data = self._plan.workload.data
        if self._resumed is not None or data is None or not data.evaluate_first:
            return
        began, limit = time.perf_counter(), self._backend.deadlines.of_first_evaluation
        what, where = "the evaluation before the first step", self._plan.rollout.pools
        line = one_line(self._plan, what, where, "evaluate", f" ({limit:.3g} s allowed)")
        with line, within(limit):
            figures = self._backend.evaluate_first()
        for name, figure in figures.items():
            self._recorded.on_note(f"before the first step: {name.replace('_', ' ')} {figure:.3f}")
        self._course.began += time.perf_counter() - began

    def _loop(self) -> Plan | None:
        """All tasks, with a pause at each stop where a checkpoint is taken; up to the one where
        the pilot wants another plan, if it does."""
        if self._pilot is not None:
            self._pilot.ready()
        while True:
            loop(
                self._tasks,
                self._backend,
                self._spans,
                self._recorded,
                self._course,
                until=self._until,
            )
            arrived = self._stops.arrive(self._course.newest)
            if arrived is None or self._saver is None:
                return None
            self._save(self._saver, *arrived)
            if self._stops.asked:
                self._end(self._saver)
            if self._pilot is not None:
                if self._may_switch(self._saver):
                    return self._pilot.chosen()
                self._pilot.look(self.timeline, self._directory.path / "metrics.jsonl")

    def _until(self, newest: int) -> float:
        """The first task that must not start yet, where `newest` is the latest one that did."""
        if self._pilot is not None:
            done, seconds = self._course.next_step, time.perf_counter() - self._course.began
            if (decision := self._pilot.decided(done, seconds)) is not None:
                self._decisions.append(decision)
                self._recorded.on_note(decision.why)
                self._stops.switching = decision.switches
        return self._stops(newest)

    def _may_switch(self, saver: "Saver") -> bool:
        """Whether the run is to end here, and can go on from the checkpoint that was just taken."""
        if not self._stops.switching:
            return False
        self._stops.switching = False
        saver.wait()
        if saver.error:
            self._recorded.on_note(f"no switch: no checkpoint could be written ({saver.error})")
        return not saver.error and self._course.next_step < self._steps

    def _save(self, saver: "Saver", stop: int, step: int) -> None:
        saver.wait()
        if saver.error:
            self._recorded.on_note(f"the checkpoint before could not be written ({saver.error})")
        with self._as_one_line("a checkpoint", "save"):
            saver.save(
                self._backend.snapshot,
                step=step,
                done=in_flight(self._tasks, stop),
                plan=self._plan,
                timeline=self._timeline_of,
                metrics=self._directory.path / "metrics.jsonl",
            )

    def _timeline_of(self, taken: "Snapshot") -> Timeline:
        """What was done, with calls that streamed and have ended since the loop paused."""
        backend, course, steps = self._backend, self._course, taken.metrics
        end_streams(backend, self._spans, self._recorded, course, steps)
        return self.timeline

    def _finish_saving(self, error: BaseException) -> None:
        """Wait, after a failure, for the checkpoint that is being written: the processes that write
        it end with the run. Those that hang do not hold it up for long, and who interrupts a run
        does not wait."""
        if self._saver is not None and isinstance(error, Exception):
            deadlines = self._backend.deadlines
            hangs = isinstance(error.__cause__, Overdue | TimeoutError)
            self._saver.wait(deadlines.floor if hangs else deadlines.of_start)

    def _check_last(self) -> None:
        """All is done but the last checkpoint may be missing, for going on for longer."""
        if self._saver is not None and self._saver.error:
            path = self._directory.path
            raise UserError(
                f"all {self._steps} steps are done and the models are in {path}/checkpoints/final, "
                f"but the last checkpoint could not be written ({self._saver.error}); make room "
                f"before you go on with: plan execute --resume {path}"
            )

    def _end(self, saver: "Saver") -> NoReturn:
        """Stop, as somebody asked, when the last checkpoint is written."""
        saver.wait()
        path = self._directory.path
        if saver.error:
            raise UserError(
                f"interrupted, and the last checkpoint could not be written ({saver.error}); see "
                f"{path}/log.txt"
            )
        anew = "" if self._pilot is None else " --autopilot"
        raise KeyboardInterrupt(
            f"interrupted and saved; go on with: plan execute --resume {path} --steps {self._steps}"
            f"{anew}"
        )

    def _export(self) -> None:
        with self._as_one_line("export of the models", "export"):
            self._backend.export(self._directory.path / "checkpoints" / "final")

    @contextlib.contextmanager
    def _as_one_line(self, what: str, call: str) -> Iterator[None]:
        """Give all processes the time that a start may take; a failure becomes a UserError."""
        limit, everywhere = self._backend.deadlines.of_start, tuple(self._plan.pools)
        line = one_line(self._plan, what, everywhere, call, f" ({limit:.3g} s allowed)")
        with line, within(limit):
            yield


def log_end(error: BaseException) -> None:
    """Write into the run's log what ended it; if a process did, also what the processes said."""
    name = "an interrupt" if isinstance(error, KeyboardInterrupt) else type(error).__name__
    log.error("ended by %s", f"{name}: {error}" if str(error) else name)
    if isinstance(error.__cause__, WorkerError):
        log.error("".join(traceback.format_exception(error.__cause__)))
        log.error("what processes wrote last:\n%s", last_words())
