"""Every model type that is supported, in bf16 with the GPU's attention, compiled or not."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_workload
from transformers import AutoConfig

from executor.data.batch import Sequences
from executor.training import models, self_check
from executor.training.packing import pack
from executor.training.residual import keep_residual_in_fp32
from planner.spec.architectures import MODEL_TYPES
from planner.spec.workload import Model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize("role", ["actor", "critic", "reward"])
@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_the_self_check_passes(tmp_path: Path, kind: str, role: str) -> None:
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    shape = make_workload().actor.shape  # the self-check reads the directory's
    self_check.check(role, Model(shape=shape, path=tmp_path), GPU, torch.bfloat16)


def batch_of(lengths: list[int]) -> Sequences:
    count, longest = len(lengths), max(lengths)
    prompts = np.full(count, 4, np.int32)
    return Sequences(
        tokens=np.random.default_rng(0).integers(3, 512, (count, longest), dtype=np.int32),
        prompt_lengths=prompts,
        response_lengths=np.array(lengths, np.int32) - prompts,
        log_probs=np.zeros((count, longest - 4), np.float32),
        weights_versions=np.zeros((count, longest - 4), np.int32),
    )


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "mistral", "olmo2"])
def test_compiled_blocks_give_the_log_probs_and_gradients_of_fp32(kind: str) -> None:
    config = AutoConfig.for_model(
        kind,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=512,
        vocab_size=512,
        pad_token_id=0,
        sliding_window=100,
    )
    torch.manual_seed(0)
    exact = models.build("actor", config, torch.float32)
    low = models.build("actor", config, torch.bfloat16).to(GPU)
    low.load_state_dict(exact.state_dict())
    exact.load_state_dict(low.state_dict())
    keep_residual_in_fp32(low, torch.bfloat16)
    models.compile_blocks(low)
    of_low = models.wrap("actor", low, 1.0)
    of_exact = models.wrap("actor", exact, 1.0)
    for lengths in ([300, 20], [64, 700, 5]):
        rows = np.arange(len(lengths))
        outputs = [
            of_low(pack(batch_of(lengths), rows, GPU)).cpu(),
            of_exact(pack(batch_of(lengths), rows, CPU)),
        ]
        assert (outputs[0] - outputs[1]).abs().max() < 0.5
        gradients = []
        for output, module in zip(outputs, (of_low, of_exact), strict=True):
            module.zero_grad()
            output.mean().backward()
            found = [parameter.grad for parameter in module.parameters()]
            parts = [
                gradient.double().cpu().flatten() for gradient in found if gradient is not None
            ]
            gradients.append(torch.cat(parts))
        assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.98
