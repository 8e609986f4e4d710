"""Files and command lines that are wrong: one line, exit code 2 and nothing half-written; never a
traceback."""

import copy
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from conftest import SHAPE, make_workload, split
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.cli import main
from planner.predict.forecast import forecast, predict
from planner.predict.points import HostPoint, RolloutPoint, TrainerPoint
from planner.predict.profile import Profile
from planner.spec.cluster import make_cluster
from planner.spec.files import File
from planner.spec.study import Cell, Study

WORKLOAD = make_workload()
PLAN = split(WORKLOAD).model_copy(update={"predicted": predict(split(WORKLOAD))})
POINTS = (
    TrainerPoint(
        call="train",
        role="actor",
        sequences=8,
        prompt_tokens=40,
        response_tokens=40,
        seconds=70.0,
        micro_batch_tokens=64,
        minibatch=4,
    ),
    RolloutPoint(
        call="generate",
        role="rollout",
        sequences=2,
        response_tokens=9,
        response_lengths=(4, 5),
        seconds=1.0,
    ),
    HostPoint(call="host", role="advantages", sequences=8, seconds=0.1),
)
FILES: dict[str, File] = {
    "plan": PLAN,
    "workload": WORKLOAD.changed(
        data={
            "train": ["a.jsonl", {"path": "b", "weight": 2.0}, {"hub": "c/d", "split": "train"}],
            "template": "chat",
            "template_args": {"think": False},
            "stop": [7, "end"],
            "evaluate_every": 2,
        },
        sampling={"top_p": 0.9, "top_k": 40, "min_tokens": 2},
        evaluation=[{"name": "e", "files": "e.csv", "samples": 4, "temperature": 0.7}],
    ),
    "profile": Profile(device="h200", model=SHAPE, points=POINTS, held_out=POINTS[:1]),
    "timeline": forecast(PLAN, 3).model_copy(update={"source": "measured"}),
    "cluster": make_cluster(2),
    "study": Study(
        name="s", workload="workload.json", gpus=1, cells=(Cell(name="a", baseline="colocated"),)
    ),
}
# Which commands read a file of a kind, given the others as they should be.
READ_BY = {
    "plan": (
        "check plan.json",
        "simulate plan.json --steps 3 --timeline out.json",
        "compare plan.json run",
    ),
    "workload": (
        "baseline colocated --gpus 1 --workload workload.json --out out.json",
        "search --gpus 1 --workload workload.json --out out.json --no-picture",
    ),
    "profile": (
        "judge profile.json --out out.md",
        "baseline colocated --gpus 1 --workload workload.json --profile profile.json --out "
        "out.json",
    ),
    "timeline": ("compare plan.json run --out out.svg",),
    "cluster": (
        "baseline colocated --cluster cluster.json --workload workload.json --out out.json",
    ),
    "study": ("study study.json --plan-only",),
}
COUNTS = [
    120,
    pytest.param(5_000, marks=[pytest.mark.nightly, pytest.mark.timeout(7200)]),
]  # of each of the two tests

texts = st.sampled_from(
    ["", "..", "/", "a:b", "[x]", "\x00", "\ud800", "é", "nan", "h200", "all", "a\nb"]
) | st.text(max_size=8)
numbers = st.sampled_from(
    [0, -1, 1, 2, 3, 8, 2**31, 2**63, 10**40, 1e-320, 1e308, float("nan"), float("inf"), 0.5]
)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=4,
)


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Each container in a document with each key or index of it."""
    for key in list(data) if isinstance(data, dict) else range(len(data)):
        yield data, key
        if isinstance(data[key], dict | list):
            yield from places(data[key])


@st.composite
def documents(draw: st.DrawFn, base: dict[str, Any]) -> bytes:
    """A document of a kind with one to three changes, half of them to a number, or with bytes that
    no editor would write."""
    data = copy.deepcopy(base)
    for _ in range(draw(st.integers(1, 3))):
        there = list(places(data))
        figures = [place for place in there if isinstance(place[0][place[1]], int | float)]
        if figures and draw(st.booleans()):
            container, key = draw(st.sampled_from(figures))
            old = container[key]
            container[key] = draw(
                st.sampled_from([-old, old + 1, old - 1, old * 2, old * 10**6, old / 3, 0])
                | numbers
            )
        elif there:
            container, key = draw(st.sampled_from(there))
            change = draw(st.sampled_from(("replace", "remove", "copy", "add")))
            if change == "remove":
                container.pop(key)
            elif change == "add" and isinstance(container, dict):
                container[draw(texts)] = draw(values)
            else:
                other, its = draw(st.sampled_from(there))
                container[key] = copy.deepcopy(other[its]) if change == "copy" else draw(values)
    text = json.dumps(data).encode()
    damage = draw(st.sampled_from((*["none"] * 8, "bytes", "cut")))
    at = draw(st.integers(0, len(text))) if damage != "none" else len(text)
    if damage == "bytes":
        return text[:at] + draw(st.binary(max_size=3)) + text[at + draw(st.integers(0, 3)) :]
    return text[:at]


@st.composite
def wrong_files(draw: st.DrawFn) -> tuple[str, bytes, list[str]]:
    kind = draw(st.sampled_from(sorted(FILES)))
    content = draw(documents(json.loads(FILES[kind].to_json())))
    return kind, content, draw(st.sampled_from(READ_BY[kind])).split()


def write_all(directory: Path) -> None:
    for kind, file in FILES.items():
        file.write(directory / ("run/timeline.json" if kind == "timeline" else f"{kind}.json"))


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def assert_orderly(arguments: list[str], directory: Path) -> None:
    """A command ends well, or with one line and nothing written."""
    before = contents(directory)
    result = CliRunner().invoke(main, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert result.exit_code in (0, 2), result.output
    if result.exit_code == 2:
        last = result.stderr.splitlines()[-1]
        assert last.startswith("plan: ") and len(last) > len("plan: "), result.output
        assert contents(directory) == before and result.stdout == ""
    for name in contents(directory):
        assert not Path(name).name.startswith("."), "a temporary file was left"


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
def test_a_wrong_file_never_ends_in_a_traceback(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    @settings(
        max_examples=count,
        deadline=None,
        derandomize=count == COUNTS[0],
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(wrong_files())
    def check(wrong: tuple[str, bytes, list[str]]) -> None:
        kind, content, arguments = wrong
        with tempfile.TemporaryDirectory() as name, monkeypatch.context() as patched:
            patched.chdir(name)
            write_all(Path())
            Path("run/timeline.json" if kind == "timeline" else f"{kind}.json").write_bytes(content)
            assert_orderly(arguments, Path())

    check()


# --- command lines ---

BROKEN = ("gone.json", "broken.json", "", ".", "a\nb", "broken.json/x")
WORDS = (
    "plan.json",
    "workload.json",
    "cluster.json",
    "profile.json",
    "run",
    "out.json",
    "out.png",
    "local",
    "2,x",
    *BROKEN,
)
FIGURES = ("-1", "0", "1", "2", "3", "1e9", "nan", "inf", "", "x", str(10**30))
WORKS = (
    "execute",
    "profile",
    "study",
    "task",
)  # these start something, so here they get nothing that would


RIGHT = {
    "plan": "plan.json",
    "run": "run",
    "profiles": "profile.json",
    "study": "study.json",
    "workload": "workload.json",
}


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A command with mostly the arguments that it needs, and a few options with mostly wrong
    values."""
    line = [draw(st.sampled_from(sorted(main.commands)))]
    works, parameters = line[0] in WORKS, main.commands[line[0]].params
    words = st.sampled_from(BROKEN if works else WORDS)
    options = [parameter for parameter in parameters if isinstance(parameter, click.Option)]
    for parameter in parameters:
        right = "colocated" if line[0] == "baseline" else RIGHT.get(parameter.name or "")
        if isinstance(parameter, click.Argument) and draw(st.integers(0, 9)):
            line.append(right if right and not works and draw(st.integers(0, 3)) else draw(words))
        elif parameter.name == "workload" and not works:
            line += ["--workload", "workload.json"]  # the one that is shipped takes seconds
    for option in draw(st.lists(st.sampled_from(options), max_size=4)) if options else []:
        figure = isinstance(option.type, click.types.IntParamType | click.types.FloatParamType)
        line.append(option.opts[0])
        if not option.is_flag:
            line.append(draw(st.sampled_from(FIGURES) if figure else words))
    return line


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
def test_a_wrong_command_line_never_ends_in_a_traceback(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    @settings(
        max_examples=count,
        deadline=None,
        derandomize=count == COUNTS[0],
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(command_lines())
    def check(line: list[str]) -> None:
        with tempfile.TemporaryDirectory() as name, monkeypatch.context() as patched:
            patched.chdir(name)
            write_all(Path())
            Path("broken.json").write_text(PLAN.to_json()[:-20])
            assert_orderly(line, Path())

    check()
