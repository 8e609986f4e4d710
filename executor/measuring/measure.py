"""Running the plans of a group: a loop as of a real run, whose steps have the group's batches."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from executor.data.batch import Sequences
from executor.data.prompts import HeldOut, Prompts, PromptSource, Synthetic
from executor.data.requests import Ints
from executor.fleet import pools
from executor.fleet.asking import ask, to_each
from executor.fleet.worker import Worker, WorkerError
from executor.measuring.group import BatchSize, Group
from executor.measuring.samples import Sample, samples_of, summed_up
from executor.running import preflight
from executor.running.loop import Silent, loop
from executor.running.step import Training
from executor.running.step_data import Done
from executor.running.supervise import Deadlines
from planner.predict.measurement import Batched
from planner.predict.points import Point
from planner.predict.schedule import Task, tasks_of
from planner.spec.errors import UserError
from planner.spec.plan import Plan
from planner.spec.timeline import Span
from planner.spec.workload import Workload

Say = Callable[[str], None]


class SizedPrompts:
    """Random prompts, as many as the batch of each step has sequences. A batch has the same prompts
    and lengths whenever it comes, so that its repeats can be compared: those of step 0 of a run, or
    for a held-out batch those of step 1."""

    held_out = 0
    notes: list[str] = []

    def __init__(self, workload: Workload, batches: Sequence[BatchSize]) -> None:
        self._workload, self._batches = workload, batches

    def step(self, step: int) -> Prompts:
        batch = self._batches[step]
        # Not checked: a measured batch need be no multiple of the minibatch.
        sized = self._workload.model_copy(update={"batch": batch.sequences})
        prompts = Synthetic(sized).step(int(batch.held_out))
        lengths = np.rint(prompts.requests.max_tokens * batch.stretch)
        lengths = np.clip(lengths, 1, self._workload.response.longest).astype(np.int32)
        return replace(prompts, requests=replace(prompts.requests, max_tokens=lengths))

    def evaluations(self) -> list[HeldOut]:
        return []

    def decode(self, responses: Sequence[Ints]) -> list[str]:
        return Synthetic(self._workload).decode(responses)

    def stopped(self, responses: Sequence[Ints]) -> list[int | None]:
        return [None] * len(responses)

    def save_tokenizer(self, directory: Path) -> None:
        """Do nothing: random prompts have no tokenizer."""


class MeasuredTraining(Training):
    """Runs each step with its own batch, and keeps every step's sequences for their lengths and
    every call's peak of memory."""

    def __init__(
        self, plan: Plan, batches: Sequence[BatchSize], fleet: pools.Fleet, deadlines: Deadlines
    ) -> None:
        synthetic = plan.workload.data is None
        prompts: PromptSource = (
            SizedPrompts(plan.workload, batches)
            if synthetic
            else preflight.load_prompts(plan.workload)
        )
        super().__init__(plan, prompts, fleet, deadlines)
        self.batches = batches
        self.made: dict[int, Sequences] = {}
        self.memory: dict[int, dict[str, int]] = {}  # by task
        ask(to_each(self.processes.training, Worker.watch_memory))
        ask(to_each(self.processes.engines, Worker.watch_memory))

    def run(self, task: Task) -> Done:
        records, tokens = super().run(task)
        kinds = {kind for record in records for kind in record.memory}
        self.memory[task.index] = {
            kind: max(r.memory.get(kind, 0) for r in records) for kind in kinds
        }
        return records, tokens

    def micro_batch_tokens(self, task: Task, role: str) -> int:
        return self.batches[task.step].micro_batch_tokens or super().micro_batch_tokens(task, role)

    def end_step(self, number: int) -> dict[str, Any]:
        self.made[number] = self.steps[number].sequences
        return super().end_step(number)


class Telling(Silent):
    """Tells the seconds of every step's calls."""

    def __init__(self, batches: Sequence[BatchSize], say: Say) -> None:
        self._batches, self._say = batches, say
        self._seconds: dict[int, list[str]] = defaultdict(list)

    def on_end(self, span: Span) -> None:
        moved = sum(span.parts.get(part, 0.0) for part in ("wake", "offload"))
        moves = f" ({moved:.2f} moving)" if moved else ""
        self._seconds[span.step].append(f"{span.call} {span.end - span.ready:.2f}{moves}")

    def on_step(self, metrics: dict[str, Any]) -> None:
        step = metrics["step"]
        calls = ", ".join(self._seconds.pop(step))
        self._say(f"step {step + 1} of {len(self._batches)}, {self._batches[step].name}: {calls}")


def measure(group: Group, fleet: pools.Fleet, say: Say) -> tuple[list[Point], list[Point]]:
    """Run the plans of a group on disjoint GPUs at the same time, each by a loop of its own; the
    points, and those of held-out batches. Raises UserError."""
    try:
        return _measure(group, fleet, say)
    except WorkerError as error:
        raise UserError(f"{group.name}: {error}") from error


def _measure(group: Group, fleet: pools.Fleet, say: Say) -> tuple[list[Point], list[Point]]:
    batches = [batch for batch, _ in group.steps]
    longest = max(group.step_seconds, default=0.0)

    def backend_of(plan: Plan) -> MeasuredTraining:
        deadlines = Deadlines(plan=plan, predicted=lambda _: longest)
        return MeasuredTraining(plan, batches, fleet, deadlines)

    with ThreadPoolExecutor(max_workers=len(group.plans)) as threads:
        backends = list(threads.map(backend_of, group.plans))
        say("processes are ready")
        watchers = [Telling(batches, say), *(Silent() for _ in backends[1:])]
        ran = list(threads.map(_run, backends, watchers))
        list(threads.map(MeasuredTraining.close, backends))
    known: dict[Point, list[Sample]] = defaultdict(list)
    held_out: dict[Point, list[Sample]] = defaultdict(list)
    for backend, spans in zip(backends, ran, strict=True):
        for sample, batch in _counted(group, backend, spans):
            # A move takes as long with any batch, so a held-out batch tells of it too.
            unseen = batch.held_out and isinstance(sample.key, Batched)
            (held_out if unseen else known)[sample.key].append(sample)
    points = [summed_up(key, samples) for key, samples in known.items()]
    return points, [summed_up(key, samples) for key, samples in held_out.items()]


def _run(backend: MeasuredTraining, watcher: Silent) -> dict[int, Span]:
    """The spans of all steps, by task."""
    spans: dict[int, Span] = {}
    loop(tasks_of(backend.plan, len(backend.batches)), backend, spans, watcher)
    return spans


def _counted(
    group: Group, backend: MeasuredTraining, spans: dict[int, Span]
) -> Iterator[tuple[Sample, BatchSize]]:
    """The samples of the steps that count, each with its step's batch."""
    for task, span in spans.items():
        batch, counts = group.steps[span.step]
        if not counts:
            continue
        made, memory = backend.made[span.step], backend.memory[task]
        for sample in samples_of(backend.plan, span, batch, made, memory):
            yield sample, batch
