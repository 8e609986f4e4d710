"""What a run leaves of its models."""

import os
import shutil
from pathlib import Path

from executor.data import PromptSource
from executor.processes import Processes
from executor.worker import ask

EXPORTED = ("actor", "critic")


def export(processes: Processes, prompts: PromptSource, directory: Path) -> None:
    """Write actor and critic as Hugging Face directories `directory/<role>` that `from_pretrained` loads, the actor
    with its tokenizer. Each appears whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    for role in EXPORTED:
        if role not in processes.plan.trainers:
            continue
        unfinished = directory / f".{role}"
        shutil.rmtree(unfinished, ignore_errors=True)
        ask(processes.of(role), "export", role, unfinished.resolve())
        if role == "actor":
            prompts.save_tokenizer(unfinished)
        os.replace(unfinished, directory / role)
