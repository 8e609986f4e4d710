"""The cells of a study, one after the other on one fleet: processes and engines that fit the next
plan stay."""

import contextlib
import hashlib
import platform
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from executor.data.prompts import PromptSource
from executor.fleet import driver, pools
from executor.fleet.asking import Rank, ask, to_each
from executor.fleet.session import ray_session
from executor.fleet.worker import Worker
from executor.measuring import software
from executor.measuring.timing import PEERS_START_SECONDS
from executor.rollout.engines import kind_of
from executor.running import hosts, preflight
from executor.running.loop import Silent
from executor.running.processes import fleet_for, retire_engines
from executor.running.run import Run
from executor.running.run_directory import RunDirectory
from executor.running.step import Training
from executor.running.supervise import Deadlines, one_line
from executor.training.trainer import Trainer
from planner import __version__
from planner.spec.errors import UserError
from planner.spec.machine import memory_bytes
from planner.spec.plan import Gpu, Plan
from planner.spec.study import CellResult, GpuMemory
from planner.spec.timeline import Timeline, step_seconds
from planner.spec.wording import reason_of

SAMPLE_SECONDS = 0.05
CELL_FLOOR_SECONDS = 20.0  # of a call's deadline: a study's time is short
# Seconds that a cell takes in addition to its steps, first step's compiling included: with engines
# to start, and without.
BESIDE = {"GPU": (120.0, 20.0), "CPU": (15.0, 5.0)}

R = TypeVar("R")
Engines = frozenset[tuple[tuple[Gpu, ...], str]]  # the GPUs of each, and what it is made for


@dataclass(frozen=True, kw_only=True)
class Job:
    """A plan to measure, under the name of its cell: `steps` in all, the first `warmup` and the
    last `drain` of which do not count, each predicted to take `seconds`. What comes of it goes into
    `directory`; `sha256` is that of the plan's file."""

    plan: Plan
    steps: int
    warmup: int
    drain: int
    seconds: float
    directory: Path
    sha256: str


class _Measured(Training):
    def export(self, directory: Path) -> None:
        """A study keeps no models."""


def run(jobs: Sequence[Job], *, seconds: float | None, say: Callable[[str], None]) -> list[str]:
    """Measure jobs within a number of seconds; the names of those for which there was no time.

    A cell that fails leaves its reason, and the next one starts on fresh processes. Raises
    UserError, before anything is started, if this machine has not what the plans need."""
    began = time.monotonic()
    widest = max(jobs, key=lambda job: pools.needed(job.plan))
    prompts = {job.plan.name: preflight.check(job.plan, local=job is widest) for job in jobs}
    for job in jobs:
        hosts.check_here(job.plan, memory_bytes(), saves=False)
    jobs, left = in_order(jobs), []
    on_cores = pools.resource_of(jobs[0].plan) == "CPU"
    gpus = {gpu for job in jobs for pool in job.plan.pools.values() for gpu in pool.gpus}
    with (
        ray_session(cpus=len(gpus) if on_cores else None, address=None),
        contextlib.closing(Bench(jobs)) as bench,
    ):
        whole = _whole_estimate(bench, jobs)
        say(
            f"{len(jobs)} cells, about {whole / 60:.1f} min"
            + (f" of {seconds / 60:.1f}" if seconds else "")
        )
        for number, job in enumerate(jobs, start=1):
            estimate, used = bench.estimate(job), time.monotonic() - began
            if seconds is not None and used + estimate > seconds:
                left.append(job.plan.name)
                say(
                    f"{number} of {len(jobs)}: {job.plan.name} would take about {estimate:.0f} s, "
                    "which is too long"
                )
                continue
            say(
                f"{number} of {len(jobs)}: {job.plan.name}, about {estimate:.0f} s, after "
                f"{used:.0f} s"
            )
            say("  " + bench.measure(job, prompts[job.plan.name]))
    return left


def in_order(jobs: Sequence[Job]) -> list[Job]:
    """Each next job is one that needs the fewest new engines after the one before; the first stays
    first."""
    left, ordered = list(jobs), list[Job]()
    alive: Engines = frozenset()
    while left:
        chosen = min(left, key=lambda job: len(engines_of(job.plan) - alive) if ordered else 0)
        left.remove(chosen)
        ordered.append(chosen)
        alive = engines_of(chosen.plan)
    return ordered


def engines_of(plan: Plan) -> Engines:
    """The plan's engines: the GPUs of each, and the traits that it was made for."""
    made_for = kind_of(plan).fits(plan)
    return frozenset((gpus, made_for) for _, gpus in plan.engine_gpus())


def _whole_estimate(bench: "Bench", jobs: Sequence[Job]) -> float:
    befores: list[Job | None] = [None, *jobs]
    pairs = zip(befores, jobs, strict=False)
    return sum(
        bench.estimate(job, engines_of(before.plan) if before else frozenset())
        for before, job in pairs
    )


def _longer(plan: Plan, new: Engines) -> float:
    """Seconds that new engines take to start if they are tensor-parallel, beyond those of
    others."""
    return PEERS_START_SECONDS if new and plan.rollout.tensor_parallel > 1 else 0.0


class Bench:
    """The fleet of a study, what is running on it, and how long things have taken on it."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._plans = [job.plan for job in jobs]
        self._fleet: pools.Fleet | None = None
        self._engines: Engines = frozenset()
        resource = pools.resource_of(self._plans[0])
        self._beside = dict(
            zip((True, False), BESIDE[resource], strict=True)
        )  # engines to start? -> seconds
        self._facts = HostFacts()

    def estimate(self, job: Job, alive: Engines | None = None) -> float:
        """Seconds that a job will take, with these engines (those that there are) running."""
        new = engines_of(job.plan) - (self._engines if alive is None else alive)
        return self._beside[bool(new)] + _longer(job.plan, new) + job.steps * job.seconds

    def measure(self, job: Job, prompts: PromptSource) -> str:
        """Run a job and write what came of it; how it ended, in words."""
        new, began = engines_of(job.plan) - self._engines, time.monotonic()
        told: dict[str, Any] = {
            "plan_sha256": job.sha256,
            "engines_started": len(new),
            **self._facts.told(),
        }
        scratch = job.directory / ".run"
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            timeline, start, found = self._run(job, prompts, scratch)
        except Exception as error:
            self.close()  # whatever its processes are doing now
            reason = reason_of(error, most=600)
            _keep_log(job.directory, scratch)
            CellResult(status="failed", reason=reason, **told).write(job.directory / "result.json")
            return f"failed: {reason}"
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        seconds, whole = step_seconds(timeline), time.monotonic() - began
        self._beside[bool(new)] = whole - _longer(job.plan, new) - job.steps * seconds
        self._engines = engines_of(job.plan)
        timeline.write(job.directory / "timeline.json")
        (job.directory / "log.txt").unlink(missing_ok=True)  # of an earlier attempt
        result = CellResult(
            status="done", start_seconds=start, run_seconds=whole, memory=tuple(found), **told
        )
        result.write(job.directory / "result.json")
        off = job.seconds / seconds - 1
        return (
            f"{seconds:.3g} s per step, predicted {job.seconds:.3g} s ({off:+.1%}); {start:.0f} s "
            "to start"
        )

    def _run(
        self, job: Job, prompts: PromptSource, scratch: Path
    ) -> tuple[Timeline, float, list[GpuMemory]]:
        """The timeline, seconds to start, and memory."""
        began = time.monotonic()
        fleet = self._make_room(job.plan)
        deadlines = Deadlines(plan=job.plan, floor=CELL_FLOOR_SECONDS)
        with one_line(job.plan, "the start", tuple(job.plan.pools), "start"):
            backend = _Measured(job.plan, prompts, fleet, deadlines)
        start = time.monotonic() - began
        _on_processes(backend, Worker.forget_peak)
        with MemoryWatch(fleet.devices) as watch:
            directory = RunDirectory(scratch, tensorboard=False)
            Run(job.plan, job.steps, backend, directory, Silent()).finish()
        found = _memory(watch.peaks, _on_processes(backend, Worker.peak))
        backend.close()  # the processes stay
        (scratch / "metrics.jsonl").replace(job.directory / "metrics.jsonl")
        timeline = Timeline.read(scratch / "timeline.json")
        return timeline.changed(warmup=job.warmup, drain=job.drain), start, found

    def _make_room(self, plan: Plan) -> pools.Fleet:
        """The fleet, without the processes that this plan has no use for: a trainer holds models
        until it is told of others, an engine its part of the memory."""
        if self._fleet is None:
            self._fleet = fleet_for(self._plans)
        every = {gpu for other in self._plans for pool in other.pools.values() for gpu in pool.gpus}
        training = {
            gpu for role in plan.trainers.values() for gpu in plan.pools[role.pools[0]].gpus
        }
        self._fleet.retire(Trainer, sorted(every), [((gpu,), "") for gpu in training])
        retire_engines(self._fleet, plan, self._plans)
        return self._fleet

    def close(self) -> None:
        if self._fleet is not None:
            self._fleet.close()
        self._fleet, self._engines = None, frozenset()


def _keep_log(directory: Path, scratch: Path) -> None:
    """Keep the log of a failed cell, and the place where it failed."""
    ran = scratch / "log.txt"
    text = ran.read_text(encoding="utf-8") if ran.exists() else ""
    (directory / "log.txt").write_text(text + traceback.format_exc(), encoding="utf-8")


# --- memory ---


def _on_processes(backend: Training, method: Callable[[Worker], R]) -> list[tuple[Gpu, str, R]]:
    """The answers of trainers and engines, with their (first) GPU and their kind."""
    plan, processes = backend.plan, backend.processes
    places: list[tuple[Gpu, str, Rank[Any]]] = [
        (gpu, "trainer", rank)
        for pool, ranks in processes.trainers.items()
        for gpu, rank in zip(plan.pools[pool].gpus, ranks, strict=True)
    ]
    engines = zip(plan.engine_gpus(), processes.engines, strict=True)
    places += [(gpus[0], "engine", rank) for (_, gpus), rank in engines]
    answers = ask(to_each([rank for _, _, rank in places], method)).results
    return [(gpu, kind, answer) for (gpu, kind, _), answer in zip(places, answers, strict=True)]


def _memory(
    watched: dict[Gpu, int], told: Sequence[tuple[Gpu, str, dict[str, int]]]
) -> list[GpuMemory]:
    """The memory that the driver counted or, where nobody could ask it, that the processes saw
    after their last call."""
    seen = dict(watched)
    for gpu, _, peak in told:
        if gpu not in watched and "used" in peak:
            seen[gpu] = max(seen.get(gpu, 0), peak["used"])
    found = []
    for gpu, used in sorted(seen.items()):
        peaks = {kind: peak for place, kind, peak in told if place == gpu and peak}
        own = {
            what: {kind: p[what] for kind, p in peaks.items()}
            for what in ("allocated", "reserved", "retries")
        }
        found.append(GpuMemory(gpu=gpu, used=used, **own))
    return found


class MemoryWatch:
    """The most bytes in use on each GPU while a `with` lasts, of all processes and as the driver
    counts them, looked at every `SAMPLE_SECONDS`. Nothing where there are no GPUs or no driver
    that could be asked."""

    def __init__(self, devices: dict[Gpu, str]) -> None:
        self._handles: dict[Gpu, Any] = {}
        with contextlib.suppress(UserError):
            if devices and driver.is_there():
                self._handles = {gpu: driver.handle_of(device) for gpu, device in devices.items()}
        self.peaks: dict[Gpu, int] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while self._handles:
            for gpu, handle in self._handles.items():
                self.peaks[gpu] = max(self.peaks.get(gpu, 0), driver.bytes_in_use(handle))
            if self._done.wait(SAMPLE_SECONDS):
                break


class HostFacts:
    """The facts about the machine that a result holds."""

    def __init__(self) -> None:
        boot = Path("/proc/sys/kernel/random/boot_id")
        booted = boot.read_text() if boot.exists() else ""
        self._host = hashlib.sha256(f"{platform.node()} {booted}".encode()).hexdigest()[:12]
        self._versions = {"splitplan": __version__, **software.versions()}
        self._gpu = platform.machine()
        with contextlib.suppress(UserError):  # cores are measured without a driver too
            for gpu in driver.gpus()[:1]:
                self._gpu, self._versions["driver"] = gpu.name, gpu.driver

    def told(self) -> dict[str, Any]:
        date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        return {"host": self._host, "gpu": self._gpu, "versions": self._versions, "date": date}
