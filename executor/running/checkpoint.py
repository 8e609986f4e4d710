"""Checkpoints, and the models that a run leaves behind. A run goes on from a checkpoint as if
nothing had happened.

A checkpoint is taken at a stop of the program, right after a `sync_weights`: the calls that were
issued before it have ended, and none behind it has begun. At that moment the rollout has the
actor's weights, and all data in flight are on the controller.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import NonNegativeInt
from safetensors.numpy import load_file, save_file

from executor.data.prompts import PromptSource
from executor.fleet.asking import ask, to_each
from executor.running.processes import Processes
from executor.running.run_directory import log
from executor.running.stops import EndedCall, in_flight
from executor.training.shards import FileEntry, RoleState, Saved, entry_of, merge
from executor.training.trainer import Trainer
from planner.predict.schedule import Task
from planner.spec.errors import UserError
from planner.spec.files import File, write_atomic
from planner.spec.plan import Plan
from planner.spec.timeline import Span, Timeline

EXPORTED, FINAL = ("actor", "critic"), "final"
MANIFEST, PLAN, TIMELINE, METRICS, IN_FLIGHT = (
    "checkpoint.json",
    "plan.json",
    "timeline.json",
    "metrics.jsonl",
    "in_flight.safetensors",
)
POLL_SECONDS = 0.05


def export(processes: Processes, prompts: PromptSource, directory: Path) -> None:
    """Write actor and critic as Hugging Face directories `directory/<role>` that `from_pretrained`
    loads, the actor with its tokenizer. Each appears whole or not at all. Raises UserError."""
    for role in EXPORTED:
        if role not in processes.plan.trainers:
            continue
        unfinished = directory / f".{role}"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            ask(to_each(processes.of(role), Trainer.export, role, unfinished.resolve()))
            if role == "actor":
                prompts.save_tokenizer(unfinished)
            shutil.rmtree(directory / role, ignore_errors=True)  # of an attempt before
            os.replace(unfinished, directory / role)
        except OSError as error:
            raise UserError(
                f"{directory}: the {role} cannot be written ({error.strerror}); make room there"
            ) from None
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


class Manifest(File):
    """The contents of a checkpoint. The manifest is written last: a directory without it is no
    checkpoint. `step` updates of the actor are in it. `done`: the calls that have ended of the
    steps that have not; `metrics` and `evaluations` of these steps; `skipped`: optimizer steps in a
    row without finite gradients, by role; `sha256` of the manifest itself without it."""

    SCHEMA: ClassVar[str] = "splitplan/checkpoint/1"

    step: NonNegativeInt
    done: tuple[EndedCall, ...]
    metrics: dict[int, dict[str, float | None]]
    evaluations: dict[int, dict[str, float]]
    skipped: dict[str, int]
    roles: dict[str, RoleState]
    files: dict[str, FileEntry]
    sha256: str = ""

    def digest(self) -> str:
        body = json.dumps(self.model_dump(mode="json", exclude={"sha256"}), sort_keys=True)
        return hashlib.sha256(body.encode()).hexdigest()


# --- what is saved ---


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The state of a run at a stop. `written` asks the ranks what came of their files, None as long
    as they write."""

    arrays: dict[str, NDArray[Any]]
    metrics: dict[int, dict[str, Any]]
    evaluations: dict[int, dict[str, float]]
    skipped: dict[str, int]
    written: Callable[[], list[tuple[dict[str, RoleState], dict[str, FileEntry]]] | None]


class Saver:
    """Writes checkpoints into `directory` in a thread, one at a time, and keeps the last `keep` of
    them. `every` is the number of steps between two of them.

    One that cannot be written leaves a line in the log and those before it as they are."""

    def __init__(self, directory: Path, *, every: int, keep: int) -> None:
        self._directory, self._keep = directory, keep
        self.every = every
        self._thread: Thread | None = None
        for unfinished in directory.glob(".step-*"):  # of a run that was killed
            shutil.rmtree(unfinished, ignore_errors=True)
        self.error: Exception | None = None  # of the latest one

    def save(
        self,
        snapshot: Callable[[Path], Snapshot],
        *,
        step: int,
        done: tuple[EndedCall, ...],
        plan: Plan,
        timeline: Timeline,
        metrics: Path,
    ) -> None:
        """Take a snapshot, for which the trainers stop, and begin to write it. The one before is
        waited for."""
        self.wait()
        began = time.perf_counter()
        name, self.error = f"step-{step:06d}", None
        unfinished = self._directory / f".{name}"
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            small = {METRICS: metrics.read_bytes()}
        except OSError as error:
            return self._failed(name, unfinished, error)
        taken = snapshot(unfinished.resolve())
        log.info("checkpoint %s: copied in %.3g s", name, time.perf_counter() - began)

        def write() -> None:
            try:
                small.update({PLAN: plan.to_json().encode(), TIMELINE: timeline.to_json().encode()})
                _write(unfinished, step, done, taken, small)
                final = self._directory / name
                shutil.rmtree(final, ignore_errors=True)
                os.replace(unfinished, final)
                prune(self._directory, self._keep)
                log.info("checkpoint %s: written after %.3g s", name, time.perf_counter() - began)
            except Exception as error:
                self._failed(name, unfinished, error)

        self._thread = Thread(target=write, daemon=True)
        self._thread.start()

    def _failed(self, name: str, unfinished: Path, error: Exception) -> None:
        self.error = error
        reason = " ".join(str(error).split())[:300]
        log.error(
            "checkpoint %s could not be written (%s); those before it are as they were",
            name,
            reason,
        )
        shutil.rmtree(unfinished, ignore_errors=True)

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the checkpoint that is being written is whole, or has failed."""
        if self._thread is not None:
            self._thread.join(seconds)


def _write(
    directory: Path,
    step: int,
    done: tuple[EndedCall, ...],
    taken: Snapshot,
    small: dict[str, bytes],
) -> None:
    """All files, the manifest last."""
    files: dict[str, FileEntry] = {}
    for name, content in small.items():
        write_atomic(directory / name, content)
        files[name] = entry_of(directory / name)
    if taken.arrays:
        save_file(
            {name: np.ascontiguousarray(array) for name, array in taken.arrays.items()},
            directory / IN_FLIGHT,
        )
        files[IN_FLIGHT] = entry_of(directory / IN_FLIGHT)
    while (parts := taken.written()) is None:
        time.sleep(POLL_SECONDS)
    roles: dict[str, list[RoleState]] = {}
    for states, entries in parts:
        files |= entries
        for role, state in states.items():
            roles.setdefault(role, []).append(state)
    manifest = Manifest(
        step=step,
        done=done,
        metrics={number: _finite(metrics) for number, metrics in taken.metrics.items()},
        evaluations=taken.evaluations,
        skipped=taken.skipped,
        roles={role: merge(states) for role, states in roles.items()},
        files=files,
    )
    manifest.changed(sha256=manifest.digest()).write(directory / MANIFEST)


def _finite(metrics: dict[str, Any]) -> dict[str, float | None]:
    return {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}


def prune(directory: Path, keep: int) -> None:
    for path in listed(directory)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def listed(directory: Path) -> list[Path]:
    """The directories that look like checkpoints, the newest last."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if re.fullmatch(r"step-\d{6,}", path.name))


# --- what is resumed ---


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose files are the ones that were saved."""

    directory: Path
    manifest: Manifest
    plan: Plan
    spans: tuple[Span, ...]
    metrics: bytes  # the lines of metrics.jsonl

    @property
    def run(self) -> Path:
        return self.directory.parent.parent

    @property
    def saved(self) -> Saved:
        return Saved(directory=self.directory, roles=self.manifest.roles)

    def arrays(self) -> dict[str, NDArray[Any]]:
        return (
            dict(load_file(self.directory / IN_FLIGHT)) if IN_FLIGHT in self.manifest.files else {}
        )

    def is_of(self, plan: Plan) -> bool:
        """Whether a plan places and orders everything as this run did."""
        return (plan.pools, plan.roles, plan.program) == (
            self.plan.pools,
            self.plan.roles,
            self.plan.program,
        )

    def has_ended(self, plan: Plan) -> bool:
        """Whether the run has written what comes after its last step, too."""
        exported = [
            self.run / "checkpoints" / FINAL / role for role in EXPORTED if role in plan.trainers
        ]
        return (self.run / TIMELINE).is_file() and all(directory.is_dir() for directory in exported)

    def take_up(self, plan: Plan) -> None:
        """Prepare the run directory for going on from this checkpoint: drop later checkpoints, and
        set aside the measurements of another plan. A run gets its timeline and its models when it
        has ended."""
        (self.run / TIMELINE).unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.run / "checkpoints" / FINAL)
        there = listed(self.directory.parent)
        for later in there[there.index(self.directory) + 1 :]:
            shutil.rmtree(later)
        if not self.is_of(plan):
            for name in (PLAN, TIMELINE):
                kept = Path(name)
                target = self.run / f"{kept.stem}-until-{self.manifest.step:06d}{kept.suffix}"
                shutil.copyfile(self.directory / name, target)

    def check(self, plan: Plan) -> None:
        """Whether a plan is for this job. Raises UserError."""
        free = {"name", "steps", "max_staleness"}
        ours, theirs = (
            self.plan.workload.model_dump(exclude=free),
            plan.workload.model_dump(exclude=free),
        )
        if differ := [key for key in ours if ours[key] != theirs[key]]:
            raise UserError(
                f"plan {plan.name!r} is for another workload than {self.directory}: "
                f"{', '.join(differ)} differ; "
                "search it for the workload in the run's plan.json"
            )

    def left(self, tasks: list[Task]) -> tuple[list[Task], set[int], int]:
        """Return (tasks, finished, stop): the plan's tasks with their weight versions, the indices
        of those that must not be done again, and the index of the first task after the stop.

        A program that would have the same calls in flight goes on with them. Any other program
        fills its pipeline again, as in the beginning: sequences in flight are generated again, by
        the current weights. Raises UserError where such sequences have been trained on already.
        """
        manifest = self.manifest
        stop = next(
            (
                t.index + 1
                for t in tasks
                if (t.call.kind, t.step) == ("transfer", manifest.step - 1)
            ),
            0,
        )
        if set(in_flight(tasks, stop)) == set(manifest.done):
            return tasks, set(range(stop)), stop
        done = {(call, step) for call, step, _ in manifest.done}
        begun = {step for _, step in done}
        trained = {task.call.name for task in tasks if task.call.kind == "train"}
        if any(call in trained and step >= manifest.step for call, step in done):
            raise UserError(
                f"{self.directory} was taken when step {manifest.step} had been half trained on, "
                "and only its own "
                "program can go on from there; resume another checkpoint"
            )
        ended = {
            task.index
            for task in tasks
            if task.step < manifest.step
            and ((task.call.name, task.step) in done or task.step not in begun)
        }
        return [_at_least(task, manifest.step) for task in tasks], ended, stop


def _at_least(task: Task, version: int) -> Task:
    """Generation by the weights that there are, where a program would have taken older ones."""
    if task.call.kind != "generate" or task.weights_version is None:
        return task
    return replace(task, weights_version=max(task.weights_version, version))


def find(path: Path) -> Checkpoint:
    """The checkpoint at a path, or the newest one of a run. Raises UserError, which names what is
    broken and the newest whole one before it."""
    path = path.resolve()
    if (path / MANIFEST).exists():
        return _read(path)
    there = listed(path / "checkpoints")
    if not there:
        raise UserError(
            f"{path}: there is no checkpoint in it; name a run that was saved, or one of its "
            "checkpoints"
        )
    try:
        return _read(there[-1])
    except UserError as error:
        for before in reversed(there[:-1]):
            try:
                _read(before)
            except UserError:
                continue
            raise UserError(f"{error}; the one before is whole: --resume {before}") from None
        raise UserError(f"{error}; there is no whole one before it") from None


def latest(run: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run."""
    for path in reversed(listed(run.resolve() / "checkpoints")):
        with contextlib.suppress(UserError):
            return _read(path)
    return None


def _read(directory: Path) -> Checkpoint:
    manifest = Manifest.read(directory / MANIFEST)
    if manifest.digest() != manifest.sha256:
        raise UserError(f"{directory / MANIFEST}: is not as it was written; it is corrupted")
    for name, entry in manifest.files.items():
        path = directory / name
        if Path(name).name != name or not path.is_file() or path.stat().st_size != entry.bytes:
            raise UserError(f"{path}: is missing or cut off ({entry.bytes} bytes were written)")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                raise UserError(f"{path}: is corrupted, its hash is not the one in {MANIFEST}")
    for role, state in manifest.roles.items():
        named = {piece.file for stored in state.tensors.values() for piece in stored.pieces}
        if missing := named - manifest.files.keys():
            raise UserError(
                f"{directory / MANIFEST}: {role} has parts in {min(missing)!r}, which is none of "
                "its files"
            )
    return Checkpoint(
        directory=directory,
        manifest=manifest,
        plan=Plan.read(directory / PLAN),
        spans=Timeline.read(directory / TIMELINE).spans,
        metrics=(directory / METRICS).read_bytes(),
    )


def metric(value: float | None) -> float:
    return math.nan if value is None else value
