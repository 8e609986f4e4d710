"""The one rule of execution, on programs small enough to work out by hand."""

import pytest
from conftest import CALLS, ROLES, colocated, make_plan, make_workload, split

from planner.predict.schedule import check, staleness, tasks_of
from planner.spec.errors import UserError

ONE_STEP_OFF = {"rollout": "r", "actor": "t", "critic": "t", "reference": "t", "reward": "t"}


def by_name(tasks):
    return {(task.call.name, task.step): task for task in tasks}


def test_every_call_of_every_step_is_issued_once():
    tasks = tasks_of(split(make_workload()), 3)
    assert len(tasks) == 27
    assert {(task.call.name, task.step) for task in tasks} == {
        (name, step) for name in split(make_workload()).dataflow.names for step in range(3)
    }
    assert [task.index for task in tasks] == list(range(27))
    assert all(before < task.index for task in tasks for before in task.after)


def test_split_has_the_predecessors_that_pools_and_data_imply():
    tasks = by_name(tasks_of(split(make_workload()), 2))

    def after(name, step):
        names = {
            (t.call.name, t.step) for t in tasks.values() if t.index in tasks[name, step].after
        }
        return names

    assert after("generate", 0) == set()
    assert after("score", 0) == {("generate", 0)}
    assert after("ref_logprobs", 0) == {("generate", 0)}
    assert after("old_logprobs", 0) == {("generate", 0), ("ref_logprobs", 0)}
    assert ("update_actor", 0) in after("old_logprobs", 1)
    assert ("update_critic", 0) not in after("update_actor", 0)
    assert after("generate", 1) == {("sync_weights", 0)}


def test_pool_order_is_the_issue_order():
    for plan in (colocated(make_workload()), split(make_workload())):
        last: dict[str, int] = {}
        reach: dict[int, set[int]] = {}
        for task in tasks_of(plan, 3):
            reach[task.index] = set(task.after).union(*(reach[i] for i in task.after))
            for pool in task.pools:
                assert pool not in last or last[pool] in reach[task.index]
                last[pool] = task.index


def test_one_step_ahead_generates_with_the_version_before_the_last_update():
    plan = make_plan(
        make_workload(),
        {"r": 1, "t": 1},
        ONE_STEP_OFF,
        order=CALLS,
        offsets={"generate": 1},
        staleness=1,
    )
    tasks = by_name(tasks_of(plan, 5))
    assert [tasks["generate", step].weights_version for step in range(5)] == [0, 0, 1, 2, 3]
    assert staleness(list(tasks.values())) == 1
    assert tasks["update_actor", 3].index not in tasks["generate", 4].after
    check(plan)


def test_reading_what_is_written_later_is_a_deadlock():
    order = [
        "generate",
        "update_actor",
        "score",
        "ref_logprobs",
        "old_logprobs",
        "values",
        "advantages",
    ]
    plan = make_plan(
        make_workload(),
        {"a": 2},
        dict.fromkeys(ROLES, "a"),
        order=[*order, "update_critic", "sync_weights"],
    )
    with pytest.raises(
        UserError, match="program deadlocks: update_actor of step 0 reads advantages"
    ):
        check(plan)


def test_a_generate_that_needs_its_own_update_is_a_deadlock():
    order = ["score", "generate", *CALLS[2:]]
    plan = make_plan(make_workload(), {"a": 2}, dict.fromkeys(ROLES, "a"), order=order)
    with pytest.raises(UserError, match="deadlocks: score of step 0 reads sequences"):
        check(plan)


def test_weights_that_are_overwritten_before_they_are_read_are_refused():
    """update_actor of the next step before the sync of this one: the sync would hand over the wrong
    version."""
    offsets = {name: 1 for name in CALLS if name != "sync_weights"}
    plan = make_plan(
        make_workload(),
        {"a": 2},
        dict.fromkeys(ROLES, "a"),
        order=CALLS,
        offsets=offsets,
        staleness=1,
    )
    with pytest.raises(UserError, match="sync_weights of step 0 needs actor_weights of step 0"):
        check(plan)


def test_more_staleness_than_allowed_is_refused():
    workload = make_workload(max_staleness=0)
    plan = make_plan(
        workload, {"r": 1, "t": 1}, ONE_STEP_OFF, order=CALLS, offsets={"generate": 1}, staleness=1
    )
    with pytest.raises(UserError, match="1 update old, but the workload allows 0"):
        check(plan)


def test_a_wrong_staleness_is_refused():
    plan = split(make_workload()).model_copy(update={"staleness": 1})
    with pytest.raises(UserError, match="staleness says 1, but its program has 0"):
        check(plan)


def test_a_wait_holds_back_everything_later():
    order = ["generate", "score", ("score",), *CALLS[2:]]
    plan = make_plan(make_workload(), {"a": 1, "b": 1}, split_roles(), order=order)
    tasks = by_name(tasks_of(plan, 1))
    score = tasks["score", 0].index
    assert score in tasks["ref_logprobs", 0].after
    assert score in tasks["old_logprobs", 0].waits
    assert tasks["generate", 0].waits == ()


def test_a_later_wait_on_older_calls_keeps_the_earlier_one():
    order = ["generate", "score", "ref_logprobs", ("ref_logprobs",), ("score",), *CALLS[3:]]
    plan = make_plan(make_workload(), {"a": 1, "b": 1}, split_roles(), order=order)
    tasks = by_name(tasks_of(plan, 1))
    assert set(tasks["old_logprobs", 0].waits) == {
        tasks["score", 0].index,
        tasks["ref_logprobs", 0].index,
    }


def test_a_wait_on_a_call_issued_before_another_wait_does_not_replace_it():
    order = ["generate", "score", "ref_logprobs", ("score",), ("ref_logprobs",), *CALLS[3:]]
    plan = make_plan(make_workload(), {"a": 1, "b": 1}, split_roles(), order=order)
    tasks = by_name(tasks_of(plan, 1))
    assert set(tasks["old_logprobs", 0].waits) == {
        tasks["score", 0].index,
        tasks["ref_logprobs", 0].index,
    }


def test_calls_that_run_every_n_steps():
    data = {"train": "x", "evaluation": "y", "evaluate_every": 2}
    tasks = tasks_of(split(make_workload(data=data)), 4)
    assert [task.step for task in tasks if task.call.name == "evaluate"] == [1, 3]


def split_roles():
    return {"actor": "a", "rollout": "a", "reference": "a", "critic": "b", "reward": "b"}
