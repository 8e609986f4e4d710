"""Prompts, batches and how they are spread; every mistake in a dataset is named by file and
line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_workload
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from executor.data.batch import Generated, Sequences, assign, collate, join, minibatches, spread
from executor.data.prompts import Dataset, Synthetic
from executor.data.requests import (
    EVALUATION,
    MINIBATCHES,
    ORDER,
    PROMPT_LENGTHS,
    RESPONSE_LENGTHS,
    SAMPLING,
    TOKENS,
)
from executor.running.step_figures import version_figures
from planner.spec.errors import UserError

GOOD = '{"prompt": "1 2", "answer": "2"}'


class Words:
    """A tokenizer: a word is a number, or 7."""

    def __call__(
        self, texts: list[str], return_attention_mask: bool, add_special_tokens: bool = True
    ) -> dict[str, list[list[int]]]:
        def number(word: str) -> int:
            return int(word) if word.isdigit() else 7

        return {"input_ids": [[number(word) for word in text.split()] for text in texts]}

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [" ".join(map(str, row)) for row in rows]


def test_a_response_ends_at_the_first_stop_string(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "a"}\n')
    numbers = {"a": 0, "b": 1, "stop": 2, "it": 3}
    made = Tokenizer(WordLevel(numbers, unk_token="b"))
    made.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    data = {"train": tmp_path / "train.jsonl", "stop": ["stop it", 7]}
    dataset = Dataset(make_workload(data=data), tokenizer)
    rows = [[0, 2, 3, 0, 2, 3], [0, 2, 0], [], [2, 3]]
    assert dataset.stopped([np.array(row, dtype=np.int32) for row in rows]) == [3, None, None, 2]
    dataset = Dataset(make_workload(data={"train": tmp_path / "train.jsonl"}), tokenizer)
    assert dataset.stopped([np.array([2, 3])]) == [None]


def test_prompts_are_named_by_their_lines(tmp_path: Path) -> None:
    """Each once, also where an epoch has them again within a batch; the first four."""
    file = tmp_path / "train.jsonl"
    file.write_text("".join(f'{{"prompt": "{n}"}}\n' for n in range(1, 7)))
    data = Dataset(make_workload(data={"train": file}, batch=8), Words())
    drawn = data.step(0)
    rows = np.argsort([int(text) for text in drawn.texts], kind="stable")
    first = ", ".join(f"{file}:{n}" for n in range(1, 5))
    assert drawn.named(rows) == f"the prompts of {first} and 2 more"
    assert drawn.named(rows[-1:]) == f"the prompts of {file}:6"
    random = Synthetic(make_workload()).step(0)
    assert random.named(np.arange(3)) == "3 prompts of random tokens"


@pytest.mark.parametrize("template", ["<bos> $A", "<bos> $A <eos>", "<mask> <bos> $A", "$A"])
def test_a_prompt_has_what_its_tokenizer_puts_before_it_once(tmp_path: Path, template: str) -> None:
    """With its template already in it or not, and nothing behind it."""
    words = ["<bos>", "<eos>", "<mask>", "a", "b", "user:"]
    numbers = {word: number for number, word in enumerate(words)}
    made = Tokenizer(WordLevel(numbers, unk_token="b"))
    made.pre_tokenizer = WhitespaceSplit()
    special = [(word, numbers[word]) for word in words[:3]]
    made.post_processor = TemplateProcessing(single=template, special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    tokenizer.add_special_tokens({"additional_special_tokens": words[:3]})
    before = template.partition("$A")[0]
    prompts = ["user: a b", f"{before}user: a b", "a"]
    (tmp_path / "train.jsonl").write_text(
        "".join(f'{{"prompt": "{prompt}"}}\n' for prompt in prompts)
    )
    data = Dataset(make_workload(data={"train": tmp_path / "train.jsonl"}, batch=8), tokenizer)
    drawn = data.step(0)
    found = {
        text: row.tolist() for text, row in zip(drawn.texts, drawn.requests.prompts(), strict=True)
    }
    framed = [numbers[word] for word in before.split()]
    assert found["user: a b"] == found[f"{before}user: a b"] == [*framed, 5, 3, 4]
    assert found["a"] == [*framed, 3]


def dataset(tmp_path: Path, prompts: list[str], **changes: Any) -> Dataset:
    file = tmp_path / "train.jsonl"
    file.write_text("".join(f'{{"prompt": "{prompt}"}}\n' for prompt in prompts))
    return Dataset(make_workload(data={"train": file}, **changes), Words())


def test_prompts_that_are_too_long_are_named_and_counted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train.jsonl:2: the prompt has 6 tokens"):
        dataset(tmp_path, ["1 2 3 4 5", "1 2 3 4 5 6"])
    others = r"allows 1 to 5 \(and 2 more of 4; the longest has 8\)"
    with pytest.raises(UserError, match=others):
        dataset(tmp_path, ["1 2 3 4 5 6", "1 2 3 4 5 6 7 8", "1 2 3 4 5 6 7", "1"])


def test_each_prompt_comes_once_per_epoch_in_an_order_that_the_seed_fixes(tmp_path: Path) -> None:
    prompts = [str(number) for number in range(12)]
    source = dataset(tmp_path, prompts, batch=8)
    drawn = [text for step in range(3) for text in source.step(step).texts]
    assert sorted(drawn[:12]) == sorted(drawn[12:]) == sorted(prompts)
    assert drawn[:12] != drawn[12:] and drawn != prompts * 2
    assert [
        text for step in range(3) for text in dataset(tmp_path, prompts, batch=8).step(step).texts
    ] == drawn
    assert dataset(tmp_path, prompts, batch=8, seed=8).step(0).texts != drawn[:8]
    assert source.step(1).requests.keys.tolist() == [[7, 1, row, 0, SAMPLING] for row in range(8)]


def test_random_prompts_have_the_lengths_of_the_workload() -> None:
    requests = Synthetic(make_workload(batch=64)).step(2).requests
    assert set(requests.lengths) == {5} and requests.exact.all()
    assert 1 <= requests.max_tokens.min() < requests.max_tokens.max() <= 8
    again = Synthetic(make_workload(batch=64)).step(2).requests
    assert np.array_equal(requests.tokens, again.tokens) and np.array_equal(
        requests.max_tokens, again.max_tokens
    )


def test_responses_come_back_in_the_order_of_their_requests() -> None:
    requests = Synthetic(make_workload(batch=4)).step(0).requests
    shares = [np.array([0, 2]), np.array([1, 3])]
    made = [
        Generated(
            lengths=np.array(lengths, dtype=np.int32),
            tokens=np.array(tokens, dtype=np.int32),
            log_probs=-np.array(tokens, dtype=np.float32),
            weights_versions=np.full(len(tokens), version, dtype=np.int32),
        )
        for lengths, tokens, version in (([2, 1], [10, 11, 30], 3), ([3, 0], [20, 21, 22], 4))
    ]
    batch = collate(requests, shares, made)
    assert [row.tolist() for row in batch.responses()] == [[10, 11], [20, 21, 22], [30], []]
    assert batch.log_probs.tolist() == [[-10, -11, 0], [-20, -21, -22], [-30, 0, 0], [0, 0, 0]]
    assert batch.weights_versions.tolist() == [[3, 3, 0], [4, 4, 4], [3, 0, 0], [0, 0, 0]]
    assert batch.mask.sum(1).tolist() == batch.response_lengths.tolist() == [2, 3, 1, 0]
    prompts = [tokens[:5].tolist() for tokens in batch.tokens]
    assert prompts == [prompt.tolist() for prompt in requests.prompts()]


def test_requests_go_to_the_engine_with_the_fewest_outstanding_tokens() -> None:
    lengths = np.array([50, 1, 1, 1, 1, 1], dtype=np.int32)
    assert [rows.tolist() for rows in assign(lengths, 2, budget=10)] == [[0], [1, 2, 3, 4, 5]]
    assert [rows.tolist() for rows in assign(lengths[1:], 2, budget=10)] == [[0, 2, 4], [1, 3]]


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    ranks=st.integers(1, 5),
    tokens=st.integers(10, 200),
)
def test_a_spread_has_every_row_once_within_the_tokens_and_equal_counts(
    lengths: list[int], ranks: int, tokens: int
) -> None:
    sizes = np.array(lengths, dtype=np.int32)
    rows = np.arange(len(lengths))
    shares = spread(rows, sizes, ranks, tokens)
    assert (
        sorted(np.concatenate([part for share in shares for part in share]).tolist())
        == rows.tolist()
    )
    assert len({len(share) for share in shares}) == 1
    for share in shares:
        for part in share:
            assert len(part) <= 1 or sizes[part].sum() <= tokens
    load = [sum(int(sizes[part].sum()) for part in share) for share in shares]
    assert max(load) - min(load) <= max(lengths)


def test_outputs_are_joined_where_they_belong() -> None:
    shares = [[np.array([2]), np.array([0])], [np.array([1]), np.array([], dtype=np.int64)]]
    outputs = [
        [np.array([[1, 2]], dtype=np.float32), np.array([[3]], dtype=np.float32)],
        [np.array([[4, 5, 6]], dtype=np.float32), np.array([[9]], dtype=np.float32)],
    ]
    assert join(shares, outputs, (3, 3)).tolist() == [[3, 0, 0], [4, 5, 6], [1, 2, 0]]


def test_no_two_purposes_share_their_randomness() -> None:
    seed, some = 7, range(3)
    keys = [
        (seed, step, what) for step in some for what in (PROMPT_LENGTHS, RESPONSE_LENGTHS, TOKENS)
    ]
    keys += [(seed, epoch, ORDER) for epoch in some]
    keys += [(seed, epoch, pool, ORDER) for epoch in some for pool in some]
    keys += [(seed, held_out, row, 0, EVALUATION) for held_out in some for row in some]
    keys += [(seed, step, epoch, MINIBATCHES) for step in some for epoch in some]
    for step in some:
        keys += map(tuple, Synthetic(make_workload(batch=4)).step(step).requests.keys.tolist())
    assert len({tuple(np.random.SeedSequence(key).generate_state(4)) for key in keys}) == len(keys)
    expected = np.random.default_rng((seed, 1, 0, MINIBATCHES)).permutation(
        12
    )  # what `minibatches` itself makes of it
    assert np.array_equal(np.concatenate(minibatches(12, 4, seed, 1, 0)), expected)


def test_ended_tells_eos_from_truncation() -> None:
    # complete · truncated · EOS only at the front · EOS only in the padding · empty, after a prompt
    # that ends in EOS
    tokens = [[1, 5, 9, 0], [1, 5, 6, 7], [1, 9, 5, 6], [1, 5, 6, 9], [9, 9, 9, 9]]
    batch = Sequences(
        tokens=np.array(tokens, dtype=np.int32),
        prompt_lengths=np.ones(5, dtype=np.int32),
        response_lengths=np.array([2, 3, 3, 2, 0], dtype=np.int32),
        log_probs=np.zeros((5, 3), dtype=np.float32),
        weights_versions=np.zeros((5, 3), dtype=np.int32),
    )
    assert batch.ended([9]).tolist() == [True, False, False, False, False]
    assert batch.ended([6, 9]).tolist() == [True, False, True, True, False]
    assert not batch.ended([]).any()


def test_minibatches_are_a_partition_that_their_key_fixes() -> None:
    parts = minibatches(12, 4, 7, 1, 0)
    assert [len(part) for part in parts] == [4, 4, 4]
    assert sorted(np.concatenate(parts).tolist()) == list(range(12))
    assert np.array_equal(parts, minibatches(12, 4, 7, 1, 0))
    assert not np.array_equal(parts, minibatches(12, 4, 7, 2, 0))


def test_segments_are_the_versions_of_a_response_and_their_tokens() -> None:
    versions = [[3, 3, 4, 4], [4, 5, 5, 0], [6, 0, 0, 0], [2, 9, 9, 9]]
    batch = Sequences(
        tokens=np.zeros((4, 5), dtype=np.int32),
        prompt_lengths=np.ones(4, dtype=np.int32),
        response_lengths=np.array([4, 2, 1, 0], dtype=np.int32),
        log_probs=np.zeros((4, 4), dtype=np.float32),
        weights_versions=np.array(versions, dtype=np.int32),
    )
    assert [batch.segments(row) for row in range(4)] == [
        [(3, 2), (4, 2)],
        [(4, 1), (5, 1)],
        [(6, 1)],
        [(2, 0)],
    ]
    assert batch.mean_segments == 6 / 4
    figures = version_figures(6, batch)
    assert figures["staleness"] == pytest.approx(6 - (3 + 3 + 4 + 4 + 4 + 5 + 6) / 7)
    assert figures["weights_version"] == 6
    assert figures["staleness_histogram"] == {"0": 1, "2": 1, "3": 1, "4": 1}
    assert figures["weights_versions"] == [[3, 1], [4, 1], [6, 1], [2, 1]]
