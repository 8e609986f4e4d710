"""Train the model with PPO, GRPO and RLOO, at staleness 0 and 1, three seeds each: 18 runs.

    python reports/llm/prepare.py demo-llm
    python reports/llm/run.py demo-llm --at-once 6 --gpus 0

Each run is planned for a GPU of its own, and takes about 20 GB of it. Several at once on one GPU
learn the same, but their step times mean nothing. Runs that are whole are not made again. The
metrics of all are written to demo-llm/results.csv.
"""

import argparse
import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from planner.spec.files import write_atomic

ALGORITHMS, STALENESS, SEEDS = ("ppo", "grpo", "rloo"), (0, 1), (0, 1, 2)
STAGGER_SECONDS = 1.0  # Rays that start at the same moment may grasp for the same port
KEPT = ("step", "score", "kl", "staleness", "actor/entropy", "actor/grad_norm", "actor/clip_share")


def all_runs() -> list[tuple[str, int, int]]:
    """Algorithm, staleness and seed of each run; runs that are compared are next to each other."""
    ordered = product(STALENESS, SEEDS, ALGORITHMS)
    return [(algorithm, k, seed) for k, seed, algorithm in ordered]


def name_of(run: tuple[str, int, int]) -> str:
    algorithm, k, seed = run
    return f"{algorithm}-k{k}-{seed}"


def command_lines(run: tuple[str, int, int], out: Path, steps: int) -> list[list[str]]:
    """The two commands of a run, as a person would give them."""
    algorithm, k, seed = run
    plan = [sys.executable, "-m", "planner.cli"]
    best = str(out / "plans" / f"{name_of(run)}.json")
    search = [*plan, "search", "--gpus", "1", "--workload", str(out / f"{algorithm}.toml")]
    search += ["--max-staleness", str(k), "--set", f"seed={seed}", "--no-picture", "--out", best]
    execute = [*plan, "execute", best, "--name", name_of(run), "--runs", str(out / "runs")]
    execute += ["--steps", str(steps), "--save-every", "0"]
    return [search, execute]


def do(run: tuple[str, int, int], number: int, asked: argparse.Namespace) -> str:
    """Make a run on the GPU whose turn it is. Returns how that went, in a line."""
    out = asked.out
    if is_whole(out, run, asked.steps):
        return f"{name_of(run)}: was there"
    gpu = asked.gpus[number % len(asked.gpus)]
    if number < asked.at_once:
        time.sleep(number * STAGGER_SECONDS)
    began = time.monotonic()
    shutil.rmtree(out / "runs" / name_of(run), ignore_errors=True)  # what failed or was cut short
    with (out / "logs" / f"{name_of(run)}.txt").open("w") as log:
        for command in command_lines(run, out, asked.steps):
            code = subprocess.run(
                command,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)},
                stdout=log,
                stderr=subprocess.STDOUT,
            ).returncode
            if code:
                return f"{name_of(run)}: failed, see {log.name}"
    return f"{name_of(run)}: {time.monotonic() - began:.0f} s"


def metrics_of(out: Path, run: tuple[str, int, int]) -> list[dict[str, Any]]:
    path = out / "runs" / name_of(run) / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def is_whole(out: Path, run: tuple[str, int, int], steps: int) -> bool:
    return len(metrics_of(out, run)) >= steps


def write_table(out: Path) -> None:
    """Write a row for each step of each run that was made."""
    rows = []
    for run in all_runs():
        algorithm, k, seed = run
        for metrics in metrics_of(out, run):
            kept = {key: metrics[key] for key in metrics if key in KEPT or "evaluation" in key}
            rows.append({"algorithm": algorithm, "k": k, "seed": seed, **kept})
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        rounded = {
            key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()
        }
        writer.writerow(rounded)
    write_atomic(out / "results.csv", text.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="what prepare.py wrote")
    parser.add_argument("--at-once", type=int, default=1, help="runs at a time")
    parser.add_argument("--gpus", type=int, nargs="+", default=[0], help="numbers of GPUs to use")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--only", nargs="+", help="runs to make, such as grpo-k0-1")
    asked = parser.parse_args()
    for directory in ("plans", "logs", "runs"):
        (asked.out / directory).mkdir(exist_ok=True)
    runs = [run for run in all_runs() if not asked.only or name_of(run) in asked.only]
    with ThreadPoolExecutor(asked.at_once) as pool:
        numbered = enumerate(runs)
        for outcome in pool.map(lambda each: do(each[1], each[0], asked), numbered):
            print(outcome, flush=True)
    write_table(asked.out)


if __name__ == "__main__":
    main()
