"""Checkpoints: a run goes on from one as if nothing had happened.

A checkpoint is taken at a stop of the program, right after a `sync_weights`: the calls that were
issued before it have ended, and none behind it has begun. At that moment the rollout has the
actor's weights, and all data in flight are on the controller.
"""

import contextlib
import hashlib
import json
import math
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from numpy.typing import NDArray
from pydantic import NonNegativeInt
from safetensors.numpy import load_file

from executor.running.export import EXPORTED, FINAL
from executor.running.stops import EndedCall, in_flight
from executor.training.shards import FileEntry, RoleState, Saved
from planner.predict.schedule import Task
from planner.spec.errors import UserError
from planner.spec.files import File
from planner.spec.plan import Plan
from planner.spec.timeline import Span, Timeline

MANIFEST, PLAN, TIMELINE, METRICS, IN_FLIGHT = (
    "checkpoint.json",
    "plan.json",
    "timeline.json",
    "metrics.jsonl",
    "in_flight.safetensors",
)


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


def listed(directory: Path) -> list[Path]:
    """The directories that look like checkpoints, the newest last."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if re.fullmatch(r"step-\d{6,}", path.name))
