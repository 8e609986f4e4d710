"""The command line of searches and baselines: what they write, and what they refuse."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SHAPE
from processes import PATIENCE
from test_cli import files, one_line, plan

from planner.commands.local import local_cluster
from planner.predict.points import HostPoint, TrainerPoint
from planner.predict.profile import Profile
from planner.predict.schedule import load_plan
from planner.spec.errors import UserError
from planner.spec.files import profiles_dir
from planner.spec.machine import physical_cores
from planner.spec.plan import Plan

MODEL = """
[{role}]
random_weights = true
[{role}.shape]
hidden = 32
layers = 2
heads = 4
kv_heads = 2
intermediate = 64
vocab = 48
"""
HEAD = """
schema = "splitplan/workload/1"
name = "tiny"
batch = 8
minibatch = 4
prompt = { kind = "fixed", tokens = 5 }
response = { kind = "lognormal", mean = 5, sigma = 0.5, max = 8 }
steps = 3
"""
WORKLOAD = HEAD + "".join(
    MODEL.format(role=role) for role in ("actor", "critic", "reference", "reward")
)


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(WORKLOAD)
    return path


# --- search ---


def test_search_writes_a_plan_and_its_picture_and_prints_the_table(
    tmp_path: Path, workload: Path
) -> None:
    out = tmp_path / "found" / "two.json"
    result = plan("search", "--gpus", "2", "--workload", workload, "--out", out, "--keep", "2")
    assert result.exit_code == 0, result.output
    found = load_plan(out)
    assert found.name == "two" and found.predicted is not None and found.provenance is not None
    assert (tmp_path / "found" / "two.png").read_bytes().startswith(b"\x89PNG")
    for words in (
        "vs split",
        "vs colocated",
        "Bottleneck: ",
        "Lower bound",
        "roofline",
        "placements, each",
        "two.png",
    ):
        assert words in result.stdout
    rows = [line.split()[0] for line in result.stdout.splitlines() if line.strip()]
    assert {
        "best",
        "colocated",
        "split",
        "split-parallel",
        "standalone",
        "one-step-off",
        "runner-up-1",
    } <= set(rows)
    assert "does not fit: " in result.stdout  # five pools on two GPUs


def test_search_without_a_picture(tmp_path: Path, workload: Path) -> None:
    result = plan(
        "search",
        "--gpus",
        "1",
        "--workload",
        workload,
        "--out",
        tmp_path / "one.json",
        "--no-picture",
    )
    assert result.exit_code == 0, result.output
    assert files(tmp_path) == {"tiny.toml", "one.json"}


def test_every_baseline_can_be_written_as_a_plan(tmp_path: Path, workload: Path) -> None:
    from planner.search.questions.baselines import NAMES

    for name in NAMES:
        assert name in " ".join(plan("baseline", "--help").stdout.split())
        result = plan(
            "baseline",
            name,
            "--gpus",
            "8",
            "--workload",
            workload,
            "--out",
            tmp_path / f"{name}.json",
        )
        assert result.exit_code == 0, result.output
        assert load_plan(tmp_path / f"{name}.json").provenance is not None
    message = one_line(
        plan(
            "baseline",
            "vanilla",
            "--gpus",
            "8",
            "--workload",
            workload,
            "--out",
            tmp_path / "x.json",
        )
    )
    assert all(name in message for name in NAMES)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--gpus N, --cluster FILE or --cluster local"),
        (["--gpus", "0"], "'--gpus': 0 is not in the range x>=1"),
        (["--gpus", "2", "--device", "h900"], "no device 'h900' is shipped"),
        (["--gpus", "2", "--cluster", "cluster.toml"], "leave out --gpus"),
        (["--cluster", "cluster.toml"], "cluster.toml: no such file"),
        (["--cluster", "local", "--gpus", "100000"], "physical cores"),
        (["--gpus", "2", "--workload", "8b"], "no workload '8b' is shipped"),
        (["--gpus", "2", "--profile", "gone.json"], "gone.json: no such file"),
        (["--gpus", "2", "--max-staleness", "-1"], "-1 is not in the range"),
        (["--gpus", "2", "--scenarios", "0"], "0 is not in the range"),
    ],
)
def test_wrong_inputs_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in one_line(plan("search", *arguments))
    assert files(tmp_path) == set()


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("batch = 8", "batch = 9", "batch = 9 is not a multiple of minibatch = 4"),
        ("tokens = 5", "tokens = -5", "greater than 0"),
        ("steps = 3", "stepz = 3", "stepz: unknown key"),
        ("workload/1", "workload/7", "splitplan/workload/1"),
        (MODEL.format(role="actor"), '[actor]\npath = "gone"\n', "no model directory at"),
        ("name =", "name", "not valid TOML"),
        (
            "batch = 8",
            "batches = 8",
            "batches: unknown key; remove it or check its spelling (and 1 more)",
        ),
        ("batch = 8", "batch = 0", "batch: must be greater than 0, not 0"),
        (
            'kind = "fixed"',
            'kind = "normal"',
            "prompt: 'kind' is 'normal'; choose one of 'fixed', 'lognormal', 'empirical'",
        ),
        ("mean = 5", "mean = -5", "response.mean: must be greater than 0, not -5"),
        (
            MODEL.format(role="reward"),
            '[reward]\nfunction = "r.py:f"\ntimeout = 3\n',
            "reward.timeout: unknown key",
        ),
        (
            MODEL.format(role="reward"),
            '[reward]\nfunction = "r"\n',
            "reward: 'r' does not name a function",
        ),
        ("steps = 3", 'steps = 3\ndata = "lines"', "data: needs a mapping of keys, not 'lines'"),
    ],
)
def test_a_wrong_workload_is_refused(tmp_path: Path, before: str, after: str, says: str) -> None:
    (tmp_path / "wrong.toml").write_text(WORKLOAD.replace(before, after, 1))
    arguments = [
        "--gpus",
        "2",
        "--workload",
        tmp_path / "wrong.toml",
        "--out",
        tmp_path / "out.json",
    ]
    line = one_line(plan("search", *arguments))
    assert says in line and "wrong.toml" in line
    assert files(tmp_path) == {"wrong.toml"}


def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, workload: Path
) -> None:
    for out, says in (
        (tmp_path, "ends in .json"),
        (workload / "best.json", "is no directory"),
        (tmp_path / "best.toml", "ends in .json"),
    ):
        assert says in one_line(plan("search", "--gpus", "1", "--workload", workload, "--out", out))
    (tmp_path / "best.json").mkdir()
    assert "is a directory" in one_line(
        plan("search", "--gpus", "1", "--workload", workload, "--out", tmp_path / "best.json")
    )
    assert files(tmp_path) == {"tiny.toml", "best.json"}


def test_the_profile_of_a_plan_is_found_again_or_missed_aloud(
    tmp_path: Path, workload: Path
) -> None:
    point = HostPoint(call="host", role="advantages", sequences=8, seconds=60.0)
    train = TrainerPoint(
        call="train",
        role="actor",
        sequences=8,
        prompt_tokens=40,
        response_tokens=40,
        seconds=70.0,
        micro_batch_tokens=64,
        minibatch=4,
    )
    profile = Profile(device="h200", model=SHAPE, points=(point, train))
    profile.write(tmp_path / "slow.json")
    out = tmp_path / "one.json"
    options = ["--gpus", "1", "--workload", workload, "--out", out]
    result = plan("baseline", "colocated", *options, "--profile", tmp_path / "slow.json")
    assert result.exit_code == 0, result.output
    found = load_plan(out)
    assert found.provenance is not None and found.provenance.profiles == {
        str(tmp_path / "slow.json"): profile.sha256
    }

    with_profile = plan("simulate", out)
    assert with_profile.exit_code == 0 and with_profile.stderr == ""
    (tmp_path / "slow.json").unlink()
    without = plan("simulate", out)
    assert without.exit_code == 0 and without.stdout != with_profile.stdout
    assert len(without.stderr.splitlines()) == 1 and "is gone or has changed" in without.stderr


# --- this machine ---


def test_this_machine_is_a_cluster_of_its_cores() -> None:
    cluster = local_cluster()
    assert len(cluster.gpus) == physical_cores() <= (os.cpu_count() or 1)
    (node,), (device,) = cluster.nodes, cluster.devices.values()
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < node.gpus * device.memory_bytes + node.host_memory_bytes <= 1.01 * total
    assert local_cluster(1).devices["cpu"].memory_bytes >= device.memory_bytes
    with pytest.raises(UserError, match="choose 1 to"):
        local_cluster(physical_cores() + 1)


def test_a_plan_for_this_machine(tmp_path: Path, workload: Path) -> None:
    out = tmp_path / "local.json"
    result = plan(
        "search",
        "--cluster",
        "local",
        "--gpus",
        "1",
        "--workload",
        workload,
        "--out",
        out,
        "--no-picture",
    )
    assert result.exit_code == 0, result.output
    assert Plan.read(out).rollout.engine == "transformers"


@pytest.mark.slow
def test_a_search_that_is_interrupted_writes_its_best_plan_with_an_honest_gap(tmp_path):
    text = (profiles_dir() / "workloads" / "70b.toml").read_text()
    for key, count in (("minibatch", 4096), ("batch", 16384)):
        text = re.sub(rf"^{key} = \d+$", f"{key} = {count}", text, flags=re.M)
    (tmp_path / "w.toml").write_text(text)
    command = [
        sys.executable,
        "-m",
        "planner.cli",
        "search",
        "--gpus",
        "1024",
        "--workload",
        "w.toml",
    ]
    # On a busy machine it may have no plan yet, or not even have begun.
    for delay in (1, 2, 4, 8, 16, 32, 64):
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
        if process.returncode == 0:
            break
        assert not (tmp_path / "best.json").exists()
    assert process.returncode == 0 and "Traceback" not in err
    predicted = Plan.read(tmp_path / "best.json").predicted
    assert predicted.lower_bound_seconds <= predicted.step_seconds * (1 + 1e-9)
    if predicted.proof.status == "time_limit":  # a quick machine may have ended by then
        assert "not proven optimal when the search was ended" in out
