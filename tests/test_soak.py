"""Processes killed at random times: every run ends with all its steps, each as if nothing had
happened."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import colocated, make_workload
from interrupted import metrics_of
from processes import PATIENCE, descendants, end_agents, working
from test_stream_run import asked, closed, streamed

from executor.fleet import session
from executor.running import checkpoint
from executor.running.execute import execute
from executor.running.options import RunOptions
from planner.spec.plan import Plan
from planner.spec.timeline import Timeline

STEPS = 60
VICTIMS = {"engine": "TransformersWorker", "rank": "Trainer", "controller": None}
SECONDS = 0.5  # at most, between a new step and the next kill
IN_A_START = 0.2  # of all kills do not wait for a new step
SECRETS = {
    "RAY_AUTH_TOKEN": "a-token-of-this-test",
    "HF_TOKEN": "hf_of-this-test",
    "WANDB_API_KEY": "a-key-of-this-test",
}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


class Controlled:
    """`plan execute` in a process of its own, called again with --resume when that was killed, as a
    user would."""

    def __init__(self, plan: Plan, runs: Path, temporary: str) -> None:
        self.run, self.file, self.output = runs / "r", runs / "plan.json", runs / "output.txt"
        self.environment = os.environ | {"TMPDIR": temporary, **SECRETS}
        self.pids: set[int] = set()
        plan.write(self.file)
        self.start()

    def start(self) -> None:
        options = ["--resume", str(self.run)]
        if not self.saved:  # nothing to go on from
            shutil.rmtree(self.run, ignore_errors=True)
            options = [str(self.file), "--name", "r", "--runs", str(self.run.parent)]
        command = [
            sys.executable,
            "-m",
            "planner.cli",
            "execute",
            *options,
            "--save-every",
            "3",
            "--max-restarts",
            "99",
        ]
        with self.output.open("a") as out:
            self.process = subprocess.Popen(
                command, cwd=Path(__file__).parents[1], env=self.environment, stdout=out, stderr=out
            )

    @property
    def saved(self) -> bool:
        return bool(checkpoint.listed(self.run / "checkpoints"))

    @property
    def steps(self) -> int:
        with contextlib.suppress(FileNotFoundError):
            return (self.run / "metrics.jsonl").read_bytes().count(b"\n")
        return 0

    def kill(self, victim: str, chance: random.Random) -> bool:
        """Whether there is such a process."""
        children = descendants(self.process.pid)
        self.pids.update(children, [self.process.pid])
        if victim == "controller":
            self.process.kill()
            self.process.wait()
            self.start()
            return True
        found = working(children, (VICTIMS[victim],))
        if found:
            os.kill(chance.choice(found), signal.SIGKILL)
        return bool(found)

    def soak(self, left: list[str], chance: random.Random) -> None:
        """Kill one after the other of what is left to kill, until the run has ended."""
        steps, since, at = 0, time.monotonic(), None
        while (code := self.process.poll()) != 0:
            now = time.monotonic()
            if code is not None:  # a process was killed when there was no checkpoint yet
                assert not self.saved, self.output.read_text()
                self.start()
            if self.steps != steps:
                steps, since = self.steps, now
                at = now + chance.uniform(0, SECONDS) if at is None else at
            assert now < since + PATIENCE, self.output.read_text()
            if left and at is not None and now >= at and self.kill(left[-1], chance):
                left.pop()
                at = now + chance.uniform(0, 16 * SECONDS) if chance.random() < IN_A_START else None
            time.sleep(0.01)

    def close(self) -> None:
        self.pids.update(descendants(self.process.pid), [self.process.pid])
        self.process.terminate()
        self.process.wait()


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A short path for sockets; whatever is killed, nothing is left in it when the next session
    begins: for a moment Ray's processes may outlive theirs, and write."""
    path = Path(tempfile.mkdtemp(prefix="s-"))
    yield str(path)
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    session._sweep()
    left = [str(name) for name in path.iterdir()]
    shutil.rmtree(path)
    assert not left


NIGHTLY = pytest.param(100, marks=[pytest.mark.nightly, pytest.mark.timeout(5400)])


@pytest.mark.parametrize("kills", [pytest.param(3, marks=pytest.mark.nightly), NIGHTLY])
def test_runs_outlive_kills_at_random_times(
    kills: int, on_two_cores: None, tmp_path: Path, temporary: str
) -> None:
    steps = STEPS if kills == 100 else STEPS // 2
    workload = make_workload(steps=steps, critic=None, reference=None)
    plan = colocated(workload, cores=1 if kills < 100 else 2)
    whole = execute(plan, name="whole", runs=tmp_path, options=RunOptions(save_every=0))
    for run in soaked(plan, kills, tmp_path, temporary):
        assert metrics_of(run) == metrics_of(whole)


@pytest.mark.parametrize("kills", [pytest.param(5, marks=pytest.mark.nightly), NIGHTLY])
def test_a_stream_outlives_kills_at_random_times(
    kills: int, on_two_cores: None, tmp_path: Path, temporary: str
) -> None:
    """What depends on time may differ, but no token is lost or doubled."""
    steps = STEPS if kills == 100 else STEPS // 2
    plan = streamed(k=2, steps=steps, critic=None, reference=None)
    lengths = [np.mean(of_step) for of_step in asked(plan, steps)]
    for run in soaked(plan, kills, tmp_path, temporary):
        metrics = metrics_of(run)
        assert [line["response_tokens"] for line in metrics] == pytest.approx(lengths)
        assert [line["step"] for line in metrics] == list(range(steps))
        closed(metrics)


def soaked(plan: Plan, kills: int, directory: Path, temporary: str) -> Iterator[Path]:
    """Runs of a plan, as many as it takes to kill so many of their processes; each has all steps,
    once."""
    chance, steps = random.Random(kills), plan.workload.steps
    left = [list(VICTIMS)[number % len(VICTIMS)] for number in range(kills)]
    chance.shuffle(left)
    pids: set[int] = set()
    for number in range(kills):
        if not left:
            break  # `number` runs took them all
        controlled = Controlled(plan, directory / str(number), temporary)
        try:
            controlled.soak(left, chance)
        finally:
            controlled.close()
            pids |= controlled.pids
        yield controlled.run
        spans = Counter(
            (span.call, span.step) for span in Timeline.read(controlled.run / "timeline.json").spans
        )
        written = b"".join(
            path.read_bytes() for path in controlled.run.parent.rglob("*") if path.is_file()
        )
        assert not [name for name, secret in SECRETS.items() if secret.encode() in written]
        assert set(spans.values()) == {1} and len(spans) == steps * len(plan.dataflow.calls)
    print(f"{kills} kills in {number} runs of {steps} steps, each as if nothing had happened")
    assert not left
    assert pids and not end_agents(pids)
