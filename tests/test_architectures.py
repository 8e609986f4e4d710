"""What is read of a model's config.json: its sizes, and by what name it is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from transformers import AutoConfig

from planner.cli import main
from planner.search.find import find
from planner.spec.architectures import MODEL_TYPES, check_vllm, obstacle, positions
from planner.spec.cluster import make_cluster
from planner.spec.errors import UserError
from planner.spec.workload import Workload
from planner.spec.workload_file import load_workload, shape_of

QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "num_experts": 128,
    "vocab_size": 151936,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
GEMMA3_1B = {
    "model_type": "gemma3_text",
    "hidden_size": 1152,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "intermediate_size": 6912,
    "vocab_size": 262144,
}


def write_workload(folder: Path, config: dict[str, Any], response: int = 8) -> Path:
    (folder / "actor").mkdir(exist_ok=True)
    (folder / "actor" / "config.json").write_text(json.dumps(config))
    file = folder / "workload.toml"
    file.write_text(
        f"""schema = "splitplan/workload/1"
name = "tiny"
batch = 4
minibatch = 4
prompt = {{ kind = "fixed", tokens = 16 }}
response = {{ kind = "fixed", tokens = {response} }}
actor = {{ path = "actor" }}
reward = {{ function = "reward.py:f" }}
"""
    )
    return file


def refusal(folder: Path, config: dict[str, Any], response: int = 8) -> str:
    with pytest.raises(UserError) as error:
        load_workload(write_workload(folder, config, response))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_an_absent_key_means_what_the_model_type_means_by_it(tmp_path: Path, name: str) -> None:
    given = {
        "model_type": name,
        "hidden_size": 5120,
        "num_hidden_layers": 2,
        "num_attention_heads": 320,
        "intermediate_size": 768,
        "vocab_size": 96,
    }
    (tmp_path / "config.json").write_text(json.dumps(given))
    shape = shape_of(tmp_path, "actor")
    config = AutoConfig.from_pretrained(tmp_path)
    assert shape.tied_embeddings == config.tie_word_embeddings
    assert shape.kv_heads == (getattr(config, "num_key_value_heads", None) or 320)
    assert shape.head_dim == (getattr(config, "head_dim", None) or 16)
    assert shape.intermediate == (768 if MODEL_TYPES[name].gated else 512)


def test_parameters_are_those_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GEMMA3_1B))
    assert shape_of(tmp_path, "actor").parameters() == pytest.approx(1.00e9, rel=0.001)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (QWEN3_MOE, "a mixture of experts"),
        ({**LLAMA, "model_type": "deepseek_v3", "kv_lora_rank": 512}, "attention is latent"),
        ({**LLAMA, "layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({**LLAMA, "model_type": "mamba", "ssm_cfg": {}}, "state spaces"),
        ({**LLAMA, "vision_config": {"hidden_size": 8}}, "vision"),
        ({"model_type": "gemma3", "text_config": GEMMA3_1B}, "language model alone"),
        ({**LLAMA, "quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ({**LLAMA, "use_bidirectional_attention": True}, "not causal"),
        ({**LLAMA, "model_type": "stablelm"}, "model_type 'stablelm' is not supported"),
        ({"hidden_size": 64}, "names no model_type"),
        ({**LLAMA, "model_type": None}, "model_type None"),
        ({**LLAMA, "rope_scaling": {"type": "linear", "factor": "2"}}, "factor = '2'"),
        ({**LLAMA, "rope_scaling": {"type": "yarn", "factor": -4}}, "factor = -4"),
        ({**LLAMA, "sliding_window": 0}, "sliding_window is 0"),
        ({**LLAMA, "sliding_window": -1}, "sliding_window is -1"),
        ({**LLAMA, "rope_scaling": {"type": "su"}}, "rotary scaling 'su'"),
        ({"model_type": "llama"}, "num_attention_heads"),
        ({**LLAMA, "num_key_value_heads": 3}, "heads = 4 is not a multiple of kv_heads = 3"),
        ({**LLAMA, "vocab_size": None}, "vocab: Input should be a valid integer"),
        ({**LLAMA, "normalize_reward": True}, "normalised"),
        ({**LLAMA, "rope_scaling": [1]}, "save the model again"),
        ({**LLAMA, "layer_types": [["a"]]}, "save the model again"),
        ({**LLAMA, "model_type": ["llama"]}, "save the model again"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], told: str
) -> None:
    line = refusal(tmp_path, config)
    assert told in line and str(tmp_path / "actor/config.json") in line


@pytest.mark.parametrize("whole", [False, True])
def test_an_adapter_is_refused_beside_a_whole_model_too(tmp_path: Path, whole: bool) -> None:
    file = write_workload(tmp_path, LLAMA)
    (tmp_path / "actor/adapter_config.json").write_text('{"peft_type": "LORA"}')
    if not whole:
        (tmp_path / "actor/config.json").unlink()
    with pytest.raises(UserError, match=r"adapter \(LoRA\) of a model; merge the two"):
        load_workload(file)


def test_gguf_is_refused_by_name(tmp_path: Path) -> None:
    file = write_workload(tmp_path, LLAMA)
    (tmp_path / "actor/config.json").rename(tmp_path / "actor/model.gguf")
    with pytest.raises(UserError, match="holds GGUF, which cannot be trained"):
        load_workload(file)


def test_a_shape_in_the_workload_hides_no_obstacle(tmp_path: Path) -> None:
    file = write_workload(tmp_path, QWEN3_MOE)
    sizes = "hidden = 64, layers = 2, heads = 4, kv_heads = 2, intermediate = 128, vocab = 96"
    file.write_text(file.read_text().replace('"actor" }', f'"actor", shape = {{ {sizes} }} }}'))
    with pytest.raises(UserError, match="mixture of experts"):
        load_workload(file)
    shutil.rmtree(tmp_path / "actor")
    assert load_workload(file).actor.shape.hidden == 64  # planned where the model is not


@pytest.mark.parametrize(
    ("key", "size", "told"),
    [
        ("num_hidden_layers", 10**7, "layers: Input should be less than or equal to 10000"),
        ("hidden_size", 10**7, "hidden: Input should be less than or equal to 1048576"),
        ("vocab_size", 10**10, "its vocab_size is 10,000,000,000, and no model has more than"),
        ("head_dim", 10**9, "its head_dim is 1,000,000,000, and no model has more than"),
        ("num_labels", 10**9, "its num_labels is 1,000,000,000, and no model has more than 10,000"),
    ],
)
def test_sizes_that_no_model_has_are_refused(
    tmp_path: Path, key: str, size: int, told: str
) -> None:
    """Whatever makes something of such a size would be ended without a word."""
    file = write_workload(tmp_path, {**LLAMA, key: size})
    with pytest.raises(UserError, match=told):
        load_workload(file)
    sizes = "hidden = 64, layers = 2, heads = 4, kv_heads = 2, intermediate = 128, vocab = 96"
    file.write_text(file.read_text().replace('"actor" }', f'"actor", shape = {{ {sizes} }} }}'))
    with pytest.raises(UserError, match=told):
        load_workload(file)


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({}, 64),
        ({"rope_type": "llama3", "factor": 8.0}, 64),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"type": "linear", "factor": 2.0}, 128),
        ({"rope_type": "dynamic", "factor": 2.0}, 64),
        ({"rope_type": "longrope", "original_max_position_embeddings": 32}, 32),
        ({"full_attention": {"rope_type": "linear", "factor": 2.0}}, 128),
    ],
)
def test_positions_end_where_the_model_was_made_for(rope: dict[str, Any], limit: int) -> None:
    config = {**LLAMA, "rope_scaling": rope}
    found = positions(config)
    assert obstacle(config) is None and found is not None and found[0] == limit


def test_a_sequence_longer_than_the_positions_is_refused_with_what_works(tmp_path: Path) -> None:
    assert load_workload(write_workload(tmp_path, LLAMA, response=48)).longest == 64
    line = refusal(tmp_path, LLAMA, response=49)
    assert "65 tokens" in line and "allows 64 (max_position_embeddings)" in line
    assert "at most 48" in line
    assert "shorten both" in refusal(tmp_path, {**LLAMA, "max_position_embeddings": 10})


SHAPE_28 = {"hidden": 448, "layers": 2, "heads": 28, "kv_heads": 4, "intermediate": 64, "vocab": 96}


def workload_of(shape: dict[str, int], engine: int | None) -> Workload:
    model = {"random_weights": True, "shape": shape}
    return Workload.model_validate(
        {
            "name": "tiny",
            "batch": 16,
            "minibatch": 16,
            "prompt": {"kind": "fixed", "tokens": 16},
            "response": {"kind": "fixed", "tokens": 16},
            "actor": model,
            "reward": model,
            "tensor_parallel": engine,
        }
    )


def test_engines_wider_than_the_heads_allow_are_refused_with_what_works() -> None:
    with pytest.raises(ValueError, match=r"28 heads with 4 of keys; set it to 1 or 2 or 4"):
        workload_of(SHAPE_28, 8)
    assert find(workload_of(SHAPE_28, 4), make_cluster(gpus=8)).best.rollout.tensor_parallel == 4
    phi_4 = {**SHAPE_28, "heads": 40, "kv_heads": 10}  # whose key heads 4 GPUs cannot divide
    with pytest.raises(ValueError, match="set it to 1 or 2, or leave"):
        workload_of(phi_4, 4)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "cohere2"}, "models of type cohere2"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "windows in models of type qwen2"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias = True in models"),
        ({"model_type": "olmo"}, "fewer key heads than query heads"),
    ],
)
def test_what_vllm_does_not_compute_is_refused_where_it_would_be_the_engine(
    tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    file = write_workload(tmp_path, {**LLAMA, **config})
    load_workload(file)
    on_gpus = CliRunner().invoke(main, ["search", "--gpus", "1", "--workload", str(file)])
    assert on_gpus.exit_code == 2 and "engine vllm cannot be used" in on_gpus.stderr
    assert said in on_gpus.stderr and len(on_gpus.stderr.splitlines()) == 1


def test_what_vllm_computes_is_not_refused(tmp_path: Path) -> None:
    write_workload(tmp_path, LLAMA)
    check_vllm(tmp_path / "actor", "actor")
    check_vllm(tmp_path / "elsewhere", "actor")
