"""The command line: what it writes, and that every mistake is one line on stderr, exit code 2 and
nothing written."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from conftest import ROLES, colocated, make_plan, make_workload, split
from processes import PATIENCE

from executor.measuring import software
from planner import __version__
from planner.cli import Commands, main
from planner.command_line.inspection import FILE_KINDS
from planner.predict.schedule import load_plan
from planner.spec.cluster import make_cluster
from planner.spec.errors import UserError
from planner.spec.files import profiles_dir
from planner.spec.timeline import Timeline

NEEDS_EXECUTOR = pytest.mark.skipif(find_spec("ray") is None, reason="needs splitplan[execute]")

LONG = "x" * 300  # more than a file system takes


def plan(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def one_line(result: Result) -> str:
    """The message of a command that refused, checked to be one line and no traceback."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("plan: ")
    return line


def test_a_seed_that_no_generator_takes_is_refused(tmp_path: Path) -> None:
    line = one_line(plan("task", "digits", "--out", tmp_path / "task", "--seed", 2**63))
    assert "'--seed': 9223372036854775808 is not in the range" in line
    assert not list(tmp_path.iterdir())


def test_what_this_user_may_not_read_is_one_line() -> None:
    @click.group(cls=Commands)
    def group() -> None: ...

    @group.command()
    def look() -> None:
        raise PermissionError(13, "Permission denied", "/closed/plan.json")

    line = one_line(CliRunner().invoke(group, ["look"]))
    assert line.startswith("plan: /closed/plan.json: may not be read or written by this user; ")


@pytest.mark.parametrize(
    "arguments",
    [
        ("samples", LONG),
        ("judge", "profile.json", "--out", f"{LONG}.md"),
        ("baseline", "split", "--gpus", "2", "--out", f"{LONG}.json"),
        ("search", "--gpus", "2", "--workload", f"{LONG}.toml"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_name_that_is_too_long_is_one_line(arguments: tuple[str, ...]) -> None:
    line = one_line(plan(*arguments))
    assert LONG in line and line.endswith(": the name is too long; choose a shorter one")


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A plan for two cores of this machine or another."""
    split(make_workload()).write(tmp_path / "split.json")
    return tmp_path / "split.json"


# --- the group ---


def test_help_lists_the_commands_in_the_order_of_use() -> None:
    result = plan("--help")
    assert result.exit_code == 0
    lines = [
        line.split()[0] for line in result.stdout.partition("Commands:")[2].splitlines() if line
    ]
    first = [
        "search",
        "baseline",
        "estimate",
        "check",
        "explain",
        "what-if",
        "pareto",
        "report",
        "simulate",
        "execute",
        "compare",
        "replan",
    ]
    later = [
        "checkpoint",
        "samples",
        "import",
        "export",
        "profile",
        "judge",
        "study",
        "task",
        "space",
        "schema",
    ]
    assert lines == [*first, *later]
    assert all(plan(name, "--help").exit_code == 0 for name in lines)


@pytest.mark.parametrize(
    "arguments", [["frobnicate"], ["search", "--gpu"], ["search", "--gpus", "many"], ["check"]]
)
def test_a_wrong_command_line_is_one_line(arguments: list[str]) -> None:
    assert "--help" in one_line(plan(*arguments))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyboardInterrupt(), "plan: interrupted"),
        (KeyboardInterrupt("interrupted and saved"), "plan: interrupted and saved"),
    ],
)
def test_ctrl_c_ends_with_one_line_and_130(error: KeyboardInterrupt, line: str) -> None:
    @click.group(cls=Commands)
    def group() -> None: ...

    @group.command()
    def stop() -> None:
        raise error

    result = CliRunner().invoke(group, ["stop"])
    assert result.exit_code == 130
    assert result.stderr.strip() == line


@pytest.mark.parametrize(("command", "what"), [("schema", "KIND"), ("task", "NAME")])
def test_a_wrong_argument_is_called_as_the_help_calls_it(command: str, what: str) -> None:
    line = one_line(plan(command, "nothing", *(["--out", "x"] if command == "task" else [])))
    assert f"Invalid value for '{what}': 'nothing' is not" in line and "{" not in line
    help_text = plan(command, "--help").stdout
    assert f"{command} [OPTIONS] {what}\n" in help_text
    choices = FILE_KINDS if command == "schema" else ("digits",)
    assert all(choice in help_text for choice in choices)


def test_python_runs_the_package_as_plan(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "planner", "--version"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"splitplan, version {__version__}\n" == plan("--version").stdout


def test_a_message_of_many_lines_becomes_one() -> None:
    @click.group(cls=Commands)
    def group() -> None: ...

    @group.command()
    def fail() -> None:
        raise UserError("first\nsecond")

    assert one_line(CliRunner().invoke(group, ["fail"])) == "plan: first second"


def test_the_process_itself_ends_with_2_and_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "planner.cli", "check", "missing.json"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "plan: missing.json: no such file; check the path\n"


@pytest.mark.parametrize("kind", FILE_KINDS)
def test_schema_prints_json_that_names_the_kind(kind: str) -> None:
    found = json.loads(plan("schema", kind).stdout)
    assert found["properties"]["schema"]["const"].startswith(f"splitplan/{kind}/")


# --- plans ---


def change(**keys: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda data: data.update(keys)


def change_role(role: str, **keys: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda data: data["roles"][role].update(keys)


def deadlock(data: dict[str, Any]) -> None:
    data["program"].reverse()


def too_stale(data: dict[str, Any]) -> None:
    data["program"][0]["offset"] = 2


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (change(colour="red"), "colour: unknown key"),
        (
            change(schema="splitplan/plan/9"),
            "schema is 'splitplan/plan/9', but 'splitplan/plan/1' is needed",
        ),
        (
            lambda data: data["roles"].update(judge=data["roles"]["critic"]),
            "the workload has no role 'judge'",
        ),
        (lambda data: data["roles"].pop("critic"), "critic is missing"),
        (change_role("critic", pools=["attic"]), "there is no pool 'attic'"),
        (
            lambda data: data["pools"]["b"].update(gpus=[[0, 0]]),
            "GPU [0, 0] is in both 'a' and 'b'",
        ),
        (lambda data: data["pools"]["b"].update(gpus=[[3, 0]]), "GPU [3, 0] is not in the cluster"),
        (change_role("actor", shard=4), "needs 4 GPUs"),
        (deadlock, "deadlocks"),
        (too_stale, "the workload allows 1"),
        (change(staleness=1), "staleness says 1, but its program has 0"),
        (lambda data: data["workload"]["response"].update(max=10**7), "per GPU"),
    ],
)
def test_a_wrong_plan_is_refused(
    tmp_path: Path, edit: Callable[[dict[str, Any]], Any], says: str
) -> None:
    data = json.loads(split(make_workload()).to_json())
    edit(data)
    (tmp_path / "wrong.json").write_text(json.dumps(data))
    line = one_line(plan("check", tmp_path / "wrong.json"))
    assert says in line and "wrong.json" in line


@NEEDS_EXECUTOR
def test_a_truncated_plan_is_refused_by_every_command_and_nothing_is_written(
    tmp_path: Path, written: Path
) -> None:
    cut = tmp_path / "cut.json"
    cut.write_text(written.read_text()[:500])
    before = files(tmp_path)
    for arguments in (
        ["check", cut],
        ["simulate", cut, "--gantt", tmp_path / "a.png", "--trace", tmp_path / "a.json"],
        ["execute", cut, "--rehearse", "--runs", tmp_path / "runs"],
        ["compare", cut, tmp_path],
    ):
        assert "not valid JSON" in one_line(plan(*arguments))
    assert files(tmp_path) == before


@NEEDS_EXECUTOR
def test_a_rehearsal_refuses_what_only_a_real_run_does(tmp_path: Path, written: Path) -> None:
    runs = tmp_path / "runs"
    for wanted in (["--track", "wandb"], ["--prometheus", "9400"], ["--autopilot"]):
        line = one_line(plan("execute", written, "--rehearse", "--runs", runs, *wanted))
        assert wanted[0] in line and "for real runs" in line
    assert not runs.exists()


@NEEDS_EXECUTOR
def test_check_shows_the_memory_of_each_pool(written: Path) -> None:
    result = plan("check", written)
    assert result.exit_code == 0, result.output
    assert "peak GB" in result.stdout and "is sound" in result.stdout
    assert "It can be run on this machine." in result.stdout


def test_check_shows_what_the_host_must_hold(tmp_path: Path) -> None:
    shape = {
        "hidden": 3584,
        "layers": 28,
        "heads": 28,
        "kv_heads": 4,
        "intermediate": 18944,
        "vocab": 152064,
    }
    model = {"shape": shape, "random_weights": True}
    workload = make_workload(**{role: model for role in ROLES if role != "rollout"})
    layouts = {role: {"shard": 8, "offload": "all"} for role in ("actor", "critic")}
    cluster, roles = make_cluster(8), dict.fromkeys(ROLES, "all")
    make_plan(workload, {"all": 8}, roles, layouts=layouts, cluster=cluster).write(
        tmp_path / "away.json"
    )
    result = plan("check", tmp_path / "away.json")
    parameters = 7_615_283_200 + 7_070_290_432  # with a language model's head, and a scalar one
    gigabytes = (4 + 8) * parameters / 1e9  # weights and moments in fp32
    line = next(line for line in result.stdout.splitlines() if "The host of node 0" in line)
    assert "of 1,900 GB that may be used" in line
    assert f"what is offloaded {gigabytes:.0f} GB" in line
    assert f"copies for checkpoints {gigabytes:.0f} GB" in line


@NEEDS_EXECUTOR
def test_check_says_why_a_plan_cannot_be_run_here(tmp_path: Path) -> None:
    cluster, roles = make_cluster(8), dict.fromkeys(ROLES, "all")
    make_plan(make_workload(), {"all": 8}, roles, cluster=cluster).write(tmp_path / "large.json")
    result = plan("check", tmp_path / "large.json")
    assert result.exit_code == 0, result.output
    assert (
        "It cannot be run on this machine:\n- plan 'test' needs 8 GPUs of kind h200"
        in result.stdout
    )
    newer = software.newer_than_tried(over_nccl=False)
    said = f"Newer than what was tried on GPUs: {', '.join(newer)}; see docs/run.md."
    assert (said in result.stdout) == bool(newer)
    assert "needs 8 GPUs of kind h200" in one_line(plan("check", "--here", tmp_path / "large.json"))


def test_a_version_is_compared_by_its_first_two_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"torch": "2.11.0+cu130", "ray": "2.9", "vllm": "0.27rc1", "transformers": "5.100.0"}
    monkeypatch.setattr(software, "versions", lambda: found)
    assert software.newer_than_tried(over_nccl=False) == [
        "transformers 5.100.0 (tried: 5.17)",
        "vllm 0.27rc1 (tried: 0.26)",
    ]
    found |= {"vllm": "0.26.0", "transformers": "5.17.1"}
    assert software.newer_than_tried(over_nccl=False) == []
    assert software.newer_than_tried(over_nccl=True) == ["vllm 0.26.0 (tried: 0.25)"]


# --- simulate and compare ---


def test_simulate_writes_what_is_asked(tmp_path: Path, written: Path) -> None:
    targets = {f"--{kind}": tmp_path / name for kind, name in
               (("gantt", "sim.png"), ("trace", "t.json"), ("timeline", "out.json"))}  # fmt: skip
    result = plan(
        "simulate", written, "--steps", "5", *(part for pair in targets.items() for part in pair)
    )
    assert result.exit_code == 0, result.output
    timeline = Timeline.read(targets["--timeline"])
    assert (timeline.source, timeline.steps) == ("simulated", 5)
    assert json.loads(targets["--trace"].read_text())["traceEvents"]
    assert targets["--gantt"].read_bytes().startswith(b"\x89PNG")
    assert "s per step" in result.stdout
    assert "0 is not in the range" in one_line(plan("simulate", written, "--steps", "0"))
    other = profiles_dir() / "h200" / "7b.json"
    assert "profile 1 (h200, hidden 3584, 28 layers) is for" in one_line(
        plan("simulate", written, "--profile", other)
    )
    assert ".png or .svg or .pdf" in one_line(
        plan("simulate", written, "--gantt", tmp_path / "sim.jpg")
    )


def make_run(directory: Path, written: Path, steps: int = 5) -> Path:
    """A run directory whose measured timeline is exactly what was predicted."""
    plan("simulate", written, "--steps", str(steps), "--timeline", directory / "timeline.json")
    timeline = Timeline.read(directory / "timeline.json")
    timeline.model_copy(update={"source": "measured"}).write(directory / "timeline.json")
    load_plan(written).write(directory / "plan.json")
    return directory


def test_compare_shows_no_error_where_there_is_none(tmp_path: Path, written: Path) -> None:
    run = make_run(tmp_path / "run", written)
    result = plan("compare", written, run)
    assert result.exit_code == 0, result.output
    assert "error +0.0%" in result.stdout and "Controller overhead: +0.0%" in result.stdout
    assert (run / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_compare_refuses_what_is_no_run_of_the_plan(tmp_path: Path, written: Path) -> None:
    assert "no such run directory" in one_line(plan("compare", written, tmp_path / "gone"))
    assert "timeline.json: no such file" in one_line(plan("compare", written, tmp_path))
    run = make_run(tmp_path / "run", written)
    colocated(make_workload()).write(tmp_path / "other.json")
    assert "was run by another plan" in one_line(plan("compare", tmp_path / "other.json", run))
    (run / "timeline.json").write_text('{"schema": "splitplan/timeline/1", "steps": -1}')
    assert "timeline.json: " in one_line(plan("compare", written, run))
    assert not (run / "compare.png").exists()
