"""An algorithm that is not PPO: its calls have other names, and nobody but this file knows them.

It has no critic. A function grades each answer, the grades of a batch are ranked, and the model is
improved by the ranks.
"""

from pathlib import Path

import numpy as np
import pytest
from conftest import cpu_cluster, make_workload, small_workload, tiny_cluster
from test_search import brute_force

import planner.predict.layouts as layouts
from executor.running.execute import rehearse
from executor.running.options import RunOptions
from planner.predict.forecast import forecast
from planner.predict.memory_check import check_memory
from planner.predict.schedule import Task, check, staleness, tasks_of
from planner.report.compare import compare
from planner.search import find
from planner.search.questions.explain import explain
from planner.search.solver.choices import choices_of
from planner.search.space.enumerate_programs import orders
from planner.search.space.placements import sharing_of, structures
from planner.spec.dataflow import Call, Dataflow, Read
from planner.spec.errors import UserError
from planner.spec.plan import Plan
from planner.spec.timeline import Timeline, step_seconds
from planner.spec.workload import Workload

ANSWERS = Read(data="answers")
NAMES = ("sample", "grade", "recall", "rank", "improve", "install")


def ranked(workload: Workload) -> Dataflow:
    """One step. It needs no more of the workload than that it has an actor and a reward
    function."""
    sample = Call(
        name="sample",
        roles=("rollout",),
        kind="generate",
        reads=(Read(data="questions"), Read(data="served", latest=True)),
        writes=("answers",),
    )
    grade = Call(
        name="grade", roles=(), kind="host", reads=(ANSWERS,), writes=("grades",), scores=True
    )
    recall = Call(
        name="recall",
        roles=("actor",),
        kind="infer",
        reads=(ANSWERS, Read(data="model", lag=1)),
        writes=("likelihoods",),
    )
    rank = Call(name="rank", roles=(), kind="host", reads=(Read(data="grades"),), writes=("ranks",))
    improve = Call(
        name="improve",
        roles=("actor",),
        kind="train",
        reads=(
            ANSWERS,
            Read(data="likelihoods"),
            Read(data="ranks"),
            Read(data="model", lag=1),
        ),
        writes=("model",),
    )
    install = Call(
        name="install",
        roles=("actor", "rollout"),
        kind="transfer",
        reads=(Read(data="model"),),
        writes=("served",),
    )
    return Dataflow(calls=(sample, grade, recall, rank, improve, install))


class Ranked(Workload):
    """A workload of this algorithm."""

    @property
    def dataflow(self) -> Dataflow:
        return ranked(self)


def ranked_workload(like: Workload) -> Ranked:
    return Ranked.model_validate(
        {**like.model_dump(), "critic": None, "reference": None, "algorithm": {}}
    )


REWARD = {"function": "r.py:f", "seconds_per_sequence": 1e-4}


@pytest.fixture(scope="module")
def plan() -> Plan:
    """The best plan on two cores."""
    return find(ranked_workload(make_workload(reward=REWARD)), cpu_cluster(2)).best


def test_what_a_call_does_follows_from_what_it_reads():
    flow = ranked(small_workload())
    assert [flow.generates.name, flow.ends_step.name, flow.installs.name] == [
        "sample",
        "improve",
        "install",
    ]
    assert flow.state == {"model", "served"}


@pytest.mark.parametrize("gpus", [2, 3])
def test_the_search_proves_what_brute_force_finds(monkeypatch, gpus):
    monkeypatch.setattr(layouts, "MICRO_BATCH_TOKENS", (8192,))
    monkeypatch.setattr(layouts, "CONCURRENCY", (32,))
    monkeypatch.setattr(layouts, "TENSOR_PARALLEL", (1, 2))
    workload, cluster = ranked_workload(small_workload(reward=REWARD)), tiny_cluster(gpus)
    result = find(workload, cluster)
    found = result.best.predicted
    assert found.proof.status == "optimal"
    assert found.gap == pytest.approx(0, abs=1e-9)
    assert found.step_seconds == pytest.approx(brute_force(workload, cluster), rel=1e-9)
    assert sorted(item.call for item in result.best.program) == sorted(NAMES)
    for baseline in result.baselines.values():
        if isinstance(baseline, Plan):
            check(baseline)
            assert baseline.predicted.step_seconds >= found.step_seconds * (1 - 1e-9)


def test_its_ways_through_a_step_bound_every_program():
    """With weights one update old, two steps may overlap: a step takes at least half of the longest
    way."""
    flow = ranked(small_workload())
    apart = next(s for s in structures(("actor", "rollout")) if len(s) == 2)
    floor = choices_of(flow, sharing_of(flow, apart), 1).floor.tolist()
    way = ["sample", "grade", "rank", "improve", "install"]
    assert [0.5 * (name in way) for name in NAMES] in floor


def test_its_programs_run():
    flow = ranked(small_workload())
    pools = {"sample": ("a",), "recall": ("b",), "improve": ("b",), "install": ("a", "b")}
    for k in (0, 1, 2):
        programs = list(orders(flow, {name: pools.get(name, ()) for name in NAMES}, k))
        assert programs
        for program in programs:
            ahead = {item.call: item.offset for item in program}
            assert ahead["sample"] - ahead["install"] == k


def test_it_is_simulated(plan):
    check(plan)
    check_memory(plan)
    timeline = forecast(plan, 40)
    assert timeline.step_ends_with == "improve"
    assert step_seconds(timeline) == pytest.approx(plan.predicted.step_seconds, rel=0.05)
    tasks = {(task.call.name, task.step): task for task in tasks_of(plan, 5)}
    assert staleness(list(tasks.values())) == plan.staleness
    assert tasks["recall", 3].weights_version == 3
    assert tasks["improve", 3].weights_version == tasks["install", 3].weights_version == 4
    assert tasks["sample", 3].weights_version == 4 - 1 - plan.staleness
    assert tasks["grade", 3].weights_version is None


def test_it_is_explained(plan):
    explained = explain(plan)
    assert {effect.call for effect in explained.effects} == set(NAMES)


def test_its_mistakes_are_named_by_its_calls(plan):
    program = [item for item in plan.program if item.call != "rank"]
    last = next(item for item in plan.program if item.call == "rank").changed(offset=0)
    with pytest.raises(UserError, match="deadlocks: improve of step 0 reads ranks, which rank"):
        tasks_of(plan.changed(program=(*program, last)), 4)


def test_it_is_rehearsed(ray_two: None, plan, tmp_path: Path) -> None:
    seconds = {name: 0.05 + 0.01 * number for number, name in enumerate(NAMES)}

    def lasts(task: Task) -> float:
        return seconds[task.call.name]

    path = rehearse(plan, lasts, name="r", runs=tmp_path, options=RunOptions(steps=4))
    measured = Timeline.read(path / "timeline.json")
    assert measured.step_ends_with == "improve"
    assert {span.call for span in measured.spans} == set(NAMES)
    assert len((path / "metrics.jsonl").read_text().splitlines()) == 4
    compared = compare(plan, forecast(plan, 4), measured)
    assert {row.name for row in compared.calls} == set(NAMES)
    assert compared.step.measured > 0
    assert np.isfinite(compared.controller_overhead)
