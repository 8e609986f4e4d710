"""Measuring the calls of a workload on the machine that is there: steps of small plans, run by the
very processes and the very loop of a real run, and the median duration of each call. What is
measured is in `groups.py`."""

import contextlib
import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from executor.data.batch import Ints, Prompts, PromptSource, Sequences, Synthetic
from executor.fleet import pools
from executor.fleet.asking import ask, to_each
from executor.fleet.session import ray_session
from executor.fleet.worker import Worker, WorkerError
from executor.measuring import software
from executor.measuring.groups import BatchSize, Group, fitting, groups_here
from executor.running import preflight
from executor.running.loop import Silent, loop
from executor.running.processes import fleet_for
from executor.running.step import Done, Training
from executor.running.supervise import Deadlines
from planner.predict.likeness import MoveCall
from planner.predict.points import (
    Batched,
    HostPoint,
    MovePoint,
    Point,
    RolloutPoint,
    TrainerPoint,
    TransferPoint,
)
from planner.predict.profile import Profile
from planner.predict.schedule import Task, tasks_of
from planner.spec.cluster import Cluster
from planner.spec.errors import UserError
from planner.spec.plan import Plan
from planner.spec.timeline import Span
from planner.spec.workload import TRAINED, Shape, Workload

OPEN = 1.0  # the seconds of a point that has not been summed up
Say = Callable[[str], None]


def profile(
    workload: Workload,
    cluster: Cluster,
    out: Path,
    *,
    progress: Say,
    minutes: float | None = None,
    only: str = "",
    command: str = "",
) -> Profile:
    """Measure the workload's calls on one node of the cluster and write the profile to `out`, after
    each group of measurements. What is in `out` already is not measured again. With `minutes` the
    least valuable is left out, as far as it takes longer than that; with `only` all groups whose
    name does not contain it.

    Small pools are measured side by side, so calls share the host's memory and links as they do in
    a run. Raises UserError, before anything is started where that can be known before."""
    began = time.monotonic()
    if len(cluster.nodes) != 1:
        raise UserError(
            f"cluster {cluster.name!r} has {len(cluster.nodes)} nodes; measure on one node of each "
            "kind"
        )
    workload = _without_evaluation(workload)
    empty = _empty(workload, cluster, command)
    result = _resumed(out, empty)
    groups = groups_here(workload, cluster, only, progress)
    if not groups:
        raise UserError(
            f"workload {workload.name!r} fits no {len(cluster.gpus)} GPUs of {cluster.name} as one "
            "plan"
        )
    preflight.check(max(_plans(groups), key=pools.needed), local=True)
    missing = [group.only(batches) for group in groups if (batches := _missing(group, result))]
    _announce(missing, len(groups) - len(missing), minutes, progress)
    if not missing:
        return result
    if result is empty:
        result.write(out)  # now, rather than after the first group, if it cannot be written

    def say(text: str) -> None:
        progress(f"[{time.monotonic() - began:5.0f} s] {text}")

    on_cores = pools.resource_of(groups[0].plans[0]) == "CPU"
    failed: list[str] = []
    session = ray_session(cpus=cluster.nodes[0].gpus if on_cores else None, address=None)
    with session, contextlib.ExitStack() as fleets:
        fleet: pools.Fleet | None = None
        for number in range(len(missing)):
            left = np.inf if minutes is None else 60 * minutes - (time.monotonic() - began)
            group = fitting(missing[number:], left)[0]
            if group is None:
                say(f"no time is left for {missing[number].name}")
                continue
            say(f"{number + 1} of {len(missing)}: {group.name}, about {group.seconds:.0f} s")
            if fleet is None:
                fleet = fleets.enter_context(contextlib.closing(fleet_for(_plans(groups))))
            try:
                result = _with(result, group, *measure(group, fleet, say), empty.command)
            except UserError as error:  # other groups may do nevertheless, on new processes
                say(f"failed: {error}")
                failed.append(group.name)
                fleets.close()
                fleet = None
            result.write(out)
    say("done")
    if failed:
        raise UserError(
            f"{'; '.join(failed)} could not be measured, as said above; the rest is in {out}"
        )
    return result


def _plans(groups: Sequence[Group]) -> list[Plan]:
    return [plan for group in groups for plan in group.plans]


def _announce(missing: Sequence[Group], there: int, minutes: float | None, progress: Say) -> None:
    """What will be measured, how long that takes, and what is left out."""
    if there:
        progress(f"{_count(there)}: there already")
    if not missing:
        return
    chosen = fitting(missing, np.inf if minutes is None else 60 * minutes)
    kept = [group for group in chosen if group is not None]
    seconds = sum(group.seconds for group in kept)
    said = f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} s"
    progress(f"{_count(len(kept))}, about {said} with their start")
    for whole, part in zip(missing, chosen, strict=True):
        lost = [batch.name for batch in whole.batches if part is None or batch not in part.batches]
        if lost:
            progress(f"left out for lack of time: {whole.name}: {'; '.join(lost)}")


def _count(groups: int) -> str:
    return f"{groups} group{'s' * (groups != 1)} of measurements"


# --- the file ---


def _empty(workload: Workload, cluster: Cluster, command: str) -> Profile:
    """A profile without points, as this machine would make it."""
    # Without defaults, so that a key that comes later changes nothing.
    content = workload.model_dump_json(exclude={"name"}, exclude_defaults=True)
    digest = hashlib.sha256(content.encode()).hexdigest()
    return Profile(
        device=cluster.nodes[0].device,
        model=workload.actor.shape,
        versions=software.versions(),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        command=command or f"plan profile --cluster {cluster.name} (workload {workload.name})",
        workload=f"{workload.name} {digest[:12]}",
        points=(),
    )


def _resumed(out: Path, empty: Profile) -> Profile:
    """The profile that is there, if it is of the same workload, device and software. Raises
    UserError."""
    if not out.exists():
        return empty
    there = Profile.read(out)
    for what, old, new in (
        ("device", there.device, empty.device),
        ("workload", there.workload, empty.workload),
        ("software", there.versions, empty.versions),
    ):
        if old != new:
            raise UserError(
                f"{out}: was measured with another {what} ({old}, not {new}); name another file"
            )
    return there


def _missing(group: Group, there: Profile) -> list[BatchSize]:
    return [batch for batch in group.batches if group.label(batch) not in there.measured]


def _with(
    result: Profile, group: Group, points: Sequence[Point], held_out: Sequence[Point], command: str
) -> Profile:
    commands = dict.fromkeys([*result.command.splitlines(), command])
    return result.model_copy(
        update={
            "command": "\n".join(commands),
            "points": (*result.points, *points),
            "held_out": (*result.held_out, *held_out),
            "measured": result.measured + tuple(group.label(batch) for batch in group.batches),
        }
    )


def _without_evaluation(workload: Workload) -> Workload:
    if workload.data is None:
        return workload
    return workload.model_copy(
        update={"data": workload.data.model_copy(update={"evaluate_every": 0})}
    )


# --- running them ---


class Sized:
    """Random prompts, of each step's own batch. A batch has the same prompts and lengths whenever
    it comes, so that its repeats can be compared; those of step 0 of a run, or for a held-out batch
    those of step 1."""

    def __init__(self, workload: Workload, batches: Sequence[BatchSize]) -> None:
        self._workload, self._batches = workload, batches

    def step(self, step: int) -> Prompts:
        batch = self._batches[step]
        sized = self._workload.model_copy(update={"batch": batch.sequences})
        prompts = Synthetic(sized).step(int(batch.held_out))
        lengths = np.rint(prompts.requests.max_tokens * batch.stretch)
        lengths = np.clip(lengths, 1, self._workload.response.longest).astype(np.int32)
        return replace(prompts, requests=replace(prompts.requests, max_tokens=lengths))

    def evaluation(self) -> Prompts:
        raise AssertionError("nothing is evaluated in a measurement")

    def decode(self, responses: Sequence[Ints]) -> list[str]:
        return Synthetic(self._workload).decode(responses)

    def save_tokenizer(self, directory: Path) -> None:
        """There is none."""


class MeasuredTraining(Training):
    """Runs each step with its own batch, and keeps every step's sequences for their lengths and
    every call's peak of memory."""

    def __init__(
        self, plan: Plan, batches: Sequence[BatchSize], fleet: pools.Fleet, deadlines: Deadlines
    ) -> None:
        synthetic = plan.workload.data is None
        prompts: PromptSource = (
            Sized(plan.workload, batches) if synthetic else preflight.load_prompts(plan.workload)
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
    steps = group.steps
    batches = [batch for batch, _ in steps]
    longest = max(group.step_seconds, default=0.0)

    def deadlines(plan: Plan) -> Deadlines:
        return Deadlines(plan=plan, predicted=lambda _: longest)

    def backend_of(plan: Plan) -> MeasuredTraining:
        return MeasuredTraining(plan, batches, fleet, deadlines(plan))

    with ThreadPoolExecutor(max_workers=len(group.plans)) as threads:
        backends = list(threads.map(backend_of, group.plans))
        say("processes are ready")
        watchers = [Telling(batches, say), *(Silent() for _ in backends[1:])]
        ran = list(threads.map(_run, backends, watchers))
        list(threads.map(MeasuredTraining.close, backends))
    found: dict[bool, dict[Point, list[Sample]]] = {
        True: defaultdict(list),
        False: defaultdict(list),
    }
    for backend, spans in zip(backends, ran, strict=True):
        for index, span in spans.items():
            batch, counts = steps[span.step]
            for sample in _samples(backend, index, span) if counts else ():
                depends_on_batch = isinstance(sample.key, Batched)
                found[batch.held_out and depends_on_batch][sample.key].append(sample)
    points = [summed_up(key, samples) for key, samples in found[False].items()]
    return points, [summed_up(key, samples) for key, samples in found[True].items()]


def _run(backend: MeasuredTraining, watcher: Silent) -> dict[int, Span]:
    spans: dict[int, Span] = {}
    loop(tasks_of(backend.plan, len(backend.batches)), backend, spans, watcher)
    return spans


# --- points ---


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What one call adds to the point `key` (whose tokens, seconds and bytes are left open)."""

    key: Point
    seconds: float
    tokens: dict[str, Any]
    memory: dict[str, int]


def _samples(backend: MeasuredTraining, index: int, span: Span) -> Iterator[Sample]:
    """The call itself, and its moves between host and GPU.

    Seconds run from when the call could start, not from when its processes did: the way through the
    controller is part of what a call costs."""
    plan, batch = backend.plan, backend.batches[span.step]
    key, tokens = _key(plan, span, backend.made[span.step], batch)
    moves: tuple[MoveCall, ...] = ("wake", "offload")
    moved = {call: span.parts.get(call, 0.0) for call in moves}
    seconds = span.end - span.ready - sum(moved.values())
    yield Sample(key=key, seconds=seconds, tokens=tokens, memory=backend.memory[index])
    for call, taken in moved.items():
        move = _move(call, plan, span, key.model) if taken > 0 else None
        if move is not None:
            yield Sample(key=move, seconds=taken, tokens={}, memory={})


def _key(plan: Plan, span: Span, made: Sequences, batch: BatchSize) -> tuple[Point, dict[str, Any]]:
    """The point that a span belongs to, and the tokens that the span had. Its seconds are left
    open."""
    workload, call = plan.workload, plan.dataflow[span.call]
    sequences, tokens = len(made.lengths), _tokens(made)
    if call.kind == "host":
        host = HostPoint(call="host", role=span.call, sequences=sequences, seconds=OPEN)
        return host, tokens
    shape, rollout = workload.model_of(span.role).shape, plan.rollout
    model = None if shape == workload.actor.shape else shape
    if call.kind == "generate":
        generated = RolloutPoint(
            call="generate",
            role=span.role,
            gpus=plan.gpus_of(span.pools),
            tensor_parallel=rollout.tensor_parallel,
            engines=rollout.replicas,
            concurrency=rollout.concurrency,
            sequences=sequences,
            model=model,
            seconds=OPEN,
        )
        return generated, tokens
    layout = plan.trainers[call.roles[0]]
    if call.kind == "transfer":
        shared = rollout.pools == layout.pools
        moved = TransferPoint(
            call="transfer",
            role=span.role,
            gpus=layout.gpus,
            shard=layout.shard,
            tensor_parallel=rollout.tensor_parallel,
            engines=rollout.replicas,
            shared=shared,
            partly=not shared and layout.pools[0] in rollout.pools,
            model=model,
            seconds=OPEN,
        )
        return moved, {}
    train = call.kind == "train"
    trained = TrainerPoint(
        call="train" if train else "infer",
        role=span.role,
        gpus=layout.gpus,
        shard=layout.shard,
        micro_batch_tokens=batch.micro_batch_tokens or layout.micro_batch_tokens,
        recompute=train and layout.recompute,
        sequences=sequences,
        minibatch=workload.minibatch if train else None,
        epochs=workload.ppo.epochs if train else 1,
        model=model,
        seconds=OPEN,
    )
    return trained, tokens


def _tokens(made: Sequences) -> dict[str, Any]:
    """Totals over a step's sequences, and each response where they differ."""
    responses = made.response_lengths
    tokens: dict[str, Any] = {
        "prompt_tokens": int(made.prompt_lengths.sum()),
        "response_tokens": int(responses.sum()),
    }
    if len(set(responses.tolist())) > 1 and responses.min() > 0:
        tokens["response_lengths"] = tuple(responses.tolist())
    return tokens


def _move(call: MoveCall, plan: Plan, span: Span, model: Shape | None) -> MovePoint | None:
    """What a call moves, as far as it is all of one role's: an update's memory, with its optimizer,
    a forward pass's of a role that does not train, an engine's."""
    caller, role = plan.dataflow[span.call], span.role
    if caller.kind == "generate":
        size = plan.rollout.tensor_parallel
        return MovePoint(
            call=call, role="rollout", gpus=size, tensor_parallel=size, model=model, seconds=OPEN
        )
    if caller.kind == "train" or (caller.kind == "infer" and role not in TRAINED):
        layout = plan.trainers[role]
        return MovePoint(
            call=call,
            role=role,
            gpus=layout.gpus,
            shard=layout.shard,
            offload=layout.offload,
            model=model,
            seconds=OPEN,
        )
    return None


def summed_up(key: Point, samples: Sequence[Sample]) -> Point:
    """The median, the lower one of an even number, with the tokens of that sample, and the most
    memory. Disturbances only add: of two repeats the quicker is the one to expect."""
    seconds = np.array([sample.seconds for sample in samples])
    low, high = np.quantile(seconds, [0.25, 0.75])
    middle = int(np.argsort(seconds, kind="stable")[(len(seconds) - 1) // 2])
    median, tokens = seconds[middle], samples[middle].tokens
    most = {
        kind: max(s.memory.get(kind, 0) for s in samples)
        for kind in ("used", "reserved", "allocated")
    }
    figures = {
        "seconds": float(median),
        "spread": float(high - low) / 2,
        "repeats": len(samples),
        "peak_bytes": most["used"],
        "reserved_bytes": most["reserved"],
        "allocated_bytes": most["allocated"],
    }
    return type(key).model_validate({**key.model_dump(), **tokens, **figures})
