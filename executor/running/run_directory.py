"""The directory of a run: plan, timeline, metrics, log, what trackers write, checkpoints."""

import contextlib
import fcntl
import json
import logging
import math
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from planner.spec.errors import UserError
from planner.spec.files import write_atomic
from planner.spec.plan import Plan
from planner.spec.timeline import Decision, Span, Timeline

if TYPE_CHECKING:  # it loads torch, which a rehearsal does without
    from executor.running import trackers
    from executor.running.said import Said

log = logging.getLogger("splitplan")
SAMPLES = "samples.jsonl"


def check_free(runs: Path, name: str) -> Path:
    """The run's directory, which must not exist yet. Raises UserError."""
    if not name or Path(name).name != name or name in (".", ".."):
        raise UserError(
            f"{name!r} is no name for a run; --name is one plain directory name under {runs}"
        )
    path = runs / name
    if path.exists():
        raise UserError(f"{path} exists already; choose another --name or remove it")
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{path}: nothing can be written into {there}; choose another --runs")
    return path


@contextlib.contextmanager
def claimed(runs: Path, name: str) -> Iterator[Path]:
    """The run's directory, which is made at once and `held`, so that a run that starts meanwhile
    takes another name. It goes again if nothing was written into it. Raises UserError as
    `check_free` does."""
    path = check_free(runs, name)
    made = [parent for parent in (path, *path.parents) if not parent.exists()]
    try:
        _make(path)
        with held(path):
            yield path
    finally:
        for directory in made:
            with contextlib.suppress(OSError):  # what has files stays
                directory.rmdir()


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True)
    except FileExistsError:  # since it was looked for
        raise UserError(f"{path} exists already; choose another --name") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be made ({error.strerror}); choose another --name or --runs"
        ) from None


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Keep other processes from going on with a run, from before anything of it is started until
    all has ended. Its directory is free when this process ends, however. Raises UserError where
    another one goes on with it."""
    directory = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(directory)
        raise UserError(
            f"{path}: the run goes on in another process; wait for its end, or end it"
        ) from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(directory)


def check_ended(run: Path) -> None:
    """Raise UserError for a run with which another process goes on."""
    with held(run):
        pass


class _Log(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Lose the line on a full disk: nobody is shown a traceback for it."""


class RunDirectory:
    """The files of a run, written as it goes. Metrics are appended a line at a time; other files
    are written whole or not at all. The directory exists when this is constructed; `open` writes
    the files that a run begins with."""

    def __init__(
        self,
        path: Path,
        *,
        tensorboard: bool,
        track: Sequence[str] = (),
        prometheus: int | None = None,
    ) -> None:
        """`track`: trackers in addition to TensorBoard; `prometheus`: the port where it may read.
        The directory may be there already."""
        self.path = path
        self._files = contextlib.ExitStack()
        self._trackers: trackers.Trackers | None = None
        if tensorboard:  # slow to load, and a rehearsal has no torch
            from executor.running.trackers import Trackers

            self._trackers = Trackers(track, prometheus)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be made ({error.strerror}); choose another --name or --runs"
            ) from None

    def open(self, plan: Plan, *, metrics: bytes = b"", samples: str = "", step: int = 0) -> None:
        """Begin with the `metrics` and `samples` of the steps before `step`."""
        plan.write(self.path / "plan.json")
        write_atomic(self.path / "metrics.jsonl", metrics)
        if samples or (self.path / SAMPLES).exists():
            write_atomic(self.path / SAMPLES, samples)
        handler = _Log(self.path / "log.txt", encoding="utf-8")
        self._files.callback(handler.close)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
        self._files.callback(log.removeHandler, handler)
        log.setLevel(logging.INFO)
        log.propagate = False
        self._files.callback(setattr, threading, "excepthook", threading.excepthook)
        threading.excepthook = _log_thread
        self._metrics = self._files.enter_context(
            (self.path / "metrics.jsonl").open("a", encoding="utf-8")
        )
        if self._trackers is not None:
            self._files.callback(
                lambda told: told.close(failed=sys.exception() is not None), self._trackers
            )
            self._trackers.open(self.path, plan, step)

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        finite = {
            key: None if isinstance(x, float) and not math.isfinite(x) else x
            for key, x in metrics.items()
        }
        try:
            self._metrics.write(json.dumps(finite, allow_nan=False) + "\n")
            self._metrics.flush()
        except OSError as error:
            what = f"{self.path / 'metrics.jsonl'}: cannot be written ({error.strerror})"
            raise UserError(
                f"{what}; make room, and go on with: plan execute --resume {self.path}"
            ) from None
        if self._trackers is not None:
            self._trackers.log(metrics)

    def write_samples(self, lines: list["Said"]) -> None:
        """Append what the model said. On a full disk it is lost, and the log says so once: a run
        does not end for it."""
        if not lines:
            return
        from executor.running.said import text_of

        try:
            with (self.path / SAMPLES).open("a", encoding="utf-8") as file:
                file.write(text_of(lines))
        except OSError as error:
            log.error("%s: cannot be written (%s)", self.path / SAMPLES, error.strerror)
        if self._trackers is not None:
            self._trackers.tell(lines)

    def write_timeline(self, timeline: Timeline) -> None:
        write_atomic(self.path / "timeline.json", timeline.to_json())

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a line that could not be written
            self._files.close()


def _log_thread(raised: threading.ExceptHookArgs) -> None:
    """Write into the log what a thread of a library raises, such as TensorBoard's on a full
    disk."""
    log.error("a thread ended by %s: %s", raised.exc_type.__name__, raised.exc_value)


def timeline_of(
    plan: Plan,
    steps: int,
    spans: Iterable[Span],
    decisions: Sequence[Decision] = (),
    ended_parts: Mapping[int, tuple[float, ...]] = MappingProxyType({}),
) -> Timeline:
    """The measured timeline of a run of `steps` steps. The pipeline fills for `staleness` steps,
    and the first calls load libraries."""
    found = tuple(spans)
    first = min((span.step for span in found), default=0)
    warmup = min(first + plan.staleness + 1, max(0, steps - 1))
    return Timeline(
        source="measured",
        plan=plan.name,
        steps=steps,
        warmup=warmup,
        step_ends_with=plan.dataflow.ends_step.name,
        spans=found,
        decisions=tuple(decisions),
        ended_parts=dict(ended_parts),
    )
