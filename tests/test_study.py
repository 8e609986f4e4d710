"""A study of a tiny workload on this machine: planned, measured, resumed and written down."""

import csv
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from conftest import colocated, cpu_cluster, make_workload, split

from executor.measuring.study import Bench, Job, _memory, engines_of, in_order
from planner.cli import main
from planner.predict.forecast import forecast_of
from planner.predict.profile import Profile
from planner.predict.schedule import load_plan
from planner.report.compare import compare
from planner.report.study import rows_of, summary_of
from planner.report.study_figures import company
from planner.spec.errors import UserError
from planner.spec.files import profiles_dir
from planner.spec.plan import Plan
from planner.spec.study import CellResult, GpuMemory, load_study
from planner.spec.timeline import Span, Timeline, step_seconds

STUDY = """
schema = "splitplan/study/1"
name = "tiny"
workload = "tiny.json"
cluster = "two.json"
steps = 3
matrix_flops = 1e10

[[cells]]
name = "colocated"
baseline = "colocated"

[[cells]]
name = "split"
baseline = "split"

[[cells]]
name = "again"
baseline = "colocated"

[[cells]]
name = "off"
baseline = "one-step-off"
pins = ["rollout=1"]
"""


def plan(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def study(tmp_path: Path) -> Path:
    make_workload(response={"kind": "fixed", "tokens": 6}).write(tmp_path / "tiny.json")
    cpu_cluster(2).write(tmp_path / "two.json")
    (tmp_path / "study.toml").write_text(STUDY)
    return tmp_path / "study.toml"


def ok(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_study_is_planned_measured_resumed_and_written_down(
    lent_cores: None, study: Path
) -> None:
    directory = study.with_suffix("")
    assert "again (= colocated)" in ok(plan("study", study, "--plan-only"))
    written = {path: path.read_bytes() for path in directory.rglob("*.json")}
    assert len(written) == 8 and not list(directory.rglob("result.json"))
    predicted = Timeline.read(directory / "off" / "predicted.json")
    assert (predicted.steps, predicted.warmup, predicted.drain) == (6, 2, 1)

    assert "No time for colocated, split, off" in ok(plan("study", study, "--minutes", "0.001"))
    assert "0 of" not in ok(plan("study", study))
    assert all(path.read_bytes() == content for path, content in written.items())
    rows = {row.cell.name: row for row in rows_of(load_study(study), directory)}
    for name, row in rows.items():
        assert row.figures is not None and row.figures.result.status == "done", name
        measured = row.figures.measured
        assert (
            measured.source == "measured" and measured.steps - measured.warmup - measured.drain == 3
        )
        assert row.figures.step_seconds == step_seconds(measured)
        assert row.figures.error == compare(row.plan, row.predicted, measured).step.error
        assert 0 < row.figures.flops_share["update_actor"] < 100
        assert row.figures.computed_share["update_actor"] < row.figures.flops_share["update_actor"]
        assert (
            row.speed_ups["colocated"][1]
            == rows["colocated"].figures.step_seconds / row.figures.step_seconds
        )
    assert (
        rows["again"].same_as == "colocated" and not (directory / "again" / "result.json").exists()
    )
    beside = {call.call: call.beside for call in rows["split"].figures.calls}
    assert beside["update_actor"] > 0.05 > beside["generate"]
    assert all(
        call.beside == 0 and call.overlap is None for call in rows["colocated"].figures.calls
    )

    results = json.loads((directory / "results.json").read_text())
    assert (
        results["summary"]["plans"] == 3
        and [cell["status"] for cell in results["cells"]] == ["done"] * 4
    )
    table = list(csv.DictReader((directory / "results.csv").open()))
    assert float(table[1]["measured_vs_split"]) == 1
    page = (directory / "README.md").read_text()
    assert "3 plans measured" in page and "split/gantt.png" in page
    assert (directory / "split" / "gantt.png").exists() and (directory / "steps.png").exists()
    metrics = (directory / "off" / "metrics.jsonl").read_text().splitlines()
    assert len(metrics) == 6
    gap = rows["off"].figures.log_prob_gap
    assert gap == json.loads(metrics[0])["log_prob_gap"] < 1e-4  # fp32 on both sides
    assert results["cells"][2]["log_prob_gap"] == gap and "Log-probs of engine and trainer" in page

    assert "of `off` as many as the staleness follow" in page
    ok(
        plan(
            "compare",
            directory / "off" / "plan.json",
            directory / "off",
            "--out",
            directory / "compare.png",
        )
    )
    off = rows["off"]
    assert forecast_of(off.plan, off.figures.measured).spans == off.predicted.spans
    text = study.read_text()
    study.write_text(text.replace("steps = 3", "steps = 4"))
    for command in (("study", study), ("study", study, "--report")):
        assert (
            f"delete {directory / 'colocated' / 'result.json'} and write it again"
            in plan(*command).stderr
        )
    study.write_text(text)
    before = (directory / "split" / "result.json").read_bytes()
    (directory / "README.md").write_text(page + "\n## Notes\n\nBy hand.\n")
    assert "Every cell has been measured" in ok(plan("study", study))
    assert (directory / "README.md").read_text() == page + "\n## Notes\n\nBy hand.\n"
    assert "Left as they are: colocated, split, off" in ok(plan("study", study, "--plan-only"))
    assert (directory / "split" / "result.json").read_bytes() == before

    gpu = GpuMemory(
        gpu=(0, 0),
        used=6 * 10**9,
        allocated={"trainer": 4 * 10**9},
        reserved={"trainer": 5 * 10**9},
    )
    result = CellResult.read(directory / "split" / "result.json")
    for memory, says in (
        (gpu, "trainer 4.0 of 5.0 |"),
        (gpu.model_copy(update={"retries": {"trainer": 2}}), "of 5.0 (retries: 2) |"),
    ):
        result.model_copy(update={"memory": (memory,)}).write(directory / "split" / "result.json")
        ok(plan("study", study, "--report"))
        page = (directory / "README.md").read_text()
        assert says in page and ("Retries: how often" in page) == bool(memory.retries)

    split_plan = Plan.read(directory / "split" / "plan.json")
    split_plan.model_copy(update={"predicted": None}).write(directory / "split" / "plan.json")
    changed = {row.cell.name: row for row in rows_of(load_study(study), directory)}
    assert changed["split"].figures is None and changed["off"].figures is not None
    ok(plan("study", study, "--report"))
    assert "- `split`: not run since its plan changed" in (directory / "README.md").read_text()


@pytest.mark.nightly
def test_a_cell_that_fails_is_recorded_and_the_next_one_runs(ray_two: None, tmp_path: Path) -> None:
    """The reward function of the first plan gives too few rewards."""
    (tmp_path / "wrong.py").write_text("def none(prompts, responses, answers):\n    return []\n")
    wrong = make_workload(
        reward={"function": f"{tmp_path}/wrong.py:none"}, critic=None, reference=None
    )
    right = make_workload(critic=None, reference=None)
    plans = [
        colocated(wrong, cores=1).model_copy(update={"name": "wrong"}),
        colocated(right, cores=1),
    ]
    jobs = [
        Job(
            plan=p, steps=2, warmup=1, drain=0, seconds=0.1, directory=tmp_path / p.name, sha256="x"
        )
        for p in plans
    ]
    from executor.measuring.study import run

    said: list[str] = []
    for job in jobs:
        job.directory.mkdir()
    assert run(jobs, seconds=None, say=said.append) == []
    failed, done = (CellResult.read(job.directory / "result.json") for job in jobs)
    assert failed.status == "failed" and "0 rewards" in failed.reason and "\n" not in failed.reason
    assert "0 rewards" in (tmp_path / "wrong" / "log.txt").read_text()
    assert (
        done.status == "done"
        and Timeline.read(tmp_path / "colocated" / "timeline.json").warmup == 1
    )
    assert any("failed: " in line for line in said)


def test_jobs_that_share_engines_follow_each_other(tmp_path: Path) -> None:
    workload = make_workload()
    one, two = colocated(workload, cores=1), colocated(workload, cores=2)
    names = {"a": two, "b": one, "c": split(workload), "d": two}
    jobs = [
        Job(
            plan=p.model_copy(update={"name": name}),
            steps=2,
            warmup=1,
            drain=0,
            seconds=1,
            directory=tmp_path,
            sha256="",
        )
        for name, p in names.items()
    ]
    assert [job.plan.name for job in in_order(jobs)] == ["a", "b", "c", "d"]
    assert engines_of(two) > engines_of(one)
    bench = Bench(jobs)
    assert bench.estimate(jobs[0], engines_of(two)) < bench.estimate(jobs[0])


def span(call: str, start: float, end: float, *pools: str) -> Span:
    return Span(
        call=call,
        role="actor",
        pools=pools,
        step=0,
        issued=start,
        ready=start,
        start=start,
        end=end,
    )


def test_company_is_the_share_of_time_beside_other_calls() -> None:
    mine = span("update_actor", 0, 10, "a")
    others = [
        span("generate", -5, 2, "b"),
        span("values", 1, 4, "c"),
        span("score", 8, 20),
        span("x", 9, 11, "b"),
    ]
    assert company([mine], [mine, *others]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (("study/1", "study/9"), "'splitplan/study/1' is needed"),
        (('name = "again"', 'name = "split"'), "'split' is used twice"),
        (('baseline = "split"', ""), "needs one of baseline, search and plan"),
        (("rollout=1", "rollout=2"), "cannot meet --pin rollout=2"),
        (('baseline = "split"', "search = 0\nrunner_up = 99"), "there is no runner-up 99"),
        (("steps = 3", "stepz = 3"), "stepz: unknown key"),
        (('"tiny.json"', '"gone.json"'), "/gone.json: no such file"),
        (('"tiny.json"', '"h200-1.5c"'), "no workload 'h200-1.5c' is shipped"),
    ],
)
def test_a_wrong_study_is_refused(study: Path, edit: tuple[str, str], says: str) -> None:
    study.write_text(study.read_text().replace(*edit))
    result = plan("study", study, "--plan-only")
    assert result.exit_code == 2 and says in result.stderr, result.output


def test_a_plan_made_with_other_profiles_or_for_other_steps_is_not_run(
    ray_two: None, study: Path
) -> None:
    ok(plan("study", study, "--plan-only"))
    text = study.read_text()
    study.write_text(text.replace("steps = 3", "steps = 4"))
    result = plan("study", study)
    assert (
        result.exit_code == 2
        and "is of 3 steps of plan 'colocated' after 1 to warm up, not of 4" in result.stderr
    )
    study.write_text(text)
    place = study.with_suffix("") / "split" / "plan.json"
    made = Plan.read(place)
    provenance = made.provenance.model_copy(update={"profiles": {"p.json": "0" * 64}})
    made.model_copy(update={"provenance": provenance}).write(place)
    result = plan("study", study)
    assert result.exit_code == 2 and "planned with other profiles" in result.stderr
    with pytest.raises(UserError, match="holds no plans"):
        rows_of(load_study(study), study.parent / "elsewhere")


def test_nothing_is_summed_up_before_anything_is_measured(study: Path) -> None:
    ok(plan("study", study, "--plan-only"))
    assert "Nothing has been measured yet" in ok(plan("study", study, "--report"))
    assert summary_of(rows_of(load_study(study), study.with_suffix(""))) is None


def test_memory_is_what_the_driver_saw_and_each_process_of_it() -> None:
    trainer = {"allocated": 50, "reserved": 60, "used": 90, "retries": 2}
    told = [
        ((0, 0), "trainer", trainer),
        ((0, 0), "engine", trainer | {"reserved": 55}),
        ((0, 1), "trainer", trainer),
    ]
    first, second = _memory({(0, 0): 100}, told)
    assert (first.gpu, first.used) == ((0, 0), 100)
    assert first.allocated == {"trainer": 50, "engine": 50} and first.reserved == {
        "trainer": 60,
        "engine": 55,
    }
    assert first.retries == {"trainer": 2, "engine": 2}
    assert (second.gpu, second.used) == ((0, 1), 90)  # nobody could ask the driver
    assert _memory({}, [((0, 0), "trainer", {})]) == []  # on cores


def test_the_shipped_studies_were_planned_with_shipped_profiles() -> None:
    shipped = {Profile.read(path).sha256 for path in profiles_dir().glob("*/*.json")}
    plans = list((Path(__file__).parents[1] / "reports" / "h200").glob("*/*/plan.json"))
    assert plans
    for path in plans:
        provenance = load_plan(path).provenance
        assert provenance is not None and set(provenance.profiles.values()) <= shipped, path
