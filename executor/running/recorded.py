"""Progress that is written down: the metrics of each step, and what the model said."""

import math
import time
from collections.abc import Sequence
from typing import Any

from executor.running import first_batch
from executor.running.loop import Backend, Course, Progress
from executor.running.run_directory import RunDirectory, log
from planner.predict.schedule import Task
from planner.predict.waiting import WORKS, pool_shares
from planner.spec.plan import Plan
from planner.spec.timeline import Span


class Recorded:
    """Progress that also writes each step's metrics, with its speed, what was predicted of it, and
    how much pools worked in it and waited, and what the model said."""

    def __init__(
        self,
        plan: Plan,
        backend: Backend,
        course: Course,
        directory: RunDirectory,
        progress: Progress,
        past: Sequence[Span],
    ) -> None:
        self._plan, self._backend, self._course = plan, backend, course
        self._directory, self._progress = directory, progress
        self._ends_step = plan.dataflow.ends_step.name
        self._has_steps = bool(past)
        self._ends = {span.step: span.end for span in past if span.call == self._ends_step}
        self._spans = list(past)  # that may reach into a step whose metrics are not written
        self._begun: dict[tuple[str, int], Span] = {}  # calls that have not ended

    def on_start(self, task: Task) -> None:
        since = time.perf_counter() - self._course.began
        before = (span.end for span in self._spans if span.end <= since)
        self._begun[task.call.name, task.step] = Span(
            call=task.call.name,
            role=task.call.roles[0] if task.call.roles else "host",
            pools=task.pools,
            step=task.step,
            issued=since,
            ready=max(before, default=since),
            start=since,
            end=math.inf,
        )
        self._progress.on_start(task)

    def on_end(self, span: Span) -> None:
        self._begun.pop((span.call, span.step), None)
        self._spans.append(span)
        if span.call == self._ends_step:
            self._ends[span.step] = span.end
        self._directory.write_samples(self._backend.said())
        self._progress.on_end(span)

    def on_step(self, metrics: dict[str, Any]) -> None:
        step, began = metrics["step"], self._ends.pop(metrics["step"] - 1, 0.0)
        if step in self._ends:  # it may have ended under another plan, on another clock
            seconds = self._ends[step] - began
            metrics = {**metrics, "seconds": seconds}
            if "tokens" in metrics:
                metrics["tokens_per_second"] = metrics["tokens"] / seconds
            if self._plan.predicted is not None:
                metrics["predicted_seconds"] = self._plan.predicted.step_seconds
            metrics |= self._shares(began, self._ends[step])
            log.info("step %d ended, %.3g s", step, seconds)
        self._directory.write_metrics(metrics)
        self._progress.on_step(metrics)
        if not self._has_steps:
            for line in first_batch.warnings(metrics, self._plan.workload):
                self.on_note(line)
        self._has_steps = True

    def _shares(self, began: float, end: float) -> dict[str, float]:
        """The shares of a step in which each pool worked, did nothing, and for what."""
        spans, found = [*self._spans, *self._begun.values()], dict[str, float]()
        for pool, shares in pool_shares(self._plan, spans, began, end).items():
            found |= {f"busy/{pool}": shares[WORKS], f"idle/{pool}": 1.0 - shares[WORKS]}
            causes = {cause: share for cause, share in shares.items() if cause != WORKS}
            found |= {f"idle/{pool}/{cause}": share for cause, share in causes.items()}
        self._spans = [span for span in self._spans if span.end > end]
        return found

    def on_note(self, text: str) -> None:
        log.info(text)
        self._progress.on_note(text)

    def on_plan(self, plan: Plan) -> None:
        self._progress.on_plan(plan)
