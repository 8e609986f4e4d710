"""Data as people have it: the kinds of files, columns, chat templates and mixtures. Every mistake
is one line with file and line."""

import csv
import gzip
import importlib.util
import io
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_workload
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from executor.data.columns import Asked, asked_in
from executor.data.order import Shuffled
from executor.data.prompts import Dataset
from executor.data.rows import Row
from executor.data.sources import read_rows
from executor.running.said import text_of
from planner.spec.data import Data, DataFile, EvaluationSet, count_evaluation
from planner.spec.errors import UserError

GOOD = '{"prompt": "1 2", "answer": "2"}'
ROWS: list[dict[str, Any]] = [
    {"prompt": "a b", "reward_model": {"ground_truth": "b", "style": "rule"}, "level": 3},
    {"prompt": "b a", "reward_model": {"ground_truth": "a", "style": "rule"}, "level": 4},
]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m.role }} {{ m.content }} end {% endfor %}"
    "{% if add_generation_prompt %}assistant{% if think %} think{% endif %}{% endif %}"
)
WORDS = ["user", "assistant", "system", "end", "think", "a", "b", "c"]


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    made = Tokenizer(WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="c"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template)


def rows(path: Path, **more: Any) -> list[Row]:
    return read_rows(DataFile(path=path, **more))


def asked(path: Path, prompt: str = "prompt", answer: str | None = None) -> list[Asked]:
    return [asked_in(row, prompt, answer) for row in rows(path)]


def refused(path: Path, **more: Any) -> str:
    with pytest.raises(UserError) as error:
        [asked_in(row, "prompt", None) for row in rows(path, **more)]
    assert "\n" not in str(error.value)
    return str(error.value)


# --- files ---


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        ("", "empty line"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("1" * 5000, "not valid JSON"),
        ("[1]", "is a list"),
        ('{"prompt": ""}', "a text that is not empty, or a list of messages, not ''"),
        ('{"prompt": 3}', "not 3"),
        ('{"prompt": "a", "answer": NaN}', "NaN is not a number"),
        ('{"question": "1", "answer": "2"}', "has no column 'prompt'; it has question, answer"),
        ('{"prompt": []}', r"not \[\]"),
        ('{"prompt": [{"role": "user"}]}', "message 1 .* needs a role and a content"),
        ('{"prompt": [{"role": "assistant", "content": "1"}]}', "ends with an assistant's"),
        (r'{"prompt": "a\ud83d", "answer": "1"}', r"prompt: character 2 is \\ud83d, half of a"),
        (r'{"prompt": "a", "answer": ["\ude00"]}', r"answer: character 1 is \\ude00, half of a"),
        (r'{"prompt": [{"role": "user", "content": "\ud83d"}]}', "half of a surrogate"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, bad: str, what: str) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(f"{GOOD}\n{bad}\n{GOOD}\n")
    with pytest.raises(UserError, match=what) as error:
        asked(file)
    assert str(error.value).startswith(f"{file}:2: ") and "\n" not in str(error.value)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    assert "No such file" in refused(file)
    file.write_text("")
    assert "the dataset is empty" in refused(file)
    file.write_bytes(f"{GOOD}\n".encode() + b"\xff\xfe")
    assert f"{file}:2: the dataset cannot be read (byte 33 is no UTF-8)" in refused(file)
    file.write_bytes(gzip.compress(b"{}"))
    assert "is compressed; unpack it" in refused(file)
    file.write_text(GOOD)
    assert "one file, which has no split 'test'" in refused(file, split="test")
    (tmp_path / "folder").mkdir()
    assert "holds no files of data" in refused(tmp_path / "folder")


def test_a_line_ends_at_a_newline_and_nowhere_else(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    prompt = "a\u2028b\u2029c\x85d"
    file.write_bytes(f'\ufeff{{"prompt": "{prompt}"}}\r\n{GOOD}'.encode())
    assert [each.prompt for each in asked(file)] == [prompt, "1 2"]


def test_a_json_list_has_items(tmp_path: Path) -> None:
    file = tmp_path / "train.json"
    file.write_text(json.dumps(ROWS, indent=2))
    assert [row.columns for row in rows(file)] == ROWS
    file.write_text('[{"prompt": "a"}, 3]')
    assert f"{file}: item 2: is a int" in refused(file)
    file.write_text('[{"prompt": "a"}')
    assert "not valid JSON" in refused(file)


def test_a_table_has_texts_and_cells_over_several_lines(tmp_path: Path) -> None:
    file = tmp_path / "train.csv"
    with file.open("w", newline="", encoding="utf-8-sig") as opened:
        csv.writer(opened).writerows([["prompt", "answer"], ["a,\nb", "1"], ["c", ""]])
    assert [(each.prompt, each.answer) for each in asked(file)] == [("a,\nb", "1"), ("c", "")]
    for text, what in (
        ("prompt,answer\na\n", ":2: has 1 cells, and the first line names 2"),
        ("prompt,answer\na,1\n\n", ":3: empty line"),
        ("prompt,prompt\na,1\n", ":1: column 'prompt' is there twice"),
        ('prompt,answer\na,1\n"b,2\n', ":3: not valid CSV (unexpected end of data)"),
        ("prompt,answer\n", "is empty"),
        (f"prompt,answer\na,{'x' * (2**26 + 1)}\n", ":2: not valid CSV (field larger than"),
    ):
        file.write_text(text)
        assert what in refused(file)


def test_parquet_and_arrow_are_read_with_their_nested_columns(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    messages = [{"role": "user", "content": "a b"}]
    chats = [{**row, "prompt": messages} for row in ROWS]
    parquet.write_table(pyarrow.Table.from_pylist(chats), tmp_path / "train.parquet")
    (first, second) = asked(tmp_path / "train.parquet", answer="reward_model.ground_truth")
    assert first.prompt == messages and (first.answer, second.answer) == ("b", "a")
    assert second.columns == chats[1] and second.where == f"{tmp_path}/train.parquet: row 2"
    with pytest.raises(UserError, match=r"row 1: has no column 'reward_model.truth'; .*_model.sty"):
        asked(tmp_path / "train.parquet", answer="reward_model.truth")
    with pyarrow.OSFile(str(tmp_path / "train.arrow"), "wb") as sink:
        table = pyarrow.Table.from_pylist(ROWS)
        with pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    assert [row.columns for row in rows(tmp_path / "train.arrow")] == ROWS
    for name in ("train.parquet", "train.arrow"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        assert f"{tmp_path}/{name}: the dataset cannot be read" in refused(tmp_path / name)


def test_a_saved_dataset_and_its_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(ROWS)
    made.save_to_disk(str(tmp_path / "one"))
    assert [row.columns for row in rows(tmp_path / "one")] == ROWS
    datasets.DatasetDict(train=made, test=made.select([1])).save_to_disk(str(tmp_path / "two"))
    assert [row.columns for row in rows(tmp_path / "two", split="test")] == ROWS[1:]
    assert "has the splits train, test; choose one" in refused(tmp_path / "two")
    assert "has the splits train, test; choose one" in refused(tmp_path / "two", split="dev")


def test_a_directory_of_files_and_its_splits(tmp_path: Path) -> None:
    for name, prompt in (("train-00001", "b"), ("train-00000", "a"), (".hidden", "no")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": prompt}))
    (tmp_path / "README.md").write_text("no data")
    assert [row.columns["prompt"] for row in rows(tmp_path)] == ["a", "b"]
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "0.jsonl").write_text('{"prompt": "c"}')
    assert [row.columns["prompt"] for row in rows(tmp_path, split="test")] == ["c"]
    assert [row.columns["prompt"] for row in rows(tmp_path, split="train")] == ["a", "b"]
    assert "has the splits test, train; choose one" in refused(tmp_path)
    assert "holds no files of split 'dev'" in refused(tmp_path, split="dev")


def test_a_data_set_of_the_hub_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert datasets
    with pytest.raises(
        UserError, match=r"openai/gsm8k \(of the hub\): is not on this machine"
    ) as e:
        read_rows(DataFile(hub="openai/gsm8k", config="main", split="train"))
    assert "\n" not in str(e.value)


# --- what becomes of rows ---


def dataset(tmp_path: Path, lines: list[Any], jinja: str | None = TEMPLATE, **data: Any) -> Any:
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    longest = {"kind": "fixed", "tokens": data.pop("longest", 9)}
    workload = make_workload(data={"train": file, **data}, prompt=longest, batch=4)
    return Dataset(workload, tokenizer(jinja))


def texts(made: Dataset) -> set[str]:
    return set(made.step(0).texts)


def words(made: Dataset) -> set[str]:
    return {" ".join(WORDS[n] for n in row) for row in made.step(0).requests.prompts()}


CHAT = {"prompt": [{"role": "user", "content": "a b", "name": None}], "answer": {"x": [1, None]}}


def test_messages_go_through_the_template(tmp_path: Path) -> None:
    made = dataset(tmp_path, [CHAT, {"prompt": "a"}])
    assert words(made) == {"user a b end assistant", "a"}
    assert made.step(0).answers.count({"x": [1, None]}) == 2
    assert made.step(0).columns[0] in (CHAT, {"prompt": "a"})
    assert len(made.notes) == 1 and 'data.template = "chat" applies it' in made.notes[0]
    made = dataset(tmp_path, [{"prompt": "a"}], template="chat")
    assert words(made) == {"user a end assistant"} and not made.notes
    made = dataset(tmp_path, [{"prompt": "a"}], template="none")
    assert words(made) == {"a"} and not made.notes
    assert not dataset(tmp_path, [{"prompt": "a"}], None).notes


def test_the_lines_of_held_out_files_are_counted(tmp_path: Path) -> None:
    """Only where all of them are JSON lines that are here."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n')
    file = tmp_path / "a.jsonl"
    sets = (EvaluationSet(name="s", files=file, samples=3, temperature=1.0),)
    data = Data(train=file, evaluation=file, evaluate_every=1)
    assert count_evaluation(data, ()) == 2 and count_evaluation(data, sets) == 8
    for other in (tmp_path / "none.jsonl", tmp_path / "b.parquet"):
        assert count_evaluation(data.changed(evaluation=other), sets) is None


def test_who_judges_an_evaluation_is_said(tmp_path: Path) -> None:
    held_out = tmp_path / "held.jsonl"
    held_out.write_text('{"prompt": "a", "answer": "b"}\n')
    data = {"train": held_out, "evaluation": held_out, "evaluate_every": 1}
    (said,) = Dataset(make_workload(data=data), tokenizer(None)).notes
    assert said.startswith("evaluations compare with the answers: a reward model is asked for")
    judged = make_workload(data=data, reward={"function": "rewards.py:f"})
    assert not Dataset(judged, tokenizer(None)).notes


def test_a_system_prompt_and_arguments_of_the_template(tmp_path: Path) -> None:
    own = {"prompt": [{"role": "system", "content": "b"}, *CHAT["prompt"]]}
    made = dataset(tmp_path, [CHAT, own], system="c", template_args={"think": True})
    assert words(made) == {
        "system c end user a b end assistant think",
        "system b end user a b end assistant think",
    }
    made = dataset(tmp_path, [{"prompt": "a"}], system="c")
    assert words(made) == {"system c end user a end assistant"}


@pytest.mark.parametrize(
    ("data", "template", "what"),
    [
        ({"template": "none"}, TEMPLATE, r'jsonl:1: the prompt is a list .*template is "none"'),
        ({}, None, r"train.jsonl:1 is a list of messages, and its tokenizer has no chat template"),
        ({"template": "chat"}, None, 'data.template is "chat", and its tokenizer has no'),
        ({"template_args": {"thin_king": 1}}, TEMPLATE, "template_args.thin_king: .* no such arg"),
        ({"template_args": {"tokenize": True}}, TEMPLATE, "template_args.tokenize: .* no such"),
        ({"prompt": "question"}, TEMPLATE, "jsonl:1: has no column 'question'; it has prompt, ans"),
        ({"answer": "wanted"}, TEMPLATE, "jsonl:1: has no column 'wanted'; .* data.answer"),
    ],
)
def test_what_does_not_fit_the_template_is_named(
    tmp_path: Path, data: dict[str, Any], template: str | None, what: str
) -> None:
    with pytest.raises(UserError, match=what):
        made = tokenizer(template)
        file = tmp_path / "train.jsonl"
        file.write_text(json.dumps(CHAT))
        Dataset(make_workload(data={"train": file, **data}), made)


def test_a_template_that_fails_names_the_row(tmp_path: Path) -> None:
    tool = {"prompt": [{"role": "tool", "content": "a"}]}
    with pytest.raises(
        UserError,
        match=r"train.jsonl:2: the tokenizer's chat template fails on .*"
        r"\(TemplateError: no tools\)",
    ):
        dataset(tmp_path, [CHAT, tool])


def test_prompts_that_are_too_long_may_be_dropped_or_cut(tmp_path: Path) -> None:
    lines = [{"prompt": "a b c"}, {"prompt": "a"}, {"prompt": "a b"}]
    with pytest.raises(UserError, match=r'jsonl:1: the prompt has 3 tokens.*"drop" or "truncate"'):
        dataset(tmp_path, lines, None, longest=2)
    made = dataset(tmp_path, lines, None, longest=2, overlong="drop")
    assert texts(made) == {"a", "a b"}
    assert made.notes == [
        f"{tmp_path}/train.jsonl: 1 of 3 prompts have more than 2 tokens and were dropped"
    ]
    made = dataset(tmp_path, lines, None, longest=2, overlong="truncate")
    assert words(made) == {"a", "a b", "b c"} and made.notes[0].endswith("cut to their last 2")
    with pytest.raises(UserError, match="all 1 prompts have more than 2 tokens, so none is left"):
        dataset(tmp_path, lines[:1], None, longest=2, overlong="drop")


def test_sources_are_mixed_by_their_weights(tmp_path: Path) -> None:
    for name, count in (("few", 3), ("many", 50)):
        lines = [json.dumps({"prompt": "a", "row": f"{name} {n}"}) for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    files = [{"path": tmp_path / "few.jsonl", "weight": 1}, {"path": tmp_path / "many.jsonl"}]

    def drawn(files: list[dict[str, Any]], steps: int) -> list[str]:
        made = Dataset(make_workload(data={"train": files}, batch=8), tokenizer(None))
        return [c["row"] for step in range(steps) for c in made.step(step).columns]

    mixed = drawn([files[0], {**files[1], "weight": 3}], 6)
    few = [row for row in mixed if row.startswith("few")]
    assert len(few) == 12 and all(len(set(few[n : n + 3])) == 3 for n in (0, 3, 6, 9))
    pooled = [{"path": file["path"]} for file in files]
    assert Counter(drawn(pooled, 53)).most_common()[-1][1] == 8  # 8 epochs of 53 rows


def test_a_stream_can_be_entered_anywhere_and_keeps_to_its_shares() -> None:
    order = Shuffled([2, 3, 5], [0.1, 0.2, 0.7], seed=1)
    whole = order.places(0, 1000)
    assert [place for n in range(0, 1000, 7) for place in order.places(n, n + 7)][:1000] == whole
    for count in (1, 10, 99, 1000):
        shares = np.bincount([pool for pool, _ in whole[:count]], minlength=3)
        assert np.abs(shares - count * np.array([0.1, 0.2, 0.7])).max() < 3
    of_last = [place for pool, place in whole if pool == 2]
    assert sorted(of_last[:5]) == sorted(of_last[5:10]) == [0, 1, 2, 3, 4]


# --- files that are wrong in any way ---


def written() -> dict[str, bytes]:
    """A good file of each kind that can be written here, by its suffix."""
    lines = [json.dumps(row) for row in [*ROWS, CHAT]]
    found = {
        ".jsonl": "\n".join(lines).encode(),
        ".json": f"[{','.join(lines)}]".encode(),
        ".csv": b'prompt,answer\r\n"a,\nb",1\r\nc,"2 ""x"""\r\n',
    }
    if importlib.util.find_spec("pyarrow"):
        import pyarrow
        import pyarrow.parquet

        sink, table = io.BytesIO(), pyarrow.Table.from_pylist(ROWS)
        pyarrow.parquet.write_table(table, sink)
        found[".parquet"] = sink.getvalue()
        sink = io.BytesIO()
        with pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        found[".arrow"] = sink.getvalue()
    return found


FILES = written()


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file with one to three damages, and perhaps with the suffix of another kind."""
    suffix = draw(st.sampled_from(sorted(FILES)))
    content = FILES[suffix]
    for _ in range(draw(st.integers(1, 3))):
        at, length = draw(st.integers(0, len(content))), draw(st.integers(0, 4))
        new = draw(
            st.binary(max_size=4) | st.sampled_from([b'"', b"\n", b"\r\n", b"{", b"\\ud800"])
        )
        content = content[:at] + (new + content[at + length :] if draw(st.booleans()) else b"")
    return draw(st.sampled_from([suffix] * 4 + sorted(FILES))), content


@pytest.mark.parametrize(
    "count", [300, pytest.param(20_000, marks=[pytest.mark.nightly, pytest.mark.timeout(7200)])]
)
def test_a_damaged_file_is_read_or_refused_in_one_line(count: int) -> None:
    made = tokenizer()

    @settings(max_examples=count, deadline=None, derandomize=count == 300, database=None)
    @given(damaged())
    def check(file: tuple[str, bytes]) -> None:
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / f"train{file[0]}"
            path.write_bytes(file[1])
            data = {"train": path, "template": "chat", "overlong": "truncate"}
            try:
                source = Dataset(make_workload(data=data), made)
            except UserError as error:
                assert str(path) in str(error) and "\n" not in str(error)
            else:
                prompts = source.step(0)
                assert len(prompts.texts) == 8 and all(prompts.texts)
                assert text_of([{"answer": answer} for answer in prompts.answers])

    check()


def test_a_damaged_arrow_file_does_not_end_the_process(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"prompt": ["abc", "def"], "answer": ["1", "2"]})
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    written, ends = sink.getvalue().to_pybytes(), np.array([0, 3, 6], np.int32).tobytes()
    assert written.count(ends) == 1
    far = np.array([0, 3, 2**31 - 1], np.int32).tobytes()
    (tmp_path / "train.arrow").write_bytes(written.replace(ends, far))
    with pytest.raises(UserError, match=r"train\.arrow"):
        read_rows(DataFile(path=tmp_path / "train.arrow"))
