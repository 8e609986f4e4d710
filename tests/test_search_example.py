"""The example of docs/search.md: the numbers on the page are those that the code computes."""

import runpy
from functools import cache
from pathlib import Path

import pytest
from click.testing import CliRunner

from planner.cli import main
from planner.predict.cycle import cycles
from planner.predict.forecast import forecast
from planner.predict.schedule import steady_edges
from planner.search import SearchOptions, find
from planner.search.questions.space_size import count
from planner.spec.cluster import make_cluster
from planner.spec.timeline import step_seconds
from planner.spec.workload_file import load_workload

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "search.md").read_text()
CLUSTER = make_cluster(4, "h100", 8)
BEST = ("actor/critic", "actor+rollout", "actor=3", "rollout=3")


@cache
def best(max_staleness, *pins):
    workload = load_workload(DOCS / "figures" / "example.toml")
    options = SearchOptions(max_staleness=max_staleness, pins=pins, runners_up=0)
    return find(workload, CLUSTER, options).best


def said(number):
    """Whether the page has a number of seconds, to the millisecond."""
    return f"{number:.3f}" in PAGE


def test_the_plan_that_wins():
    plan = best(1)
    assert {name: len(pool.gpus) for name, pool in plan.pools.items()} == {
        "actor+rollout": 3,
        "critic": 1,
    }
    assert plan.staleness == 1
    assert plan.predicted.proof.status == "optimal"
    assert plan.predicted.step_seconds == pytest.approx(3.581, abs=5e-4)
    assert plan.predicted.gap == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("steps", [6, 8, 20])
def test_the_steps_in_which_a_pipeline_drains_do_not_count(steps, tmp_path):
    """At step times that do not vary, a simulation shows what the plan says, and no picture shows
    two figures."""
    plan = best(1)
    timeline = forecast(plan, steps)
    assert (timeline.warmup, timeline.drain) == (2, 1)
    assert step_seconds(timeline) == pytest.approx(plan.predicted.step_seconds, rel=1e-9)
    plan.write(tmp_path / "plan.json")
    said = CliRunner().invoke(
        main, ["simulate", str(tmp_path / "plan.json"), "--steps", str(steps)]
    )
    assert f"{steps} steps: 3.58 s per step after 2 to warm up and before 1 to drain" in said.stdout
    assert "The plan itself says" not in said.stdout


def test_too_few_steps_for_the_steady_state_are_told(tmp_path):
    best(1).write(tmp_path / "plan.json")
    said = CliRunner().invoke(main, ["simulate", str(tmp_path / "plan.json"), "--steps", "2"])
    assert "2 steps: 1.91 s per step" in said.stdout and "says 3.58 s" in said.stdout


@pytest.mark.parametrize(
    ("max_staleness", "pins", "seconds"),
    [
        (0, BEST, 4.060),
        (1, BEST, 3.581),
        (1, ("actor=4",), 3.902),
        (1, ("actor=2", "critic=1", "rollout=1"), 3.775),
        (1, ("actor=1", "critic=2", "rollout=1"), 4.325),
    ],
)
def test_step_times_of_placements(max_staleness, pins, seconds):
    found = best(max_staleness, *pins).predicted.step_seconds
    assert found == pytest.approx(seconds, abs=5e-4)
    assert said(found)


def test_seconds_of_calls():
    """Those of the plan that wins, and of generation on one to four GPUs."""
    seconds = best(1).predicted.call_seconds
    for call in ("generate", "old_logprobs", "update_actor", "sync_weights", "advantages"):
        assert said(seconds[call]), call
    assert said(round(seconds["values"] + seconds["update_critic"], 4))
    others = [("actor=4",), ("actor=1", "critic=1", "rollout=2"), ("actor=2", "rollout=1")]
    for pins in others:
        assert said(best(1, *pins).predicted.call_seconds["generate"]), pins


def test_the_cycles_of_the_table():
    plan = best(1)
    names = plan.dataflow.steady.names
    found = cycles(names, steady_edges(plan.dataflow, plan.program, plan.pools_of))
    seconds = [plan.predicted.call_seconds[name] for name in names]
    ratios = sorted((found.counts @ seconds / found.distance).tolist(), reverse=True)
    assert ratios[:3] == pytest.approx([3.581, 3.405, 2.210], abs=6e-4)
    assert found.critical(seconds) == ("generate", "old_logprobs", "update_actor", "sync_weights")


def test_the_bounds_by_hand():
    """The pictures compute them from the table of the page."""
    by_hand = runpy.run_path(str(DOCS / "figures" / "search.py"))
    for row in ("ACTOR", "CRITIC", "GENERATE", "GATHER"):
        assert " | ".join(f"{seconds:.3f}" for seconds in by_hand[row][1:]) in PAGE
    left = {}
    for structure in by_hand["STRUCTURES"]:
        bound = by_hand["bound_of"](structure, by_hand["largest"](structure))
        sizes = by_hand["needs"](structure)
        if bound < by_hand["KNOWN"] and sum(sizes) <= by_hand["GPUS"]:
            left[structure] = sizes
    assert left == {by_hand["WINNER"]: [3, 1]}


def test_the_size_of_the_space():
    size = count(load_workload(DOCS / "figures" / "example.toml"), CLUSTER)
    assert sum(structures for _, structures, _ in size.placements) == 10
    assert sum(placements for *_, placements in size.placements) == 50
    assert size.layouts[0] == ("actor", 192, 129)
    assert size.programs[1][1] == 301
