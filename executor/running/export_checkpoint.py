"""Models out of a checkpoint: Hugging Face directories in bf16. The run that it is of may go on
meanwhile."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from executor.data.tokenizer import tokenizer_of
from executor.running.checkpoint import Checkpoint
from executor.running.export import EXPORTED
from executor.training import loading, models, shards
from planner.spec.directories import check_free
from planner.spec.errors import UserError
from planner.spec.workload import Model

EXPORTS = "exports"  # in a run directory


def export_checkpoint(checkpoint: Checkpoint, out: Path) -> list[Path]:
    """Write the trained models as `out/<role>`, with the actor's tokenizer. Each appears whole or
    not at all. Raises UserError."""
    workload, written = checkpoint.plan.workload, []
    check_free(out)
    for role in EXPORTED:
        if role not in checkpoint.manifest.roles:
            continue
        unfinished = out / f".{role}"
        try:
            out.mkdir(parents=True, exist_ok=True)
            _write(role, workload.models[role], checkpoint.saved, unfinished)
            if workload.actor.path is not None and workload.data is not None:
                tokenizer_of(workload.actor.path).save_pretrained(unfinished)
            os.replace(unfinished, out / role)
        except OSError as error:
            raise UserError(
                f"{out}: the {role} cannot be written ({error.strerror or error}); make room "
                "there, or choose another place"
            ) from None
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        written.append(out / role)
    return written


def _write(role: str, model: Model, saved: shards.Saved, directory: Path) -> None:
    if model.path is not None and not (model.path / "config.json").is_file():
        raise UserError(
            f"{role}: no model directory at {model.path}, whose config.json an export needs; if "
            "it was moved, write where it is now into the checkpoint's run and resume that"
        )
    empty, source = models.empty(role, model, torch.bfloat16), shards.Restored(role, saved)
    cpu = torch.device("cpu")
    state = {
        names[0]: source.rows(names, parameter.shape, 0, parameter.shape[0], cpu).bfloat16()
        for names, parameter in loading.parameters(empty)
    }
    models.export(empty, state, directory)


def export_apart(checkpoint: Path, out: Path) -> str:
    """Export a checkpoint in a process of its own, which takes neither memory nor time of this one;
    what went wrong, or nothing."""
    command = [sys.executable, "-P", "-m", "planner", "checkpoint", "export"]
    done = subprocess.run(
        [*command, str(checkpoint), str(out)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is not for it
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return lines[-1].removeprefix("plan: ") if done.returncode else ""
