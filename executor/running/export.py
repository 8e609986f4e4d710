"""The models that a run leaves: Hugging Face directories of what it trained."""

import os
import shutil
from pathlib import Path

from executor.data.prompts import PromptSource
from executor.fleet.asking import ask, to_each
from executor.running.processes import Processes
from executor.training.trainer import Trainer
from planner.spec.errors import UserError

EXPORTED, FINAL = ("actor", "critic"), "final"  # roles, and the directory beside checkpoints


def export_models(processes: Processes, prompts: PromptSource, directory: Path) -> None:
    """Write actor and critic as Hugging Face directories `directory/<role>` that `from_pretrained`
    loads, with the tokenizer. Each appears whole or not at all. Raises UserError."""
    for role in EXPORTED:
        if role not in processes.plan.trainers:
            continue
        unfinished = directory / f".{role}"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            ask(to_each(processes.of(role), Trainer.export, role, unfinished.resolve()))
            prompts.save_tokenizer(unfinished)
            shutil.rmtree(directory / role, ignore_errors=True)  # of an attempt before
            os.replace(unfinished, directory / role)
        except OSError as error:
            raise UserError(
                f"{directory}: the {role} cannot be written ({error.strerror}); make room there"
            ) from None
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
