"""Which models share a tokenizer, told by what each number stands for."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import SHAPE, make_workload

from planner.spec.errors import UserError
from planner.spec.tokenizers import check_tokenizers, stop_strings, stop_tokens, tokens_of
from planner.spec.workload import Workload
from planner.spec.workload_file import load_workload

WORDS = ["a", "b", "c"]


def model(folder: Path, name: str, added: list[str], vocab: int = 48) -> dict[str, Any]:
    """A model directory with a tokenizer: three words and then what is added."""
    directory = folder / name
    directory.mkdir()
    special = [{"id": len(WORDS) + i, "content": token} for i, token in enumerate(added)]
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    whole = {"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": special}
    (directory / "tokenizer.json").write_text(json.dumps(whole))
    return {"shape": {**SHAPE, "vocab": vocab}, "path": directory}


def refused(workload: Workload, **more: bool) -> str:
    with pytest.raises(UserError) as error:
        check_tokenizers(workload, **more)
    return str(error.value)


def test_vocabularies_of_different_sizes_may_hold_one_tokenizer(tmp_path: Path) -> None:
    """As those of Qwen2.5-7B (152,064) and Qwen2.5-1.5B (151,936) do."""
    actor = model(tmp_path, "actor", ["<eos>"], 64)
    critic = model(tmp_path, "critic", ["<eos>"], 56)
    check_tokenizers(make_workload(actor=actor, critic=critic, reward=actor, reference=actor))
    fresh = {"shape": {**SHAPE, "vocab": 4}, "random_weights": True}
    check_tokenizers(make_workload(actor=actor, critic=fresh, reward=actor, reference=actor))


def test_vocabularies_of_one_size_may_hold_two(tmp_path: Path) -> None:
    """As those of R1-Distill-Qwen and of a Qwen reward model do."""
    actor = model(tmp_path, "actor", ["<begin>", "<think>"])
    reward = model(tmp_path, "reward", ["<begin>", "<ref>"])
    less = model(tmp_path, "less", ["<begin>"])
    line = refused(make_workload(actor=actor, critic=actor, reward=reward, reference=actor))
    assert line == (
        "reward: another tokenizer than the actor's: token 4, '<think>' to the actor, means "
        "'<ref>' to this model; name a model with the actor's tokenizer"
    )
    line = refused(make_workload(actor=actor, critic=less, reward=actor, reference=actor))
    assert "critic: another tokenizer" in line and "'<think>' to the actor, is unknown to" in line
    check_tokenizers(make_workload(actor=less, critic=actor, reward=less, reference=less))


def test_a_model_needs_room_for_the_actors_tokens(tmp_path: Path) -> None:
    actor = model(tmp_path, "actor", ["<eos>"])
    small = {"shape": {**SHAPE, "vocab": 3}, "random_weights": True}
    line = refused(make_workload(actor=actor, critic=small, reward=actor, reference=actor))
    assert "critic: its vocabulary has 3 tokens, and the actor's tokenizer has token 3" in line


def test_a_directory_without_a_tokenizer_is_refused_where_there_is_text(tmp_path: Path) -> None:
    actor = model(tmp_path, "actor", [])
    (tmp_path / "bare").mkdir()
    bare = {"shape": SHAPE, "path": tmp_path / "bare"}
    models = {"actor": actor, "critic": bare, "reward": actor, "reference": actor}
    check_tokenizers(make_workload(**models), must_know=True)
    text = make_workload(**models, data={"train": "train.jsonl"})
    check_tokenizers(text)
    assert "holds no tokenizer to compare" in refused(text, must_know=True)


def test_the_kinds_of_files_are_read(tmp_path: Path) -> None:
    directory = Path(model(tmp_path, "actor", ["<eos>"])["path"])
    assert tokens_of(directory) == {0: "a", 1: "b", 2: "c", 3: "<eos>"}
    unigram = {"model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["x", -1.5]]}}
    (directory / "tokenizer.json").write_text(json.dumps(unigram))
    further = {"added_tokens_decoder": {"2": {"content": "<end>"}}}
    (directory / "tokenizer_config.json").write_text(json.dumps(further))
    assert tokens_of(directory) == {0: "<unk>", 1: "x", 2: "<end>"}
    (directory / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match="not a tokenizer's file; save it again"):
        tokens_of(directory)
    assert tokens_of(tmp_path) is None


def test_stops_that_are_tokens_are_left_to_the_engine(tmp_path: Path) -> None:
    actor = model(tmp_path, "actor", ["<eos>", "<end>"])
    stops = {"train": "train.jsonl", "stop": [9, "<end>", "b", "###"]}
    assert stop_tokens(make_workload(actor=actor, data=stops)) == [9, 4]
    assert stop_strings(make_workload(actor=actor, data=stops)) == ["b", "###"]
    assert stop_tokens(make_workload(actor=actor)) == []


def test_a_search_is_told_too(tmp_path: Path) -> None:
    model(tmp_path, "actor", ["<think>"])
    model(tmp_path, "reward", ["<ref>"])
    workload = json.loads(make_workload(critic=None, reference=None).model_dump_json())
    for role in ("actor", "reward"):
        workload[role] = {"path": role, "shape": SHAPE}
    (tmp_path / "mine.json").write_text(json.dumps({"schema": Workload.SCHEMA, **workload}))
    with pytest.raises(UserError, match="reward: another tokenizer than the actor's: token 3"):
        load_workload(tmp_path / "mine.json")
