"""What the prompts of 8 samples cost against those of one: seconds until each response has its
first token, 64 prompts of 2,000 tokens, the 1.5B model. On a host with a GPU:
`python -m pytest -m gpu -s tests/gpu/test_prefix_gpu.py`."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from executor.data.prompts import Synthetic
from planner.search import baseline
from planner.spec.cluster import make_cluster
from planner.spec.data import Sampler
from planner.spec.files import profiles_dir
from planner.spec.workload import Workload
from planner.spec.workload_file import load_workload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU"),
]
PROMPTS, SAMPLES, REPEATS = 64, 8, 5


def job() -> Workload:
    sizes = {"batch": PROMPTS * SAMPLES, "minibatch": PROMPTS * SAMPLES}
    settings = [f"{name}={value}" for name, value in sizes.items()]
    settings += ["critic=", f"samples_per_prompt={SAMPLES}", "algorithm.advantage=grpo"]
    settings += ["prompt={kind='fixed',tokens=2000}", "response={kind='fixed',tokens=64}"]
    path = profiles_dir() / "workloads" / "h200-1.5b.toml"
    return load_workload(path, settings)


def test_the_prompts_of_eight_samples_cost_little_more_than_those_of_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Another test of this process may have used the GPU, and no fork of such a process can.
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    from executor.rollout.vllm.engine import VllmEngine

    workload = job()
    engine = VllmEngine(baseline("one-step-off", workload, make_cluster(2, "h200", 2)))
    one_token = np.ones(workload.batch, dtype=np.int32)
    eight = replace(Synthetic(workload).step(0).requests, max_tokens=one_token)
    one = eight.take(np.arange(0, workload.batch, SAMPLES))
    seconds: dict[str, list[float]] = {"one": [], "eight": []}
    for _ in range(1 + REPEATS):  # the first warms up
        for name, asked in (("one", one), ("eight", eight)):
            start = time.perf_counter()
            engine.generate(asked, Sampler(temperature=1.0))
            seconds[name].append(time.perf_counter() - start)
    fastest = {name: min(times[1:]) for name, times in seconds.items()}
    ratio = fastest["eight"] / fastest["one"]
    print(f"\n{fastest['one']:.3f} s and {fastest['eight']:.3f} s: {ratio:.2f} times (at most 1.3)")
    assert ratio <= 1.3
