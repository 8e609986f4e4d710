"""Every model type that is supported, in every role and the whole way in, against transformers'
own padded forward pass; what the self-check notices; and the table of docs/models.md."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHAPE, make_workload
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from executor.data.batch import Sequences
from executor.data.requests import Requests
from executor.rollout.transformers_engine import TransformersEngine
from executor.running import preflight
from executor.training import lm_head, models, packing, self_check
from executor.training.packing import pack
from planner.spec.architectures import MODEL_TYPES
from planner.spec.data import Sampler
from planner.spec.errors import UserError
from planner.spec.workload import Model, Shape
from planner.spec.workload_file import shape_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- written by tests/test_models.py -->\n", "<!-- end -->\n"
CPU, TEMPERATURE, TOKENS = torch.device("cpu"), 0.7, 96
ROLES = ("actor", "critic", "reward")
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": TOKENS,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What a model type has of its own, larger or smaller than usual, so that it shows.
OWN: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.25, "use_qk_norm": True},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 5},
    "gemma2": {
        "sliding_window": 5,
        "query_pre_attn_scalar": 4,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {"sliding_window": 5, "query_pre_attn_scalar": 4},
    "granite": {
        "logits_scaling": 8.0,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.1,
    },
    "mistral": {"sliding_window": 5},
    "olmo": {"clip_qkv": 0.5},
    "olmo3": {"sliding_window": 5},
    "phi": {"resid_pdrop": 0.3, "embd_pdrop": 0.3},
    "phi3": {"sliding_window": 5, "resid_pdrop": 0.3},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"attention_bias": True},
    "seed_oss": {"residual_dropout": 0.3},
    "starcoder2": {"sliding_window": 5, "residual_dropout": 0.3, "embedding_dropout": 0.3},
}
TRIED = {
    "cohere": "scaled logits, LayerNorm, norms of queries and keys",
    "cohere2": "scaled logits, layers with and without a window",
    "gemma": "scaled embeddings, tied head",
    "gemma2": "capped scores and logits, query scale, window, norms after the blocks",
    "gemma3_text": "query scale, layers with and without a window, two rotary bases",
    "glm": "partly rotated heads, biases",
    "glm4": "partly rotated heads, norms after the blocks",
    "gpt_neox": "LayerNorm, parallel blocks, MLP without a gate",
    "granite": "embedding, residual, attention and logit multipliers",
    "helium": "heads of their own size",
    "llama": "fewer key heads",
    "mistral": "window",
    "olmo": "norms without weights, clipped queries and keys",
    "olmo2": "norms after the blocks only",
    "olmo3": "norms after the blocks only, layers with and without a window",
    "phi": "LayerNorm, a head with a bias, dropout, MLP without a gate",
    "phi3": "joined projections, window, dropout",
    "qwen2": "biases, layers with and without a window",
    "qwen3": "norms of queries and keys",
    "seed_oss": "biases, dropout",
    "smollm3": "layers with and without rotation",
    "starcoder2": "LayerNorm, window, dropout, MLP without a gate",
}


def config_of(kind: str, role: str, **more: Any) -> PreTrainedConfig:
    labels = {} if role == "actor" else {"num_labels": 1}
    sizes = {**SIZES, **OWN.get(kind, {}), **labels, **more}
    if not MODEL_TYPES[kind].grouped:
        del sizes["head_dim"], sizes["num_key_value_heads"]
    made: PreTrainedConfig = AutoConfig.for_model(kind, **sizes)
    return made


def write(kind: str, role: str, directory: Path, **more: Any) -> PreTrainedModel:
    """A model with weights that are large enough for a scale or a cap to show; `more` of its
    configuration."""
    torch.manual_seed(1)
    model = models.build(role, config_of(kind, role, **more), torch.float32)
    model.eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            wide = parameter.dim() > 1
            scale = 2.0 / math.sqrt(parameter.shape[1]) if wide else 0.2
            parameter.copy_(noise * scale if wide else parameter + noise * scale)
    model.save_pretrained(directory)
    return model


def sequences() -> Sequences:
    prompts, responses = np.array([3, 1, 6, 2], np.int32), np.array([5, 9, 1, 12], np.int32)
    lengths = prompts + responses
    tokens = np.random.default_rng(0).integers(3, TOKENS, (4, 14), dtype=np.int32)
    tokens[np.arange(14) >= lengths[:, None]] = 0
    return Sequences(
        tokens=tokens,
        prompt_lengths=prompts,
        response_lengths=responses,
        log_probs=np.zeros((4, 12), np.float32),
        weights_versions=np.zeros((4, 12), np.int32),
    )


@torch.no_grad()
def expected(role: str, model: PreTrainedModel, batch: Sequences) -> Tensor:
    """Log-probs and entropies `[2, S]`, values `[S]` or scores `[n]` of a padded forward pass."""
    tokens = torch.tensor(batch.tokens).long()
    mask = torch.arange(14) < torch.tensor(batch.lengths)[:, None]
    logits: Tensor = model(input_ids=tokens, attention_mask=mask.long(), use_cache=False).logits
    if role == "reward":
        return logits[:, 0]
    place = torch.arange(1, 14)
    answered = mask[:, 1:] & (place >= torch.tensor(batch.prompt_lengths)[:, None])
    if role == "critic":
        return logits[:, :-1, 0][answered]
    log_p = (logits[:, :-1] / TEMPERATURE).log_softmax(-1)
    picked = log_p.gather(-1, tokens[:, 1:, None])[..., 0]
    return torch.stack([picked[answered], -(log_p.exp() * log_p).sum(-1)[answered]])


@torch.no_grad()
def found(role: str, model: PreTrainedModel, batch: Sequences) -> Tensor:
    packed = pack(batch, np.arange(4), CPU)
    module = models.wrap(role, model, TEMPERATURE).train()
    output: Tensor = module(packed, entropy=True) if role == "actor" else module(packed)
    if role == "actor":
        return output[:, packed.mask]
    return output if role == "reward" else output[packed.mask]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_a_supported_model_agrees_with_transformers(tmp_path: Path, kind: str, role: str) -> None:
    own = write(kind, role, tmp_path)
    model = Model(shape=shape_of(tmp_path, role), path=tmp_path)
    models.check(role, model)
    loaded = models.load(role, model, 0, torch.float32)
    batch = sequences()
    wanted, got = expected(role, own, batch), found(role, loaded, batch)
    assert wanted.std() > 0.1
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    for dtype in self_check.DTYPES:
        self_check.check(role, model, CPU, dtype)


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHORT = {"original_max_position_embeddings": 16}
UNUSUAL = [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"head_dim": 24, "attention_dropout": 0.5, "hidden_act": "gelu"}),
    ("llama", {"rms_norm_eps": 0.5, "tie_word_embeddings": True}),
    ("llama", rope("linear", factor=4.0)),
    ("llama", rope("llama3", **LLAMA3, **SHORT)),
    ("llama", rope("yarn", factor=4.0, attention_factor=1.3, **SHORT)),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
    ("mistral", {"sliding_window": 1}),
    ("olmo", {"clip_qkv": 0.05, "attention_bias": True}),
    ("granite", {"residual_multiplier": -0.9, "attention_multiplier": 0.7, "mlp_bias": True}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("gemma3_text", {"attn_logit_softcapping": 1.5, "tie_word_embeddings": False}),
    ("cohere", {"use_qk_norm": False, "logit_scale": 1.7, "attention_bias": True}),
    ("gpt_neox", {"use_parallel_residual": False, "rotary_pct": 1.0, "hidden_dropout": 0.4}),
    ("phi3", {"sliding_window": None, **rope("default", partial_rotary_factor=0.5)}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 3, "no_rope_layer_interval": 2}),
    ("starcoder2", {"use_bias": False, "sliding_window": None}),
    ("olmo3", {"sliding_window": 3, **rope("yarn", factor=2.0, **SHORT)}),
]


@pytest.mark.parametrize(("kind", "more"), UNUSUAL)
def test_unusual_configurations_agree_with_transformers(
    tmp_path: Path, kind: str, more: dict[str, Any]
) -> None:
    own = write(kind, "actor", tmp_path, **more)
    model = Model(shape=shape_of(tmp_path, "actor"), path=tmp_path)
    models.check("actor", model)
    loaded, batch = models.load("actor", model, 0, torch.float32), sequences()
    wanted, got = expected("actor", own, batch), found("actor", loaded, batch)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    self_check.check("actor", model, CPU, torch.float32)


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_what_is_generated_has_the_log_probs_that_training_computes(
    tmp_path: Path, kind: str
) -> None:
    write(kind, "actor", tmp_path)
    model = Model(shape=shape_of(tmp_path, "actor"), path=tmp_path)
    batch = sequences()
    engine = TransformersEngine(models.load("actor", model, 0, torch.float32), [], 4)
    requests = Requests(
        tokens=batch.tokens[np.arange(14) < batch.prompt_lengths[:, None]],
        lengths=batch.prompt_lengths,
        keys=np.arange(4)[:, None],
        max_tokens=batch.response_lengths,
        exact=np.ones(4, dtype=bool),
    )
    lengths, tokens, log_probs = engine.generate(requests, Sampler(temperature=TEMPERATURE))
    assert (lengths == batch.response_lengths).all()
    place, prompts = np.arange(14), batch.prompt_lengths[:, None]
    batch.tokens[(place >= prompts) & (place < batch.lengths[:, None])] = tokens
    loaded = models.load("actor", model, 0, torch.float32)
    ours = found("actor", loaded, batch)[0]
    torch.testing.assert_close(torch.tensor(log_probs), ours, rtol=1e-4, atol=1e-4)


# --- what the self-check notices ---


def refused(kind: str, directory: Path, role: str = "actor") -> str:
    write(kind, role, directory)
    model = Model(shape=shape_of(directory, role), path=directory)
    with pytest.raises(UserError, match="not supported, use another model") as error:
        self_check.check(role, model, CPU, torch.float32)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{role}: {directory} ")
    return str(error.value)


@pytest.mark.parametrize("kind", ["cohere", "granite", "gemma2"])
def test_it_notices_what_lies_between_head_and_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(models, "shaping_of", lambda config: lm_head.PLAIN)
    assert "log-probs that differ from transformers' by" in refused(kind, tmp_path)


@pytest.mark.parametrize("kind", ["seed_oss", "phi", "starcoder2"])
def test_it_notices_dropout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(models, "_drop_nothing", lambda model: None)
    assert "differ" in refused(kind, tmp_path)


@pytest.mark.parametrize(
    ("kind", "role", "ignored"),
    [
        ("mistral", "actor", {"window": None}),
        ("olmo3", "critic", {"window": None}),
        ("gemma2", "reward", {"cap": None}),
        ("llama", "actor", {"scaling": 1.0}),
    ],
)
def test_it_notices_what_attention_ignores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, role: str, ignored: dict[str, Any]
) -> None:
    dense = packing._dense_attention
    monkeypatch.setattr(
        packing,
        "_dense_attention",
        lambda q, k, v, scores: dense(q, k, v, scores._replace(**ignored)),
    )
    assert "differ" in refused(kind, tmp_path, role)


def test_it_notices_sequences_that_see_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def whole(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, *rest: Any) -> Any:
        return apart(q, k, v, starts[[0, -1]], len(q), rest[1])

    apart = packing._padded_attention
    monkeypatch.setattr(packing, "_padded_attention", whole)
    assert "differ" in refused("llama", tmp_path)


def test_what_cannot_be_computed_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_dense_attention", None)
    assert "cannot be computed here (TypeError: " in refused("llama", tmp_path)


def test_the_small_model_is_small_whatever_the_model() -> None:
    wide = Shape(
        hidden=2**20,
        layers=2,
        heads=1,
        kv_heads=1,
        intermediate=64,
        vocab=2**24,
        tied_embeddings=True,
    )
    found = self_check.small(models.config_of(wide))
    assert (found.hidden_size, found.vocab_size) == (512, 128)


def test_random_weights_are_checked_too() -> None:
    """In bf16 they differ by its rounding, which is far above what fp32 may differ by."""
    model = Model.model_validate({"shape": SHAPE, "random_weights": True})
    config = models.config_for("critic", model)
    exact, rounded = (
        self_check._differences("critic", config, CPU, dtype) for dtype in self_check.DTYPES
    )
    assert 0 < exact[0] < exact[1] == self_check.EXACT
    assert 10 * self_check.EXACT < rounded[0] < rounded[1]


def test_a_model_of_another_structure_than_its_sizes_say_is_refused(tmp_path: Path) -> None:
    write("llama", "actor", tmp_path)
    shape = shape_of(tmp_path, "actor").changed(intermediate=200)
    with pytest.raises(UserError, match=r"parameters, and .* are planned for"):
        models.check("actor", Model(shape=shape, path=tmp_path))


def test_it_is_tried_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_dense_attention", None)
    with pytest.raises(UserError, match="actor: a model of random weights cannot be computed"):
        preflight.check_models(make_workload())


def test_scaling_by_length_is_that_of_short_sequences(tmp_path: Path) -> None:
    """As far as a workload may go; `planner.spec.architectures.positions`. There every frequency is
    divided by its short factor."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.5] * 8,
        "long_factor": [4.0] * 8,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    own = models.build("actor", config_of("phi3", "actor"), torch.float32)
    own.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"rope_parameters": rope, "original_max_position_embeddings": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = Model(shape=shape_of(tmp_path, "actor"), path=tmp_path)
    self_check.check("actor", model, CPU, torch.float32)
    loaded = models.load("actor", model, 0, torch.float32)
    frequencies = 10000.0 ** -(torch.arange(0, 16, 2) / 16) / 1.5
    torch.testing.assert_close(loaded.base_model.rotary_emb.inv_freq, frequencies)
    own = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    batch = sequences()
    wanted, got = expected("actor", own, batch), found("actor", loaded, batch)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


# --- the page ---


def table() -> str:
    vllm = {kind: "yes" if traits.in_vllm else "no" for kind, traits in MODEL_TYPES.items()}
    rows = [f"| `{kind}` | {TRIED[kind]} | {vllm[kind]} |\n" for kind in MODEL_TYPES]
    return "".join(["| `model_type` | tried with | in vLLM |\n", "|---|---|---|\n", *rows])


def test_the_page_lists_what_was_tried(renew_golden: bool) -> None:
    assert TRIED.keys() == MODEL_TYPES.keys()
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    written, _, after = rest.partition(END)
    if renew_golden:
        PAGE.write_text(before + BEGIN + table() + END + after)
    else:
        assert written == table(), "pytest tests/test_models.py --renew-golden writes it"
