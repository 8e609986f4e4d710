"""The loop with sleeping processes: the order of the schedule, real overlap, and nothing left
behind."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import colocated, cpu_cluster, make_plan, make_workload, split
from processes import PATIENCE, descendants, end, listening, still_there

from executor.fleet.signals import (
    ENDING,
    REPEAT_SECONDS,
    check_interrupted,
    interruptible,
    unrepeated,
)
from executor.fleet.worker import Overdue, Record, WorkerError
from executor.running import checkpoint
from executor.running.execute import rehearse
from executor.running.generating import check_agreement
from executor.running.loop import Course, Silent, loop
from executor.running.options import RunOptions
from executor.running.recorded import Recorded
from executor.running.rehearse import Rehearsal
from executor.running.run import Run
from executor.running.run_directory import RunDirectory, log
from executor.running.said import Said
from executor.running.saving import Saver, Snapshot
from executor.running.supervise import Deadlines
from planner.predict.schedule import Task, tasks_of
from planner.predict.simulate import simulate
from planner.spec.errors import UserError
from planner.spec.files import read_data
from planner.spec.plan import Plan
from planner.spec.timeline import Span, Timeline

SECONDS = {
    "generate": 0.10,
    "score": 0.02,
    "ref_logprobs": 0.03,
    "old_logprobs": 0.03,
    "values": 0.04,
    "advantages": 0.01,
    "update_critic": 0.10,
    "update_actor": 0.12,
    "sync_weights": 0.02,
}


def seconds(task: Task) -> float:
    return SECONDS[task.call.name]


def one_step_off() -> Plan:
    """Rollout on its own core, generating for the next step while the others train."""
    roles = {"rollout": "g", "actor": "t", "critic": "c", "reference": "t", "reward": "c"}
    return make_plan(
        make_workload(),
        {"g": 1, "t": 1, "c": 1},
        roles,
        offsets={"generate": 1},
        staleness=1,
        name="one-step-off",
    )


def slow_updates(task: Task) -> float:
    """Generation and updates take so long that it hardly matters when a busy machine begins
    them."""
    long = task.call.name in ("generate", "update_critic", "update_actor")
    return 1.0 if long else 0.01


def rehearsed(
    plan: Plan, steps: int, seconds: Callable[[Task], float] = seconds
) -> tuple[list[Task], list[Span]]:
    tasks = tasks_of(plan, steps)
    spans: dict[int, Span] = {}
    backend = Rehearsal(plan, seconds)
    try:
        loop(tasks, backend, spans, Silent())
    finally:
        backend.close()
    return tasks, [spans[task.index] for task in tasks]


@pytest.mark.parametrize(
    "make", [lambda: colocated(make_workload()), lambda: split(make_workload()), one_step_off]
)
def test_precedence_and_the_order_on_each_pool_are_those_of_the_simulation(
    ray_two: None, make
) -> None:
    plan = make()
    tasks, measured = rehearsed(plan, 4)
    simulated = simulate(tasks, seconds)
    for task in tasks:
        for before in task.after:
            assert measured[before].end <= measured[task.index].start
    for pool in plan.pools:
        orders = [
            [(s.call, s.step) for s in sorted(spans, key=lambda s: s.start) if pool in s.pools]
            for spans in (measured, simulated)
        ]
        assert orders[0] == orders[1]


def overlap(a: Span, b: Span) -> float:
    """Common seconds as a share of the shorter span."""
    return (min(a.end, b.end) - max(a.start, b.start)) / min(a.seconds, b.seconds)


def test_the_two_updates_run_side_by_side(ray_two: None) -> None:
    _, spans = rehearsed(split(make_workload()), 2, slow_updates)
    of = {(span.call, span.step): span for span in spans}
    assert all(
        overlap(of["update_actor", step], of["update_critic", step]) >= 0.5 for step in range(2)
    )


def test_generation_of_the_next_step_runs_beside_the_updates(ray_two: None) -> None:
    _, spans = rehearsed(one_step_off(), 4, slow_updates)
    of = {(span.call, span.step): span for span in spans}
    assert all(
        overlap(of["generate", step + 1], of["update_actor", step]) > 0 for step in range(1, 3)
    )


def test_a_rehearsal_writes_a_run_directory(ray_two: None, tmp_path: Path) -> None:
    plan = split(make_workload())
    path = rehearse(plan, seconds, name="r", runs=tmp_path, options=RunOptions(steps=3))
    timeline = Timeline.read(path / "timeline.json")
    assert timeline.source == "measured" and len(timeline.spans) == 27 and timeline.warmup == 1
    assert all(span.seconds >= SECONDS[span.call] for span in timeline.spans)
    assert read_data(path / "plan.json")["name"] == "split"
    assert len((path / "metrics.jsonl").read_text().splitlines()) == 3
    with pytest.raises(UserError, match="--name"):
        rehearse(plan, seconds, name="r", runs=tmp_path, options=RunOptions(steps=3))


def test_more_ranks_than_cores_rehearse(ray_two: None, tmp_path: Path) -> None:
    roles = {"actor": "a", "rollout": ["a", "b"], "reference": "a", "critic": "b", "reward": "b"}
    plan = make_plan(make_workload(), {"a": 4, "b": 4}, roles, cluster=cpu_cluster(8))
    path = rehearse(plan, seconds, name="r", runs=tmp_path, options=RunOptions(steps=2))
    assert len(Timeline.read(path / "timeline.json").spans) == 18


class Quick:
    """A backend whose calls take no time, and of which one may fail."""

    def __init__(self, fails: int = 0) -> None:
        self.deadlines = Deadlines(plan=colocated(make_workload()))
        self.calls, self.fails = 0, fails

    def run(self, task: Task) -> tuple[list[Record], int]:
        self.calls += 1
        if self.calls == self.fails:
            raise UserError("the reward function is wrong")
        now = time.perf_counter()
        return [Record(start=now, end=now)], 0

    def end_step(self, step: int) -> dict[str, float]:
        return {"step": step}

    def said(self) -> list[Said]:
        return []

    def snapshot(self, directory: Path) -> Snapshot:
        raise AssertionError("there is nothing to save")

    def export(self, directory: Path) -> None: ...
    def close(self) -> None: ...


def test_a_failed_call_ends_the_loop_and_what_was_done_is_kept() -> None:
    spans: dict[int, Span] = {}
    with pytest.raises(UserError, match="reward function"):
        loop(tasks_of(colocated(make_workload()), 2), Quick(fails=3), spans, Silent())
    assert [span.call for span in spans.values()] == ["generate", "score"]


@pytest.mark.slow
def test_a_call_that_ray_holds_up_ends_the_run() -> None:
    """It waits for nothing that has a deadline, as when Ray takes no data."""
    held = threading.Event()

    class Held(Quick):
        def run(self, task: Task) -> tuple[list[Record], int]:
            if task.call.name == "score":
                held.wait()
            return super().run(task)

    backend, plan = Held(), colocated(make_workload())
    backend.deadlines = Deadlines(plan=plan, floor=0.1, predicted=lambda task: 0.01)
    try:
        with pytest.raises(UserError, match="score of step 0: Ray itself has not answered for"):
            loop(tasks_of(plan, 2), backend, {}, Silent())
    finally:
        held.set()


def test_a_step_of_which_nothing_is_left_ends_first() -> None:
    """As after a resume under a plan that does not evaluate it."""
    tasks = tasks_of(colocated(make_workload()), 3)
    backend, course = Quick(), Course(ended={t.index for t in tasks if t.step < 2}, next_step=1)
    told: list[int] = []
    progress = Silent()
    progress.on_step = lambda metrics: told.append(metrics["step"])  # type: ignore[method-assign]
    loop(tasks, backend, {}, progress, course)
    assert told == [1, 2] and course.next_step == 3


def test_the_clock_begins_after_the_evaluation_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation puts our clock forward by a day."""
    day, ahead, now = 86400.0, 0.0, time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: now() + ahead)

    class Evaluated(Quick):
        def evaluate_first(self) -> dict[str, float]:
            nonlocal ahead
            ahead += day
            return {"score": 0.5}

    data = {"train": "x", "evaluation": "y", "evaluate_every": 1, "evaluate_first": True}
    directory = RunDirectory(tmp_path / "r", tensorboard=False)
    Run(colocated(make_workload(data=data)), 2, Evaluated(), directory, Silent()).finish()
    spans = Timeline.read(tmp_path / "r" / "timeline.json").spans
    assert 0 <= spans[0].start <= spans[-1].end < day
    assert "before the first step: score 0.500" in (tmp_path / "r" / "log.txt").read_text()


class Interrupted(RunDirectory):
    """Ctrl-C comes before the run has begun."""

    def open(self, plan: Plan, *, metrics: bytes = b"", samples: str = "", step: int = 0) -> None:
        super().open(plan, metrics=metrics, samples=samples, step=step)
        raise KeyboardInterrupt


def test_a_run_directory_never_lacks_its_timeline(tmp_path: Path) -> None:
    plan = colocated(make_workload())
    with pytest.raises(KeyboardInterrupt):
        Run(plan, 2, Quick(), Interrupted(tmp_path / "r", tensorboard=False), Silent()).finish()
    timeline = Timeline.read(tmp_path / "r" / "timeline.json")
    assert timeline.steps == 2 and not timeline.spans
    assert "ended by an interrupt" in (tmp_path / "r" / "log.txt").read_text()


def files_of_log() -> list[logging.FileHandler]:
    return [handler for handler in log.handlers if isinstance(handler, logging.FileHandler)]


class Full(RunDirectory):
    """Its disk is full."""

    def open(self, plan: Plan, *, metrics: bytes = b"", samples: str = "", step: int = 0) -> None:
        super().open(plan, metrics=metrics, samples=samples, step=step)
        with Path("/dev/full").open("w") as full:
            for file in (self._metrics, *(handler.stream for handler in files_of_log())):
                os.dup2(full.fileno(), file.fileno())


@pytest.mark.skipif(sys.platform != "linux", reason="writes to /dev/full")
def test_a_disk_too_full_for_metrics_ends_the_run_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = colocated(make_workload())
    with pytest.raises(
        UserError, match=r"metrics.jsonl: cannot be written \(No space left on device\); make room"
    ):
        Run(plan, 2, Quick(), Full(tmp_path / "r", tensorboard=False), Silent()).finish()
    assert Timeline.read(tmp_path / "r" / "timeline.json").spans
    assert capfd.readouterr().err == ""
    assert not files_of_log()


def test_a_last_checkpoint_that_cannot_be_written_is_told_at_the_end(tmp_path: Path) -> None:
    """A file stands where the checkpoints' directory would be."""
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "checkpoints").touch()
    saver = Saver(tmp_path / "r" / "checkpoints", every=1, keep=2)
    directory = RunDirectory(tmp_path / "r", tensorboard=False)
    with pytest.raises(
        UserError,
        match=r"all 2 steps are done .* the last checkpoint could not be written \(.*Not a",
    ):
        Run(colocated(make_workload()), 2, Quick(), directory, Silent(), saver=saver).finish()
    assert Timeline.read(tmp_path / "r" / "timeline.json").steps == 2


class SlowlyWritten(Quick):
    """Its checkpoints take as long as `written` says nothing; the first call of step 1 fails."""

    def __init__(self, written: Callable[[], list[Any] | None], cause: Exception | None) -> None:
        super().__init__()
        self.deadlines = Deadlines(plan=colocated(make_workload()), floor=0.1)
        self.written, self.cause = written, cause

    def run(self, task: Task) -> tuple[list[Record], int]:
        if task.step == 1:
            raise UserError("the reward function is wrong") from self.cause
        return super().run(task)

    def snapshot(self, directory: Path) -> Snapshot:
        return Snapshot(
            arrays={},
            metrics={},
            evaluations={},
            skipped={},
            kl_coef=None,
            written=self.written,
        )


def checkpoint_after_failure(backend: SlowlyWritten, path: Path) -> bool:
    """Whether the checkpoint of step 0 is there when the run has failed in step 1."""
    saver = Saver(path / "checkpoints", every=1, keep=2)
    directory = RunDirectory(path, tensorboard=False)
    with pytest.raises(UserError, match="reward function"):
        Run(colocated(make_workload()), 3, backend, directory, Silent(), saver=saver).finish()
    return (path / "checkpoints" / "step-000001").exists()


def test_a_checkpoint_that_is_being_written_outlives_the_failure(tmp_path: Path) -> None:
    looks = iter([None] * 10)
    backend = SlowlyWritten(lambda: next(looks, [({}, {})]), WorkerError("trainer 0 died"))
    assert checkpoint_after_failure(backend, tmp_path / "r")


def test_a_checkpoint_whose_processes_hang_does_not_hold_up_the_end(tmp_path: Path) -> None:
    over = threading.Event()
    backend = SlowlyWritten(lambda: [({}, {})] if over.is_set() else None, Overdue("trainer 0"))
    try:
        assert not checkpoint_after_failure(backend, tmp_path / "r")
    finally:
        over.set()


def test_what_a_thread_of_a_library_raises_is_for_the_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory, hook = RunDirectory(tmp_path / "r", tensorboard=False), threading.excepthook
    directory.open(colocated(make_workload()))
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    directory.close()
    assert "a thread ended by ZeroDivisionError" in (tmp_path / "r" / "log.txt").read_text()
    assert capfd.readouterr().err == "" and threading.excepthook is hook


def test_a_signal_that_comes_twice_is_handled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    handled: list[int] = []

    def handle(number: int, _: object) -> None:
        handled.append(number)
        once(number, None)  # the second one, in the middle of it

    once = unrepeated(handle)
    clock = [100.0]

    def now() -> float:
        once(signal.SIGTERM, None)  # the second one, before the first is known to have come
        return clock[0]

    monkeypatch.setattr("executor.fleet.signals.time.monotonic", now)
    once(signal.SIGTERM, None)
    clock[0] += 0.1
    once(signal.SIGTERM, None)
    assert handled == [signal.SIGTERM]
    clock[0] += 0.15  # from the one that was handled
    once(signal.SIGTERM, None)
    assert handled == [signal.SIGTERM] * 2


@pytest.fixture
def no_run_around(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The signals of a process in which nothing runs; a session of Ray around a test takes them."""
    monkeypatch.setattr("executor.fleet.signals._asked", threading.Event())
    before = {number: signal.getsignal(number) for number in ENDING}
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)
    time.sleep(REPEAT_SECONDS)  # or an interrupt would be taken for the one of another test
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Interrupts:
    """An interrupt comes where Python cannot raise: in a finalizer, as where an import ends."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


class Loses(Silent):
    def on_start(self, task: Task) -> None:
        Interrupts()


@pytest.mark.usefixtures("no_run_around")
def test_an_interrupt_that_python_loses_is_raised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", lambda args: lost.append(args.exc_type))
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with interruptible():
        with interruptible():
            Interrupts()
        assert lost == [KeyboardInterrupt]
        with pytest.raises(KeyboardInterrupt):
            check_interrupted()
    check_interrupted()  # of the next run nobody has asked anything
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.usefixtures("no_run_around")
def test_a_loop_ends_by_an_interrupt_that_python_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.unraisablehook", lambda args: None)
    spans: dict[int, Span] = {}
    with interruptible(), pytest.raises(KeyboardInterrupt):
        loop(tasks_of(colocated(make_workload()), 1), Quick(), spans, Loses())
    assert len(spans) <= 1


@pytest.mark.ray
@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_interrupts_end_a_run_whose_ray_was_stopped(tmp_path: Path) -> None:
    plan, root = tmp_path / "plan.json", Path(__file__).parents[1]
    colocated(make_workload(), cores=1).write(plan)
    command = [sys.executable, "-m", "planner.cli", "execute", str(plan), "--name", "r"]
    command += ["--runs", str(tmp_path), "--steps", "5000", "--save-every", "1000"]
    process = subprocess.Popen(
        command, start_new_session=True, cwd=root, text=True, stderr=subprocess.PIPE
    )
    children: list[int] = []
    try:
        deadline, metrics = time.monotonic() + PATIENCE, tmp_path / "r" / "metrics.jsonl"
        while not metrics.exists() or not metrics.read_text():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        children = descendants(process.pid)
        for pid in children:
            if b"/raylet" in Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0]:
                os.kill(pid, signal.SIGSTOP)
        time.sleep(1)  # until calls wait for it
        for _ in range(2):
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(1)  # or it would count as one
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 130 and "plan: interrupted" in errors
        assert "Traceback" not in errors and "Started a local Ray" not in errors
        assert not still_there(children)
    finally:
        end([process.pid, *children])
        process.wait()


@pytest.mark.ray
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("number", "rehearse"),
    [
        (signal.SIGINT, False),
        (signal.SIGTERM, True),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.nightly),
        (signal.SIGHUP, True),
        pytest.param(signal.SIGHUP, False, marks=pytest.mark.nightly),
    ],
)
def test_an_interrupt_leaves_no_process(
    tmp_path: Path, number: signal.Signals, rehearse: bool
) -> None:
    """In a working directory with a package of our name, and with a long path for temporary
    files, as Slurm sets it."""
    plan = tmp_path / "plan.json"
    (tmp_path / "planner").mkdir()
    (tmp_path / "planner" / "__init__.py").touch()
    temporary = tmp_path / "slurm-job-1234567"
    temporary.mkdir()
    colocated(make_workload(), cores=1).write(plan)
    command = [
        sys.executable,
        "-P",
        "-m",
        "planner.cli",
        "execute",
        str(plan),
        "--name",
        "r",
        "--runs",
        str(tmp_path),
    ]
    command += ["--steps", "5000", *(["--rehearse"] if rehearse else [])]
    root = Path(__file__).parents[1]
    process = subprocess.Popen(
        command,
        start_new_session=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root), "TMPDIR": str(temporary)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    children: list[int] = []
    try:
        deadline = time.monotonic() + PATIENCE
        while not (tmp_path / "r" / "log.txt").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        children = descendants(process.pid)
        open_at = listening([process.pid, *children])
        if number in (signal.SIGINT, signal.SIGHUP):  # as a terminal sends them
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid, number)
            os.kill(process.pid, number)  # timeout(1) sends it twice
        _, errors = process.communicate(timeout=PATIENCE)
        told = "plan: interrupted"
        if not rehearse:  # the way to go on is the last line
            told += f" and saved; go on with: plan execute --resume {tmp_path / 'r'} --steps 5000"
        said_last = "" if number == signal.SIGHUP else told  # there is no terminal
        assert process.returncode == 130 and errors.strip() == said_last, errors
        assert len(children) > 5 and not still_there(children)
        assert open_at == {"127.0.0.1"}  # of all of them, Ray's and torch's
        timeline = Timeline.read(tmp_path / "r" / "timeline.json")
        assert timeline.steps == 5000
        if not rehearse:  # all that was begun before the last checkpoint has ended
            ended = max(span.step for span in timeline.spans if span.call == "sync_weights")
            assert checkpoint.find(tmp_path / "r").manifest.step == ended + 1
            log = (tmp_path / "r" / "log.txt").read_text()
            assert "stopping after this step with a last checkpoint" in log
            assert log.rstrip().endswith(f"ended by an interrupt: {told.removeprefix('plan: ')}")
    finally:
        end([process.pid, *children])
        process.wait()


class Notes(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def on_note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize(("shares", "warned"), [((0.95, 1.0), 1), ((0.5, 1.0), 0)])
def test_a_first_batch_of_truncated_responses_is_told_once(
    tmp_path: Path, shares: tuple[float, ...], warned: int
) -> None:
    notes, directory = Notes(), RunDirectory(tmp_path / "r", tensorboard=False)
    plan = colocated(make_workload())
    directory.open(plan)
    recorded = Recorded(plan, Quick(), Course(), directory, notes, ())
    for step, share in enumerate(shares):
        recorded.on_step({"step": step, "truncated_share": share})
    directory.close()
    assert len(notes.notes) == warned
    assert all("95% of the responses of step 0 were cut" in note for note in notes.notes)


def test_an_engine_that_computes_another_model_ends_the_first_step() -> None:
    plan = colocated(make_workload())
    check_agreement(0.05, plan)  # rounding to bf16
    said = rf"differ by 2\.2 a token between the engine \({plan.rollout.engine}\) and training"
    with pytest.raises(UserError, match=said):
        check_agreement(2.248, plan)
