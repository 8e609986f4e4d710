"""Reward functions as people have them: in our form, verl's and TRL's, by name, and what is refused
before a run."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from executor.data import reward
from executor.data.reward_forms import Samples
from planner.spec.errors import UserError
from planner.spec.files import profiles_dir
from planner.spec.rewards import RewardFunction

CHAT = [{"role": "user", "content": "1 + 1?"}]
SAMPLES = Samples(
    prompts=["<user>1 + 1?", "2 + 2?"],
    asked=[CHAT, "2 + 2?"],
    responses=["2", "five"],
    answers=["2", "4"],
    columns=[
        {"data_source": "sums", "extra_info": {"index": 7}, "level": 1},
        {"data_source": "sums", "extra_info": None, "level": 2},
    ],
)


def function(tmp_path: Path, code: str, name: str = ":f", **more: Any) -> RewardFunction:
    (tmp_path / "r.py").write_text(code)
    return RewardFunction(function=f"{tmp_path}/r.py{name}", **more)


def scores(asked: RewardFunction) -> list[float]:
    return reward.score(asked, reward.import_function(asked), SAMPLES)


def refused(asked: RewardFunction) -> str:
    with pytest.raises(UserError) as error:
        reward.check(asked)
    line = str(error.value)
    assert "\n" not in line
    return line


def test_our_form(tmp_path: Path) -> None:
    code = """
def f(prompts, responses, answers):
    return [r == a for r, a in zip(responses, answers)]
"""
    assert scores(function(tmp_path, code)) == [1.0, 0.0]


@pytest.mark.parametrize(
    "head",
    [
        "def f(data_source, solution_str, ground_truth, extra_info=None):",
        "def f(solution_str, ground_truth, data_source, extra_info, **kwargs):",
        "async def f(data_source, solution_str, ground_truth, extra_info):",
    ],
)
def test_verls_form_is_called_once_per_response(tmp_path: Path, head: str) -> None:
    body = "assert data_source == 'sums'\n    right = solution_str == ground_truth"
    code = (
        f"{head}\n    {body}\n    return {{'score': right + (extra_info or {{}}).get('index', 0)}}"
    )
    assert scores(function(tmp_path, code)) == [8.0, 0.0]


def test_a_function_that_takes_anything_says_its_form(tmp_path: Path) -> None:
    code = "def f(**given):\n    return len(given['solution_str'])"
    assert "takes (**given)" in refused(function(tmp_path, code))
    assert scores(function(tmp_path, code, form="verl")) == [1.0, 4.0]


def test_trls_form_gets_columns_and_messages(tmp_path: Path) -> None:
    """None is no opinion: it adds nothing."""
    code = """
def f(completions, level, prompts, answer, **kwargs):
    assert prompts[0][0]["content"] == "1 + 1?" and prompts[1] == "2 + 2?"
    assert completions == [[{"role": "assistant", "content": "2"}], "five"]
    assert kwargs["data_source"] == ["sums", "sums"] and answer == ["2", "4"]
    return [float(level[0]), None]
"""
    asked = function(tmp_path, code)
    assert scores(asked) == [1.0, 0.0]
    assert reward.check(asked) == ["level"]  # the columns that it cannot do without
    few = "def f(completions, level=0):\n    return [len(c) for c in completions]"
    assert scores(function(tmp_path, few)) == [1.0, 4.0]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def only(prompts, responses, answers):\n    return [3] * len(responses)", [3.0, 3.0]),
        (
            "from math import sqrt\ndef helper(x):\n    return 5\n"
            "def compute_score(data_source, solution_str, ground_truth, extra_info):\n"
            "    return helper(1)",
            [5.0, 5.0],
        ),
    ],
)
def test_a_file_may_stand_for_its_function(
    tmp_path: Path, code: str, expected: list[float]
) -> None:
    assert scores(function(tmp_path, code, "")) == expected


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("x = 1", "has no function; name one with"),
        (
            "def a(p, r, w):\n    pass\ndef b(p, r, w):\n    pass",
            "has the functions a, b; name one",
        ),
        (
            "def a(p, r):\n    pass",
            "takes (p, r), and is called with (prompts, responses, answers)",
        ),
        ("def a(solution_str):\n    pass", "is called with (data_source, solution_str,"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, code: str, problem: str) -> None:
    assert problem in refused(function(tmp_path, code, ""))


def test_what_a_function_of_another_form_raises_is_told_with_its_line(tmp_path: Path) -> None:
    code = "def f(data_source, solution_str, ground_truth, extra_info):\n    return {'acc': 1}"
    with pytest.raises(UserError, match="failed: KeyError: 'score'"):
        scores(function(tmp_path, code))
    code = "def f(data_source, solution_str, ground_truth, extra_info):\n    return 1 / 0"
    with pytest.raises(UserError, match=r"ZeroDivisionError: division by zero \(r\.py:2\)"):
        scores(function(tmp_path, code))


def test_mathematics_is_verified_by_name() -> None:
    pytest.importorskip("math_verify")
    asked = RewardFunction(function="math-verify")
    given = Samples(
        prompts=["", "", ""],
        asked=["", "", ""],
        responses=["It is $\\frac{1}{2}$.", "\\boxed{3}", "so 7"],
        answers=["0.5", "4", 7],
        columns=[{}, {}, {}],
    )
    assert reward.score(asked, reward.import_function(asked), given) == [1.0, 0.0, 1.0]


def test_what_verifies_mathematics_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install 'splitplan\\[math\\]'"):
        reward.import_function(RewardFunction(function="math-verify"))


def test_the_smallest_files_of_the_page_run(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    ours, verl, trl, server = blocks
    chat = Samples(
        prompts=["1 + 1?"] * 2,
        asked=[CHAT] * 2,
        responses=[" 2", "3"],
        answers=["2", "4"],
        columns=[{}, {}],
    )
    for code in (ours, verl, trl):
        asked = function(tmp_path, code, "")
        assert reward.score(asked, reward.import_function(asked), chat) == [1.0, 0.0]
    assert "HTTPServer" in server


def test_the_example_rewards_read_the_last_word_or_number() -> None:
    spec = importlib.util.spec_from_file_location(
        "examples", profiles_dir() / "workloads" / "rewards.py"
    )
    assert spec is not None and spec.loader is not None
    examples = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(examples)
    responses = ["It makes 1,072 clips.", "72, or 71", "none", "so 72."]
    answers = ["24+48\n#### 1072", "#### 72", "#### 0", "#### 72"]
    assert examples.gsm8k([""] * 4, responses, answers) == [1, 0, 0, 1]
    assert examples.exact([""] * 2, ["so 72.", ""], ["72", "72"]) == [1, 0]
