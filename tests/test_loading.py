"""Weights straight into shards: bit for bit what from_pretrained loads, however a model is
sharded."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import SHAPE, colocated, make_workload
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from executor.running import preflight
from executor.training import loading, models, residual
from planner.spec.errors import UserError
from planner.spec.workload import Model, Shape

CPU = torch.device("cpu")
ODD = Shape(
    hidden=32, layers=2, heads=4, kv_heads=2, intermediate=60, vocab=47, tied_embeddings=False
)  # of 2, 3, 4
TIED = ODD.model_copy(update={"tied_embeddings": True})


def random(shape: Shape = ODD) -> Model:
    return Model(shape=shape, random_weights=True)


def saved(directory: Path, model: PreTrainedModel, **options: Any) -> Model:
    model.save_pretrained(directory, **options)
    return Model(shape=ODD, path=directory)


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    for kind in ("named_parameters", "named_buffers"):
        a, b = dict(getattr(ours, kind)()), dict(getattr(theirs, kind)())
        assert a.keys() == b.keys() and a
        assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [ODD, TIED], ids=["untied", "tied"])
def test_a_directory_of_several_files_is_what_from_pretrained_loads(
    tmp_path: Path, shape: Shape, dtype: torch.dtype
) -> None:
    written = models.load("actor", random(shape), 0, dtype)
    written.generation_config.eos_token_id = [3, 4]
    model = saved(tmp_path, written, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3 and (tmp_path / loading.INDEX).is_file()
    ours = models.load("actor", model, 0, dtype)
    assert_same(ours, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype))
    assert_same(ours, written)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == shape.tied_embeddings
    assert models.eos_tokens(ours) == [3, 4]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "phi3"])
def test_other_model_types_are_what_from_pretrained_loads(tmp_path: Path, kind: str) -> None:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = AutoConfig.for_model(
        kind, **sizes, intermediate_size=60, vocab_size=47, head_dim=8, pad_token_id=0
    )
    model = saved(tmp_path, AutoModelForCausalLM.from_config(config))
    ours, theirs = (
        models.load("actor", model, 0, torch.float32),
        AutoModelForCausalLM.from_pretrained(tmp_path),
    )
    assert_same(ours, theirs)
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(ours.eval()(tokens).logits, theirs(tokens).logits)


def test_heads_come_from_their_own_kind_of_model(tmp_path: Path) -> None:
    reward = saved(tmp_path / "reward", models.load("reward", random(), 0, torch.float32))
    theirs = AutoModelForSequenceClassification.from_pretrained(reward.path)
    assert_same(models.load("reward", reward, 0, torch.float32), theirs)
    assert theirs.score.weight.abs().sum() > 0
    critic = models.load("critic", reward, 0, torch.float32)  # begins as the reward model
    assert torch.equal(critic.model.norm.weight, theirs.model.norm.weight)
    assert torch.equal(critic.score.weight, theirs.score.weight) and not critic.score.bias.any()
    actor = saved(tmp_path / "actor", models.load("actor", random(), 0, torch.float32))
    critic = models.load("critic", actor, 0, torch.float32)  # values of 0
    assert not critic.score.weight.any() and not critic.score.bias.any()
    nn.init.ones_(critic.score.bias)
    exported = saved(tmp_path / "critic", critic)
    assert_same(
        models.load("critic", exported, 0, torch.float32),
        AutoModelForTokenClassification.from_pretrained(exported.path),
    )
    assert models.load("critic", exported, 0, torch.float32).score.bias.item() == 1


def test_the_files_of_a_base_model_lack_its_prefix(tmp_path: Path) -> None:
    whole = models.load("actor", random(TIED), 0, torch.float32)
    whole.model.save_pretrained(tmp_path)
    ours = models.load("actor", Model(shape=TIED, path=tmp_path), 0, torch.float32)
    assert_same(ours, whole)


# --- shards ---


@pytest.fixture
def ranks() -> Iterator[Any]:
    """Runs as some rank of some world, one after the other: nothing is sent while a model is
    sharded and filled."""

    def become(rank: int, world: int) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)

    from torch.testing._internal.distributed.fake_pg import FakeStore

    yield become
    dist.destroy_process_group()


def shards(role: str, model: Model, shard: int, replicas: int = 1) -> dict[str, torch.Tensor]:
    """This rank's rows of each parameter."""
    empty = models.empty(role, model, torch.float32)
    module = models.wrap(role, empty, 1.0)
    grid = torch.arange(shard * replicas).view(replicas, shard)
    me = (
        dist.get_rank()
    )  # torch keeps what it made of equal meshes, and in one process ranks must differ
    mesh = DeviceMesh("cpu", grid, mesh_dim_names=(f"replicate {me}", f"shard {me}"))
    mesh = mesh[f"shard {me}"] if replicas == 1 else mesh
    for block in residual.blocks(empty):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    loading.fill(module, empty, models.weights_of(role, model, 5, empty), CPU)
    assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    shards = {}
    for name, parameter in empty.named_parameters():
        assert isinstance(parameter, DTensor)
        shards[name] = parameter.to_local().clone()
    return shards


@pytest.mark.parametrize("stored", [False, True], ids=["random", "stored"])
@pytest.mark.parametrize("shape", [ODD, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize(("shard", "replicas"), [(2, 1), (3, 1), (2, 2), (64, 1)])
def test_shards_are_the_rows_of_the_whole(
    ranks: Any, tmp_path: Path, stored: bool, shape: Shape, shard: int, replicas: int
) -> None:
    whole = models.load("actor", random(shape), 5, torch.float32)
    model = saved(tmp_path, whole, max_shard_size="10KB") if stored else random(shape)
    for replica in range(replicas):
        found = []
        for rank in (
            range(shard) if shard < 10 else (0, 31, 63)
        ):  # of many shards of few rows the last ones are empty
            ranks(replica * shard + rank, shard * replicas)
            found.append(shards("actor", model, shard, replicas))
        for name, parameter in whole.named_parameters():
            expected = list(torch.chunk(parameter.detach(), shard))
            expected += [parameter.detach()[:0]] * (shard - len(expected))
            wanted = expected if shard < 10 else [expected[0], expected[31], expected[63]]
            assert all(torch.equal(rows[name], w) for rows, w in zip(found, wanted, strict=True)), (
                name
            )


def test_random_weights_are_fixed_by_seed_kind_and_name() -> None:
    actor = models.load("actor", random(), 5, torch.float32)
    assert_same(actor, models.load("reference", random(), 5, torch.float32))
    one, other = actor.model.layers
    assert not torch.equal(one.mlp.up_proj.weight, other.mlp.up_proj.weight)
    for changed in (
        models.load("actor", random(), 6, torch.float32),
        models.load("critic", random(), 5, torch.float32),
    ):
        assert not torch.equal(changed.model.layers[0].mlp.up_proj.weight, one.mlp.up_proj.weight)
    fewer = models.load("actor", random(ODD.model_copy(update={"layers": 1})), 5, torch.float32)
    assert torch.equal(fewer.model.layers[0].mlp.up_proj.weight, one.mlp.up_proj.weight)
    assert actor.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert (actor.model.norm.weight == 1).all() and not one.self_attn.q_proj.bias.any()
    rounded = models.load("actor", random(), 5, torch.bfloat16)
    assert torch.equal(rounded.lm_head.weight, actor.lm_head.weight.bfloat16())


def test_a_model_larger_than_any_memory_can_be_built() -> None:
    large = Shape(hidden=16384, layers=200, heads=128, kv_heads=8, intermediate=65536, vocab=256000)
    empty = models.empty("actor", random(large), torch.float32)
    assert sum(parameter.numel() for parameter in empty.parameters()) > 5e11
    assert all(parameter.is_meta for parameter in empty.parameters())


# --- what is refused ---


def refused(model: Model, role: str = "actor") -> str:
    with pytest.raises(UserError) as error:
        models.load(role, model, 0, torch.float32)
    line = str(error.value)
    assert "\n" not in line and line.startswith(f"{role}: weights in {model.path}: ")
    return line


def test_what_is_missing_or_misshapen_is_named(tmp_path: Path) -> None:
    model = saved(tmp_path, models.load("actor", random(), 0, torch.float32))
    assert "score.weight is missing" in refused(model, "reward")
    file = tmp_path / loading.SINGLE
    tensors = load_file(file)
    norm = "model.norm.weight"
    save_file({name: x for name, x in tensors.items() if name != norm}, file)
    assert f"{norm} is missing" in refused(model)
    save_file({**tensors, norm: torch.ones(31)}, file)
    assert f"{norm} has shape [31], the model wants [32]" in refused(model)
    file.write_bytes(file.read_bytes()[:-100])
    assert "cannot be read" in refused(model)
    file.unlink()
    assert "neither model.safetensors nor" in refused(model)


def test_an_index_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    model = saved(tmp_path, models.load("actor", random(), 0, torch.float32), max_shard_size="10KB")
    index = tmp_path / loading.INDEX
    data = json.loads(index.read_text())
    name = data["weight_map"]["model.norm.weight"]
    (tmp_path / name).rename(tmp_path / "elsewhere")
    assert f"names {name!r}, which is not there" in refused(model)
    index.write_text(
        json.dumps({**data, "weight_map": dict.fromkeys(data["weight_map"], "../elsewhere")})
    )
    assert "names '../elsewhere', which is not there" in refused(model)
    index.write_text("{}")
    assert "no weight_map" in refused(model)


def test_it_is_refused_before_anything_is_started(
    tmp_path: Path, model_directories: dict[str, Path]
) -> None:
    tensors = load_file(model_directories["actor"] / loading.SINGLE)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((model_directories["actor"] / file).read_bytes())
    save_file(
        {name: x for name, x in tensors.items() if "layers.1." not in name},
        tmp_path / loading.SINGLE,
    )
    workload = make_workload(actor={"shape": SHAPE, "path": tmp_path})
    with pytest.raises(UserError, match=r"actor: weights in .*model.layers.1.* is missing"):
        preflight.check(colocated(workload, cores=1), local=True)


# --- what other programs write ---


def renamed(directory: Path, names: dict[str, str]) -> None:
    tensors = load_file(directory / loading.SINGLE)
    save_file({names.get(name, name): x for name, x in tensors.items()}, directory / loading.SINGLE)


@pytest.mark.parametrize("head", ["value_head", "classifier", "v_head.summary"])
def test_a_head_under_another_name_is_used(tmp_path: Path, head: str) -> None:
    reward = saved(tmp_path, models.load("reward", random(), 0, torch.float32))
    written = load_file(tmp_path / loading.SINGLE)["score.weight"]
    renamed(tmp_path, {"score.weight": f"{head}.weight"})
    assert torch.equal(models.load("reward", reward, 0, torch.float32).score.weight, written)
    assert torch.equal(models.load("critic", reward, 0, torch.float32).score.weight, written)


def test_a_critic_of_trl_has_its_head_next_to_the_language_model(tmp_path: Path) -> None:
    model = saved(tmp_path, models.load("actor", random(), 0, torch.float32))
    head = {"v_head.summary.weight": torch.rand(1, 32), "v_head.summary.bias": torch.rand(1)}
    save_file({**load_file(tmp_path / loading.SINGLE), **head}, tmp_path / loading.SINGLE)
    critic = models.load("critic", model, 0, torch.float32)
    assert torch.equal(critic.score.weight, head["v_head.summary.weight"])
    assert torch.equal(critic.score.bias, head["v_head.summary.bias"])
    models.load("actor", model, 0, torch.float32)  # which has no use for it


def test_a_critic_that_lost_its_head_is_refused(tmp_path: Path) -> None:
    reward = saved(tmp_path, models.load("reward", random(), 0, torch.float32))
    renamed(tmp_path, {"score.weight": "head.weight"})
    assert "score.weight is missing" in refused(reward, "critic")


def test_what_has_no_place_in_the_model_is_refused(tmp_path: Path) -> None:
    model = saved(tmp_path, models.load("actor", random(), 0, torch.float32))
    file = tmp_path / loading.SINGLE
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, f"{name}_scale_inv": torch.ones(1), "model.mtp.x": torch.ones(1)}, file)
    assert f"{name}_scale_inv (and 1 more) has no place in the model" in refused(model)
    save_file({**tensors, name: tensors[name].to(torch.int8)}, file)
    assert f"{name} is stored as I8" in refused(model)
    save_file({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, file)
    models.load("actor", model, 0, torch.float32)  # a buffer of old files


def test_a_stale_index_does_not_win_over_the_single_file(tmp_path: Path) -> None:
    saved(tmp_path, models.load("actor", random(), 0, torch.float32), max_shard_size="10KB")
    newer = models.load("actor", random(), 1, torch.float32)
    save_file(newer.state_dict(), tmp_path / loading.SINGLE)
    assert_same(models.load("actor", Model(shape=ODD, path=tmp_path), 0, torch.float32), newer)


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    model = saved(tmp_path, models.load("actor", random(TIED), 0, torch.float32))
    file = tmp_path / loading.SINGLE
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding.clone()}, file)
    models.load("actor", model, 0, torch.float32)
    save_file({**tensors, "lm_head.weight": embedding + 1}, file)
    assert "config.json says that they are one" in refused(model)
    grown = torch.cat([embedding[:-1], embedding[-1:] + 1])
    save_file({**tensors, "lm_head.weight": grown}, file)
    assert "config.json says that they are one" in refused(model)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    model = saved(tmp_path, models.load("actor", random(), 0, torch.float32))
    tensors = load_file(tmp_path / loading.SINGLE)
    tensors["model.norm.weight"][-1] = value
    save_file(tensors, tmp_path / loading.SINGLE)
    assert "model.norm.weight has values that are not finite" in refused(model)


@pytest.mark.parametrize("token", ["</s>", [1, "</s>"], 10_000, -1])
def test_an_end_that_is_no_token_is_refused(tmp_path: Path, token: Any) -> None:
    model = saved(tmp_path, models.load("actor", random(), 0, torch.float32))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": token}))
    with pytest.raises(UserError, match="which is none of its"):
        models.check("actor", model)


def test_an_attention_that_is_not_installed_is_not_needed(tmp_path: Path) -> None:
    own = models.load("actor", random(), 0, torch.float32)
    model = saved(tmp_path, own)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("attn_implementation", "_attn_implementation"):
        asks = json.dumps({**config, key: "flash_attention_2"})
        (tmp_path / "config.json").write_text(asks)
        models.check("actor", model)
        assert_same(models.load("actor", model, 0, torch.float32), own)
