"""What may differ from the run that is gone on with, and what may not."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import SHAPE, make_workload, split
from interrupted import STEPS

from executor.running import checkpoint
from executor.running.changes import content_of
from executor.running.checkpoint import Manifest
from planner.spec.errors import UserError


def test_a_plan_for_another_job_is_refused(two: Path) -> None:
    found = checkpoint.find(two)
    other = split(make_workload(seed=8, batch=16))
    with pytest.raises(UserError, match=r"another workload .*: batch, seed may not differ"):
        found.check(other)
    found.check(split(make_workload(steps=99)))


def rewritten(path: Path, **content: str) -> None:
    """The manifest of a checkpoint with this content of files."""
    manifest = Manifest.read(path / "checkpoint.json").changed(content=content)
    manifest.changed(sha256=manifest.digest()).write(path / "checkpoint.json")


def test_settings_that_people_change_in_mid_run_may_change_and_are_named(two: Path) -> None:
    found = checkpoint.find(two)
    observed = {"kind": "empirical", "values": [3, 4, 9], "max": 9}
    algorithm = {"temperature": 0.8, "kl_coef": 0.01}
    optimizer = {"actor": {"lr": 1e-4}, "critic": {"lr": 1e-3}}
    settings = {"algorithm": algorithm, "optimizer": optimizer}
    changed = make_workload(steps=9, response=observed, **settings)
    assert found.check(split(changed)) == [
        "algorithm.kl_coef: 0.05 becomes 0.01",
        "optimizer.actor.lr: 0.001 becomes 0.0001",
        "response: lognormal (mean 5, sigma 0.5, max 8) becomes empirical (values 3 values, max 9)",
    ]
    for key, other in (
        ("algorithm.temperature", {"algorithm": {**algorithm, "temperature": 1.0}}),
        ("prompt", {"prompt": {"kind": "fixed", "tokens": 6}}),  # which makes other prompts
    ):
        with pytest.raises(UserError, match=f"{key} may not differ"):
            found.check(split(make_workload(**{**settings, **other})))


def test_models_and_files_may_lie_elsewhere_if_they_hold_the_same(
    two: Path, tmp_path: Path, model_directories: dict[str, Path]
) -> None:
    places = [tmp_path / "here", tmp_path / "there"]
    plans = []
    for place in places:
        shutil.copytree(model_directories["actor"], place / "actor")
        (place / "train.jsonl").write_text('{"prompt": "1 2"}\n')
        (place / "reward.py").write_text("def f(prompts, responses, answers): ...\n")
        workload = make_workload(
            actor={"shape": SHAPE, "path": place / "actor"},
            data={"train": place / "train.jsonl", "evaluate_every": 0},
            reward={"function": f"{place}/reward.py:f"},
            steps=STEPS,
        )
        plans.append(split(workload))
    here, there = plans
    directory = two / "checkpoints" / "step-000006"
    rewritten(directory, **content_of(here.workload))
    found = replace(checkpoint.find(two), plan=here)
    assert found.check(here) == []
    assert found.check(there) == [
        f"actor.path: now {places[1]}/actor (as before)",
        f"data.train: now {places[1]}/train.jsonl (as before)",
        f"reward.function: now {places[1]}/reward.py (as before)",
    ]
    (places[1] / "reward.py").write_text("def f(prompts, responses, answers): return []\n")
    assert f"reward.function: {places[1]}/reward.py is not what it was" in found.check(there)
    weights = places[1] / "actor" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r": the content of actor.path may not differ"):
        found.check(there)
    shutil.rmtree(places[0])
    with pytest.raises(
        UserError, match=r"actor.path: nothing is at .* --resume .*run --plan .*plan"
    ):
        found.check(here)
