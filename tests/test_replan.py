"""A run planned anew from its own steps: what is saved, how surely, and what a switch costs."""

import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import small_workload, tiny_cluster
from test_stream_run import streamed

from executor.running.run_directory import held
from planner.cli import main
from planner.exchange.own_run import lines_of, own_run, read_own_run
from planner.predict.forecast import forecast, predict
from planner.predict.schedule import load_plan
from planner.search import baseline
from planner.spec.errors import UserError
from planner.spec.lengths import Fixed
from planner.spec.timeline import Span, Timeline

START = 12.5  # seconds, of the run below


def made(folder: Path, name: str = "colocated", steps: int = 8, slower=None, tokens=512) -> Path:
    """The directory of a run of a baseline, with some calls as many times slower as is said."""
    plan = baseline(name, small_workload(max_staleness=1, steps=100), tiny_cluster(4))
    run = folder / "run"
    run.mkdir()
    plan.write(run / "plan.json")
    timeline, spans, late = forecast(plan, steps), [], 0.0
    for span in timeline.spans:  # serial: what is slower moves all that follows
        more = span.seconds * ((slower or {}).get(span.call, 1.0) - 1)
        at = {"issued": span.issued, "ready": span.ready, "start": span.start, "end": span.end}
        moved = {key: value + late for key, value in at.items()}
        moved["end"] += more
        late += more
        spans.append(
            Span(call=span.call, role=span.role, pools=span.pools, step=span.step, **moved)
        )
    timeline = timeline.changed(source="measured", steps=100, spans=tuple(spans))
    timeline.write(run / "timeline.json")
    rows = [
        {
            "step": step, "response_tokens": float(tokens), "response_tokens_min": float(tokens),
            "response_tokens_max": float(tokens), "truncated_share": 1.0,
        }
        for step in range(steps)
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{")
    said = f"INFO start: {START} s, of which engines 8.0, processes 4.5"
    (run / "log.txt").write_text(f"2026-01-01 10:00:00,000 {said}\n")
    return run


def replan(run: Path, *options: str) -> str:
    out = run.parent / "new.json"
    result = CliRunner().invoke(main, ["replan", str(run), "--out", str(out), *options])
    assert result.exit_code in (0, 2), result.exception
    assert len(result.stderr.splitlines()) == (1 if result.exit_code else 0)
    return " ".join((result.stderr if result.exit_code else result.stdout).split())


def test_what_a_run_says_of_itself(tmp_path: Path) -> None:
    found = read_own_run(made(tmp_path, slower={"generate": 3.0}, tokens=256), 4)
    expected = predict(found.plan).call_seconds
    assert len(found.steps) == 4 and (found.done, found.asked) == (8, 100)
    assert found.steps[0]["generate"] == pytest.approx(3 * expected["generate"], rel=1e-6)
    assert found.steps[0]["update_actor"] == pytest.approx(expected["update_actor"], rel=1e-6)
    assert found.start_seconds == pytest.approx(START)
    assert found.observed.workload.response == Fixed(tokens=256)
    longer = predict(found.plan).step_seconds + 2 * expected["generate"]
    assert found.step_seconds[0] == pytest.approx(longer, rel=1e-3)


def test_a_plan_that_is_still_the_best_is_kept(tmp_path: Path) -> None:
    """Without staleness all roles on all GPUs are the fastest split of this job."""
    said = replan(made(tmp_path), "--max-staleness", "0")
    assert "Keep the plan" in said
    assert load_plan(tmp_path / "new.json").workload.response == Fixed(tokens=512)


def test_a_better_plan_is_said_with_what_it_saves_and_what_a_switch_costs(tmp_path: Path) -> None:
    said = replan(made(tmp_path, "standalone"))
    assert "It saves" in said and f"Switching costs about {START:.1f} s" in said
    assert "92 are left" in said
    assert "plan execute --resume" in said
    new, old = load_plan(tmp_path / "new.json"), load_plan(tmp_path / "run" / "plan.json")
    assert new.workload == old.workload  # so that the run can go on
    assert predict(new).step_seconds < predict(old).step_seconds


def test_drift_is_shown_call_by_call(tmp_path: Path) -> None:
    said = replan(made(tmp_path, slower={"update_actor": 2.0}))
    assert "+100%" in said


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    run = made(tmp_path)
    assert "no such run directory" in replan(tmp_path / "nowhere")
    short = tmp_path / "short"
    short.mkdir()
    with pytest.raises(UserError, match="has 1 of the 2 steps that must count"):
        read_own_run(made(short, steps=2), 10)
    shutil.copy(made_other(tmp_path), run / "plan.json")
    assert "its timeline is of another plan" in replan(run)
    assert not (tmp_path / "new.json").exists()


def test_a_run_that_streams_does_not_say_what_calls_take() -> None:
    timeline = Timeline(source="measured", plan="x", steps=4, warmup=0, spans=())
    with pytest.raises(UserError, match="its generation streams"):
        own_run(streamed(2), timeline, [], 4, None)


def made_other(folder: Path) -> Path:
    """The plan of another job, with a call more."""
    workload = small_workload(max_staleness=1)
    workload = workload.changed(reference=workload.actor)
    baseline("colocated", workload, tiny_cluster(4)).write(folder / "other.json")
    return folder / "other.json"


def test_what_cannot_go_on_is_not_planned_anew(tmp_path: Path) -> None:
    run = made(tmp_path, "standalone")
    with held(run):
        assert "the run goes on in another process" in replan(run, "--apply")
    assert "there is no checkpoint in it" in replan(run, "--apply")
    assert "are for --apply" in replan(run, "--keep", "5")
    assert "no such run directory" in replan(tmp_path / "nowhere", "--apply")
    assert not (tmp_path / "new.json").exists()


def test_a_run_that_was_killed_says_what_its_last_checkpoint_has(tmp_path: Path) -> None:
    run = made(tmp_path)
    whole, kept = read_own_run(run, 4), run / "checkpoints" / "step-000008"
    kept.mkdir(parents=True)
    for name in ("timeline.json", "metrics.jsonl"):
        (run / name).rename(kept / name)
    assert read_own_run(run, 4) == whole


@pytest.mark.parametrize("figure", ["NaN", "Infinity", "-5", "1" + "0" * 400])
def test_lengths_that_cannot_be_are_one_line(tmp_path: Path, figure: str) -> None:
    run = made(tmp_path)
    path = run / "metrics.jsonl"
    path.write_text(re.sub(r'("response_tokens_max": )[\d.]+', rf"\g<1>{figure}", path.read_text()))
    with pytest.raises(UserError, match=r"response_tokens of .* tokens: no step has such lengths"):
        read_own_run(run, last=5)


def test_lines_that_say_nothing_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    deep = "[" * 100_000
    path.write_text(f'{{"step": 0}}\n{deep}\n[1]\n{{"step": 1}}\n{{"st')
    assert lines_of(path) == [{"step": 0}, {"step": 1}]
