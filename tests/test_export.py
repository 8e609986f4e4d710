"""Models out of a checkpoint, in another process than the run's."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import SHAPE, colocated, make_workload
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from executor.running.checkpoint import MANIFEST, Manifest
from executor.running.export_checkpoint import export_apart
from executor.training import models, shards
from planner.cli import main
from planner.spec.timeline import Timeline
from planner.spec.workload import Workload


def save(directory: Path, workload: Workload) -> dict[str, torch.nn.Module]:
    """A checkpoint as two ranks' writers leave it, of models with random weights."""
    directory.mkdir(parents=True)
    trained: dict[str, torch.nn.Module] = {}
    roles, files = {}, {}
    for role in ("actor", "critic"):
        random = workload.models[role].changed(path=None, random_weights=True)
        model = models.load(role, random, 5 if role == "actor" else 6, torch.float32)
        optimizer = torch.optim.AdamW(model.parameters())
        copied = shards.copy(role, model, optimizer, 4, 0)
        assert copied is not None
        writer = shards.Writer({role: copied}, directory)
        while (written := writer.finished()) is None:
            pass
        roles |= written[0]
        files |= written[1]
        trained[role] = model
    colocated(workload).write(directory / "plan.json")
    empty = Timeline(
        source="measured", plan="x", steps=1, warmup=0, step_ends_with="update_actor", spans=()
    )
    empty.write(directory / "timeline.json")
    (directory / "metrics.jsonl").write_bytes(b"")
    for name in ("plan.json", "timeline.json", "metrics.jsonl"):
        files[name] = shards.entry_of(directory / name)
    manifest = Manifest(
        step=4, done=(), metrics={}, evaluations={}, skipped={}, roles=roles, files=files
    )
    manifest.changed(sha256=manifest.digest()).write(directory / MANIFEST)
    return trained


@pytest.fixture
def checkpoint(tmp_path: Path, model_directories: dict[str, Path]) -> Path:
    return tmp_path / "runs" / "x" / "checkpoints" / "step-000004"


def workload_of(tmp_path: Path, model_directories: dict[str, Path]) -> Workload:
    actor = {"shape": SHAPE, "path": model_directories["actor"]}
    return make_workload(actor=actor, critic=actor, data={"train": tmp_path / "train.jsonl"})


def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """In fp32, of weights that are rounded to bf16."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.bfloat16().float()
        found: torch.Tensor = model.eval()(tokens).logits
        return found


def test_exported_models_give_the_log_probs_of_the_trained_ones(
    tmp_path: Path, checkpoint: Path, model_directories: dict[str, Path]
) -> None:
    trained = save(checkpoint, workload_of(tmp_path, model_directories))
    done = CliRunner().invoke(main, ["checkpoint", "export", str(checkpoint), str(tmp_path / "o")])
    assert done.exit_code == 0, done.output
    assert f"Wrote {tmp_path}/o/actor and {tmp_path}/o/critic, after 4 steps." in done.stdout
    actor = AutoModelForCausalLM.from_pretrained(tmp_path / "o" / "actor")
    assert actor.dtype == torch.bfloat16
    assert json.loads((tmp_path / "o/actor/config.json").read_text())["dtype"] == "bfloat16"
    tokens = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(logits(trained["actor"], tokens), logits(actor, tokens))
    critic = AutoModelForTokenClassification.from_pretrained(tmp_path / "o" / "critic")
    assert torch.equal(logits(trained["critic"], tokens), logits(critic, tokens))
    assert AutoTokenizer.from_pretrained(tmp_path / "o" / "critic")("1 2")["input_ids"] == [3, 4]
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["actor", "critic"]


def test_what_cannot_be_exported_is_one_line(
    tmp_path: Path, checkpoint: Path, model_directories: dict[str, Path]
) -> None:
    save(checkpoint, workload_of(tmp_path, model_directories))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()

    def line(checkpoint: Path, out: Path) -> str:
        done = CliRunner().invoke(main, ["checkpoint", "export", str(checkpoint), str(out)])
        assert done.exit_code == 2 and done.stderr.count("\n") == 1
        return done.stderr

    assert "is there already, and no empty directory" in line(checkpoint, tmp_path / "full")
    below = tmp_path / "full" / "file" / "below"
    assert f"cannot be made in {below.parent}" in line(checkpoint, below)
    (checkpoint / "actor-00000.safetensors").write_bytes(b"")
    assert "is missing or cut off" in line(checkpoint, tmp_path / "o")
    assert "no checkpoint in it" in line(tmp_path, tmp_path / "o")
    assert not (tmp_path / "o").exists()


@pytest.mark.slow  # it loads transformers
def test_another_process_says_in_one_line_what_went_wrong(tmp_path: Path) -> None:
    """As in the middle of a run."""
    line = export_apart(tmp_path, tmp_path / "o")
    assert "no checkpoint in it" in line and "\n" not in line
