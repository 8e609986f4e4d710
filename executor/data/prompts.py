"""Where prompts come from: the lines of a dataset, or random tokens."""

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from executor.data.requests import (
    ORDER,
    PROMPT_LENGTHS,
    RESPONSE_LENGTHS,
    TOKENS,
    Ints,
    Requests,
    Rows,
    keys_of,
    make_requests,
    permutation,
)
from planner.spec.errors import UserError
from planner.spec.lengths import sample
from planner.spec.workload import RewardFunction, Workload

MOST_KEYS, MOST_LINES = 6, 4  # that a message names


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of one batch, with the texts that a reward function and an evaluation need."""

    requests: Requests
    texts: list[str]
    answers: list[str | None]
    where: list[str]  # file:line; nothing for prompts that are not of a file

    def named(self, rows: Rows) -> str:
        """Some of the prompts, by the lines that they are in."""
        if not self.where:
            return f"{len(rows)} prompts of random tokens"
        lines = list(dict.fromkeys(self.where[row] for row in rows.tolist()))
        more = f" and {len(lines) - MOST_LINES} more" if len(lines) > MOST_LINES else ""
        return f"the prompts of {', '.join(lines[:MOST_LINES])}{more}"


class PromptSource(Protocol):
    """Where the prompts of a step come from, and how responses read. `held_out` is the number of
    prompts of an evaluation."""

    held_out: int

    def step(self, step: int) -> Prompts: ...
    def evaluation(self) -> Prompts: ...
    def decode(self, responses: Sequence[Ints]) -> list[str]: ...
    def stopped(self, responses: Sequence[Ints]) -> list[int | None]: ...
    def save_tokenizer(self, directory: Path) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Line:
    prompt: str
    answer: str | None
    where: str  # file:line


def read_lines(path: Path, *, need_answer: bool = False) -> list[Line]:
    """The lines of a JSONL file of `{"prompt": str, "answer": str}`. Raises UserError naming file
    and line."""
    try:
        content = path.read_bytes()
        _refuse_packed(path, content)
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: the dataset cannot be read ({reason}); check the path") from None
    if not text:
        raise UserError(f"{path}: the dataset is empty; it needs lines of {_EXAMPLE}")
    lines = text.removesuffix("\n").split(
        "\n"
    )  # splitlines() would also split at characters that JSON strings hold
    return [
        _line(f"{path}:{number}", line, need_answer) for number, line in enumerate(lines, start=1)
    ]


_EXAMPLE = '{"prompt": "...", "answer": "..."}'


def _refuse_packed(path: Path, content: bytes) -> None:
    """Raise UserError for other formats that datasets come in."""
    if content.startswith(b"PAR1"):
        write = "pandas.read_parquet(FILE).to_json(NEW, orient='records', lines=True)"
        raise UserError(
            f"{path}: is Parquet; write it as lines of {_EXAMPLE}, with {write} for example"
        )
    if content.startswith((b"\x1f\x8b", b"PK\x03\x04", b"(\xb5/\xfd")):
        raise UserError(f"{path}: is compressed; unpack it into lines of {_EXAMPLE}")
    if content.lstrip()[:1] == b"[":
        raise UserError(f"{path}: is one JSON list; write its items as lines of {_EXAMPLE}")


def _line(where: str, text: str, need_answer: bool) -> Line:
    if not text.strip():
        raise UserError(f"{where}: empty line; remove it or write {_EXAMPLE}")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); a line is {_EXAMPLE}") from None
    if not isinstance(data, dict) or not isinstance(data.get("prompt"), str) or not data["prompt"]:
        raise UserError(
            f'{where}: needs a "prompt" that is a non-empty string, like {_EXAMPLE}{_found(data)}'
        )
    answer = data.get("answer")
    if not isinstance(answer, str) and (answer is not None or need_answer):
        raise UserError(
            f'{where}: needs an "answer" that is a string, like {_EXAMPLE}{_found(data)}'
        )
    for key in ("prompt", "answer"):
        _check_unicode(f"{where}: {key}", data.get(key) or "")
    return Line(prompt=data["prompt"], answer=answer, where=where)


def _found(data: Any) -> str:
    """What a line has instead, and what to do with it."""
    if not isinstance(data, dict):
        return ""
    if isinstance(data.get("prompt"), list):
        return "; its prompt is a list: apply the model's chat template to it first"
    keys = ", ".join(json.dumps(key) for key in list(data)[:MOST_KEYS])
    return f"; it has {keys or 'no keys'}: rename what is meant"


def _check_unicode(where: str, text: str) -> None:
    """Raise UserError for half of a surrogate pair, which JSON can write and no tokenizer reads."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        raise UserError(
            f"{where}: character {error.start + 1} is {half}, half of a surrogate pair; write the "
            "other half too, or remove it"
        ) from None


class Dataset:
    """Prompts from the workload's files: each once per epoch, in an order that the seed and the
    epoch fix."""

    def __init__(self, workload: Workload, tokenizer: Any) -> None:
        assert workload.data is not None
        self._workload, self._tokenizer = workload, tokenizer
        self._train = self._encode(read_lines(workload.data.train))
        file = workload.data.evaluation
        # A reward function may do without answers; what is compared with them does not.
        compared = not isinstance(workload.reward, RewardFunction)
        self._evaluation = self._encode(read_lines(file, need_answer=compared)) if file else []
        self.held_out = len(self._evaluation)

    def _encode(self, lines: list[Line]) -> list[tuple[Line, Ints]]:
        longest = self._workload.prompt.longest
        ids = self._tokens([line.prompt for line in lines])
        wrong = [
            (line.where, len(tokens))
            for line, tokens in zip(lines, ids, strict=True)
            if not 0 < len(tokens) <= longest
        ]
        if wrong:
            where, first = wrong[0]
            others = ""
            if len(wrong) > 1:
                most = max(count for _, count in wrong)
                others = f" (and {len(wrong) - 1} more of {len(lines)}; the longest has {most})"
            raise UserError(
                f"{where}: the prompt has {first} tokens, and the workload allows 1 to {longest}"
                f"{others}; shorten or leave out such prompts, or raise the prompt length in the "
                "workload and search again"
            )
        return [
            (line, np.asarray(tokens, dtype=np.int32))
            for line, tokens in zip(lines, ids, strict=True)
        ]

    def _tokens(self, prompts: list[str]) -> list[list[int]]:
        """The tokens of prompts, with those that the tokenizer puts before any text (a BOS) once,
        also where a prompt begins with them as its template has it, and none after it: a prompt
        goes on in its response."""
        before, after = _framing(self._tokenizer)
        asked = self._tokenizer(prompts, return_attention_mask=False)
        found = []
        for tokens in asked["input_ids"]:
            tokens = tokens[: len(tokens) - len(after)]
            twice = before and tokens[: 2 * len(before)] == before + before
            found.append(tokens[len(before) :] if twice else tokens)
        return found

    def step(self, step: int) -> Prompts:
        batch, seed = self._workload.batch, self._workload.seed
        position = np.arange(step * batch, (step + 1) * batch)
        epochs, places = np.divmod(position, len(self._train))
        orders = {
            epoch: permutation(len(self._train), seed, epoch, ORDER)
            for epoch in set(epochs.tolist())
        }
        chosen = [
            self._train[orders[e][p]] for e, p in zip(epochs.tolist(), places.tolist(), strict=True)
        ]
        return self._prompts(chosen, (seed, step))

    def evaluation(self) -> Prompts:
        return self._prompts(self._evaluation, (self._workload.seed,))

    def _prompts(self, chosen: list[tuple[Line, Ints]], key: tuple[int, ...]) -> Prompts:
        count = len(chosen)
        longest = np.full(count, self._workload.response.longest)
        tokens = [tokens for _, tokens in chosen]
        requests = make_requests(tokens, keys_of(count, *key), longest, np.zeros(count, dtype=bool))
        lines = [line for line, _ in chosen]
        return Prompts(
            requests=requests,
            texts=[line.prompt for line in lines],
            answers=[line.answer for line in lines],
            where=[line.where for line in lines],
        )

    def stopped(self, responses: Sequence[Ints]) -> list[int | None]:
        """The tokens of each response up to the first that completes a stop string; None where
        there is none."""
        assert self._workload.data is not None
        stops = [stop for stop in self._workload.data.stop if isinstance(stop, str)]
        if not stops:
            return [None] * len(responses)

        def has_stop(tokens: Ints) -> bool:
            text = self._tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
            return any(stop in text for stop in stops)

        found: list[int | None] = []
        for response in responses:
            if not has_stop(response):
                found.append(None)
                continue
            counts = range(1, len(response) + 1)
            found.append(1 + bisect_left(counts, True, key=lambda n: has_stop(response[:n])))
        return found

    def decode(self, responses: Sequence[Ints]) -> list[str]:
        texts: list[str] = self._tokenizer.batch_decode(
            [list(map(int, r)) for r in responses], skip_special_tokens=True
        )
        return texts

    def save_tokenizer(self, directory: Path) -> None:
        self._tokenizer.save_pretrained(directory)


def _framing(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after any text."""
    (bare,) = tokenizer(["a"], add_special_tokens=False, return_attention_mask=False)["input_ids"]
    (framed,) = tokenizer(["a"], return_attention_mask=False)["input_ids"]
    for begin in range(len(framed) - len(bare) + 1):
        if framed[begin : begin + len(bare)] == bare:
            return framed[:begin], framed[begin + len(bare) :]
    return [], []


class Synthetic:
    """Random tokens of the workload's lengths, for workloads without data: what benchmarks run
    on."""

    held_out = 0

    def __init__(self, workload: Workload) -> None:
        self._workload = workload

    def step(self, step: int) -> Prompts:
        workload = self._workload
        prompts = sample(workload.prompt, workload.batch, workload.seed, step, PROMPT_LENGTHS)
        responses = sample(workload.response, workload.batch, workload.seed, step, RESPONSE_LENGTHS)
        rng = np.random.default_rng((workload.seed, step, TOKENS))
        tokens = [
            rng.integers(workload.actor.shape.vocab, size=n, dtype=np.int32)
            for n in prompts.tolist()
        ]
        keys = keys_of(workload.batch, workload.seed, step)
        requests = make_requests(tokens, keys, responses, np.ones(workload.batch, dtype=bool))
        return Prompts(
            requests=requests, texts=self.decode(tokens), answers=[None] * len(tokens), where=[]
        )

    def evaluation(self) -> Prompts:
        raise AssertionError("a workload without data has nothing to evaluate on")

    def stopped(self, responses: Sequence[Ints]) -> list[int | None]:
        return [None] * len(responses)

    def decode(self, responses: Sequence[Ints]) -> list[str]:
        return [" ".join(map(str, response)) for response in responses]

    def save_tokenizer(self, directory: Path) -> None:
        """There is none."""
