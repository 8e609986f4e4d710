"""Simulated timelines against makespans worked out by hand, and the exact period against simulation."""

from itertools import pairwise

import numpy as np
import pytest
from conftest import ROLES, colocated, make_plan, make_workload, split
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.predict.cycle import cycles
from planner.predict.schedule import check, steady_edges, tasks_of, unroll
from planner.predict.simulate import simulate
from planner.spec.dataflow import Call, Dataflow, Read
from planner.spec.errors import UserError
from planner.spec.plan import Issue, Wait
from planner.spec.timeline import Timeline, busy_shares, step_seconds

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


def test_two_calls_on_one_pool_follow_each_other():
    spans = simulate(unroll(*chain("p"), 3), lambda task: {"a": 2.0, "b": 3.0}[task.call.name])
    assert [(span.start, span.end) for span in spans] == [(0, 2), (2, 5), (5, 7), (7, 10), (10, 12), (12, 15)]


def test_two_calls_on_two_pools_form_a_pipeline():
    spans = simulate(unroll(*chain("q"), 3), lambda task: {"a": 2.0, "b": 3.0}[task.call.name])
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
    """generate 10, then {reference 2 + old 2.5} beside {score 1 + values 3}, advantages, update_actor 7, sync 0.5."""
    assert step_seconds(run(split(make_workload()), 4)) == pytest.approx(10 + 4.5 + 0.25 + 7 + 0.5)


def test_one_step_ahead_takes_the_longer_of_generation_and_training():
    roles = {"rollout": "r", "actor": "t", "critic": "t", "reference": "t", "reward": "t"}
    plan = make_plan(make_workload(), {"r": 1, "t": 1}, roles, offsets={"generate": 1}, staleness=1)
    training = sum(SECONDS.values()) - SECONDS["generate"]
    assert step_seconds(run(plan, 6, warmup=2)) == pytest.approx(training)
    slow = SECONDS | {"generate": 40.0}
    assert step_seconds(run(plan, 6, slow, warmup=2)) == pytest.approx(40.5)  # the sync holds the rollout's pool too


def test_busy_shares():
    timeline = run(split(make_workload()), 4)
    shares = busy_shares(timeline)
    assert shares["b"] == pytest.approx((1 + 3 + 6) / (10 + 4.5 + 0.25 + 7 + 0.5), rel=0.02)


@st.composite
def plans(draw):
    """Random placements and programs that can run, with random durations (quarters, so that sums are exact)."""
    pools = draw(st.integers(1, 4))
    names = [f"p{i}" for i in range(pools)]
    roles = {role: draw(st.sampled_from(names)) for role in ROLES if role != "rollout"}
    roles["rollout"] = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    used = {pool for home in roles.values() for pool in ([home] if isinstance(home, str) else home)}
    ahead = draw(st.integers(0, 2))
    infer = draw(st.permutations(["score", "ref_logprobs", "old_logprobs", "values"]))
    updates = draw(st.permutations(["update_critic", "update_actor"]))
    order = ["generate", *infer, "advantages", *updates, "sync_weights"]
    for name in draw(st.lists(st.sampled_from(order), max_size=2)):
        order.insert(draw(st.integers(0, len(order))), (name,))
    workload = make_workload(max_staleness=ahead)
    seconds = {name: draw(st.integers(1, 40)) / 4 for name in SECONDS}
    plan = make_plan(
        workload,
        {name: 1 for name in names if name in used},
        roles,
        order=order,
        offsets={"generate": ahead},
        staleness=ahead,
    )
    try:
        check(plan)
    except UserError:
        plan = make_plan(workload.model_copy(update={"max_staleness": 2}), {"p0": 1}, dict.fromkeys(ROLES, "p0"))
    return plan, seconds


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
def test_the_period_is_the_slope_of_the_simulation(drawn):
    """Past its transient the recursion grows by period * cyclicity over each cyclicity; 60 is a multiple of those of
    distances up to 6."""
    plan, seconds = drawn
    spans = run(plan, 240, seconds).spans
    ends = {span.step: span.end for span in spans if span.call == "update_actor"}
    assert (ends[220] - ends[160]) / 60 == pytest.approx(period(plan, seconds), rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(plans())
def test_the_period_is_above_every_bound(drawn):
    plan, seconds = drawn
    found = period(plan, seconds) * (1 + 1e-12)
    for pool in plan.pools:
        calls = [call for call in plan.dataflow.calls if pool in plan.pools_of(call)]
        assert found >= sum(seconds[call.name] for call in calls)
    path = ["generate", "advantages", "update_actor", "sync_weights"]
    for infer in ("score", "ref_logprobs", "old_logprobs", "values"):
        assert found >= sum(seconds[name] for name in [*path, infer]) / (1 + plan.staleness)


@settings(max_examples=40, deadline=None)
@given(plans())
def test_removing_a_wait_never_makes_it_longer(drawn):
    plan, seconds = drawn
    free = plan.model_copy(update={"program": tuple(i for i in plan.program if isinstance(i, Issue))})
    assert period(free, seconds) <= period(plan, seconds) * (1 + 1e-12)
    assert run(free, 6, seconds).makespan <= run(plan, 6, seconds).makespan
