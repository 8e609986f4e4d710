"""On a GPU: what is compiled for a full micro-batch serves smaller ones too, and entropies take no
memory of their own. About a minute."""

import numpy as np
import pytest
import torch
from test_models_gpu import GPU, batch_of

from executor.training import models
from executor.training.packing import pack
from executor.training.residual import keep_residual_in_fp32
from planner.spec.workload import Shape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
SHAPE = Shape(
    hidden=1024, layers=2, heads=8, kv_heads=4, intermediate=2048, vocab=64_000, head_dim=128
)
FULL = [1700] * 5
# With 1,024 columns torch 2.11 fused other reductions from 2,048 tokens on, and from 5,120.
SMALLER = [[1], [200], [3, 3], [1000, 900], [1500] * 3, [900] * 6, [90] * 20, [1700]]


def actor() -> models.Policy:
    config = models.config_of(SHAPE)
    torch.manual_seed(0)
    model = models.build("actor", config, torch.bfloat16).to(GPU)
    keep_residual_in_fp32(model, torch.bfloat16)
    models.compile_blocks(model)
    found = models.wrap("actor", model, 1.0)
    assert isinstance(found, models.Policy)
    return found


def update(module: models.Policy, responses: list[int], entropy: bool) -> None:
    batch = batch_of([4 + response for response in responses])
    packed = pack(batch, np.arange(len(responses)), GPU)
    module(packed, entropy=entropy).mean().backward()
    torch.cuda.synchronize()


def test_smaller_micro_batches_are_not_compiled_again() -> None:
    module = actor()
    for entropy in (False, True):
        update(module, FULL, entropy)
        update(module, [2, 2], entropy)  # as a warm-up does
        known = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for responses in SMALLER:
            update(module, responses, entropy)
            found = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            assert found == known, f"{responses} was compiled again"


def test_entropies_take_no_memory_of_their_own() -> None:
    module, peaks = actor(), []
    for entropy in (False, True, False, True):  # it is compiled first
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        update(module, FULL, entropy)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        print(f"entropy {entropy}: {peaks[-1] / 1e9:.2f} GB")
    assert peaks[3] < 1.02 * peaks[2]
