"""Train the small task with weights at boundaries and in flight, KV caches kept and recomputed, at
k = 1, 2 and 4, three seeds each: 27 runs, N at a time, each on two cores, generation on one and all
else on the other.

    python reports/streaming/learn.py --out learning --at-once 1

Few sequences are decoded at once, so that generation takes about as long as training: weights then
arrive while most sequences of a batch are still to come. Runs that have been made are not made
again."""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from planner.commands.local import local_cluster
from planner.spec.plan import Plan
from planner.spec.workload_file import load_workload

KINDS, STALENESS, SEEDS = ("boundary", "keep", "recompute"), (1, 2, 4), (0, 1, 2)
STEPS, SLOTS = 60, 96
ORDER = ("generate", "score", "ref_logprobs", "old_logprobs", "values", "advantages")
ORDER += ("update_critic", "update_actor", "sync_weights", "evaluate")


def plan_of(kind: str, k: int, seed: int, task: Path) -> Plan:
    """The same placement and program for all kinds."""
    changes: dict[str, Any] = {"seed": seed, "max_staleness": k}
    streams = kind != "boundary"
    if streams:
        changes |= {"sync": "in_flight", "kv": kind}
    trained = {"engine": "fsdp", "shard": 1, "micro_batch_tokens": 4096, "recompute": False}
    roles: dict[str, Any] = {
        role: {**trained, "pools": ["rest"]} for role in ("actor", "critic", "reference", "reward")
    }
    roles["rollout"] = {
        "engine": "transformers",
        "pools": ["generation"],
        "tensor_parallel": 1,
        "replicas": 1,
        "memory_fraction": 0.1,
        "concurrency": SLOTS,
    }
    return Plan.model_validate(
        {
            "name": f"{kind}-{k}-{seed}",
            "workload": load_workload(task / "workload.toml").changed(**changes),
            "cluster": local_cluster(2),
            "pools": {"generation": {"gpus": [(0, 0)]}, "rest": {"gpus": [(0, 1)]}},
            "roles": roles,
            "program": [{"call": c, "offset": k if c == "generate" else 0} for c in ORDER],
            "staleness": k,
            "sync": "in_flight" if streams else "boundary",
        }
    )


def train(plan: Plan, out: Path, steps: int) -> dict[str, float]:
    """What came of a run: the last three evaluations, and means of the last ten steps."""
    run, file = out / "runs" / plan.name, out / f"{plan.name}.json"
    lines = run / "metrics.jsonl"
    if not lines.exists() or lines.read_bytes().count(b"\n") < steps:
        plan.write(file)
        command = [sys.executable, "-m", "planner.cli", "execute", str(file), "--name", plan.name]
        command += ["--runs", str(out / "runs"), "--steps", str(steps), "--save-every", "0"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (out / f"{plan.name}.txt").open("w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)
    metrics = [json.loads(line) for line in lines.read_text().splitlines()]
    last = {name: [line[name] for line in metrics[-10:]] for name in ("staleness", "score")}
    found = {name: float(np.mean(values)) for name, values in last.items()}
    found["segments"] = float(np.mean([line.get("segments", 1.0) for line in metrics[-10:]]))
    found["gap"] = float(np.mean([line["log_prob_gap"] for line in metrics[-10:]]))
    found["share"] = float(np.mean([line["importance/effective_share"] for line in metrics[-10:]]))
    right = [line["exact_match"] for line in metrics if "exact_match" in line]
    return found | {"right": float(np.mean(right[-3:]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--at-once", type=int, default=1, help="runs at a time, each on two cores")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "task").exists():
        from executor import digits

        digits.make(out / "task")
    keys = list(product(STALENESS, KINDS, SEEDS))
    plans = [plan_of(kind, k, seed, out / "task") for k, kind, seed in keys]
    with ThreadPoolExecutor(options.at_once) as threads:
        done = list(threads.map(lambda plan: train(plan, out, options.steps), plans))
    found = dict(zip(keys, done, strict=True))
    print("| k | weights | exact match | score | staleness | segments | log-prob gap | share |")
    print("|---|---|---|---|---|---|---|---|")
    for k, kind in product(STALENESS, KINDS):
        of_seeds = [found[k, kind, seed] for seed in SEEDS]
        right = [each["right"] for each in of_seeds]
        names = ("score", "staleness", "segments", "gap", "share")
        means = [f"{np.mean([each[name] for each in of_seeds]):.3g}" for name in names]
        spread = f"{np.mean(right):.2f} ({min(right):.2f} to {max(right):.2f})"
        print(f"| {k} | {kind} | {spread} | {' | '.join(means)} |")


if __name__ == "__main__":
    main()
