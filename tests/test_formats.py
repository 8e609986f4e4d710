"""docs/formats.md knows every key of every file."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from planner.predict.points import (
    HostPoint,
    MovePoint,
    RolloutPoint,
    TrainerPoint,
    TransferPoint,
)
from planner.predict.profile import Profile
from planner.spec.algorithm import Algorithm, Optimizer
from planner.spec.cluster import Cluster, Device, Node
from planner.spec.data import Data, DataFile, EvaluationSet, Sampling
from planner.spec.files import Spec
from planner.spec.lengths import Empirical, Fixed, Lognormal
from planner.spec.plan import (
    Issue,
    Plan,
    Pool,
    Predicted,
    Proof,
    Provenance,
    RolloutRole,
    TrainerRole,
    Wait,
)
from planner.spec.rewards import Overlong, RewardFunction, RewardServer
from planner.spec.study import Cell, CellResult, GpuMemory, Study
from planner.spec.timeline import Span, Timeline
from planner.spec.workload import Model, RewardModel, Shape, Workload
from planner.spec.workload_file import load_workload

TEXT = (Path(__file__).parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")
CHAPTERS: dict[str, tuple[type[Spec], ...]] = {
    "Workload": (
        Workload,
        Data,
        DataFile,
        Sampling,
        EvaluationSet,
        Model,
        Shape,
        RewardFunction,
        RewardServer,
        Overlong,
        RewardModel,
        Algorithm,
        Optimizer,
        Fixed,
        Lognormal,
        Empirical,
    ),
    "Cluster": (Cluster, Node, Device),
    "Plan": (Plan, Pool, TrainerRole, RolloutRole, Issue, Wait, Predicted, Proof, Provenance),
    "Timeline": (Timeline,),
    "Profile": (Profile, TrainerPoint, RolloutPoint, TransferPoint, MovePoint, HostPoint),
    "Study": (Study, Cell),
    "Cell": (CellResult, GpuMemory),
}


def chapter(name: str) -> str:
    found = re.search(rf"^## {name}: .*?(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert found, f"no chapter {name}"
    return found[0]


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_key_is_described(name: str) -> None:
    text = chapter(name)
    described = set(re.findall(r"[a-z][a-z0-9_]*", " ".join(re.findall(r"`([^`]*)`", text))))
    keys = {key for model in CHAPTERS[name] for key in model.model_fields}
    if name == "Timeline":
        keys |= {field.name for field in fields(Span)}
    assert not keys - described


@pytest.mark.parametrize("name", CHAPTERS)
def test_the_schema_is_the_one_that_is_read(name: str) -> None:
    file = CHAPTERS[name][0]
    assert f"## {name}: `{file.SCHEMA}`" in chapter(name)  # type: ignore[attr-defined]


def test_the_example_is_a_workload(tmp_path: Path) -> None:
    example = re.search(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    assert example
    shape = "{ hidden = 64, layers = 2, heads = 4, kv_heads = 2, intermediate = 128, vocab = 99 }"
    model = f"random_weights = true\nshape = {shape}"
    (tmp_path / "mine.toml").write_text(re.sub(r'path = "models/actor".*', model, example[1]))
    assert load_workload(tmp_path / "mine.toml").roles == ("actor", "rollout", "critic")
