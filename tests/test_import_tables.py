"""Runs whose seconds stand in a table or in OpenRLHF's log, and whose placement is named."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import small_workload
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.cli import main
from planner.exchange.metric_tables import read_metrics
from planner.predict.forecast import predict
from planner.predict.profile import Profile
from planner.predict.schedule import load_plan
from planner.spec.timeline import Timeline, mean_call_seconds, step_seconds

WANDB = "\n".join(
    [
        '"Step","run-1 - t/gen","run-1 - t/gen__MIN","run-1 - t/rest","run-1 - t/sync","run-1 - t"',
        *(f'"{n}","{2 + n / 10}","0","{3 - n / 10}","0.5","6"' for n in range(6)),
    ]
)
REST = "score,old_logprobs,values,advantages,update_critic,update_actor"
COLUMNS = ("generate=t/gen", f"{REST}=t/rest", "sync_weights=t/sync", "step=t")
OPENRLHF = "\n".join(
    f"(PPOTrainer pid=1) ✨ Global step {n}: {{'a': None, 'timing/generation': {3 + n}.0, "
    "'timing/make_experience': 1.0, 'timing/ppo_train': 2.0, 'timing/broadcast': 0.25, "
    f"'timing/step_total': {6.25 + n}}}"
    for n in range(4)
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_workload(max_staleness=1).write(tmp_path / "job.json")
    return tmp_path


def imported(folder: Path, source: str, text: str, *options: str, pools=("all=2",)) -> str:
    (folder / "run.txt").write_text(text)
    job = ["--workload", str(folder / "job.json"), "--gpus", "4"]
    named = [word for pool in pools for word in ("--pool", pool)]
    command = ["import", source, folder / "run.txt", "--out", folder / "out", *job, *named]
    result = CliRunner().invoke(main, [*map(str, command), *options])
    assert result.exit_code in (0, 2), result.exception
    assert len(result.stderr.splitlines()) == (1 if result.exit_code else 0)
    return result.stderr if result.exit_code else result.stdout


def columns(*texts: str) -> list[str]:
    return [word for text in texts for word in ("--column", text)]


def found(folder: Path):
    plan = load_plan(folder / "out" / "plan.json")
    profile = Profile.read(folder / "out" / "profile.json")
    return plan, profile, Timeline.read(folder / "out" / "timeline.json")


def test_a_table_of_weights_and_biases(folder: Path) -> None:
    assert "Step: 6.00 s" in imported(folder, "csv", WANDB, *columns(*COLUMNS))
    plan, profile, timeline = found(folder)
    assert (timeline.steps, timeline.warmup) == (6, 2)
    assert step_seconds(timeline) == pytest.approx(6, rel=0.02)
    means = mean_call_seconds(timeline)
    assert means["generate"] == pytest.approx(np.mean([2.2, 2.3, 2.4, 2.5]))
    rest = sum(means[call] for call in REST.split(","))
    assert rest == pytest.approx(2.65 + 0.5)  # what lies between the calls counts to advantages
    assert predict(plan, (profile,)).step_seconds == pytest.approx(6, rel=0.01)


def test_the_unit_of_a_table(folder: Path) -> None:
    imported(folder, "csv", WANDB, *columns(*COLUMNS), "--unit", "ms")
    assert step_seconds(found(folder)[2]) == pytest.approx(6e-3, rel=0.02)


def test_tables_of_single_tags_as_tensorboard_exports_them(folder: Path) -> None:
    for name, value in (("gen", 3.0), ("rest", 2.0), ("sync", 0.5)):
        lines = [f"1.7e9,{step},{value}" for step in range(3)]
        (folder / f"{name}.csv").write_text("\n".join(["Wall time,Step,Value", *lines]))
    texts = ("generate=gen.csv", f"{REST}=rest.csv", "sync_weights=sync.csv")
    shown = imported(folder, "csv", "Step,x\n0,1\n", *columns(*texts))
    assert "taken as the sum of the others" in shown
    assert step_seconds(found(folder)[2]) == pytest.approx(
        5.5, rel=5e-3
    )  # the host's calls go beside others


def test_the_log_of_openrlhf(folder: Path) -> None:
    pools = ("actor=1", "critic=1", "rollout=2")
    shown = imported(folder, "openrlhf", OPENRLHF, pools=pools)
    assert "Step: 8.25 s" in shown  # of the steps that count: 7.25, 8.25 and 9.25
    plan, _, timeline = found(folder)
    spans = {span.call: span for span in timeline.spans if span.step == 2}
    assert spans["update_critic"].start == spans["update_actor"].start  # on pools of their own
    both = max(spans["update_critic"].end, spans["update_actor"].end)
    assert both - spans["update_actor"].start == pytest.approx(2.0)
    assert len(plan.pools) == 3


@pytest.mark.parametrize(
    ("source", "text", "given", "said"),
    [
        ("csv", WANDB, COLUMNS[:1], "nothing of how long"),
        ("csv", WANDB, (), "say what the columns are"),
        ("csv", WANDB, ("generate",), "write CALLS=COLUMN"),
        ("csv", WANDB, ("dance=t/gen",), "there is no call 'dance'"),
        ("csv", WANDB, ("generate=t/other",), "no step has 't/other'; the columns are Step, t"),
        ("csv", "hello\n", COLUMNS, "no table"),
        ("csv", "", COLUMNS, "no table"),
        ("csv", "Step,t/gen\nx,y\n", COLUMNS, "no step has"),
        ("csv", WANDB.replace('"6"', '"2"'), COLUMNS, "are both in seconds"),
        ("csv", WANDB.replace('"0.5"', '"-0.5"'), COLUMNS, "below 0"),
        ("openrlhf", WANDB, (), "no step has 'timing/generation'"),
        ("openrlhf", OPENRLHF[:60], (), "no table"),
    ],
)
def test_what_cannot_be_imported_is_one_line(folder, source, text, given, said) -> None:
    assert said in imported(folder, source, text, *columns(*given))
    assert not (folder / "out").exists()


def test_figures_that_no_clock_says_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    lines = [f"Global step 1: {{'a': {figure}, 'b': 2.0}}" for figure in ("1e999", 10**400, True)]
    path.write_text("\n".join([*lines, f"Global step {'9' * 5000}: {{'a': 1.0}}"]))
    assert read_metrics(path) == {1: {"b": 2.0}}


def test_pools_are_asked_for(folder: Path) -> None:
    assert "--pool all=4" in imported(folder, "csv", WANDB, *columns(*COLUMNS), pools=())


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_tables_are_one_line(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    small_workload(max_staleness=1).write(folder / "job.json")
    source = data.draw(st.sampled_from(["csv", "openrlhf"]))
    text = WANDB if source == "csv" else OPENRLHF
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        change = data.draw(st.sampled_from(("cut", "number", "insert")))
        if change == "cut":
            text = text[:at]
        elif change == "number":
            other = data.draw(st.sampled_from(["0", "-1", "1e400", "nan", "", "9" * 30]))
            text = text[:at] + re.sub(r"\d+(?:\.\d+)?", other, text[at:], count=1)
        else:
            text = text[:at] + data.draw(st.text(max_size=4)) + text[at:]
    given = columns(*COLUMNS) if source == "csv" else []
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    if imported(folder, source, text, *given).startswith("plan: "):
        assert not (folder / "out").exists()
    else:
        found(folder)
