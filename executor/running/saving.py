"""Writing checkpoints while a run goes on."""

import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from executor.running.changes import content_of
from executor.running.checkpoint import (
    IN_FLIGHT,
    MANIFEST,
    METRICS,
    PLAN,
    TIMELINE,
    Manifest,
    listed,
)
from executor.running.export_checkpoint import EXPORTS, export_apart
from executor.running.run_directory import log
from executor.running.stops import EndedCall
from executor.training.shards import FileEntry, RoleState, entry_of, merge
from planner.spec.files import write_atomic
from planner.spec.plan import Plan
from planner.spec.timeline import Timeline
from planner.spec.wording import reason_of

POLL_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The state of a run at a stop. `written` asks the ranks what came of their files, None as long
    as they write."""

    arrays: dict[str, NDArray[Any]]
    metrics: dict[int, dict[str, Any]]
    evaluations: dict[int, dict[str, float]]
    skipped: dict[str, int]
    kl_coef: float | None
    written: Callable[[], list[tuple[dict[str, RoleState], dict[str, FileEntry]]] | None]


class Saver:
    """Writes checkpoints into `directory` in a thread, one at a time, and keeps the last `keep` of
    them. One comes every `every` steps and every `export_every` steps (0: never); after the latter
    its models are exported beside `directory`.

    One that cannot be written leaves a line in the log and those before it as they are."""

    def __init__(self, directory: Path, *, every: int, keep: int, export_every: int = 0) -> None:
        self._directory, self._keep = directory, keep
        self.every, self._export_every = (every, export_every), export_every
        self._content: dict[str, str] | None = None  # of models and files, looked at once
        self._thread: Thread | None = None
        for unfinished in directory.glob(".step-*"):  # of a run that was killed
            shutil.rmtree(unfinished, ignore_errors=True)
        self.error = ""  # what kept the latest one from being written

    def save(
        self,
        snapshot: Callable[[Path], Snapshot],
        *,
        step: int,
        done: tuple[EndedCall, ...],
        plan: Plan,
        timeline: Callable[[Snapshot], Timeline],
        metrics: Path,
    ) -> None:
        """Take a snapshot, for which the trainers stop, and begin to write it, with the timeline of
        what is in it. The one before is waited for."""
        self.wait()
        began = time.perf_counter()
        name, self.error = f"step-{step:06d}", ""
        unfinished = self._directory / f".{name}"
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            small = {METRICS: metrics.read_bytes()}
        except OSError as error:
            return self._failed(name, unfinished, error)
        taken = snapshot(unfinished.resolve())
        streams = {call.name for call in plan.dataflow.calls if call.streams}
        # The sequences of those that have not ended are in the snapshot.
        done = tuple(one for one in done if one[0] not in streams or one[1] in taken.metrics)
        spans = timeline(taken)
        log.info("checkpoint %s: copied in %.3g s", name, time.perf_counter() - began)

        def write() -> None:
            try:
                small.update({PLAN: plan.to_json().encode(), TIMELINE: spans.to_json().encode()})
                if self._content is None:
                    self._content = content_of(plan.workload)
                _write(unfinished, step, done, taken, small, self._content)
                final = self._directory / name
                shutil.rmtree(final, ignore_errors=True)
                os.replace(unfinished, final)
                prune(self._directory, self._keep)
                log.info("checkpoint %s: written after %.3g s", name, time.perf_counter() - began)
                if self._export_every and step % self._export_every == 0:
                    self._export(final)
            except Exception as error:
                self._failed(name, unfinished, error)

        self._thread = Thread(target=write, daemon=True)
        self._thread.start()

    def _export(self, checkpoint: Path) -> None:
        """Export the models of a checkpoint. A run goes on without, if that fails."""
        out = self._directory.parent / EXPORTS / checkpoint.name
        shutil.rmtree(out, ignore_errors=True)
        if problem := export_apart(checkpoint.resolve(), out.resolve()):
            log.error("the models of %s could not be exported (%s)", checkpoint.name, problem)
        else:
            log.info("the models of %s are in %s", checkpoint.name, out)

    def _failed(self, name: str, unfinished: Path, error: Exception) -> None:
        self.error = reason_of(error, most=300)
        log.error(
            "checkpoint %s could not be written (%s); those before it are as they were",
            name,
            self.error,
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
    content: dict[str, str],
) -> None:
    """All files, the manifest last."""
    files: dict[str, FileEntry] = {}
    for name, written in small.items():
        write_atomic(directory / name, written)
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
        kl_coef=taken.kl_coef,
        roles={role: merge(states) for role, states in roles.items()},
        files=files,
        content=content,
    )
    manifest.changed(sha256=manifest.digest()).write(directory / MANIFEST)


def _finite(metrics: dict[str, Any]) -> dict[str, float | None]:
    return {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}


def prune(directory: Path, keep: int) -> None:
    for path in listed(directory)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
