"""Engines that stream, against a simulation of every token."""

from collections import deque
from typing import Any

import numpy as np
import pytest
from conftest import SERIAL, make_plan, small_workload

from planner.predict.cost import CostModel
from planner.predict.forecast import forecast, predict
from planner.predict.kv_cache import BLOCK_TOKENS, held_tokens
from planner.predict.memory import rollout_fraction
from planner.predict.memory_check import check_memory
from planner.predict.schedule import tasks_of
from planner.predict.speed import Speed
from planner.predict.stream import Request, StreamEngine, Submitted
from planner.predict.streamed import stream_run
from planner.spec.cluster import Cluster, Device, Node
from planner.spec.errors import UserError
from planner.spec.plan import Plan
from planner.spec.timeline import mean_call_seconds, step_seconds

SPEED = Speed(
    weights=0.011,
    arithmetic=0.0031,
    attention=2.3e-6,
    step=0.0015,
    sequence=1.7e-4,
    prefill_token=2.9e-5,
    prefill_square=1.1e-9,
)
A_SECOND_EACH = Speed(
    weights=1.0, arithmetic=0, attention=0, step=0, sequence=0, prefill_token=0, prefill_square=0
)


def together(requests: list[Request]) -> Submitted:
    """Submitted of one step, as an engine takes them."""
    _, prompts, responses, prefills = map(np.array, zip(*requests, strict=True))
    return Submitted(requests[0].step, prompts, responses, prefills.astype(bool))


class EveryToken:
    """The same engine, token by token: `run(until)` takes one decoding step after the other."""

    def __init__(self, speed: Speed, slots: int) -> None:
        self.speed, self.slots, self.now = speed, slots, 0.0
        self.active: list[list[int]] = []  # step of the training, tokens so far, tokens left
        self.waiting = deque[Request]()
        self.ended: list[tuple[int, float]] = []

    def fill(self) -> None:
        while self.waiting and len(self.active) < self.slots:
            request = self.waiting.popleft()
            self.active.append([request.step, request.prompt, request.response])
            self.now += self.speed.prefill(request.prompt) * request.prefills

    def run(self, until: float) -> None:
        while self.active and self.now < until:
            context = sum(tokens for _, tokens, _ in self.active)
            self.now += self.speed.matrices(len(self.active)) + self.speed.attention * context
            for sequence in self.active:
                sequence[1] += 1
                sequence[2] -= 1
            self.ended += [(step, self.now) for step, _, left in self.active if not left]
            self.active = [sequence for sequence in self.active if sequence[2]]
            self.fill()

    def submit(self, at: float, requests: list[Request]) -> None:
        self.run(at)
        self.now = max(self.now, at)
        self.waiting.extend(requests)
        self.fill()

    def interrupt(self, start: float, end: float, *, recompute: bool) -> None:
        self.run(start)
        self.now = max(self.now, end)
        if recompute:
            self.now += sum(self.speed.prefill(tokens) for _, tokens, _ in self.active)


def test_the_example_of_the_module():
    engine = StreamEngine(A_SECOND_EACH, slots=8)
    engine.submit(0.0, together([Request(0, 4, 2), Request(0, 4, 5)]))
    engine.submit(2.5, together([Request(1, 4, 3)]))
    assert (engine.now, engine.steps) == (3.0, 3)
    engine.interrupt(3.5, 10.0, recompute=False)
    assert (engine.end_of(0), engine.end_of(1)) == (11.0, 12.0)


@pytest.mark.parametrize("slots", [1, 3, 7, 100])
@pytest.mark.parametrize("recompute", [False, True])
def test_an_engine_does_as_every_token_alone(slots, recompute):
    rng = np.random.default_rng([slots, recompute])
    engine, reference, at = StreamEngine(SPEED, slots), EveryToken(SPEED, slots), 0.0
    for step in range(25):
        prompts, responses = rng.integers(1, 40, 6), rng.integers(1, 90, 6)
        prefills = rng.integers(0, 2, 6).astype(bool)
        batch = list(map(Request, [step] * 6, prompts.tolist(), responses.tolist(), prefills))
        engine.submit(at, together(batch))
        reference.submit(at, batch)
        for each in (engine, reference):
            each.interrupt(at + 0.4, at + 0.4 + 0.1 * (step % 3), recompute=recompute)
        at += float(rng.uniform(0.5, 2.5))
    reference.run(np.inf)
    for step in range(25):
        last = max(end for of, end in reference.ended if of == step)
        assert engine.end_of(step) == pytest.approx(last, rel=1e-12)
    assert sorted(engine.ended) == [
        (of, pytest.approx(end, rel=1e-12)) for of, end in sorted(reference.ended)
    ]


SLOW_LINKS = Device(
    kind="cuda",
    memory_bytes=80 * 10**9,
    flops=3e14,
    memory_bandwidth=2e11,
    link_bandwidth=2e10,
    host_bandwidth=2e10,
    overhead_seconds=0.02,
)


def streamed_plan(k: int, *, engines: int = 2, slots: int = 1000, **changes: Any) -> Plan:
    """A plan that streams, of a 1B actor and critic; they take as long as generation or so."""
    response = {"kind": "lognormal", "mean": 120, "sigma": 0.8, "max": 400}
    changes = {"response": response, "sync": "in_flight", "max_staleness": k, **changes}
    roles = {"rollout": "r", "actor": "a", "critic": "c"}
    rollout = {"engine": "vllm", "concurrency": slots}
    return make_plan(
        small_workload(**changes),
        {"r": engines, "a": 1, "c": 1},
        roles,
        order=[*SERIAL[:-4], "update_actor", "sync_weights", "update_critic", "evaluate"],
        offsets={"generate": k},
        staleness=k,
        sync="in_flight",
        layouts={"rollout": rollout, "actor": TRAINED, "critic": TRAINED},
        cluster=Cluster(
            name="slow",
            nodes=(Node(gpus=engines + 2, device="g", host_memory_bytes=10**12),),
            devices={"g": SLOW_LINKS},
        ),
    )


TRAINED = {"micro_batch_tokens": 8192, "recompute": True}


@pytest.mark.parametrize(("k", "slots"), [(1, 1000), (3, 1000), (2, 20)])
@pytest.mark.parametrize("kv", ["keep", "recompute"])
def test_a_run_does_as_every_token_alone(k, slots, kv):
    """Given when syncs and submissions are, engines that take one token after the other end when
    the run says; and given that, calls start when the rule says."""
    plan = streamed_plan(k, slots=slots, kv=kv)
    model = CostModel(plan.workload, plan.cluster, scenarios=3)
    tasks = tasks_of(plan, 9)
    run = stream_run(plan, model, tasks)
    for task in tasks:
        begins = max((run.ends[before] for before in task.after), default=0.0)
        assert run.starts[task.index] == begins
    speed = model.streams.speed(1, slots, 2, SLOW_LINKS).speed
    engines = [EveryToken(speed, slots), EveryToken(speed, slots)]
    events = [
        (run.starts[task.index], task.call.streams, task)
        for task in tasks
        if task.call.streams or task.call.kind == "transfer"
    ]
    for at, submits, task in sorted(events, key=lambda event: event[:2]):
        for engine in engines:
            if submits:
                engine.run(at)
            else:
                engine.interrupt(at, run.ends[task.index], recompute=kv == "recompute")
        if submits:
            batch = zip(
                *(of[task.step % 3].tolist() for of in model.streams.lengths[:2]), strict=True
            )
            dealt: list[list[Request]] = [[], []]
            has = [len(engine.active) + len(engine.waiting) for engine in engines]
            for prompt, response in batch:
                number = int(has[1] < has[0])
                has[number] += 1
                dealt[number].append(Request(task.step, prompt, response))
            for engine, requests in zip(engines, dealt, strict=True):
                engine.submit(at, requests)
    for engine in engines:
        engine.run(np.inf)
    ended = [each for engine in engines for each in engine.ended]
    for task in tasks:
        if task.call.streams:
            last = max(end for step, end in ended if step == task.step)
            assert run.ends[task.index] == pytest.approx(last + 0.02, rel=1e-12)


def test_sequences_of_several_steps_are_in_flight_at_once():
    plan = streamed_plan(3)
    tasks = tasks_of(plan, 12)
    run = stream_run(plan, CostModel(plan.workload, plan.cluster, scenarios=3), tasks)
    spans = [(run.starts[t.index], run.ends[t.index]) for t in tasks if t.call.streams]
    assert max(sum(a <= start < b for a, b in spans) for start, _ in spans) == 4  # k + 1
    syncs = [run.starts[t.index] for t in tasks if t.call.kind == "transfer"]
    assert any(a < at < b for at in syncs for a, b in spans)  # interrupted


def test_streaming_beats_the_boundary_where_a_tail_is_long():
    """With a boundary, a step waits for the longest response of its batch, and further staleness
    buys nothing."""
    boundary = [streamed_plan(k).changed(sync="boundary") for k in (1, 3)]
    of_boundary = [predict(plan).step_seconds for plan in boundary]
    of_stream = [predict(streamed_plan(k)).step_seconds for k in (1, 3)]
    assert of_boundary[1] == pytest.approx(of_boundary[0])
    assert of_stream[1] < of_stream[0]
    assert of_stream[1] < 0.9 * of_boundary[1]


def test_equal_lengths_leave_a_stream_nothing_to_gain():
    """All responses of a batch end together, so engines have nothing else to do meanwhile."""
    fixed = {"kind": "fixed", "tokens": 120}
    stream = streamed_plan(1, response=fixed)
    boundary = predict(stream.changed(sync="boundary")).step_seconds
    assert predict(stream).step_seconds > 0.97 * boundary


def test_a_forecast_shows_what_was_predicted():
    plan = streamed_plan(2)
    timeline = forecast(plan, 30)
    assert step_seconds(timeline) == pytest.approx(predict(plan).step_seconds, rel=0.03)
    generate = mean_call_seconds(timeline)["generate"]
    assert generate == pytest.approx(predict(plan).call_seconds["generate"], rel=0.05)


def test_all_slots_of_a_stream_need_room():
    """What preemption takes there is not said, so an engine must not have to."""
    plan = streamed_plan(1, slots=400)
    needed = rollout_fraction(plan.workload, 1, 400, SLOW_LINKS)

    def with_fraction(fraction):
        rollout = plan.rollout.changed(memory_fraction=fraction)
        return plan.changed(roles={**plan.roles, "rollout": rollout})

    check_memory(with_fraction(needed))
    with pytest.raises(UserError, match=f"{needed:.2f} for 400 sequences that stream"):
        check_memory(with_fraction(needed - 0.01))


@pytest.mark.parametrize("k", [1, 4])
def test_engines_that_stream_have_room_for_what_they_hold(k):
    """Token by token: an engine whose slots are all busy never holds more than it must have room
    for, so it sets no sequence aside. It is not far from that either."""
    plan, slots = streamed_plan(k, slots=48), 48
    model = CostModel(plan.workload, plan.cluster)
    engine, most = EveryToken(SPEED, slots), 0
    for step in range(24):
        prompts, responses = (of[step % model.scenarios] for of in model.streams.lengths[:2])
        batch = zip(prompts.tolist(), responses.tolist(), strict=True)
        engine.submit(engine.now, [Request(step, *lengths) for lengths in batch])
        while len(engine.waiting) > slots:
            engine.run(engine.now + 1e-9)  # a step
            blocks = sum(-(-tokens // BLOCK_TOKENS) for _, tokens, _ in engine.active)
            most = max(most, blocks * BLOCK_TOKENS)
    room = held_tokens(plan.workload, slots)
    assert 0.7 * room < most <= room


def test_an_evaluation_is_no_part_of_the_step():
    data = {"train": "t.jsonl", "evaluation": "e.jsonl", "evaluate_every": 2}
    plan = streamed_plan(2)
    watched = streamed_plan(2, data=data)
    assert predict(watched).step_seconds == predict(plan).step_seconds
    assert forecast(watched, 12).makespan > forecast(plan, 12).makespan
