"""Nothing hangs silently: what is stuck, dies or runs out of memory ends a run with one line that
names it."""

import os
import re
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from conftest import colocated, make_plan, make_workload, split
from processes import PATIENCE

from executor.fleet import asking, pools
from executor.fleet.asking import Order, Rank, ask, to_each, within
from executor.fleet.worker import DiedAgain, OutOfMemory, Overdue, Record, Worker, WorkerError
from executor.running import preflight
from executor.running.execute import started
from executor.running.loop import Silent, loop
from executor.running.rehearse import Rehearsal, Sleeper
from executor.running.run import Run
from executor.running.run_directory import RunDirectory
from executor.running.step import Training
from executor.running.supervise import COLLECTIVE_SECONDS, Deadlines, memory_of, one_line
from planner.predict.forecast import predict
from planner.predict.memory import plan_memory, trainer_allowance
from planner.predict.schedule import Task, tasks_of
from planner.spec.cluster import make_cluster
from planner.spec.errors import UserError
from planner.spec.plan import Plan
from planner.spec.timeline import Span, Timeline

WORKLOAD = make_workload()
ray.cloudpickle.register_pickle_by_value(
    sys.modules[__name__]
)  # Ray's processes cannot import tests


def task_of(plan: Plan, call: str) -> Task:
    return next(task for task in tasks_of(plan, 3) if task.call.name == call)


# --- deadlines ---


def test_an_evaluation_has_time_for_all_held_out_prompts() -> None:
    """5,000 prompts are 625 batches of 8; a reward function may take 5 times its limit for each."""
    data = {"train": "x", "evaluation": "y", "evaluate_every": 1, "evaluate_first": True}
    plan = split(make_workload(data=data))
    evaluate = task_of(plan, "evaluate")
    assert Deadlines(plan=plan, held_out=4).of_call(evaluate, early=False) == 1800
    assert Deadlines(plan=plan, held_out=5000).of_call(evaluate, early=False) == 625 * 1800
    predicted = Deadlines(plan=plan, held_out=5000, predicted=lambda task: 7.0)
    assert predicted.of_call(evaluate, early=False) == 625 * 70
    reward = {"function": "rewards.py:f", "timeout_seconds": 10.0}
    judged = Deadlines(plan=split(make_workload(data=data, reward=reward)), held_out=5000)
    assert judged.of_call(evaluate, early=False) == 625 * (1800 + 50)
    assert judged.of_first_evaluation == 625 * (1800 + 50)


def test_a_deadline_is_ten_times_the_prediction_but_not_below_the_floor() -> None:
    plan = split(WORKLOAD)
    plan = plan.model_copy(update={"predicted": predict(plan)})
    assert plan.predicted is not None
    calls = {**plan.predicted.call_seconds, "update_actor": 30.0, "values": 1.0}
    plan = plan.model_copy(
        update={"predicted": plan.predicted.model_copy(update={"call_seconds": calls})}
    )
    deadlines = Deadlines(plan=plan)
    update, values = task_of(plan, "update_actor"), task_of(plan, "values")
    assert deadlines.of_call(update, early=False) == 300
    assert deadlines.of_call(update, early=True) == deadlines.of_call(values, early=True) == 600
    assert deadlines.of_call(values, early=False) == 60
    assert Deadlines(plan=plan, floor=5).of_call(values, early=False) == 10
    assert Deadlines(plan=plan, predicted=lambda task: 7.0).of_call(values, early=False) == 70
    assert (
        Deadlines(plan=split(WORKLOAD)).of_call(values, early=False) == 1800
    )  # nothing is predicted


def test_a_deadline_follows_responses_that_grow() -> None:
    """What is predicted as 7 s takes 20 s: the next call may take 200 s, and with three times the
    tokens 600 s. An evaluation of 5,000 prompts is 625 batches of 8."""
    data = {"train": "x", "evaluation": "y", "evaluate_every": 1}
    plan = split(make_workload(data=data))
    deadlines = Deadlines(plan=plan, held_out=5000, predicted=lambda task: 7.0)
    update, evaluate = task_of(plan, "update_actor"), task_of(plan, "evaluate")
    later = replace(update, step=1)
    deadlines.note(took("generate", 0, 12.0, tokens=100))
    deadlines.note(took("update_actor", 0, 20.0))
    assert deadlines.of_call(later, early=False) == 200
    assert deadlines.why(later, 200) == " (200 s allowed, 7 s predicted, 20 s lately)"
    deadlines.note(took("generate", 1, 36.0, tokens=300))
    assert deadlines.of_call(later, early=False) == 600
    assert deadlines.of_call(evaluate, early=False) == 625 * 360
    deadlines.note(took("evaluate", 0, 625 * 40.0))
    assert deadlines.of_call(evaluate, early=False) == 625 * 400
    for step in range(2, 5):  # only the latest calls count
        deadlines.note(took("update_actor", step, 1.0))
    assert deadlines.of_call(replace(update, step=5), early=False) == 70
    deadlines.note(took("values", 5, 1.0))  # of a run that had a critic: it is passed over
    assert deadlines.of_call(evaluate, early=False) < COLLECTIVE_SECONDS


def took(call: str, step: int, seconds: float, tokens: int = 0) -> Span:
    return Span(
        call=call,
        role="actor",
        pools=(),
        step=step,
        issued=0.0,
        ready=0.0,
        start=1.0,
        end=1.0 + seconds,
        tokens=tokens,
    )


class Stuck(Rehearsal):
    """One process of pool b sleeps for ever in the second step's update of the critic."""

    def run(self, task: Task) -> tuple[list[Record], int]:
        if (task.call.name, task.step) != ("update_critic", 1):
            return super().run(task)
        ranks = self.ranks["b"]
        seconds = [1e6 if number == 1 else 0.0 for number in range(len(ranks))]
        orders = [rank.order(Sleeper.sleep, s) for rank, s in zip(ranks, seconds, strict=True)]
        return ask(orders).records, 0


def test_a_process_that_sleeps_for_ever_ends_the_run_with_its_name(
    ray_two: None, tmp_path: Path
) -> None:
    home = {"actor": "a", "rollout": "a", "reference": "a", "critic": "b", "reward": "b"}
    plan = make_plan(WORKLOAD, {"a": 1, "b": 2}, home)
    backend = Stuck(plan, lambda _: 0.01)
    backend.deadlines = Hurried(
        plan=plan, floor=0.3, predicted=lambda _: 0.01, call="update_critic"
    )
    handles = [rank.handle for ranks in backend.ranks.values() for rank in ranks]
    try:
        with pytest.raises(UserError) as error:
            directory = RunDirectory(tmp_path / "r", tensorboard=False)
            Run(plan, 4, backend, directory, Silent()).finish()
    finally:
        backend.close()
    line = str(error.value)
    who = r"update_critic of step 1 on pool b: no answer to 'sleep' for \d+ s from process 1"
    assert re.match(who + r" of pool b \(", line)
    assert (
        "(3 s allowed, 0.01 s predicted" in line and "--deadline-floor" in line and "\n" not in line
    )
    done = {
        (span.call, span.step) for span in Timeline.read(tmp_path / "r" / "timeline.json").spans
    }
    assert ("update_critic", 0) in done and ("update_critic", 1) not in done
    assert line in (tmp_path / "r" / "log.txt").read_text()
    with pytest.raises(WorkerError, match="died"):
        ask(to_each([Rank(name="it", handle=handle) for handle in handles], Worker.now))


@pytest.mark.nightly
def test_a_trainer_that_sleeps_for_ever_is_named_with_those_who_wait_for_it(ray_two: None) -> None:
    plan = colocated(WORKLOAD, cores=2, layouts={"rollout": {"replicas": 1}})
    backend = Training(plan, preflight.check(plan, local=True))
    try:
        backend.deadlines = Hurried(
            plan=plan, floor=0.2, predicted=lambda _: 0.01, call="ref_logprobs"
        )
        backend.processes.trainers["all"][1].handle.__ray_call__.remote(lambda _: time.sleep(1e6))
        with pytest.raises(
            UserError,
            match=r"^ref_logprobs of step 0 on pool all: no answer to 'infer' for \d+ s from",
        ):
            tasks = [
                task_of(plan, "generate"),
                replace(task_of(plan, "ref_logprobs"), index=1, after=(0,), waits=()),
            ]
            loop(tasks, backend, {}, Silent())
    finally:
        backend.close()


@dataclass(frozen=True, kw_only=True)
class Hurried(Deadlines):
    """All but one call may take long, for the machine may be busy."""

    call: str

    def of_call(self, task: Task, early: bool) -> float:
        return super().of_call(task, early) if task.call.name == self.call else PATIENCE


class Slow(Worker):
    """A process that does not get up."""

    def __init__(self) -> None:
        super().__init__()
        time.sleep(1e6)


def test_a_start_that_hangs_leaves_a_log(ray_two: None, tmp_path: Path) -> None:
    plan = colocated(WORKLOAD)
    ranks = [replace(pools.start(Slow), name="trainer 0 of pool all")]

    def start() -> Any:
        with within(0.5):
            pools.connect(ranks)

    try:
        with pytest.raises(
            UserError, match=r"^the start: no answer to 'now' for \d+ s from trainer 0 of pool all"
        ):
            started(Deadlines(plan=plan), tmp_path / "r", start)
    finally:
        pools.stop(ranks)
    assert "no answer to 'now'" in (tmp_path / "r" / "log.txt").read_text()


class Crashing(Worker):
    def crash(self) -> None:
        print("a fatal error", file=sys.stderr, flush=True)
        os._exit(1)


def test_a_process_that_crashes_leaves_its_last_words(ray_two: None, tmp_path: Path) -> None:
    plan = colocated(WORKLOAD)
    ranks = pools.connect([replace(pools.start(Crashing), name="it")])

    def crash() -> Any:
        return ask(to_each(ranks, Crashing.crash))

    with pytest.raises(UserError, match=r"^the start: it died in crash"):
        started(Deadlines(plan=plan), tmp_path / "r", crash)
    said = (tmp_path / "r" / "log.txt").read_text()
    assert "a fatal error" in said and ":actor_name:" not in said


def test_the_inner_deadline_may_only_be_sooner(ray_two: None) -> None:
    ranks = pools.connect([replace(pools.start(Sleeping), name="it")])
    try:
        with within(0.2), within(1e6), pytest.raises(Overdue, match="from it"):
            ask(to_each(ranks, Sleeping.sleep))
    finally:
        pools.stop(ranks)


def test_what_a_new_process_takes_to_start_is_not_counted(
    ray_two: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that is put forward, for what is really asked may take any time."""
    fresh, dying = pools.connect([replace(pools.start(Sleeping), name="it") for _ in range(2)])
    ahead = 0.0
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead)
    monkeypatch.setattr(asking, "time", clock)

    def revive(dead: Rank[Sleeping]) -> Rank[Sleeping]:
        nonlocal ahead
        assert dead == dying
        ahead += 2 * PATIENCE
        with within(PATIENCE, anew=True):
            ask([fresh.order(Sleeping.sleep, 0.0)])
        return fresh

    try:
        with within(PATIENCE):
            pools.stop([dying])
            assert ask([dying.order(Sleeping.sleep, 0.2)], revive=revive).results == [0.2]
            ahead += PATIENCE
            with pytest.raises(Overdue):
                ask([fresh.order(Sleeping.sleep)])
    finally:
        pools.stop([fresh])


def test_an_order_that_ends_every_process_is_not_sent_forever(ray_two: None) -> None:
    """Another order, answered by a process that lives, does not count."""
    lives = replace(pools.start(Sleeping), name="engine 0")
    dies = [replace(pools.start(Crashing), name="engine 1") for _ in range(3)]
    asked_for: list[str] = []

    def revive(dead: Rank[Crashing]) -> Rank[Crashing]:
        asked_for.append(dead.name)
        return dies[len(asked_for)]

    line = r"^engine 1 died in crash \(.*\), and so did the 2 in its place$"
    orders: list[Order[Any]] = [lives.order(Sleeping.sleep, 0.1), dies[0].order(Crashing.crash)]
    try:
        with within(PATIENCE), pytest.raises(DiedAgain, match=line) as raised:
            ask(orders, revive=revive)
    finally:
        pools.stop([lives, *dies])
    assert raised.value.number == 1 and asked_for == ["engine 1"] * 2


class Sleeping(Worker):
    def sleep(self, seconds: float = 1e6) -> float:
        time.sleep(seconds)
        return seconds


# --- failures on a process ---


class Failing(Worker):
    def grow(self) -> None:
        torch.zeros(2**60)

    def fail(self) -> None:
        raise RuntimeError("no space\nleft")

    def peak(self) -> dict[str, int]:
        return {"used": 140_900_000_000, "allocated": 99_000_000_000}


@pytest.fixture
def failing(ray_two: None) -> Any:
    ranks = pools.connect([replace(pools.start(Failing), name="trainer 0 of pool all")])
    yield ranks
    pools.stop(ranks)


def test_out_of_memory_says_what_was_predicted_and_what_to_change(failing: Any) -> None:
    layouts = {"actor": {"micro_batch_tokens": 4096, "shard": 1}}
    plan = colocated(WORKLOAD, cores=2, layouts=layouts)
    with pytest.raises(OutOfMemory) as caught:
        ask(to_each(failing, Failing.grow))
    assert caught.value.peak["used"] == 140_900_000_000
    with (
        pytest.raises(UserError) as error,
        one_line(plan, "update_actor of step 2", ("all",), "update_actor"),
    ):
        raise caught.value
    line = str(error.value)
    memory = plan_memory(plan)["all"]
    for part in (
        "update_actor of step 2: out of memory in 'grow' on trainer 0 of pool all",
        f"pool all was predicted {memory.peak / 1e9:.1f} GB of {memory.allowed / 1e9:.1f} GB "
        "allowed per GPU",
        "the GPU had 140.9 GB in use at the peak, of which this process's tensors 99.0 GB",
        "lower roles.actor.micro_batch_tokens (now 4096), or set roles.actor.recompute to true, or "
        "raise roles.actor.",
    ):
        assert part in line
    assert "\n" not in line and "roles.rollout.memory" not in line
    with (
        pytest.raises(UserError) as error,
        one_line(plan, "generate of step 0", ("all",), "generate"),
    ):
        raise caught.value
    assert "lower roles.rollout.memory_fraction (now 0.4)" in str(error.value)


@pytest.mark.parametrize(
    ("text", "about_memory"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB.", True),
        ("No available memory for the cache blocks. Try increasing `gpu_memory_utilization`", True),
        (
            "Free memory on device cuda:0 (9/140 GiB) on startup is less than desired GPU memory "
            "utilization",
            True,
        ),
        ("an illegal memory access was encountered", False),
    ],
)
def test_what_counts_as_out_of_memory(text: str, about_memory: bool) -> None:
    class Raising(Worker):
        def work(self) -> None:
            try:
                raise ValueError(text)
            except ValueError as error:
                raise RuntimeError("the engine core failed") from error

    with pytest.raises(OutOfMemory if about_memory else RuntimeError):
        Raising().call("work")


def test_a_failing_export_is_one_line(failing: Any, tmp_path: Path) -> None:
    plan = split(WORKLOAD)

    class Full(Rehearsal):
        def export(self, directory: Path) -> None:
            ask(to_each(failing, Failing.fail))

    backend = Full(plan, lambda task: 0.0)
    try:
        with pytest.raises(
            UserError,
            match=r"^export of the models: fail failed on trainer 0 .*RuntimeError: no space",
        ):
            directory = RunDirectory(tmp_path / "r", tensorboard=False)
            Run(plan, 1, backend, directory, Silent()).finish()
    finally:
        backend.close()
    assert "RuntimeError: no space" in (tmp_path / "r" / "log.txt").read_text()


def test_on_gpus_it_says_what_trainers_may_take() -> None:
    plan = colocated(WORKLOAD, cluster=make_cluster(2, "h200", 2))
    line = memory_of(plan, ["all"], OutOfMemory("full", {"used": 5 * 10**9, "allocated": 10**9}))
    assert (
        f"allowed per GPU, its trainers may take {trainer_allowance(plan, 'all') / 1e9:.1f} GB"
        in line
    )
    assert "at the peak" in line
