"""Simulated timelines against makespans worked out by hand, and what holds for any plan."""

from itertools import pairwise

import numpy as np
import pytest
from conftest import ROLES, SHAPE, colocated, make_plan, make_workload, split
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from planner.predict.cycle import cycles
from planner.predict.schedule import check, staleness, steady_edges, tasks_of, unroll
from planner.predict.simulate import simulate
from planner.spec.dataflow import Call, Dataflow, Read
from planner.spec.plan import Issue, Wait
from planner.spec.timeline import Timeline, mean_call_seconds, step_seconds

MODEL = {"shape": SHAPE, "random_weights": True}
SECONDS = {
    "generate": 10.0,
    "score": 1.0,
    "ref_logprobs": 2.0,
    "old_logprobs": 2.5,
    "values": 3.0,
    "advantages": 0.25,
    "update_critic": 6.0,
    "update_actor": 7.0,
    "sync_weights": 0.5,
}


def run(plan, steps, seconds=SECONDS, warmup=1):
    spans = simulate(tasks_of(plan, steps), lambda task: seconds[task.call.name])
    return Timeline(source="simulated", plan=plan.name, steps=steps, warmup=warmup, spans=spans)


def period(plan, seconds=SECONDS):
    edges = steady_edges(plan.dataflow, plan.program, plan.pools_of)
    names = plan.dataflow.steady.names
    return float(cycles(names, edges).periods(np.array([seconds[name] for name in names])))


def chain(second_pool):
    """a, then b on what a makes; both every step."""
    a = Call(name="a", roles=("x",), kind="infer", reads=(), writes=("A",))
    b = Call(name="b", roles=("y",), kind="infer", reads=(Read(data="A"),), writes=("B",))
    pools = {"a": ("p",), "b": (second_pool,)}
    return Dataflow(calls=(a, b)), (Issue(call="a"), Issue(call="b")), lambda call: pools[call.name]


def of_the_chain(task):
    return {"a": 2.0, "b": 3.0}[task.call.name]


def test_two_calls_on_one_pool_follow_each_other():
    flow, program, pools_of = chain("p")
    spans = simulate(
        unroll(flow, program, pools_of, 3), lambda task: {"a": 2.0, "b": 3.0}[task.call.name]
    )
    assert [(span.start, span.end) for span in spans] == [
        (0, 2),
        (2, 5),
        (5, 7),
        (7, 10),
        (10, 12),
        (12, 15),
    ]


def test_two_calls_on_two_pools_form_a_pipeline():
    flow, program, pools_of = chain("q")
    spans = simulate(
        unroll(flow, program, pools_of, 3), lambda task: {"a": 2.0, "b": 3.0}[task.call.name]
    )
    assert [(s.call, s.start, s.end) for s in spans] == [
        ("a", 0, 2),
        ("b", 2, 5),
        ("a", 2, 4),
        ("b", 5, 8),
        ("a", 4, 6),
        ("b", 8, 11),
    ]
    assert [s.ready for s in spans if s.call == "b"] == [2, 5, 8]


def test_a_wait_turns_the_pipeline_into_a_sequence():
    flow, program, pools_of = chain("q")
    spans = simulate(unroll(flow, (*program, Wait(wait=("b",))), pools_of, 3), lambda task: 1.0)
    assert [span.start for span in spans] == [0, 1, 2, 3, 4, 5]


def test_colocated_takes_the_sum_of_its_calls():
    timeline = run(colocated(make_workload()), 4)
    assert step_seconds(timeline) == pytest.approx(sum(SECONDS.values()))
    assert period(colocated(make_workload())) == pytest.approx(sum(SECONDS.values()))


def test_split_overlaps_what_its_pools_allow():
    """generate 10, then {reference 2 + old 2.5} beside {score 1 + values 3}, advantages,
    update_actor 7, sync 0.5."""
    assert step_seconds(run(split(make_workload()), 4)) == pytest.approx(10 + 4.5 + 0.25 + 7 + 0.5)


def test_one_step_ahead_takes_the_longer_of_generation_and_training():
    roles = {"rollout": "r", "actor": "t", "critic": "t", "reference": "t", "reward": "t"}
    plan = make_plan(make_workload(), {"r": 1, "t": 1}, roles, offsets={"generate": 1}, staleness=1)
    training = sum(SECONDS.values()) - SECONDS["generate"]
    assert step_seconds(run(plan, 6, warmup=2)) == pytest.approx(training)
    slow = SECONDS | {"generate": 40.0}
    assert step_seconds(run(plan, 6, slow, warmup=2)) == pytest.approx(
        40.5
    )  # the sync holds the rollout's pool too


def test_steps_that_generate_nothing_more_do_not_count():
    plan = make_plan(
        make_workload(), {"a": 1}, dict.fromkeys(ROLES, "a"), offsets={"generate": 1}, staleness=1
    )
    timeline = run(plan, 4, warmup=2)
    assert step_seconds(timeline) == pytest.approx(sum(SECONDS.values()) - SECONDS["generate"] / 2)
    timeline = timeline.model_copy(update={"drain": 1})
    assert step_seconds(timeline) == pytest.approx(sum(SECONDS.values()))
    assert mean_call_seconds(timeline) == pytest.approx(SECONDS)


@st.composite
def plans(draw):
    """Random workloads, placements and programs that can run, with random durations (quarters, so
    that sums are exact).

    Call v of step t has its turn at t + turn(v). Whatever reads something comes after what writes
    it and, if that is overwritten, before the next one; the fractions of the turns are then the
    order in a round, and their whole parts the offsets."""
    reward = draw(st.sampled_from([MODEL, {"function": "r.py:f"}]))
    workload = make_workload(
        reward=reward,
        critic=draw(st.sampled_from([MODEL, MODEL, None])),
        reference=draw(st.sampled_from([MODEL, MODEL, None])),
        proximal=draw(st.sampled_from(["recompute", "rollout"])),
        max_staleness=9,
    )
    ahead = draw(st.integers(0, 200))  # hundredths of a round
    turn = {"generate": 0}
    for call in workload.dataflow.names[1:-2]:
        before = {"advantages": ahead + 40, "update_critic": turn.get("advantages", 0)}.get(
            call, ahead
        )
        turn[call] = before + draw(st.integers(1, 40 if before == ahead else 25))
    turn["update_actor"] = turn["advantages"] + draw(st.integers(1, 25))
    turn["sync_weights"] = turn["update_actor"] + draw(st.integers(1, 99))
    order = sorted(turn, key=lambda call: turn[call] % 100)
    most = max(turn.values()) // 100
    items = [
        Issue(call=call, offset=most - turn[call] // 100, blocking=draw(st.integers(0, 9)) == 0)
        for call in order
    ]
    for names in draw(
        st.lists(st.lists(st.sampled_from(order), min_size=1, max_size=3, unique=True), max_size=2)
    ):
        items.insert(draw(st.integers(0, len(items))), Wait(wait=tuple(names)))
    names = [f"p{i}" for i in range(draw(st.sampled_from([3, 4, 2, 1])))]
    roles = {role: draw(st.sampled_from(names)) for role in workload.roles if role != "rollout"}
    roles["rollout"] = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    used = {pool for home in roles.values() for pool in ([home] if isinstance(home, str) else home)}
    plan = make_plan(workload, {name: 1 for name in names if name in used}, roles)
    plan = plan.model_copy(update={"program": tuple(items)})
    plan = plan.model_copy(update={"staleness": staleness(tasks_of(plan, 9))})
    check(plan)
    return plan, {name: draw(st.integers(1, 40)) / 4 for name in turn}


@settings(max_examples=60, deadline=None)
@given(plans())
def test_no_two_spans_overlap_on_a_pool(drawn):
    plan, seconds = drawn
    spans = run(plan, 5, seconds).spans
    for pool in plan.pools:
        held = sorted((span.start, span.end) for span in spans if pool in span.pools)
        assert all(end <= start for (_, end), (start, _) in pairwise(held))


@settings(max_examples=60, deadline=None)
@given(plans())
def test_the_period_is_above_every_bound(drawn):
    plan, seconds = drawn
    found = period(plan, seconds) * (1 + 1e-12)
    for pool in plan.pools:
        calls = [call for call in plan.dataflow.calls if pool in plan.pools_of(call)]
        assert found >= sum(seconds[call.name] for call in calls)
    path = ["generate", "advantages", "update_actor", "sync_weights"]
    for infer in {"score", "ref_logprobs", "old_logprobs", "values"} & seconds.keys():
        assert found >= sum(seconds[name] for name in [*path, infer]) / (1 + plan.staleness)


@settings(max_examples=60, deadline=None)
@given(plans(), st.data())
def test_removing_a_wait_never_makes_it_longer(drawn, data):
    """One wait, or what blocks at one call: no task starts later. And all of them."""
    plan, seconds = drawn
    waiting = [
        at for at, item in enumerate(plan.program) if isinstance(item, Wait) or item.blocking
    ]
    assume(waiting)
    for removed in ({data.draw(st.sampled_from(waiting))}, set(waiting)):
        free = without(plan, removed)
        assert period(free, seconds) <= period(plan, seconds) * (1 + 1e-12)
        later = {(span.call, span.step): span.start for span in run(plan, 6, seconds).spans}
        assert all(
            span.start <= later[span.call, span.step] for span in run(free, 6, seconds).spans
        )


def without(plan, removed):
    """The plan without the waits at these places of its program."""
    items = [
        item if at not in removed else item.model_copy(update={"blocking": False})
        for at, item in enumerate(plan.program)
        if at not in removed or isinstance(item, Issue)
    ]
    return plan.model_copy(update={"program": tuple(items)})
