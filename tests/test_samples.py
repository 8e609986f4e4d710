"""What the model said: the lines that a run writes of it, which of them a run that goes on keeps,
and `plan samples`, which pages through them."""

import datetime
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import make_workload, split

from executor.data.batch import Sequences
from executor.data.prompts import Prompts
from executor.data.requests import make_requests
from executor.running import first_batch
from executor.running.run_directory import RunDirectory
from executor.running.said import Listener, kept, lines_of, text_of
from executor.running.step_figures import spread_of
from planner.cli import main

PLAN = split(make_workload())


def lines(step: int, evaluation: str | None = None, rows: int = 2) -> list[dict[str, Any]]:
    """Lines of a batch of two; the second one was truncated and got no score."""
    tokens = [np.array([1, 2], dtype=np.int32)] * 2
    exact = np.zeros(2, dtype=bool)
    keys = np.zeros((2, 5), dtype=np.int64)
    day = datetime.date(2026, 1, 2)
    prompts = Prompts(
        requests=make_requests(tokens, keys, np.array([4, 4]), exact),
        texts=["one\nline", "\x1b[2Jtwo"],
        answers=[{"x": math.inf}, day],
        where=["a.jsonl:1", "a.jsonl:2"],
    )
    sequences = Sequences(
        tokens=np.zeros((2, 6), dtype=np.int32),
        prompt_lengths=np.array([2, 2], dtype=np.int32),
        response_lengths=np.array([3, 4], dtype=np.int32),
        log_probs=np.zeros((2, 4), dtype=np.float32),
        weights_versions=np.array([[step - 1] * 4, [step] * 4], dtype=np.int32),
    )
    return lines_of(
        step=step,
        evaluation=evaluation,
        prompts=prompts,
        sequences=sequences,
        responses=["yes", "no"][:rows],
        ended=np.array([True, False])[:rows],
        scores={"score": np.array([0.5, np.nan], dtype=np.float32)},
        rows=np.arange(rows),
    )


def test_a_line_says_what_was_asked_answered_and_scored() -> None:
    first, second = (json.loads(line) for line in text_of(lines(3)).splitlines())
    assert first == {
        "step": 3,
        "evaluation": None,
        "row": 0,
        "prompt": "one\nline",
        "response": "yes",
        "answer": {"x": None},
        "scores": {"score": 0.5},
        "response_tokens": 3,
        "truncated": False,
        "weights_version": 2,
        "staleness": 1,
        "where": "a.jsonl:1",
    }
    assert second["scores"] == {"score": None} and second["truncated"]
    assert second["answer"] == "2026-01-02" and second["staleness"] == 0
    (held_out,) = lines(3, "sums", rows=1)
    assert held_out["evaluation"] == "sums" and held_out["staleness"] is None


def test_a_listener_wants_a_few_sequences_now_and_then() -> None:
    listener = Listener(every=2, count=3)
    assert [listener.rows(step, 12).tolist() for step in (0, 1, 2)] == [[0, 4, 8], [], [0, 4, 8]]
    assert listener.rows(0, 2).tolist() == [0, 1]
    assert not len(Listener().rows(0, 12)) and not Listener(every=1).listens
    listener.add(lines(0))
    assert len(listener.take()) == 2 and not listener.take()


def test_a_run_that_goes_on_keeps_what_is_not_done_again() -> None:
    content = text_of(lines(0) + lines(1) + lines(2) + lines(1, "sums") + lines(2, "sums"))
    told = [json.loads(line) for line in kept(content + '{"st', 1, {1}, {2}).splitlines()]
    found = {(line["step"], line["evaluation"]) for line in told}
    assert found == {(0, None), (1, None), (2, "sums")} and len(told) == 6
    assert kept("", 1, (), ()) == ""


def test_a_run_directory_begins_with_the_samples_that_are_kept(tmp_path: Path) -> None:
    for samples in ("", text_of(lines(0))):
        directory = RunDirectory(tmp_path / "r", tensorboard=False)
        directory.open(PLAN, samples=samples)
        directory.write_samples(lines(1))
        directory.close()
    told = (tmp_path / "r" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in told] == [0, 0, 1, 1]


# --- plan samples ---


def plan(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["samples", *map(str, arguments)])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = tmp_path / "r"
    directory.mkdir()
    (directory / "samples.jsonl").write_text(
        text_of(lines(0) + lines(10) + lines(10, "sums", rows=1)) + '{"step": 20, "un'
    )
    return directory


def test_samples_are_shown_with_their_scores_and_control_characters_as_text(run: Path) -> None:
    shown = plan(run, "--step", "10").stdout
    assert shown == (
        "step 10, sample 0 · score 0.5 · 3 tokens · staleness 1 · a.jsonl:1\n"
        "  prompt\n    one\n    line\n  response\n    yes\n  answer\n"
        '    {"x": null}\n\n'
        "step 10, sample 1 · score none · 4 tokens, truncated · a.jsonl:2\n"
        "  prompt\n    \\x1b[2Jtwo\n  response\n    no\n  answer\n    2026-01-02\n\n"
    )
    assert plan(run).stdout.count("· 3 tokens") == 2


def test_the_best_the_worst_and_evaluations(run: Path) -> None:
    assert plan(run, "--best", "1").stdout.startswith("step 0, sample 0 · score 0.5")
    assert "score none" not in plan(run, "--worst", "2").stdout
    assert plan(run, "--evaluation").stdout.startswith("step 10, sums 0 ·")
    assert plan(run, "--set", "sums").stdout == plan(run, "--evaluation").stdout


def refused(*arguments: str | Path) -> str:
    found = plan(*arguments)
    assert found.exit_code == 2 and not found.stdout
    (line,) = found.stderr.splitlines()
    return line


def test_what_cannot_be_shown_is_one_line(run: Path, tmp_path: Path) -> None:
    line = refused(run, "--step", "7")
    assert "has samples of steps 0, 10; sums of step 10; ask for something of that" in line
    assert "no such run directory" in refused(tmp_path / "none")
    assert "exclude each other" in refused(run, "--best", "1", "--worst", "1")
    (tmp_path / "empty").mkdir()
    assert "has no samples.jsonl" in refused(tmp_path / "empty")
    with (run / "samples.jsonl").open("a") as file:
        file.write("known\n{}\n")
    line = refused(run, "--worst", "9")
    assert "samples.jsonl:6: is no sample of this version" in line


# --- figures and warnings ---


def test_the_spread_of_some_values() -> None:
    found = spread_of("score", np.array([1.0, 3.0]))
    assert found == {"score_std": 1.0, "score_min": 1.0, "score_max": 3.0}
    assert spread_of("score", np.zeros(0)) == {}


FINE = {"step": 0, "staleness": 0.0, "score_min": 0.0, "score_max": 1.0, "log_prob_gap": 0.02}


@pytest.mark.parametrize(
    ("metrics", "what"),
    [
        ({}, None),
        ({"truncated_share": 0.95}, "95% of the responses of step 0 were cut"),
        ({"score_max": 0.0}, "all responses of step 0 have the same score, 0: nothing can be"),
        ({"log_prob_gap": 0.5}, "log-probs of step 0 are 0.5 per token from the trainers'"),
        ({"log_prob_gap": 0.5, "staleness": 1.0}, None),
    ],
)
def test_a_first_batch_shows_mistakes(metrics: dict[str, float], what: str | None) -> None:
    found = list(first_batch.warnings({**FINE, **metrics}, make_workload()))
    assert len(found) == (what is not None) and all(what in line for line in found)


def test_cuts_of_sampling_are_said_beforehand() -> None:
    assert first_batch.beforehand(make_workload()) == []
    (line,) = first_batch.beforehand(make_workload(sampling={"top_p": 0.9, "min_tokens": 2}))
    assert line.startswith("sampling with top_p = 0.9, min_tokens = 2 draws from other")


def test_a_gap_that_sampling_explains_is_no_mistake() -> None:
    workload = make_workload(sampling={"top_p": 0.5})
    assert not list(first_batch.warnings({**FINE, "log_prob_gap": 0.5}, workload))
