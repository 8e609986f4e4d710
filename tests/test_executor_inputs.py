"""Bad input to a run: one clear line, before anything is started, and nothing half-written."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import SHAPE, colocated, cpu_cluster, make_plan, make_workload, samples_of, split
from processes import PATIENCE

from executor.data import reward
from executor.fleet import session
from executor.fleet.pools import Fleet
from executor.running import preflight
from executor.running.execute import execute, rehearse
from executor.running.options import RunOptions
from executor.running.run_directory import check_ended, claimed
from planner.commands.execute import free_name
from planner.spec.cluster import make_cluster
from planner.spec.errors import UserError
from planner.spec.plan import Plan
from planner.spec.rewards import RewardFunction
from planner.spec.workload import Workload

GOOD = "def f(prompts, responses, answers):\n    return [float(len(r)) for r in responses]\n"


def write_reward(tmp_path: Path, code: str) -> RewardFunction:
    (tmp_path / "reward.py").write_text(code)
    return RewardFunction(function=f"{tmp_path}/reward.py:f")


def refuse(workload: Workload) -> str:
    with pytest.raises(UserError) as error:
        preflight.check(colocated(workload, cores=1), local=True)
    assert "\n" not in str(error.value)
    return str(error.value)


def with_path(path: Path, role: str = "actor") -> Workload:
    return make_workload(**{role: {"shape": SHAPE, "path": path}})


@pytest.mark.slow
def test_a_reward_function_that_cannot_be_imported(tmp_path: Path) -> None:
    missing = RewardFunction(function=f"{tmp_path}/none.py:f")
    assert "no file" in refuse(make_workload(reward=missing))
    (tmp_path / "reward.txt").write_text(GOOD)
    assert "no Python file" in refuse(
        make_workload(reward=RewardFunction(function=f"{tmp_path}/reward.txt:f"))
    )
    assert "SyntaxError" in refuse(make_workload(reward=write_reward(tmp_path, "def f(:")))
    assert "ZeroDivisionError" in refuse(make_workload(reward=write_reward(tmp_path, "1 / 0")))
    assert "SystemExit: 3" in refuse(
        make_workload(reward=write_reward(tmp_path, "import sys\nsys.exit(3)"))
    )
    assert "no function 'f'" in refuse(make_workload(reward=write_reward(tmp_path, "g = 1")))


@pytest.mark.parametrize("parameters", ["prompts", "a, b, c, d", "prompts, responses, *, answers"])
def test_a_reward_function_that_cannot_be_called_is_refused_before_the_run(
    tmp_path: Path, parameters: str
) -> None:
    asked = write_reward(tmp_path, f"def f({parameters}):\n    return [0.0]\n")
    line = refuse(make_workload(reward=asked))
    assert f"takes ({parameters}), and is called with (prompts, responses, answers)" in line
    reward.import_function(write_reward(tmp_path, "def f(*lists):\n    return [0.0]\n"))


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("[1.0]", "1 rewards for 2 responses"),
        ("[1.0, float('nan')]", "nan for prompt 'b'"),
        ("[1.0, 'high']", "'high'"),
        ("[1.0, [2.0]]", "finite number"),
        ("3", "TypeError"),
        ("responses[5]", "IndexError"),
        ("__import__('sys').exit(1)", "SystemExit: 1"),
    ],
)
def test_a_reward_function_that_returns_the_wrong_thing(
    tmp_path: Path, body: str, what: str
) -> None:
    asked = write_reward(tmp_path, f"def f(prompts, responses, answers):\n    return {body}\n")
    with pytest.raises(UserError, match="reward function") as error:
        reward.score(asked, reward.import_function(asked), samples_of("a b", "x yy"))
    assert what in str(error.value) and "\n" not in str(error.value)


def test_a_good_reward_function_may_return_what_behaves_like_numbers(tmp_path: Path) -> None:
    asked = write_reward(
        tmp_path, "import numpy\ndef f(p, r, a):\n    return numpy.arange(len(r))\n"
    )
    assert reward.score(asked, reward.import_function(asked), samples_of("a b", "x yy")) == [
        0.0,
        1.0,
    ]


def test_model_directories_are_checked(tmp_path: Path, model_directories: dict[str, Path]) -> None:
    actor = model_directories["actor"]
    assert "config.json is missing" in refuse(with_path(tmp_path))
    broken = tmp_path / "actor"
    shutil.copytree(actor, broken)
    (broken / "model.safetensors").unlink()
    assert "no *.safetensors" in refuse(with_path(broken))
    assert "ForCausalLM" in refuse(with_path(model_directories["reward"]))
    assert "ForSequenceClassification" in refuse(with_path(actor, "reward"))
    differences = {
        "hidden": 64,
        "layers": 3,
        "heads": 8,
        "kv_heads": 4,
        "intermediate": 65,
        "head_dim": 16,
    }
    for name, value in {**differences, "tied_embeddings": True}.items():
        other = make_workload(actor={"shape": {**SHAPE, "head_dim": 8, name: value}, "path": actor})
        assert f"says {name} = " in (line := refuse(other)) and f"made for {value};" in line
    wide = {"shape": {**SHAPE, "vocab": 49}, "random_weights": True}
    assert "vocabulary has 49" in refuse(make_workload(critic=wide))
    shutil.copytree(actor, tmp_path / "custom")
    config = json.loads((actor / "config.json").read_text())
    (tmp_path / "custom/config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoModel": "m.py"}})
    )
    assert "auto_map" in refuse(with_path(tmp_path / "custom"))


def test_files_that_may_not_be_read_are_named(
    tmp_path: Path, model_directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests may run as root, who may read everything: the modes are looked at instead."""
    monkeypatch.setattr(os, "access", lambda path, how: os.stat(path).st_mode & 0o400)
    actor = tmp_path / "actor"
    shutil.copytree(model_directories["actor"], actor)
    (actor / "lost+found").mkdir(mode=0)  # as a volume has it
    preflight.check_models(with_path(actor))
    (actor / "model.safetensors").chmod(0)
    line = refuse(with_path(actor))
    assert f"actor: {actor}/model.safetensors may not be read by this user" in line
    actor.chmod(0o100)
    assert f"actor: {actor} may not be read by this user" in refuse(with_path(actor))
    actor.chmod(0o700)


def test_a_run_claims_its_directory_before_it_starts(tmp_path: Path) -> None:
    with claimed(tmp_path / "runs", "r") as path:
        assert path.is_dir() and free_name(tmp_path / "runs", "r") == "r-2"
        with pytest.raises(UserError, match="goes on in another process"):
            check_ended(path)
        with pytest.raises(UserError, match="exists already"), claimed(tmp_path / "runs", "r"):
            pass
    assert not list(tmp_path.iterdir())
    with claimed(tmp_path / "runs", "r") as path:
        (path / "log.txt").touch()
    assert path.is_dir()


def test_cores_that_a_process_may_not_use_do_not_count() -> None:
    """As under taskset(1)."""
    every = os.sched_getaffinity(0)
    if len(every) < 2:
        pytest.skip("needs two cores")
    try:
        os.sched_setaffinity(0, {min(every)})
        with pytest.raises(UserError, match=r"needs 2 cores, and this process may use 1 of"):
            preflight.check_machine(colocated(make_workload(), cores=2))
    finally:
        os.sched_setaffinity(0, every)


def test_data_needs_a_tokenizer(tmp_path: Path, model_directories: dict[str, Path]) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "1 2"}\n')
    data: dict[str, Any] = {"train": tmp_path / "train.jsonl"}
    assert "needs a tokenizer" in refuse(make_workload(data=data))
    bare = tmp_path / "actor"
    shutil.copytree(model_directories["actor"], bare)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    model = {"shape": SHAPE, "path": bare}
    assert "holds no tokenizer" in refuse(make_workload(actor=model, data=data))
    (bare / "tokenizer.json").write_text("{")
    assert "cannot be loaded" in refuse(make_workload(actor=model, data=data))


def on_gpus() -> Plan:
    roles = {"actor": "a", "rollout": "a", "reference": "a", "critic": "b", "reward": "b"}
    cluster = make_cluster(16)
    return make_plan(make_workload(), {"a": 4, "b": 4}, roles, cluster=cluster)


def test_a_machine_without_the_gpus_is_told_about_rehearse(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"needs 8 GPUs of kind h200 and this machine has 0.*--rehearse"
    ):
        execute(on_gpus(), name="r", runs=tmp_path)
    with pytest.raises(UserError, match=r"needs 64 cores.*--rehearse"):
        execute(colocated(make_workload(), cores=64), name="r", runs=tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_engine_that_cannot_run_here_is_named() -> None:
    vllm = colocated(make_workload(), cores=1, layouts={"rollout": {"engine": "vllm"}})
    with pytest.raises(UserError, match="vllm"):
        preflight.check_engine(vllm)
    wide = colocated(make_workload(), layouts={"rollout": {"tensor_parallel": 2, "replicas": 1}})
    with pytest.raises(UserError, match="tensor_parallel to 1"):
        preflight.check_engine(wide)
    hot = make_workload(algorithm={"temperature": 2.5})
    layouts = {"rollout": {"engine": "vllm", "memory_fraction": 0.1}}
    with pytest.raises(UserError, match=r"engine vllm takes at most 2, not 2\.5; lower it"):
        preflight.check_engine(colocated(hot, 1, layouts=layouts))


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"steps": 0}, "--steps 0: must be at least 1"),
        ({"keep": 10**6}, "--keep 1000000: must be at most 100,000"),
        (
            {"address": "127.0.0.1"},
            "--address 127.0.0.1: write host:port, such as 127.0.0.1:6379 (the port that `ray "
            "start --head` names), or auto for the cluster of this machine",
        ),
        ({"save_every": -1}, "--save-every -1: must be at least 0"),
        ({"deadline_floor": 0.0}, "--deadline-floor 0: choose a number of seconds, at most 1e+06"),
    ],
)
def test_numbers_out_of_range_are_no_options_of_a_run(values: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as error:
        RunOptions(**values)
    assert str(error.value) == line


@pytest.mark.parametrize("name", ["", "..", "a/b", "/tmp"])
def test_a_run_has_a_plain_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="--name"):
        rehearse(split(make_workload()), lambda task: 0.0, name=name, runs=tmp_path)


def test_a_run_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    runs = tmp_path / "new" / "runs"
    with pytest.raises(UserError, match="cannot be made"), claimed(runs, "x" * 300):
        pass
    assert not list(tmp_path.iterdir())


def test_runs_need_a_directory_before_anything_is_started(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"nothing can be written into .*file; choose another --runs"
    ):
        execute(split(make_workload()), name="r", runs=tmp_path / "file" / "runs")


def test_more_gpus_than_ray_has(ray_two: None) -> None:
    gpus = cpu_cluster(100).gpus
    with pytest.raises(UserError, match=r"100 CPUs are needed and Ray has 4"):
        Fleet(gpus, "CPU")
    with pytest.raises(UserError, match=r"Ray's matching node has 0"):
        Fleet(((0, 0), (1, 0)), "CPU")


@pytest.mark.ray
@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "127.0.0.1:99999999"])
def test_no_ray_at_the_address(address: str) -> None:
    with pytest.raises(UserError, match="no Ray cluster at"):
        session._connect(address)


def test_a_reward_file_that_hangs_when_it_is_imported(tmp_path: Path) -> None:
    hanging = write_reward(tmp_path, "import time\ntime.sleep(1000)\n")
    impatient = hanging.model_copy(update={"timeout_seconds": 0.2})
    assert "its file took longer than 0.2 s to import" in refuse(make_workload(reward=impatient))


ORDINARY = """
from __future__ import annotations
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from beside import one

@dataclass
class Graded:
    text: str

def length(graded):
    return float(len(graded.text) + one())

def f(prompts, responses, answers):
    with ProcessPoolExecutor(2, mp_context=get_context(METHOD)) as pool:
        return list(pool.map(length, map(Graded, responses)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_reward_file_is_ordinary_python(tmp_path: Path, method: str) -> None:
    """It has dataclasses under postponed annotations, a process pool, and a module beside it."""
    (tmp_path / "beside.py").write_text("def one():\n    return 1\n")
    asked = write_reward(tmp_path, ORDINARY.replace("METHOD", repr(method)))
    reward.check(asked)
    script = (
        "from executor.data import reward\nfrom planner.spec.rewards import RewardFunction\n"
        "from conftest import samples_of\n"
        f"asked = RewardFunction(function={asked.function!r})\n"
        "print(reward.score(asked, reward.import_function(asked), samples_of('a', 'four')))\n"
    )
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}\n{script}"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout == "[5.0]\n"


@pytest.mark.slow
def test_an_import_leaves_nothing_in_our_process_and_none_behind(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    asked = write_reward(
        tmp_path,
        "import multiprocessing, os\n"
        "pool = multiprocessing.get_context('fork').Pool(1)\n"
        f"open({str(pids)!r}, 'w').write(str(pool.apply(os.getpid)))\n{GOOD}",
    )
    before = dict(sys.modules), list(sys.path)
    reward.check(asked)
    assert (dict(sys.modules), list(sys.path)) == before
    deadline = time.monotonic() + PATIENCE
    while Path(f"/proc/{pids.read_text()}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pids.read_text()}").exists()


def test_a_reward_file_that_crashes_when_it_is_imported(tmp_path: Path) -> None:
    crash = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n"
    line = refuse(make_workload(reward=write_reward(tmp_path, crash)))
    assert "importing its file ended the process (SIGSEGV)" in line


def test_an_exception_of_a_reward_function_is_told_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "beside2.py").write_text("def half(x):\n    return 1 / x\n")
    code = "import beside2\n\ndef f(p, r, a):\n    return [beside2.half(0)]\n"
    asked = write_reward(tmp_path, code)
    with pytest.raises(UserError, match=r"ZeroDivisionError: division by zero \(reward\.py:4\)"):
        reward.score(asked, reward.import_function(asked), samples_of("a", "x"))
    with pytest.raises(UserError, match=r"ZeroDivisionError: division by zero \(reward\.py:2\)"):
        reward.import_function(write_reward(tmp_path, "x = 1\n1 / 0\n"))


@pytest.mark.parametrize("value", ["1e39", "-1e39", "10**400", "numpy.float64(1e300)"])
def test_a_score_that_float32_does_not_hold_is_no_finite_score(tmp_path: Path, value: str) -> None:
    asked = write_reward(tmp_path, f"import numpy\ndef f(p, r, a):\n    return [1.0, {value}]\n")
    with pytest.raises(UserError, match="for prompt 'b'; it must be a finite number of float32"):
        reward.score(asked, reward.import_function(asked), samples_of("a b", "x y"))
