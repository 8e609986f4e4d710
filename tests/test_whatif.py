"""Planning under other conditions, the points of a Pareto picture, and the commands that print
them."""

import csv

import pytest
from click.testing import CliRunner
from conftest import ROLES, make_workload, small_workload, tiny_cluster

from planner.cli import main
from planner.predict.memory_check import check_memory
from planner.predict.schedule import check
from planner.search import SearchOptions, find
from planner.search.questions.pareto import pareto_points
from planner.search.questions.space_size import count
from planner.search.questions.variants import (
    resized,
    with_models,
    with_network,
    with_response,
    with_tail,
)
from planner.search.questions.what_if import conditions, what_if
from planner.search.space.placements import sizes, structures
from planner.spec.cluster import make_cluster
from planner.spec.errors import UserError
from planner.spec.lengths import Empirical, Fixed, Lognormal

TAIL = Lognormal(mean=400, sigma=0.8, max=1024)


@pytest.fixture(scope="module")
def plan():
    return find(small_workload(response=TAIL, max_staleness=1), tiny_cluster(2)).best


def test_unchanged_inputs_give_the_plan_again(plan):
    outcome = what_if(plan, next(conditions(plan, (), ())))
    assert outcome.what == "as it is" and not outcome.flips
    for key in ("pools", "roles", "program", "staleness", "workload", "cluster"):
        assert getattr(outcome.plan, key) == getattr(plan, key)
    assert outcome.seconds == outcome.kept == pytest.approx(plan.predicted.step_seconds, rel=1e-12)
    assert outcome.tokens_per_second == pytest.approx(plan.predicted.tokens_per_second)


def test_each_condition_is_planned_anew(plan):
    small = small_workload()
    listed = {each.what: each for each in conditions(plan, (1, 3), (small,))}
    assert list(listed) == [
        "as it is",
        "1 GPU",
        "3 GPUs",
        "responses 2× as long",
        "a longer tail (sigma × 1.5)",
        "models of small",
        "staleness up to 2",
    ]
    outcomes = {what: what_if(plan, each) for what, each in listed.items() if what != "1 GPU"}
    for what, outcome in outcomes.items():
        check(outcome.plan)
        check_memory(outcome.plan)
        best = find(listed[what].workload, listed[what].cluster).best
        assert outcome.seconds == pytest.approx(best.predicted.step_seconds, rel=1e-9)
        assert outcome.kept is None or outcome.kept >= outcome.seconds * (1 - 1e-9)
        own = frozenset(
            frozenset(r for r, layout in plan.roles.items() if p in layout.pools)
            for p in plan.pools
        )
        then = frozenset(
            frozenset(r for r, layout in outcome.plan.roles.items() if p in layout.pools)
            for p in outcome.plan.pools
        )
        assert outcome.flips or own == then
    assert (
        outcomes["3 GPUs"].seconds
        < outcomes["as it is"].seconds
        < outcomes["responses 2× as long"].seconds
    )
    assert outcomes["staleness up to 2"].seconds <= outcomes["as it is"].seconds * (1 + 1e-9)


def test_where_nothing_fits_the_reason_is_given(plan):
    tight = plan.model_copy(update={"cluster": tiny_cluster(2, memory=24e9)})
    one = [each for each in conditions(tight, (1,), ()) if each.what == "1 GPU"]
    with pytest.raises(UserError, match="nothing fits: actor needs"):
        what_if(tight, one[0])


def test_clusters_grow_and_shrink_by_their_nodes():
    cluster = make_cluster(12)
    assert [node.gpus for node in resized(cluster, 16).nodes] == [8, 4, 4]
    assert [node.gpus for node in resized(cluster, 5).nodes] == [5]
    assert resized(cluster, 12).nodes == cluster.nodes and resized(cluster, 12).name == cluster.name
    assert with_network(cluster, 0.25).network_bandwidth == cluster.network_bandwidth / 4


def test_workloads_change_in_one_thing():
    workload = make_workload(response=TAIL)
    assert with_response(workload, 2).response == Lognormal(mean=800, sigma=0.8, max=2048)
    assert with_response(make_workload(response=Fixed(tokens=5)), 2).response == Fixed(tokens=10)
    observed = Empirical(values=(2, 4), max=4)
    assert with_response(make_workload(response=observed), 2).response == Empirical(
        values=(4, 8), max=8
    )
    assert with_tail(workload, 1.5).response == Lognormal(mean=400, sigma=1.5 * 0.8, max=1024)
    assert with_tail(make_workload(response=observed), 1.5) is None
    other = small_workload()
    swapped = with_models(workload, other)
    assert swapped.roles == workload.roles
    assert {model.shape for model in swapped.models.values()} == {other.actor.shape}


def test_points_are_the_best_plans_and_the_beaten_are_marked():
    workload = small_workload(max_staleness=0)
    points, reasons = pareto_points(
        workload, [tiny_cluster(1, memory=24e9), tiny_cluster(2), tiny_cluster(3)], range(2)
    )
    assert [(point.gpus, point.max_staleness) for point in points] == [
        (2, 0),
        (2, 1),
        (3, 0),
        (3, 1),
    ]
    assert len(reasons) == 1 and "on 1 GPU:" in reasons[0]
    for point in points:
        check(point.plan)
        options = SearchOptions(max_staleness=point.max_staleness)
        best = find(workload, tiny_cluster(point.gpus), options).best
        assert point.seconds == pytest.approx(best.predicted.step_seconds, rel=1e-9)
        beaten = [
            p
            for p in points
            if p[:2] != point[:2]
            and p.gpus <= point.gpus
            and p.max_staleness <= point.max_staleness
            and p.seconds <= point.seconds * (1 + 1e-9)
        ]
        assert point.best == (not beaten)


def test_dollars_are_those_of_all_gpus():
    (point,), _ = pareto_points(small_workload(max_staleness=0), [make_cluster(2, "h100")], [0])
    price = make_cluster(1, "h100").devices["h100"].price_per_hour
    assert point.dollars == pytest.approx(2 * price * point.seconds / 3600)


def test_the_space_is_counted():
    found = count(make_workload(), tiny_cluster(4), 0)
    assert sum(structures for _, structures, _ in found.placements) == sum(
        len(s) <= 4 for s in structures(ROLES)
    )
    counted = sum(len(sizes(used, len(s))) for s in structures(ROLES) for used in range(1, 5))
    assert sum(many for *_, many in found.placements) == counted
    assert [k for k, *_ in found.programs] == [0]
    assert all(1 <= kept <= listed for _, listed, kept in found.layouts)


# --- the commands ---


@pytest.fixture
def written(tmp_path, plan):
    plan.write(tmp_path / "best.json")
    return tmp_path / "best.json"


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_explain_prints_all_its_parts(written):
    result = run("explain", written)
    assert result.exit_code == 0, result.output
    for part in (
        "split",
        "drop the waits",
        "Bottleneck",
        "Critical cycle",
        "10% longer",
        "kept while idle",
        "idle s",
    ):
        assert part in result.stdout


def test_what_if_prints_a_row_per_condition(written, monkeypatch):
    monkeypatch.setattr("planner.commands.whatif.MODELS", ("1.5b",))
    result = run("what-if", written, "--gpus", "1")
    assert result.exit_code == 0, result.output
    for row in ("as it is", "1 GPU", "models of 1.5b", "staleness up to 2"):
        assert row in result.stdout


def test_pareto_draws_and_writes_its_figures(tmp_path, written, plan):
    plan.workload.write(tmp_path / "w.json")
    plan.cluster.write(tmp_path / "c.json")
    given = ("--workload", tmp_path / "w.json", "--cluster", tmp_path / "c.json")
    wanted = ("--out", tmp_path / "p.png", "--csv", tmp_path / "p.csv")
    result = run("pareto", "--gpus", "1,2", *given, "--max-staleness", 1, *wanted)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    one, two = (min(float(r["step_seconds"]) for r in rows if r["gpus"] == n) for n in "12")
    sentence = next(line for line in result.stdout.splitlines() if line.startswith("1 → 2 GPUs"))
    assert f"{1 - two / one:.1%} less time a step" in sentence
    hours = 2 * two / one - 1
    assert f"{abs(hours):.1%} {'more' if hours >= 0 else 'fewer'} GPU hours" in sentence
    assert [(row["gpus"], row["max_staleness"]) for row in rows] == [
        ("1", "0"),
        ("1", "1"),
        ("2", "0"),
        ("2", "1"),
    ]
    assert float(rows[-1]["step_seconds"]) == pytest.approx(plan.predicted.step_seconds, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pareto", "--gpus", "4,x"), "write numbers with commas"),
        (("pareto", "--gpus", "0,4"), "each number must be 1 to 4,096"),
        (("pareto", "--gpus", "4", "--max-staleness", "-1"), "-1 is not in the range"),
        (("pareto", "--gpus", "1", "--device", "h100"), "no plan fits 7b on 1 GPU: actor needs"),
        (("search", "--gpus", "4", "--pin", "actor=9"), "--pin actor=9 cannot be met on 4 GPUs"),
        (("explain", "missing.json"), "no such file"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert message in result.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
