"""On GPUs the small task learns as it does on a CPU (reports/learning, three seeds). Making the
task takes a minute of one core; SPLITPLAN_DIGITS may name a directory of `plan task digits`."""

import csv
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROLES, make_plan

from executor.digits import task
from executor.running import preflight
from executor.running.loop import Silent, loop
from executor.running.step import Training
from planner.predict.schedule import tasks_of
from planner.spec.cluster import make_cluster
from planner.spec.workload_file import load_workload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
STEPS, SETTLED = 40, 20  # exact match is compared over the evaluations from step 20 to 39
ON_CPU = Path(__file__).parents[2] / "reports" / "learning" / "results.csv"


class Watched(Training):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.exact_match: dict[int, float] = {}

    def end_step(self, number: int) -> dict[str, Any]:
        metrics = super().end_step(number)
        if "exact_match" in metrics:
            self.exact_match[number] = metrics["exact_match"]
        return metrics


def test_the_small_task_learns_as_on_a_cpu(tmp_path: Path) -> None:
    from executor.fleet.session import ray_session

    directory = Path(os.environ.get("SPLITPLAN_DIGITS", tmp_path / "digits"))
    if not directory.exists():
        task.make(directory)
    layouts: dict[str, dict[str, Any]] = {
        role: {"micro_batch_tokens": 8192, "shard": 1, "replicas": 2} for role in ROLES
    }
    layouts["rollout"] = {
        "engine": "vllm",
        "replicas": 2,
        "memory_fraction": 0.2,
        "concurrency": 512,
    }
    plan = make_plan(
        load_workload(directory / "workload.toml"),
        {"all": 2},
        dict.fromkeys(ROLES, "all"),
        layouts=layouts,
        cluster=make_cluster(2, "h200", 2),
        blocking=True,
    )
    with ray_session(cpus=None, address=None):
        backend = Watched(plan, preflight.check(plan, local=True))
        try:
            loop(tasks_of(plan, STEPS), backend, {}, Silent())
        finally:
            backend.close()
    on_cpu = np.array(list(exact_match_on_cpu().values()))  # [seeds, evaluations]
    found = np.mean([match for step, match in backend.exact_match.items() if step >= SETTLED])
    print(
        f"exact match on GPUs {backend.exact_match}, mean {found:.3f}; on a CPU "
        f"{on_cpu.mean(1).round(3)}"
    )
    assert abs(found - on_cpu.mean()) < 0.1


def exact_match_on_cpu() -> dict[str, list[float]]:
    """By seed, of the same steps with k = 0."""
    found = defaultdict(list)
    with ON_CPU.open() as file:
        for row in csv.DictReader(file):
            counts = row["exact_match"] and SETTLED <= int(row["step"]) < STEPS
            if counts and (row["k"], row["objective"]) == ("0", "decoupled"):
                found[row["seed"]].append(float(row["exact_match"]))
    return found
