"""The search's plans against brute force, baselines and each other."""

from itertools import product

import numpy as np
import pytest
from conftest import ROLES, small_workload, tiny_cluster
from test_search_space import default, pools_of_calls

import planner.predict.layouts as layouts
from planner.predict.cost import CostModel
from planner.predict.forecast import forecast, predict
from planner.predict.layouts import rank_counts, rollout_layouts, trainer_layouts
from planner.predict.memory_check import check_memory
from planner.predict.profile import load_profiles
from planner.predict.schedule import check, unroll
from planner.predict.simulate import simulate
from planner.search import SearchOptions, baseline, find
from planner.search.find import solved
from planner.search.questions.baselines import NAMES
from planner.search.solver.branch_and_bound import solve
from planner.search.solver.evaluate import Candidate
from planner.search.solver.problem import problem_of
from planner.search.space.enumerate_programs import orders
from planner.search.space.placements import gpus_of, pack, sizes, structures
from planner.spec.cluster import Cluster, Node, make_cluster
from planner.spec.errors import UserError
from planner.spec.files import profiles_dir
from planner.spec.lengths import Fixed
from planner.spec.plan import Issue, Plan, Pool
from planner.spec.timeline import step_seconds
from planner.spec.workload_file import load_workload


def brute_force(workload, cluster):
    """The shortest simulated step over every structure, pool size, layout and program, one plan at
    a time."""
    best = np.inf
    flow = workload.dataflow.steady
    model = CostModel(workload, cluster)
    device = cluster.device_of((0, 0))
    for structure in structures(workload.roles):
        names = tuple("+".join(sorted(roles)) + str(i) for i, roles in enumerate(structure))
        for counts in sizes(len(cluster.gpus), len(structure)):
            packing = pack(counts, cluster)
            gpus = map(gpus_of, packing)
            pools = {name: Pool(gpus=pool) for name, pool in zip(names, gpus, strict=True)}
            home = {
                role: i for i, roles in enumerate(structure) for role in roles if role != "rollout"
            }
            generating = [i for i, roles in enumerate(structure) if "rollout" in roles]
            shared = any(structure[i] != {"rollout"} for i in generating)
            parts = tuple(tuple(part.gpus for part in packing[i]) for i in generating)
            rollouts = rollout_layouts(
                workload, parts, tuple(names[i] for i in generating), device, shared
            )
            trainers = [
                [
                    layout
                    for used in rank_counts(int(counts[i]), workload.minibatch, len(cluster.gpus))
                    for layout in trainer_layouts(workload, role, used, names[i], device)
                ]
                for role, i in home.items()
            ]
            for rollout, *chosen in product(rollouts, *trainers):
                roles = dict(zip(home, chosen, strict=True)) | {"rollout": rollout}
                base = Plan(
                    name="x",
                    workload=workload,
                    cluster=cluster,
                    pools=pools,
                    roles=roles,
                    program=tuple(Issue(call=name) for name in flow.names),
                    staleness=0,
                )
                try:
                    check_memory(base)
                except UserError:
                    continue
                seconds = {
                    call.name: float(model.call(call, base).seconds[0]) for call in flow.calls
                }
                loads = [
                    sum(seconds[c.name] for c in flow.calls if pool in base.pools_of(c))
                    for pool in names
                ]
                if max(loads) >= best:  # a step is never shorter than what one pool has to do
                    continue
                for k in range(workload.max_staleness + 1):
                    for items in orders(flow, dict(pools_of_calls(flow, structure)), k):
                        spans = simulate(
                            unroll(flow, items, base.pools_of, 18),
                            lambda task, s=seconds: s[task.call.name],
                        )
                        ends = {(span.call, span.step): span.end for span in spans}
                        # Far from the filling and the draining, of the slowest call: all others end
                        # up as slow.
                        best = min(
                            best, max((ends[name, 15] - ends[name, 9]) / 6 for name in flow.names)
                        )
    return best


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpus", "changes"),
    [
        (1, {"memory": 60e9}),
        pytest.param(2, {}, marks=pytest.mark.nightly),
        (2, {"memory": 40e9}),
        pytest.param(3, {"flops": 100e12}, marks=pytest.mark.nightly),
    ],
)
def test_search_equals_brute_force(monkeypatch, gpus, changes):
    monkeypatch.setattr(layouts, "MICRO_BATCH_TOKENS", (8192,))
    monkeypatch.setattr(layouts, "CONCURRENCY", (32,))
    monkeypatch.setattr(layouts, "TENSOR_PARALLEL", (1, 2))
    workload, cluster = small_workload(), tiny_cluster(gpus, **changes)
    found = find(workload, cluster).best
    assert found.predicted.step_seconds == pytest.approx(brute_force(workload, cluster), rel=1e-9)


@pytest.fixture(scope="module")
def result():
    return find(*default())


def test_the_default_plan_is_sound(result):
    plan = result.best
    check(plan)
    check_memory(plan)
    assert plan.predicted.proof.status == "optimal"
    assert plan.predicted.gap == pytest.approx(0, abs=1e-9)
    assert all(not hasattr(item, "wait") for item in plan.program)
    again = Plan.model_validate(plan.model_dump())
    assert again == plan


def test_the_plan_predicts_what_its_simulation_shows(result):
    fixed = Fixed(tokens=900)
    plan = find(
        result.best.workload.model_copy(update={"response": fixed}), result.best.cluster
    ).best
    timeline = forecast(plan, 30)
    ends = {span.step: span.end for span in timeline.spans if span.call == "update_actor"}
    assert (ends[22] - ends[10]) / 12 == pytest.approx(plan.predicted.step_seconds, rel=1e-9)
    assert step_seconds(timeline) == pytest.approx(plan.predicted.step_seconds, rel=1e-9)
    assert step_seconds(forecast(result.best, 33)) == pytest.approx(
        result.best.predicted.step_seconds, rel=0.05
    )


def test_no_baseline_or_runner_up_beats_the_winner(result):
    assert set(result.baselines) == set(NAMES)
    others = [
        plan for plan in (*result.baselines.values(), *result.runners_up) if isinstance(plan, Plan)
    ]
    assert len(others) >= 6
    for plan in others:
        check(plan)
        check_memory(plan)
        assert plan.predicted.step_seconds >= result.best.predicted.step_seconds * (1 - 1e-9)
    times = [plan.predicted.step_seconds for plan in result.runners_up]
    assert times == sorted(times)


def test_split_is_the_tutorials(result):
    plan = result.baselines["split"]
    assert {name: {node for node, _ in pool.gpus} for name, pool in plan.pools.items()} == {
        "actor+rollout+reference": {0},
        "critic+reward": {1},
    }
    waits = [set(item.wait) for item in plan.program if hasattr(item, "wait")]
    assert waits == [{"update_critic", "update_actor"}]


@pytest.mark.parametrize(
    ("gpus", "halves", "idle"),
    [
        (2, [(0, 1), (0, 1)], 0),
        (3, [(0, 1), (0, 1)], 1),
        (8, [(0, 4), (0, 4)], 0),
        (24, [(0, 8), (1, 8)], 8),
    ],
)
def test_what_is_odd_of_a_split_stays_idle(gpus, halves, idle):
    """Half of one node each, or half of the nodes, whole."""
    plan = baseline("split", small_workload(), make_cluster(gpus))
    assert [(pool.gpus[0][0], len(pool.gpus)) for pool in plan.pools.values()] == halves
    assert all(len({node for node, _ in pool.gpus}) == 1 for pool in plan.pools.values())
    assert gpus - plan.gpus_of(tuple(plan.pools)) == idle


@pytest.mark.slow
def test_on_policy_only_where_no_staleness_is_allowed():
    workload, cluster = default()
    strict = find(workload, cluster, SearchOptions(max_staleness=0))
    assert strict.best.staleness == 0
    assert "trains on sequences 1 update old" in strict.baselines["one-step-off"]
    assert strict.best.predicted.step_seconds >= find(workload, cluster).best.predicted.step_seconds


@pytest.mark.slow
def test_search_is_deterministic():
    first, second = (find(*default()).best for _ in range(2))
    assert first.model_copy(update={"predicted": None}) == second.model_copy(
        update={"predicted": None}
    )
    assert predict(first) == predict(second)


def test_a_baseline_can_be_written_as_a_plan():
    plan = baseline("standalone", *default())
    check(plan)
    assert sorted(plan.pools) == sorted(ROLES)
    with pytest.raises(UserError, match="no baseline 'best'"):
        baseline("best", *default())


def test_too_little_memory_is_an_error():
    with pytest.raises(UserError, match="no plan fits"):
        find(default()[0], make_cluster(1, "h100"))


def test_workloads_with_fewer_roles():
    for changes in (
        {"reference": None},
        {"critic": None, "reference": None},
        {"proximal": "rollout"},
    ):
        workload = small_workload(**changes)
        plan = find(workload, tiny_cluster(4)).best
        check(plan)
        assert set(plan.roles) == set(workload.roles)


# --- objectives, time limits, clusters of all sorts ---


def varied(**changes):
    return small_workload(
        response={"kind": "lognormal", "mean": 256, "sigma": 0.8, "max": 1024}, **changes
    )


def test_each_objective_is_best_at_its_own():
    workload, cluster = varied(), tiny_cluster(4)
    mean, p95, cost = (
        find(workload, cluster, SearchOptions(objective=objective)).best
        for objective in ("mean", "p95", "cost")
    )
    assert mean.predicted.step_seconds <= p95.predicted.step_seconds * (1 + 1e-9)
    assert p95.predicted.step_seconds_p95 <= mean.predicted.step_seconds_p95 * (1 + 1e-9)
    assert p95.predicted.lower_bound_seconds == pytest.approx(p95.predicted.step_seconds_p95)
    assert (cost.pools, cost.roles, cost.program) == (mean.pools, mean.roles, mean.program)
    assert [plan.predicted.proof.objective for plan in (mean, p95, cost)] == ["mean", "p95", "cost"]


def test_one_scenario_is_a_search_at_fixed_durations():
    workload, cluster = varied(), tiny_cluster(3)
    one, many = (
        find(workload, cluster, SearchOptions(scenarios=scenarios)).best.predicted
        for scenarios in (1, 16)
    )
    assert (one.proof.scenarios, many.proof.scenarios) == (1, 16)
    assert one.step_seconds == one.step_seconds_p95 < many.step_seconds_p95


@pytest.mark.parametrize("most", [0, 1, 3])
def test_a_search_that_is_ended_keeps_its_best_plan_with_an_honest_gap(most):
    full = solve(problem_of(default()[0], make_cluster(32), (), None), 1)
    assert not full.ended and full.evaluated > 3
    problem = problem_of(default()[0], make_cluster(32), (), None)
    found = solve(problem, 1, is_over=lambda evaluated: evaluated >= most)
    assert found.ended and bool(found.best) == (most > 0)
    assert found.bound <= full.best[0].seconds * (1 + 1e-9)
    assert not found.best or found.best[0].seconds >= full.best[0].seconds * (1 - 1e-9)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_search_that_is_ended_gives_no_plan_slower_than_a_baseline(most):
    problem = problem_of(default()[0], make_cluster(512), (), None, scenarios=1)
    options = SearchOptions(runners_up=0, scenarios=1)
    found = solved(problem, options, 0.0, lambda evaluated: evaluated >= most)
    assert found.status == "time_limit" and found.evaluated >= most
    seconds = [each.seconds for each in found.baselines.values() if isinstance(each, Candidate)]
    assert len(seconds) == 5 and found.best[0].seconds <= min(seconds) * (1 + 1e-9)


@pytest.mark.slow
def test_measured_costs_leave_a_large_search_small():
    """The bounds stay sharp: once they did not know which of the measured syncs a plan has, and ten
    thousand sizes of pools were left."""
    workload = load_workload(profiles_dir() / "workloads" / "h200-1.5b.toml")
    profiles = load_profiles([profiles_dir() / "h200" / "1.5b-4gpu.json"])
    options = SearchOptions(runners_up=0, time_limit=60)
    found = find(workload, make_cluster(64), options, profiles=profiles)
    assert found.best.predicted.proof.status == "optimal"
    assert found.evaluated < 100


def test_a_pool_is_of_one_kind():
    kind = tiny_cluster(1).devices["g"]
    slow = kind.model_copy(update={"flops": 100e12, "memory_bandwidth": 1e12})
    nodes = tuple(Node(gpus=2, device=name, host_memory_bytes=10**12) for name in ("g", "s"))
    cluster = Cluster(name="two", nodes=nodes, devices={"g": kind, "s": slow})
    result = find(small_workload(), cluster)
    alone = find(small_workload(), tiny_cluster(2)).best.predicted.step_seconds
    plans = [
        result.best,
        *result.runners_up,
        *(p for p in result.baselines.values() if isinstance(p, Plan)),
    ]
    assert len(plans) >= 5
    for plan in plans:
        check_memory(plan)
        for pool in plan.pools.values():
            assert len({node for node, _ in pool.gpus}) == 1  # a node of each kind
    assert result.best.predicted.step_seconds < alone
    assert result.best.predicted.gap == pytest.approx(0, abs=1e-9)


@pytest.mark.nightly
def test_nodes_of_unequal_size_equal_brute_force(monkeypatch):
    monkeypatch.setattr(layouts, "MICRO_BATCH_TOKENS", (8192,))
    monkeypatch.setattr(layouts, "CONCURRENCY", (32,))
    monkeypatch.setattr(layouts, "TENSOR_PARALLEL", (1, 2))
    device = tiny_cluster(1).devices["g"]
    nodes = tuple(Node(gpus=gpus, device="g", host_memory_bytes=10**12) for gpus in (2, 1))
    workload, cluster = small_workload(), Cluster(name="uneven", nodes=nodes, devices={"g": device})
    found = find(workload, cluster).best
    assert found.predicted.step_seconds == pytest.approx(brute_force(workload, cluster), rel=1e-9)


def test_an_engine_beside_the_actor_is_no_wider_than_it():
    workload = small_workload(tensor_parallel=2, minibatch=1, batch=2, max_staleness=0)
    best = find(workload, make_cluster(4, gpus_per_node=4)).best
    assert best.trainers["actor"].gpus == 1 and best.rollout.tensor_parallel == 2
    assert not {*best.trainers["actor"].pools} & {*best.rollout.pools}
