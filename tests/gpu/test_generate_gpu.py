"""`generate` against a bare vLLM engine on the same requests (tokens and their log-probs), each on
a GPU of its own and at the same time: tokens per second of the 1.5B model. On a host with two GPUs:
`python -m pytest -m gpu -s tests/gpu/test_generate_gpu.py`."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from executor.data.prompts import Synthetic
from executor.data.requests import Requests
from planner.search import baseline
from planner.spec.cluster import make_cluster
from planner.spec.data import Sampler
from planner.spec.files import profiles_dir
from planner.spec.workload_file import load_workload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
REPEATS = 5

Generates = dict[str, Callable[[], int]]  # each returns the tokens of one batch


def ours(requests: Requests) -> Generates:
    """The executor's engine, as it is in a plan with a GPU for the rollout."""
    from executor.rollout.vllm.engine import VllmEngine

    engine = VllmEngine(baseline("one-step-off", workload(), make_cluster(2, "h200", 2)))
    return {"ours": lambda: int(engine.generate(requests, Sampler(temperature=1.0))[0].sum())}


def bare(requests: Requests) -> Generates:
    """vLLM as it comes, with the same model, lengths and batch; also where nobody asks for the
    log-probs of tokens."""
    from vllm import LLM, SamplingParams

    from executor.rollout.vllm.engine import _config

    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(_config(workload().actor))
        llm = LLM(
            model=directory,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=workload().longest,
            max_num_seqs=workload().batch,
            max_cudagraph_capture_size=workload().batch,
        )
    prompts = [{"prompt_token_ids": prompt.tolist()} for prompt in requests.prompts()]

    def generate(logprobs: int | None) -> int:
        params = [
            SamplingParams(max_tokens=count, ignore_eos=True, detokenize=False, logprobs=logprobs)
            for count in requests.max_tokens.tolist()
        ]
        return sum(
            len(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False)
        )

    return {"bare": lambda: generate(0), "bare without log-probs": lambda: generate(None)}


def workload():
    return load_workload(profiles_dir() / "workloads" / "h200-1.5b.toml")


def measured(kind: str) -> dict[str, list[float]]:
    """Tokens per second of each repeat, after a warm-up, by what was timed; in turns."""
    ways = {"ours": ours, "bare": bare}[kind](Synthetic(workload()).step(0).requests)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + REPEATS):
        for name, generate in ways.items():
            began = time.perf_counter()
            rates[name].append(generate() / (time.perf_counter() - began))
    return {name: found[1:] for name, found in rates.items()}


def test_generate_is_as_fast_as_a_bare_engine() -> None:
    started = {
        kind: subprocess.Popen(
            [sys.executable, __file__, kind],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for gpu, kind in enumerate(("ours", "bare"))
    }
    try:
        said = {kind: process.communicate(timeout=500)[0] for kind, process in started.items()}
    finally:
        for process in started.values():
            process.kill()
    rates = {
        name: found
        for text in said.values()
        for name, found in json.loads(text.splitlines()[-1]).items()
    }
    for name, found in rates.items():
        print(
            f"{name}: median {np.median(found):.0f} tokens/s of "
            f"{', '.join(f'{rate:.0f}' for rate in found)}"
        )
    assert np.median(rates["ours"]) >= 0.95 * np.median(rates["bare"])


if __name__ == "__main__":
    print(json.dumps(measured(sys.argv[1])), flush=True)
