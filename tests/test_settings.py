"""`--set KEY=VALUE`: any key of a workload, checked as in its file."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import make_workload, split

from planner.cli import main
from planner.predict.schedule import load_plan
from planner.search import find
from planner.spec.cluster import make_cluster
from planner.spec.errors import UserError
from planner.spec.files import profiles_dir
from planner.spec.plan import Plan
from planner.spec.settings import keep_costs, set_in
from planner.spec.workload_file import load_workload

GRPO = profiles_dir() / "workloads" / "7b-grpo.toml"


def test_values_are_written_as_in_toml() -> None:
    data = {"algorithm": {"clip": 0.2}, "rewards": [{"weight": 1}], "critic": None}
    given = ("algorithm.clip=0.3", "algorithm.loss=gspo", "rewards.0.weight=2", "name='a=b'")
    set_in(data, (*given, "prompt={kind='fixed',tokens=9}", "critic.random_weights=true"))
    assert data == {
        "algorithm": {"clip": 0.3, "loss": "gspo"},
        "rewards": [{"weight": 2}],
        "critic": {"random_weights": True},
        "name": "a=b",
        "prompt": {"kind": "fixed", "tokens": 9},
    }
    set_in(data, ("critic=", "algorithm.loss="))
    assert "critic" not in data and data["algorithm"] == {"clip": 0.3}


def test_paths_start_where_one_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    data = {"actor": {"path": "/old", "shape": {"hidden": 1}}, "data": {}, "reward": {}}
    set_in(data, ("actor.path=new", "data.train=a.jsonl", "reward.function=r.py:f"))
    assert data["actor"] == {"path": str(tmp_path / "new")}  # its shape is its own
    assert data["data"]["train"] == str(tmp_path / "a.jsonl")
    assert data["reward"]["function"] == f"{tmp_path}/r.py:f"


def test_a_workload_is_checked_with_its_settings() -> None:
    workload = load_workload(GRPO, ("algorithm.advantage=rloo", "samples_per_prompt=16"))
    assert (workload.algorithm.advantage, workload.group) == ("rloo", 16)
    for setting, text in {
        "algorithm.clipp=1": "7b-grpo.toml: algorithm.clipp: unknown key",
        "samples_per_prompt=7": "batch = 1024 is not a multiple of samples_per_prompt = 7",
        "algorithm.advantage=gae": "'gae' needs a critic; add",
        "algorithm.clip=-1": "algorithm.clip: must be greater than 0, not -1",
        "algorithm": "--set algorithm: write KEY=VALUE",
        "batch.size=3": "--set batch.size=3: batch is no section",
        "rewards.0.weight=2": "--set rewards.0.weight=2: rewards.0 is no section",
    }.items():
        with pytest.raises(UserError, match=text):
            load_workload(GRPO, (setting,))


def test_a_plan_keeps_what_is_predicted_as_long_as_that_holds(tmp_path: Path) -> None:
    found = find(load_workload(GRPO), make_cluster(8)).best
    path = tmp_path / "plan.json"
    found.write(path)
    same = load_plan(path, ("optimizer.actor.lr=1e-5", "steps=7", "algorithm.clip_high=0.28"))
    assert same.workload.optimizer.actor.lr == 1e-5 and same.workload.steps == 7
    assert same.predicted == found.predicted
    longer = load_plan(path, ("algorithm.epochs=2",))
    assert longer.predicted is None and longer.program == found.program
    assert not keep_costs(("response.mean=9",)) and not keep_costs(("samples_per_prompt=4",))
    with pytest.raises(UserError, match=r"plan\.json: roles: the workload has no role 'reference'"):
        load_plan(path, ("reference=",))


def test_another_evaluation_is_counted_anew(tmp_path: Path) -> None:
    for name, rows in (("few", 3), ("many", 40)):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "a"}\n' * rows)
    few, many = str(tmp_path / "few.jsonl"), str(tmp_path / "many.jsonl")
    data = {"train": few, "evaluation": few, "evaluate_every": 2, "evaluation_responses": 3}
    path = tmp_path / "plan.json"
    split(make_workload(data=data)).write(path)

    def counted(*settings: str) -> int | None:
        found = load_plan(path, settings).workload.data
        assert found is not None
        return found.evaluation_responses

    assert (counted(), counted("seed=7")) == (3, 3)
    assert counted(f"data.evaluation={many}") == 40
    assert counted(f"data.evaluation={many}", "data.evaluation_responses=9") == 9


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, arguments)
    return result.exit_code, result.stdout + result.stderr


def test_commands_take_it(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    search = ("search", "--gpus", "8", "--workload", "7b-grpo", "--no-picture", "--out", str(plan))
    code, said = run(*search, "--set", "algorithm.oversampling_factor=1.5", "--set", "name=mine")
    assert code == 0 and "mine on 8 GPUs" in said
    assert "A step generates and scores 1,536 sequences, of which 1,024 are trained on." in said
    assert Plan.read(plan).workload.generated == 1536
    assert run("simulate", str(plan), "--set", "algorithm.epochs=2")[0] == 0
    code, said = run("check", str(plan), "--set", "minibatch=1023")
    assert code == 2 and said.startswith("plan: ") and said.count("\n") == 1


def test_a_plan_with_settings_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    split(make_workload()).write(path)
    assert load_plan(path, ("seed=7",)) == load_plan(path)
    assert json.loads(path.read_text())["workload"]["seed"] == 7
