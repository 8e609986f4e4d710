"""A reward model that has another tokenizer than the actor."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import SHAPE, WORDS, make_workload

from executor.data.reading import Reader
from executor.data.reward_forms import Samples
from executor.running import preflight
from planner.spec.errors import UserError
from planner.spec.tokenizers import check_tokenizers, reads_text
from planner.spec.workload import Workload

TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
SAMPLES = Samples(
    prompts=["<chat>1 2", "3"],
    asked=[[{"role": "user", "content": "1 2"}], "3"],
    responses=["4", "5 6"],
    answers=[None, None],
    columns=[{}, {}],
)


def tokenizer_of(words: list[str], template: str | None = None) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    numbers = {word: number for number, word in enumerate(words)}
    found = Tokenizer(WordLevel(numbers, unk_token=words[0]))
    found.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=found, pad_token=words[0])
    fast.chat_template = template
    return fast


def test_text_is_read_through_the_models_own_template() -> None:
    words = ["?", "user", "assistant", *"123456"]
    read = Reader(tokenizer_of(words, TEMPLATE), None).read(SAMPLES)
    assert [row[:n].tolist() for row, n in zip(read.tokens, read.lengths, strict=True)] == [
        [1, 3, 4, 2, 6],
        [1, 5, 2, 7, 8],
    ]
    assert (read.response_lengths == 1).all()


def test_without_a_template_prompt_and_response_are_one_text() -> None:
    """Messages are read as the actor's template has them. The beginning is cut off."""
    words = ["?", *"123456", "<chat>1", "24", "35"]
    read = Reader(tokenizer_of(words), 2).read(SAMPLES)
    assert read.tokens.tolist() == [[7, 8], [9, 6]]


def test_a_template_that_fails_is_one_line() -> None:
    reader = Reader(tokenizer_of(["?"], "{{ raise_exception('no\\nsystem') }}"), None)
    with pytest.raises(UserError, match="reward: the chat template of its tokenizer fails") as told:
        reader.read(SAMPLES)
    assert "\n" not in str(told.value)


def workload_of(actor: Path, reward: Path, **changes: Any) -> Workload:
    models = {
        "actor": {"path": actor, "shape": SHAPE},
        "reward": {"path": reward, "shape": SHAPE},
    }
    return make_workload(critic=None, reference=None, **{**models, **changes})


def test_tokenizers_may_differ_where_there_is_text(tmp_path: Path) -> None:
    for name, words in (("actor", WORDS), ("same", WORDS), ("other", [*reversed(WORDS)])):
        tokenizer_of(words).save_pretrained(tmp_path / name)
    data = {"data": {"train": tmp_path / "train.jsonl"}}
    actor, same, other = (tmp_path / name for name in ("actor", "same", "other"))
    assert not reads_text(workload_of(actor, same, **data))
    reads = workload_of(actor, other, **data)
    assert reads_text(reads)
    check_tokenizers(reads, must_know=True)
    with pytest.raises(UserError, match="reward: another tokenizer than the actor's"):
        check_tokenizers(workload_of(actor, other))  # there is no text, but random tokens


def with_head(directory: Path, source: Path, **changes: Any) -> Path:
    import shutil

    shutil.copytree(source, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    return directory


def test_a_reward_model_without_a_head_is_refused(
    tmp_path: Path, model_directories: dict[str, Path]
) -> None:
    actor = model_directories["actor"]
    with pytest.raises(UserError, match="the reward has to be a model ForSequenceClassification"):
        preflight.check_models(workload_of(actor, actor))
    named = with_head(tmp_path / "a", actor, architectures=["Qwen2ForSequenceClassification"])
    with pytest.raises(UserError, match=r"reward: .*score\.weight"):
        preflight.check_models(workload_of(actor, named))
