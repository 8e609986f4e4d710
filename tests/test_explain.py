"""The ladder, the critical cycle, the bubbles and the sensitivities of a plan."""

from itertools import pairwise

import numpy as np
import pytest
from conftest import small_workload, tiny_cluster

from planner.predict.cost import CostModel
from planner.predict.cycle import plan_cycles
from planner.predict.forecast import predict
from planner.predict.memory_check import check_memory
from planner.predict.schedule import check
from planner.search import SearchOptions, find
from planner.search.questions.explain import effects, explain
from planner.search.questions.ladder import distances, moves, seconds_of, step_of
from planner.search.space.placements import structures
from planner.spec.lengths import Lognormal
from planner.spec.workload import ROLES

TAIL = Lognormal(mean=400, sigma=0.8, max=1024)


@pytest.fixture(scope="module")
def plan():
    return find(small_workload(response=TAIL, max_staleness=1), tiny_cluster(4)).best


@pytest.fixture(scope="module")
def explanation(plan):
    return explain(plan)


def test_every_rung_is_a_plan_and_the_last_is_the_winner(plan, explanation):
    rungs = explanation.ladder
    assert [rung.what for rung in rungs[:2]] == ["split", "drop the waits"]
    for rung in rungs:
        check(rung.plan)
        check_memory(rung.plan)
        assert rung.seconds == pytest.approx(predict(rung.plan).step_seconds, rel=1e-9)
    assert rungs[-1].plan == plan
    assert len(rungs) >= 4 or rungs[2].seconds == rungs[-1].seconds


def test_a_plan_is_explained_in_the_scenarios_that_it_was_found_in():
    one = find(small_workload(response=TAIL), tiny_cluster(2), SearchOptions(scenarios=1)).best
    assert explain(one).step_seconds == pytest.approx(one.predicted.step_seconds, rel=1e-9)
    assert predict(one).step_seconds != pytest.approx(one.predicted.step_seconds, rel=1e-6)


def test_the_rungs_add_up_to_the_whole_difference(plan, explanation):
    rungs = explanation.ladder
    bought = [before.seconds - after.seconds for before, after in pairwise(rungs)]
    assert sum(bought) == pytest.approx(rungs[0].seconds - plan.predicted.step_seconds, rel=1e-9)
    assert min(bought[:2]) >= -1e-9  # without waits, and with a better order, no step gets longer


def test_a_rung_decides_one_thing(explanation):
    for before, after in pairwise(explanation.ladder[2:]):
        homes = [
            {role: layout.pools for role, layout in rung.plan.roles.items()}
            for rung in (before, after)
        ]
        moved = homes[0] != homes[1]
        resized = not moved and [len(p.gpus) for p in before.plan.pools.values()] != [
            len(p.gpus) for p in after.plan.pools.values()
        ]
        assert moved + resized + after.what.startswith("allow one step") == 1


def test_a_wait_never_pays(explanation):
    assert {what for what, _ in explanation.waits} >= {"wait for generate", "wait for advantages"}
    assert all(price >= -1e-9 for _, price in explanation.waits)


def test_sensitivities_are_finite_differences(plan, explanation):
    model = CostModel(plan.workload, plan.cluster)
    seconds, cycles = seconds_of(plan, model), plan_cycles(plan)
    step = float(cycles.periods(seconds).mean())
    assert step == pytest.approx(step_of(plan, model)) == pytest.approx(plan.predicted.step_seconds)
    for row, effect in enumerate(explanation.effects):
        nudged = seconds.copy()
        nudged[row] += 1e-6
        slope = (float(cycles.periods(nudged).mean()) - step) / 1e-6
        assert slope == pytest.approx(effect.share, abs=1e-4)
        assert effect.faster <= step * (1 + 1e-12) and effect.slower >= step * (1 - 1e-12)
    (longer,) = (e for e in effects(plan, model, 1e-9) if e.call == "update_actor")
    assert longer.slower == pytest.approx(step, rel=1e-6)


def test_idle_seconds_are_what_the_busy_shares_leave(plan, explanation):
    expected = predict(plan)
    for pool in plan.pools:
        idle = sum(bubble.seconds for bubble in explanation.bubbles if bubble.pool == pool)
        assert idle == pytest.approx(
            expected.step_seconds * (1 - expected.busy[pool]), rel=1e-6, abs=1e-6
        )


def test_critical_cycles_make_up_the_step(plan, explanation):
    assert sum(cycle.share for cycle in explanation.critical) == pytest.approx(1)
    seconds, names = (
        seconds_of(plan, CostModel(plan.workload, plan.cluster)),
        plan.dataflow.steady.names,
    )
    around = [
        sum(seconds[names.index(call)] for call in cycle.calls) / cycle.steps
        for cycle in explanation.critical
    ]
    assert np.max(around, axis=0).mean() == pytest.approx(explanation.step_seconds)


def test_a_plan_of_ones_own_is_explained_too(plan):
    """With another layout than the search would choose, and slower: the engines sleep though
    nothing needs the room."""
    rollout = plan.rollout.model_copy(update={"offload": not plan.rollout.offload})
    slower = plan.model_copy(update={"roles": {**plan.roles, "rollout": rollout}})
    rungs = explain(slower).ladder
    assert rungs[-1].plan == slower and rungs[-1].what == "the plan's own layouts and order"
    assert rungs[-1].seconds > rungs[-2].seconds == pytest.approx(plan.predicted.step_seconds)


def test_moves_lead_from_every_structure_to_structures_only():
    known = {frozenset(structure) for structure in structures(ROLES)}
    for structure in structures(ROLES):
        for _, after, counts in moves(structure, (3,) * len(structure), {}):
            assert frozenset(after) in known and len(after) == len(counts)
            assert sum(counts) == 3 * len(structure) and min(counts) > 0


def test_every_structure_can_be_reached_from_any():
    for target in structures(ROLES)[::17]:
        left = distances(ROLES, target)
        assert all(frozenset(structure) in left for structure in structures(ROLES))
        assert left[frozenset(target)] == 0 and max(left.values()) <= 8
