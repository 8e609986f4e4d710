"""The one rule of execution where generation streams, and plans that cannot."""

from typing import Any

import pytest
from conftest import SERIAL, make_plan, make_workload

from planner.predict.schedule import check, staleness, steady_edges, tasks_of
from planner.spec.plan import Plan, Wait

APART = {"rollout": "r", "actor": "t", "critic": "t", "reference": "t", "reward": "t"}


def streamed(k: int = 2, roles: dict[str, str] = APART, **changes: Any) -> Plan:
    """A plan that streams at staleness k, on one core, with trainers on another."""
    workload = make_workload(sync="in_flight", max_staleness=k, **changes)
    pools = dict.fromkeys(roles.values(), 1)
    offsets = {"generate": k}
    return make_plan(workload, pools, roles, offsets=offsets, staleness=k, sync="in_flight")


def needs_of(plan: Plan, steps: int) -> dict[tuple[str, int], set[tuple[str, int]]]:
    tasks = tasks_of(plan, steps)
    names = [(task.call.name, task.step) for task in tasks]
    return {names[task.index]: {names[before] for before in task.after} for task in tasks}


def test_generation_waits_for_the_sync_that_bounds_its_staleness_alone():
    after = needs_of(streamed(k=2), 8)
    for step in range(3):
        assert after["generate", step] == set()
    for step in range(3, 8):
        assert after["generate", step] == {("sync_weights", step - 3)}


def test_a_sync_waits_for_no_generation():
    after = needs_of(streamed(k=2), 8)
    for step in range(1, 8):
        assert after["sync_weights", step] == {("update_actor", step), ("sync_weights", step - 1)}
        assert ("generate", step) in after["score", step]


def test_a_stream_is_as_stale_as_a_boundary_at_the_same_offset():
    plan = streamed(k=2)
    check(plan)
    assert (
        staleness(tasks_of(plan, 9)) == staleness(tasks_of(plan.changed(sync="boundary"), 9)) == 2
    )
    first = [task.weights_version for task in tasks_of(plan, 6) if task.call.kind == "generate"]
    assert first == [0, 0, 0, 1, 2, 3]


def test_in_the_steady_state_generation_has_no_pool():
    plan = streamed(k=2)
    edges = steady_edges(plan.dataflow, plan.program, plan.pools_of)
    assert {(u, d) for (u, v), d in edges.items() if v == "generate"} == {("sync_weights", 3)}
    assert ("generate", "sync_weights") not in edges


def test_an_evaluation_has_the_same_weights_from_start_to_end():
    data = {"evaluation": "held-out.jsonl", "train": "t.jsonl", "evaluate_every": 2}
    plan = streamed(k=1, data=data)
    assert plan.program[-1].call == SERIAL[-1] == "evaluate"
    after = needs_of(plan, 6)
    assert after["evaluate", 3] == {("sync_weights", 3)}
    assert ("evaluate", 3) in after["sync_weights", 4]
    assert after["generate", 5] == {("sync_weights", 3)}


def test_a_plan_remembers_how_it_streams():
    plan = streamed(k=1, kv="recompute")
    again = Plan.model_validate_json(plan.to_json())
    assert again.streams and again.workload.kv == "recompute"
    assert '"sync":"boundary"' not in plan.changed(sync="boundary").model_dump_json(
        exclude={"workload"}
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"workload": make_workload(max_staleness=2)}, "workload has sync = 'boundary'"),
        ({"staleness": 0}, "nothing is in flight when weights arrive; give generate an offset"),
    ],
)
def test_plans_that_cannot_stream(change, text):
    with pytest.raises(ValueError, match=text):
        streamed(k=2).changed(**change)


def test_a_stream_shares_its_pools_with_no_role():
    with pytest.raises(ValueError, match="critic is on pool 'r', which generation holds all"):
        streamed(roles={**APART, "critic": "r"})


def test_engines_that_stream_never_sleep():
    plan = streamed()
    with pytest.raises(ValueError, match="engines never sleep"):
        plan.changed(roles={**plan.roles, "rollout": plan.rollout.changed(offload=True)})


def test_a_wait_would_stop_the_stream():
    plan = streamed()
    blocking = [item.changed(blocking=True) for item in plan.program]
    for program in ([Wait(wait=("update_actor",)), *plan.program], blocking):
        with pytest.raises(ValueError, match="a wait in the program would stop the stream"):
            plan.changed(program=tuple(program))
