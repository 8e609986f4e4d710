"""Faults that are really injected: processes killed and stopped, numbers that are none. The run
goes on or says why."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import colocated, make_workload, nearly, split
from interrupted import OPTIONS, WORKLOAD, metrics_of
from processes import PATIENCE, WORKERS, descendants, end, still_there, working
from safetensors.numpy import load_file

from executor.fleet.pools import Fleet
from executor.running import checkpoint, step
from executor.running.execute import execute, resume
from executor.running.loop import Silent
from executor.running.options import RunOptions
from executor.running.step import Training
from executor.running.step_data import Done
from planner.predict.forecast import predict
from planner.predict.schedule import Task
from planner.spec.errors import UserError
from planner.spec.timeline import Timeline

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
# Minutes, most of them starts of processes. What these kill, test_soak.py kills too, and that is
# never left out.
nightly = pytest.mark.nightly


@pytest.fixture(scope="module")
def whole(ray_two: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to which nothing happened."""
    return execute(
        split(WORKLOAD),
        name="r",
        runs=tmp_path_factory.mktemp("whole"),
        options=RunOptions(save_every=0),
    )


class Faults(Silent):
    """Sends signals to a process of a class when a call starts for the first time."""

    def __init__(self, faults: dict[tuple[str, int], tuple[str, signal.Signals]]) -> None:
        self.faults = dict(faults)
        self.others = set(working(descendants(os.getpid())))  # those that several tests share
        self.trainers: list[list[int]] = []  # at each fault
        self.notes: list[str] = []

    def on_start(self, task: Task) -> None:
        if fault := self.faults.pop((task.call.name, task.step), None):
            name, number = fault
            self.trainers.append(self.ours("Trainer"))
            os.kill(self.ours(name)[-1], number)

    def ours(self, *names: str) -> list[int]:
        """The run's own processes of some classes."""
        return [
            pid
            for pid in working(descendants(os.getpid()), names or WORKERS)
            if pid not in self.others
        ]

    def left(self) -> list[int]:
        """Its processes that stay; Ray's kill does not wait for them to end."""
        return still_there(self.ours())

    def on_note(self, text: str) -> None:
        if not text.startswith("start: "):
            self.notes.append(text)


def close(a: list[dict[str, float]], b: list[dict[str, float]]) -> bool:
    return a == [
        {name: nearly(value, rel=1e-4, abs=1e-5) for name, value in line.items()} for line in b
    ]


@nightly
def test_a_killed_engine_is_started_again_with_the_current_weights(
    whole: Path, tmp_path: Path
) -> None:
    engine = "TransformersWorker", signal.SIGKILL
    faults = Faults({("generate", 1): engine, ("sync_weights", 2): engine})
    nothing = RunOptions(save_every=0, max_restarts=0)
    run = execute(split(WORKLOAD), name="r", runs=tmp_path, progress=faults, options=nothing)
    assert metrics_of(run) == metrics_of(whole)
    assert (run / "log.txt").read_text().count("engine 0 in pool a died; it is started again") == 2
    assert (
        not faults.notes
        and len(faults.trainers[0]) == 2
        and faults.trainers[0] == faults.trainers[1]
    )
    assert len(Timeline.read(run / "timeline.json").spans) == 36


@nightly
def test_a_killed_rank_and_one_that_hangs_restart_from_the_last_checkpoint(
    whole: Path, tmp_path: Path
) -> None:
    plan = colocated(WORKLOAD, cores=2)
    plan = plan.model_copy(update={"predicted": predict(plan)})
    faults = Faults(
        {
            ("update_actor", 2): ("Trainer", signal.SIGSTOP),
            ("update_actor", 3): ("Trainer", signal.SIGKILL),
        }
    )
    run = execute(
        plan,
        name="r",
        runs=tmp_path,
        progress=faults,
        options=RunOptions(save_every=2, keep=2, max_restarts=2, deadline_floor=6.0),
    )
    assert close(metrics_of(run), metrics_of(whole))
    hung, killed = faults.notes
    assert (
        "update_actor of step 2 on pool all: no answer to 'train'" in hung
        and "Restart 1 of 2, from step 2" in hung
    )
    assert "update_actor of step 3" in killed and "Restart 2 of 2, from step 2" in killed
    spans = Timeline.read(run / "timeline.json").spans
    assert len({(span.call, span.step) for span in spans}) == len(spans) == 36
    assert not faults.left()


def test_too_many_restarts_end_the_run(ray_two: None, tmp_path: Path) -> None:
    faults = Faults({("update_actor", 0): ("Trainer", signal.SIGKILL)})
    plan = colocated(WORKLOAD, cores=1)
    with pytest.raises(UserError, match=r"update_actor of step 0 on pool all: .*died in train"):
        execute(plan, name="r", runs=tmp_path, progress=faults, options=OPTIONS)
    assert not faults.left()


@nightly
def test_a_killed_controller_leaves_a_run_that_can_be_resumed(whole: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    split(WORKLOAD).write(plan)
    command = [
        sys.executable,
        "-m",
        "planner.cli",
        "execute",
        str(plan),
        "--name",
        "r",
        "--runs",
        str(tmp_path),
    ]
    temporary = set(Path(tempfile.gettempdir()).glob("splitplan-*"))
    process = subprocess.Popen(
        [*command, "--save-every", "1"], start_new_session=True, cwd=Path(__file__).parents[1]
    )
    children: list[int] = []
    try:
        deadline = time.monotonic() + PATIENCE
        while not (tmp_path / "r/checkpoints/step-000001").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        children = descendants(process.pid)
        process.kill()
        process.wait()
        deadline = time.monotonic() + PATIENCE
        while (left := working(children)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(children) > 5 and not left  # Ray's agents notice later
    finally:
        end([process.pid, *children])
        for directory in set(Path(tempfile.gettempdir()).glob("splitplan-*")) - temporary:
            shutil.rmtree(directory, ignore_errors=True)
    assert not (tmp_path / "r/timeline.json").exists()
    found = checkpoint.find(tmp_path / "r")
    assert 1 <= found.manifest.step < 4
    assert metrics_of(resume(found, options=OPTIONS)) == metrics_of(whole)


class Poisoned(Training):
    """One minibatch of step 1 and all from step 3 on train on what is no number."""

    def advantages(self, task: Task) -> Done:
        done = super().advantages(task)
        column = self.steps[task.step].columns["advantages"].copy()
        if task.step == 1:
            column[0, 0] = np.inf
        elif task.step >= 3:
            column[:] = np.nan
        self.steps[task.step].columns["advantages"] = column
        return done


def test_steps_without_finite_gradients_are_left_out_counted_and_end_the_run(
    two_cores: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "Training", partial(Poisoned, fleet=two_cores))
    plan = colocated(make_workload(critic=None, reference=None, steps=8), cores=1)
    with pytest.raises(
        UserError, match="update_actor of step 6: loss or gradient was not finite in 8 optimizer"
    ):
        execute(plan, name="r", runs=tmp_path, options=RunOptions(save_every=2, keep=1))
    lines = metrics_of(tmp_path / "r")
    assert [line["actor/skipped"] for line in lines] == [0, 1, 0, 2, 2, 2]
    assert all(line["actor/grad_norm"] is not None for line in lines[:3])
    found = checkpoint.find(tmp_path / "r")
    assert (found.manifest.step, found.manifest.skipped) == (6, {"actor": 6})
    assert all(
        np.isfinite(array).all()
        for array in load_file(found.directory / "actor-00000.safetensors").values()
    )


class Filling(Silent):
    """Leaves no room on a disk when step 2 has ended."""

    def __init__(self, disk: Path) -> None:
        self.file = disk / "fill"

    def on_step(self, metrics: dict[str, Any]) -> None:
        if metrics["step"] == 2:
            with self.file.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(1024))


@nightly
def test_a_disk_that_is_full_costs_no_checkpoint(whole: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a disk")
    try:
        full = Filling(disk)
        with pytest.raises(UserError, match="cannot be written"):
            options = RunOptions(save_every=2)
            execute(split(WORKLOAD), name="r", runs=disk, progress=full, options=options)
        assert [
            path.name for path in (disk / "r/checkpoints").iterdir() if path.name != "final"
        ] == ["step-000002"]
        full.file.unlink()
        assert metrics_of(resume(checkpoint.find(disk / "r"), options=OPTIONS)) == metrics_of(whole)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
