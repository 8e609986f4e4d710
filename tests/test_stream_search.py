"""Searches for plans that stream, against brute force and simulations."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import SHAPE, cpu_cluster, make_workload, small_workload, tiny_cluster

import planner.predict.layouts as layouts
from planner.cli import main
from planner.predict.cost import CostModel
from planner.predict.costs.latencies import Arrivals, LeastLatencies
from planner.predict.cycle import plan_cycles
from planner.predict.forecast import predict
from planner.predict.kv_cache import AMPLE
from planner.predict.layouts import rank_counts, stream_size, trainer_layouts
from planner.predict.memory_check import check_memory
from planner.predict.schedule import check
from planner.search import SearchOptions, find
from planner.search.questions.explain import explain
from planner.search.questions.ladder import STREAMED
from planner.search.questions.pareto import pareto_points
from planner.search.space.placements import gpus_of, pack, sizes, structures
from planner.spec.cluster import Cluster, make_cluster
from planner.spec.errors import UserError
from planner.spec.files import profiles_dir
from planner.spec.lengths import Fixed
from planner.spec.plan import Issue, Plan, Pool, RolloutRole
from planner.spec.workload import Workload
from planner.spec.workload_file import load_workload

LONG_TAIL = {"kind": "lognormal", "mean": 500, "sigma": 1.0, "max": 4096}


def streaming_workload(**changes: Any) -> Workload:
    """A 1B actor and critic, with a long tail."""
    asked = {"response": LONG_TAIL, "sync": "in_flight", "max_staleness": 2}
    return small_workload(**{**asked, **changes})


def programs(staleness: int) -> Iterator[tuple[Issue, ...]]:
    """The critic after the actor or before it, and inference beside the updates of a step before
    or after these."""
    infer = ("score", "old_logprobs", "values", "advantages")
    actor, critic = ("update_actor", "sync_weights"), ("update_critic",)
    for updates in ((*actor, *critic), (*critic, *actor)):
        for ahead in (0, 1) if staleness > 1 else (0,):
            offsets = dict.fromkeys(("score", "values"), ahead) | {"generate": staleness}
            order = ("generate", *infer, *updates)
            yield tuple(Issue(call=call, offset=offsets.get(call, 0)) for call in order)


def every_plan(workload: Workload, cluster: Cluster) -> Iterator[Plan]:
    """Every structure with generation alone, pool sizes and layouts, and some programs."""
    device, most = cluster.device_of((0, 0)), workload.max_staleness
    for structure in structures(workload.roles):
        if frozenset({"rollout"}) not in structure or sum("rollout" in s for s in structure) > 1:
            continue
        names = ["+".join(sorted(roles)) for roles in structure]
        for counts in sizes(len(cluster.gpus), len(structure)).tolist():
            pools = {
                name: Pool(gpus=gpus_of(parts))
                for name, parts in zip(names, pack(counts, cluster), strict=True)
            }
            gpus = dict(zip(names, counts, strict=True))
            home = {
                role: name
                for name, roles in zip(names, structure, strict=True)
                for role in roles - {"rollout"}
            }
            trainers = [
                [
                    layout
                    for used in rank_counts(gpus[name], workload.minibatch, len(cluster.gpus))
                    for layout in trainer_layouts(workload, role, used, name, device)
                ]
                for role, name in home.items()
            ]
            rollouts = [
                RolloutRole(
                    engine="vllm",
                    pools=("rollout",),
                    tensor_parallel=size,
                    replicas=engines,
                    memory_fraction=percent / 100,
                    concurrency=slots,
                )
                for size in (1, 2)
                for engines in range(1, gpus["rollout"] // size + 1)
                for slots, percent in stream_size(workload, size, engines, device, most + 1)
            ]
            for rollout, *chosen in product(rollouts, *trainers):
                for items in programs(most):
                    yield Plan(
                        name="x",
                        workload=workload,
                        cluster=cluster,
                        pools=pools,
                        roles=dict(zip(home, chosen, strict=True)) | {"rollout": rollout},
                        program=items,
                        staleness=most,
                        sync="in_flight",
                    )


@pytest.mark.slow
@pytest.mark.parametrize("flops", [pytest.param(300e12, marks=pytest.mark.nightly), 60e12])
def test_no_plan_is_below_the_bound_and_none_is_much_faster(monkeypatch, flops):
    monkeypatch.setattr(layouts, "MICRO_BATCH_TOKENS", (8192,))
    monkeypatch.setattr(layouts, "TENSOR_PARALLEL", (1, 2))
    workload, cluster = streaming_workload(), tiny_cluster(3, flops=flops)
    found = find(workload, cluster).best.predicted
    model, best = CostModel(workload, cluster), np.inf
    for plan in every_plan(workload, cluster):
        steady = [call for call in plan.dataflow.steady.calls if not call.streams]
        seconds = {call.name: model.call(call, plan).seconds.mean() for call in steady}
        loads = [
            sum(seconds[call.name] for call in steady if pool in plan.pools_of(call))
            for pool in plan.pools
        ]
        try:
            check_memory(plan)
            check(plan)
        except UserError:
            continue
        if max(loads) < best:
            best = min(best, float(model.streamed(plan).steps.mean()))
    assert found.lower_bound_seconds <= best
    assert found.step_seconds <= 1.01 * best


def long_tail(staleness: int, sync: str = "in_flight") -> Workload:
    """The 7B job with long responses, without reference and reward model."""
    workload = load_workload(profiles_dir() / "workloads" / "7b.toml")
    response = {"kind": "lognormal", "mean": 3000, "sigma": 1.0, "max": 12288}
    return Workload.model_validate(
        workload.model_dump()
        | {"response": response, "reference": None, "reward": {"function": "r.py:f"}}
        | {"batch": 512, "minibatch": 128, "max_staleness": staleness, "sync": sync}
    )


@pytest.fixture(scope="module")
def result():
    return find(long_tail(2), make_cluster(16), SearchOptions(runners_up=1))


def test_the_best_stream_is_sound(result):
    plan = result.best
    check(plan)
    check_memory(plan)
    assert plan.streams
    assert plan.predicted.gap <= 0.04  # of which up to 3% are an allowance
    assert plan.predicted.step_seconds == predict(plan).step_seconds
    assert Plan.model_validate_json(plan.to_json()) == plan


@pytest.mark.slow
def test_staleness_buys_more_where_weights_arrive_in_flight(result):
    boundary = [find(long_tail(k, "boundary"), make_cluster(16)).best for k in (1, 2)]
    seconds = [plan.predicted.step_seconds for plan in boundary]
    assert seconds[1] > 0.99 * seconds[0]
    assert result.best.predicted.step_seconds < 0.85 * seconds[1]


def period_with(plan: Plan, model: CostModel, generation: Any) -> float:
    """Seconds of a step by the plan's cycles, if generation takes so long."""
    seconds = {
        call.name: generation if call.streams else model.call(call, plan).seconds
        for call in plan.dataflow.steady.calls
    }
    cycles = plan_cycles(plan)
    means = np.array([np.mean(seconds[call]) for call in cycles.calls])
    return float(cycles.periods(means))


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [1, 3])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kv", ["keep", "recompute"])
def test_no_latency_is_below_the_floor(result, staleness, size, kv):
    """At the period that a plan takes, its generation takes no less than the floor says."""
    workload = result.best.workload.changed(kv=kv, max_staleness=staleness)
    gpus = len(result.best.pools["rollout"].gpus)
    (slots, percent), *_ = stream_size(
        workload, size, gpus // size, result.best.device_of("rollout"), staleness + 1
    )
    rollout = result.best.rollout.changed(
        tensor_parallel=size,
        replicas=gpus // size,
        concurrency=slots,
        memory_fraction=percent / 100,
    )
    program = tuple(
        item.changed(offset=staleness) if item.call == "generate" else item
        for item in result.best.program
    )
    plan = result.best.changed(
        workload=workload,
        roles=result.best.roles | {"rollout": rollout},
        program=program,
        staleness=staleness,
    )
    model = CostModel(workload, plan.cluster)
    found = model.streamed(plan)
    least = LeastLatencies(model.streams, Arrivals(float(found.steps.mean()), staleness + 1))
    device, engines = plan.device_of("rollout"), gpus // size
    floors = least.floors(size, np.array([slots]), np.array([engines]), device, np.array([AMPLE]))
    run = least.run(size, slots, ((device, engines),))
    run.advance()
    latency = found.generate.seconds.mean()
    assert floors.mean() <= run.seconds.mean() <= latency
    while not run.done:
        run.advance()
    assert period_with(plan, model, run.seconds) <= found.steps.mean()
    if kv == "keep":  # of the other the floor leaves something out
        assert floors.mean() > 0.73 * latency


@pytest.mark.slow
def test_the_floor_counts_no_prefill_that_a_sync_may_not_cause():
    """Where all responses are as long, nothing has to be in flight when weights arrive."""
    workload = long_tail(4).changed(kv="recompute", response=Fixed(tokens=3000))
    cluster = make_cluster(16)
    found = find(workload, cluster, SearchOptions(runners_up=0)).best
    assert found.predicted.lower_bound_seconds <= found.predicted.step_seconds
    model, rollout = CostModel(workload, found.cluster), found.rollout
    streamed = model.streamed(found)
    arrivals = Arrivals(float(streamed.steps.mean()), found.staleness + 1)
    least = LeastLatencies(model.streams, arrivals)
    slots, engines = np.array([rollout.concurrency]), np.array([rollout.replicas])
    device = found.device_of("rollout")
    floors = least.floors(rollout.tensor_parallel, slots, engines, device, np.array([AMPLE]))
    assert floors.mean() <= streamed.generate.seconds.mean()


@pytest.mark.slow
def test_a_search_says_whether_weights_in_flight_pay():
    short = long_tail(1, "any").changed(response={"kind": "fixed", "tokens": 1000})
    found = find(short, make_cluster(8), SearchOptions(runners_up=1))
    assert not found.best.streams
    assert [plan.streams for plan in found.runners_up] == [True]
    long = find(long_tail(2, "any"), make_cluster(16), SearchOptions(runners_up=1))
    assert long.best.streams
    assert [plan.streams for plan in long.runners_up] == [False]


@pytest.mark.slow
def test_the_command_says_where_weights_in_flight_do_not_pay(tmp_path):
    plan = tmp_path / "plan.json"
    job = ["--workload", "gsm8k", "--gpus", "8", "--set", "sync=any", "--no-picture"]
    said = CliRunner().invoke(main, ["search", *job, "--out", str(plan)]).output
    assert "Weights in flight do not pay here: runner-up-" in said
    assert not Plan.read(plan).streams
    job = [*job, "--max-staleness", "0"]
    said = CliRunner().invoke(main, ["search", *job, "--out", str(plan)]).output
    assert "No plan with weights in flight: nothing is in flight at a staleness of 0." in said


def test_engines_have_the_slots_with_which_a_stream_is_the_fastest():
    """Where a stream waits for its longest responses, batches come in bunches, and fewer slots let
    the first of them end earlier."""
    model = {
        "shape": SHAPE | {"hidden": 128, "heads": 8, "kv_heads": 4, "intermediate": 256},
        "random_weights": True,
    }
    workload = make_workload(
        batch=96,
        minibatch=48,
        samples_per_prompt=4,
        prompt={"kind": "fixed", "tokens": 8},
        response={"kind": "lognormal", "mean": 64, "sigma": 1.0, "max": 512},
        actor=model,
        critic=None,
        reference=None,
        reward=model,
        algorithm={"advantage": "grpo"},
        optimizer={},
        sync="in_flight",
        max_staleness=4,
        seed=0,
    )
    cluster = cpu_cluster(2)
    core = cluster.devices["core"].changed(flops=4e11, overhead_seconds=5e-3)
    cluster = cluster.changed(devices={"core": core})
    plan = find(workload, cluster, SearchOptions(runners_up=0)).best
    assert plan.rollout.concurrency <= 96
    more = plan.rollout.changed(concurrency=480, memory_fraction=0.5)
    crowded = plan.changed(roles=plan.roles | {"rollout": more})
    assert predict(plan).step_seconds < 0.99 * predict(crowded).step_seconds


def test_explaining_ends_with_weights_in_flight(result):
    explanation = explain(result.best)
    last = explanation.ladder[-1]
    assert last.what == STREAMED
    assert last.plan == result.best
    assert last.seconds == pytest.approx(result.best.predicted.step_seconds)
    assert not explanation.ladder[-2].plan.streams
    assert last.seconds < explanation.ladder[-2].seconds


@pytest.mark.slow
def test_what_staleness_buys_is_a_curve():
    points, _ = pareto_points(long_tail(4), [make_cluster(16)], (1, 2, 4))
    seconds = [point.seconds for point in points]
    assert seconds[0] > 1.05 * seconds[1] > seconds[2]
    assert all(point.plan.streams for point in points)


@pytest.mark.parametrize(
    ("gpus", "options", "text"),
    [
        (1, {}, "nothing fits with sync = 'in_flight', for which generation needs GPUs of its own"),
        (8, {"pins": ("actor+rollout",)}, "nothing fits with sync = 'in_flight'"),
        (8, {"max_staleness": 0}, "nothing is in flight when weights arrive"),
        (8, {"objective": "p95"}, "a stream has no 95th percentile"),
    ],
)
def test_streams_that_cannot_be_searched(gpus, options, text):
    with pytest.raises(UserError, match=text):
        find(long_tail(1), make_cluster(gpus), SearchOptions(**options))
