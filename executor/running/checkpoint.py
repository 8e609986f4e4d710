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
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt
from safetensors import safe_open
from safetensors.numpy import load_file

from executor.running.changes import changes, check_there
from executor.running.export import EXPORTED, FINAL
from executor.running.run_directory import SAMPLES
from executor.running.said import kept
from executor.running.stops import EndedCall, in_flight
from executor.training.shards import FileEntry, RoleState, Saved
from planner.predict.schedule import Task, tasks_of
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
    row without finite gradients, by role; `content` of the models and files that the workload
    names, as `changes.content_of` tells it; `sha256` of the manifest itself without it."""

    SCHEMA: ClassVar[str] = "splitplan/checkpoint/1"

    step: NonNegativeInt
    done: tuple[EndedCall, ...]
    metrics: dict[int, dict[str, float | None]]
    evaluations: dict[int, dict[str, float]]
    skipped: dict[str, int]
    kl_coef: float | None = Field(default=None, exclude_if=lambda value: value is None)
    roles: dict[str, RoleState]
    files: dict[str, FileEntry]
    content: dict[str, str] = Field(default_factory=dict)
    sha256: str = ""

    def digest(self) -> str:
        left_out = {"sha256"} if self.content else {"sha256", "content"}  # as before there was any
        body = json.dumps(self.model_dump(mode="json", exclude=left_out), sort_keys=True)
        return hashlib.sha256(body.encode()).hexdigest()


class Left(NamedTuple):
    """What a run still has to do: the plan's `tasks` with the versions of the weights that they
    will use, the indices of those that must not be done again, the index of the first task after
    the stop; and in words what differs from a run without interruption, if anything does. If it
    `refills` its pipeline, what the checkpoint has of steps in flight is not used."""

    tasks: list[Task]
    ended: set[int]
    stop: int
    differs: str = ""
    refills: bool = False


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose files are the ones that were saved."""

    directory: Path
    manifest: Manifest
    plan: Plan
    timeline: Timeline
    metrics: bytes  # the lines of metrics.jsonl

    @property
    def run(self) -> Path:
        return self.directory.parent.parent

    @property
    def spans(self) -> tuple[Span, ...]:
        return self.timeline.spans

    @property
    def saved(self) -> Saved:
        return Saved(directory=self.directory, roles=self.manifest.roles)

    def arrays(self) -> dict[str, NDArray[Any]]:
        return (
            dict(load_file(self.directory / IN_FLIGHT)) if IN_FLIGHT in self.manifest.files else {}
        )

    @property
    def written(self) -> int:
        """The number of steps whose metrics are written."""
        return self.metrics.count(b"\n")

    def samples(self, *, again: bool) -> str:
        """What the model said up to here; `again` if sequences in flight are generated again."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            content = (self.run / SAMPLES).read_text(encoding="utf-8")
            done = () if again else self.manifest.done
            trained = {step for call, step, _ in done if call == "advantages"}
            return kept(content, self.written, trained, self.manifest.evaluations)
        return ""

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
        if plan != self.plan:
            for name in (PLAN,) if self.is_of(plan) else (PLAN, TIMELINE):
                kept = Path(name)
                target = self.run / f"{kept.stem}-until-{self.manifest.step:06d}{kept.suffix}"
                shutil.copyfile(self.directory / name, target)

    def check(self, plan: Plan) -> list[str]:
        """Whether a plan is for this job: a line for each setting or place that is another one.
        Raises UserError."""
        check_there(plan.workload, self.run)
        try:
            return changes(self.plan.workload, plan.workload, self.manifest.content)
        except ValueError as error:
            raise UserError(
                f"plan {plan.name!r} is for another workload than {self.directory}: {error} may "
                "not differ; search it for the workload in the run's plan.json"
            ) from None

    def _streaming(self, before: list[Task]) -> set[int]:
        """The tasks before the stop that were under way: those that stream."""
        done = {(call, step) for call, step, _ in self.manifest.done}
        return {
            task.index
            for task in before
            if task.call.streams and (task.call.name, task.step) not in done
        }

    @property
    def unfinished(self) -> set[int]:
        """The steps that have sequences in flight which have not all ended."""
        if IN_FLIGHT not in self.manifest.files:
            return set()
        with safe_open(self.directory / IN_FLIGHT, "numpy") as file:
            parts = [name.split("/") for name in file.keys()]  # noqa: SIM118  it is no mapping
        return {int(part[1]) for part in parts if part[0] == "stream" and len(part) == 3}

    def _streams_on(self, plan: Plan, streaming: set[int]) -> bool:
        """Whether a plan goes on with unfinished sequences: where it streams those of these steps,
        and allows them to be as stale as they were to be."""
        unfinished = self.unfinished
        known = unfinished <= streaming
        return not unfinished or (known and plan.staleness >= self.plan.staleness)

    def left(self, plan: Plan, steps: int) -> Left:
        """What so many steps of a plan have to do from here.

        A program that would have the same calls in flight goes on with them. Any other program
        fills its pipeline again, as in the beginning: sequences in flight are generated again, by
        the current weights. Raises UserError where such sequences have been trained on already.
        """
        manifest, tasks = self.manifest, tasks_of(plan, steps)
        stop = next(
            (
                t.index + 1
                for t in tasks
                if (t.call.kind, t.step) == ("transfer", manifest.step - 1)
            ),
            0,
        )
        written = {task.index for task in tasks if task.step < self.written}
        steady = {task.call.name for task in tasks if not task.call.monitor}
        streaming = self._streaming(tasks[:stop]) - written
        before = [task for task in tasks if task.index not in streaming]
        has = _needed(in_flight(before, stop - len(streaming)), steady)
        of_stream = {tasks[index].step for index in streaming}
        if has == _needed(manifest.done, steady) and self._streams_on(plan, of_stream):
            return Left(tasks, (written | set(range(stop))) - streaming, stop)
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
        fresh = [_at_least(task, manifest.step) for task in tasks]
        ended |= written
        again = {step for step in begun | self.unfinished if step >= manifest.step}
        newer = {new.step for old, new in zip(tasks, fresh, strict=True) if new != old}
        newer -= {task.step for task in tasks if task.index in ended}
        return Left(fresh, ended, stop, _differs(manifest.step, again, newer), refills=True)


def _needed(done: Iterable[EndedCall], steady: set[str]) -> set[EndedCall]:
    """The ended calls of steps that have more to do than what watches the training, which may be
    done at other steps than before."""
    ended = [call for call in done if call[0] in steady]
    of_step: dict[int, set[str]] = {}
    for name, step, _ in ended:
        of_step.setdefault(step, set()).add(name)
    return {call for call in ended if of_step[call[1]] != steady}


def _differs(version: int, again: set[int], newer: set[int]) -> str:
    """What a pipeline that fills again means for the metrics, in words."""
    parts = []
    if again:
        parts.append(f"sequences in flight, of {_steps(again)}, are generated again")
    if newer:
        drained = "" if again else "the pipeline had drained: "
        parts.append(
            f"{drained}the sequences of {_steps(newer)} are generated by weights {version}, where "
            "a run in one go takes older ones"
        )
    if not parts:
        return ""
    return f"{'; '.join(parts)}; metrics differ from those of a run in one go"


def _steps(numbers: set[int]) -> str:
    listed = ", ".join(str(number) for number in sorted(numbers))
    return f"step{'s' if len(numbers) > 1 else ''} {listed}"


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
        beside = [checkpoint.name for checkpoint in listed(path.parent)]
        kept = f": {path.parent} has {', '.join(beside)}" if beside else ""
        raise UserError(
            f"{path}: there is no checkpoint in it; name a run that was saved, or one of its "
            f"checkpoints{kept}"
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
        timeline=Timeline.read(directory / TIMELINE),
        metrics=(directory / METRICS).read_bytes(),
    )


def metric(value: float | None) -> float:
    return math.nan if value is None else value


def listed(directory: Path) -> list[Path]:
    """The directories that look like checkpoints, the newest last."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if re.fullmatch(r"step-\d{6,}", path.name))
