"""Seconds of the controller between the last inference and the updates, for a batch of long
responses; `make bench` prints them."""

import time

import numpy as np
import pytest
import torch
from conftest import make_workload

from executor.running import learning

pytestmark = pytest.mark.bench

SEQUENCES, TOKENS = 1024, 10_000
SETTINGS = {"gae": {}, "grpo": {"critic": None, "samples_per_prompt": 8}}


@pytest.mark.parametrize("advantage", SETTINGS)
def test_advantages_of_long_responses(advantage):
    torch.set_num_threads(1)
    rng, shape = np.random.default_rng(0), (SEQUENCES, TOKENS)
    sizes = {"batch": SEQUENCES, "minibatch": SEQUENCES}
    workload = make_workload(**sizes, **SETTINGS[advantage], algorithm={"advantage": advantage})
    names = ["log_probs", "proximal_log_probs", "ref_log_probs"]
    names += ["values"] if advantage == "gae" else []
    columns = {name: rng.normal(-1, 0.1, shape).astype(np.float32) for name in names}
    scores, real = rng.normal(size=SEQUENCES).astype(np.float32), np.ones(shape, dtype=bool)
    fastest = np.inf
    for _ in range(5):
        start = time.perf_counter()
        learning.estimate(
            workload, columns, scores=scores, mask=real, ended=real[:, 0], kl_coef=0.05
        )
        fastest = min(fastest, time.perf_counter() - start)
    print(f"\n{advantage}: {fastest:.2f} s for 1,024 responses of 10,000 tokens (at most 1)")
    assert fastest <= 1.0
