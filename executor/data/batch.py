"""Prompts, batches of sequences, and how a batch is spread over ranks and micro-batches. All of it
is plain numpy: it runs on the controller and travels through Ray's object store."""

import heapq
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from planner.spec.errors import UserError
from planner.spec.lengths import sample
from planner.spec.workload import Workload

Ints = NDArray[np.int32]
Rows = NDArray[np.int64]

# The last word of every key (seed, ...) says what it is for. The first two are the planner's, with
# which it draws the same lengths. numpy takes (a, b) and (a, b, 0) for one key; so only the first
# may be 0, whose key is none's beginning.
PROMPT_LENGTHS, RESPONSE_LENGTHS, TOKENS, ORDER, MINIBATCHES, SAMPLING = range(6)


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Sequences to generate, as arrays: prompts end to end in `tokens` with their `lengths [n]`;
    `keys [n, k]` (seed, step, prompt, sample, purpose) fix the randomness of each; a response has
    at most `max_tokens [n]`. Where `exact [n]`, it ends there and nowhere else, whatever its
    tokens; whoever spreads requests must not look at that."""

    tokens: Ints
    lengths: Ints
    keys: NDArray[np.int64]
    max_tokens: Ints
    exact: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, rows: Rows) -> "Requests":
        columns = self.keys[rows], self.max_tokens[rows], self.exact[rows]
        prompts = self.prompts()
        chosen = [prompts[row] for row in rows]
        return make_requests(chosen, *columns)

    def prompts(self) -> list[Ints]:
        return _split(self.tokens, self.lengths)


def make_requests(
    prompts: Sequence[Ints],
    keys: NDArray[np.int64],
    max_tokens: NDArray[Any],
    exact: NDArray[np.bool_],
) -> Requests:
    return Requests(
        tokens=np.concatenate([np.zeros(0, dtype=np.int32), *prompts]),
        lengths=np.array([len(prompt) for prompt in prompts], dtype=np.int32),
        keys=keys,
        max_tokens=max_tokens.astype(np.int32),
        exact=exact,
    )


def _keys(count: int, *key: int) -> NDArray[np.int64]:
    """The keys (..., prompt, sample, purpose) of each of `count` prompts."""
    return np.array([(*key, prompt, 0, SAMPLING) for prompt in range(count)], dtype=np.int64)


def _split(flat: NDArray[Any], lengths: Ints) -> list[NDArray[Any]]:
    ends = np.cumsum(lengths).tolist()
    return [flat[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)]


def pad(flat: NDArray[Any], lengths: Ints, width: int, begin: Ints | int = 0) -> NDArray[Any]:
    """Arrange rows of different `lengths [n]`, which lie end to end, as `[n, width]` with zeros.
    Row i begins at column `begin[i]`."""
    columns = np.arange(width)
    begin = np.broadcast_to(begin, lengths.shape)[:, None]
    padded = np.zeros((len(lengths), width), dtype=flat.dtype)
    padded[(columns >= begin) & (columns < begin + lengths[:, None])] = flat
    return padded


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of one batch, with the texts that a reward function and an evaluation need."""

    requests: Requests
    texts: list[str]
    answers: list[str | None]


class PromptSource(Protocol):
    """Where the prompts of a step come from, and how responses read."""

    def step(self, step: int) -> Prompts: ...
    def evaluation(self) -> Prompts: ...
    def decode(self, responses: Sequence[Ints]) -> list[str]: ...
    def save_tokenizer(self, directory: Path) -> None: ...


# --- a dataset ---


@dataclass(frozen=True, kw_only=True)
class Line:
    prompt: str
    answer: str | None
    where: str  # file:line


def read_lines(path: Path, *, need_answer: bool = False) -> list[Line]:
    """The lines of a JSONL file of `{"prompt": str, "answer": str}`. Raises UserError naming file
    and line."""
    try:
        text = path.read_bytes().decode("utf-8")
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


def _line(where: str, text: str, need_answer: bool) -> Line:
    if not text.strip():
        raise UserError(f"{where}: empty line; remove it or write {_EXAMPLE}")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); a line is {_EXAMPLE}") from None
    if not isinstance(data, dict) or not isinstance(data.get("prompt"), str) or not data["prompt"]:
        raise UserError(f'{where}: needs a "prompt" that is a non-empty string, like {_EXAMPLE}')
    answer = data.get("answer")
    if not isinstance(answer, str) and (answer is not None or need_answer):
        raise UserError(f'{where}: needs an "answer" that is a string, like {_EXAMPLE}')
    return Line(prompt=data["prompt"], answer=answer, where=where)


class Dataset:
    """Prompts from the workload's files: each once per epoch, in an order that the seed and the
    epoch fix."""

    def __init__(self, workload: Workload, tokenizer: Any) -> None:
        assert workload.data is not None
        self._workload, self._tokenizer = workload, tokenizer
        self._train = self._encode(read_lines(workload.data.train))
        file = workload.data.evaluation
        self._evaluation = self._encode(read_lines(file, need_answer=True)) if file else []

    def _encode(self, lines: list[Line]) -> list[tuple[Line, Ints]]:
        longest = self._workload.prompt.longest
        ids = self._tokenizer([line.prompt for line in lines], return_attention_mask=False)[
            "input_ids"
        ]
        for line, tokens in zip(lines, ids, strict=True):
            if not 0 < len(tokens) <= longest:
                raise UserError(
                    f"{line.where}: the prompt has {len(tokens)} tokens, and the workload allows 1 "
                    f"to {longest}; "
                    "shorten it or raise the prompt length"
                )
        return [
            (line, np.asarray(tokens, dtype=np.int32))
            for line, tokens in zip(lines, ids, strict=True)
        ]

    def step(self, step: int) -> Prompts:
        batch, seed = self._workload.batch, self._workload.seed
        position = np.arange(step * batch, (step + 1) * batch)
        epochs, places = np.divmod(position, len(self._train))
        orders = {
            epoch: _permutation(len(self._train), seed, epoch, ORDER)
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
        requests = make_requests(tokens, _keys(count, *key), longest, np.zeros(count, dtype=bool))
        lines = [line for line, _ in chosen]
        return Prompts(
            requests=requests, texts=[x.prompt for x in lines], answers=[x.answer for x in lines]
        )

    def decode(self, responses: Sequence[Ints]) -> list[str]:
        texts: list[str] = self._tokenizer.batch_decode(
            [list(map(int, r)) for r in responses], skip_special_tokens=True
        )
        return texts

    def save_tokenizer(self, directory: Path) -> None:
        self._tokenizer.save_pretrained(directory)


class Synthetic:
    """Random tokens of the workload's lengths, for workloads without data: what benchmarks run
    on."""

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
        keys = _keys(workload.batch, workload.seed, step)
        requests = make_requests(tokens, keys, responses, np.ones(workload.batch, dtype=bool))
        return Prompts(requests=requests, texts=self.decode(tokens), answers=[None] * len(tokens))

    def evaluation(self) -> Prompts:
        raise AssertionError("a workload without data has nothing to evaluate on")

    def decode(self, responses: Sequence[Ints]) -> list[str]:
        return [" ".join(map(str, response)) for response in responses]

    def save_tokenizer(self, directory: Path) -> None:
        """There is none."""


def _permutation(count: int, *key: int) -> Rows:
    return np.random.default_rng(key).permutation(count)


# --- a batch of sequences ---


@dataclass(frozen=True, kw_only=True)
class Generated:
    """An engine's answer to its requests, end to end: `lengths [n]`, `tokens` and `log_probs [sum
    of lengths]`."""

    lengths: Ints
    tokens: Ints
    log_probs: NDArray[np.float32]
    weights_version: int


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """A batch: right-padded `tokens [B, T]` (prompt, then response), lengths `[B]`, the log-probs
    `[B, R]` under which the response tokens were sampled (R is the longest response), and the
    versions `[B]` of the weights that sampled them."""

    tokens: Ints
    prompt_lengths: Ints
    response_lengths: Ints
    log_probs: NDArray[np.float32]
    weights_versions: Ints

    @property
    def width(self) -> int:
        return int(self.log_probs.shape[1])

    @property
    def lengths(self) -> Ints:
        return self.prompt_lengths + self.response_lengths

    @property
    def mask(self) -> NDArray[np.bool_]:
        """True on real response tokens, `[B, R]`."""
        return np.arange(self.width) < self.response_lengths[:, None]

    def ended(self, eos: Sequence[int]) -> NDArray[np.bool_]:
        """Whether the response ends with one of these tokens, `[B]`. False for truncated and for
        empty responses."""
        last = self.tokens[np.arange(len(self.lengths)), self.lengths - 1]
        return (self.response_lengths > 0) & np.isin(last, eos)

    def responses(self) -> list[Ints]:
        rows = zip(self.tokens, self.prompt_lengths, self.response_lengths, strict=True)
        return [tokens[p : p + r] for tokens, p, r in rows]


def collate(requests: Requests, shares: Sequence[Rows], made: Sequence[Generated]) -> Sequences:
    """One batch in the order of the requests; `shares[i]` are the rows that engine i was given."""
    count = len(requests)
    lengths, versions = np.zeros(count, dtype=np.int32), np.zeros(count, dtype=np.int32)
    for rows, generated in zip(shares, made, strict=True):
        lengths[rows], versions[rows] = generated.lengths, generated.weights_version
    width = max(1, int(lengths.max()))
    responses, log_probs = (
        np.zeros((count, width), dtype=np.int32),
        np.zeros((count, width), dtype=np.float32),
    )
    for rows, generated in zip(shares, made, strict=True):
        responses[rows] = pad(generated.tokens, generated.lengths, width)
        log_probs[rows] = pad(generated.log_probs, generated.lengths, width)
    longest = int((requests.lengths + lengths).max())
    tokens = pad(requests.tokens, requests.lengths, longest)
    tokens += pad(
        responses[np.arange(width) < lengths[:, None]], lengths, longest, begin=requests.lengths
    )
    return Sequences(
        tokens=tokens,
        prompt_lengths=requests.lengths,
        response_lengths=lengths,
        log_probs=log_probs,
        weights_versions=versions,
    )


# --- spreading ---


def assign(prompt_lengths: Ints, engines: int, budget: int) -> list[Rows]:
    """Give each request, in order, to the engine with the fewest outstanding tokens. Return the
    rows of each engine.

    A request counts with its prompt and a `budget` of response tokens, the same for all: nobody may
    know how long a response will be.
    """
    outstanding = [0] * engines
    rows: list[list[int]] = [[] for _ in range(engines)]
    for row, length in enumerate(prompt_lengths.tolist()):
        engine = outstanding.index(min(outstanding))
        rows[engine].append(row)
        outstanding[engine] += length + budget
    return [np.array(share, dtype=np.int64) for share in rows]


def minibatches(count: int, size: int, *key: int) -> list[Rows]:
    """The rows of a batch in minibatches of `size`, by a permutation that the key (seed, step,
    epoch) fixes: formed before anything is spread over ranks, so that placement does not change the
    mathematics."""
    return np.split(_permutation(count, *key, MINIBATCHES), count // size)


def spread(rows: Rows, lengths: Ints, ranks: int, micro_batch_tokens: int) -> list[list[Rows]]:
    """Rows over ranks, and within each rank into micro-batches of at most `micro_batch_tokens`
    tokens (or a single sequence), both balanced by tokens. Every rank gets the same number of
    micro-batches, some perhaps empty: their collectives must match."""
    shares = _balance(rows, lengths, ranks)
    parts = max(1, -(-max(int(lengths[share].sum()) for share in shares) // micro_batch_tokens))
    while True:
        micro = [_balance(share, lengths, parts) for share in shares]
        if all(
            len(part) < 2 or lengths[part].sum() <= micro_batch_tokens
            for share in micro
            for part in share
        ):
            return micro
        parts += 1


def _balance(rows: Rows, lengths: Ints, parts: int) -> list[Rows]:
    """Distribute the longest first, each to the part with the fewest tokens."""
    longest_first = rows[np.argsort(-lengths[rows], kind="stable")]
    load = [(0, part) for part in range(parts)]
    found: list[list[int]] = [[] for _ in range(parts)]
    for row, length in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        tokens, part = load[0]
        found[part].append(row)
        heapq.heapreplace(load, (tokens + length, part))
    return [np.array(part, dtype=np.int64) for part in found]


def join(
    shares: Sequence[list[Rows]],
    outputs: Sequence[list[NDArray[np.float32]]],
    shape: tuple[int, ...],
) -> Any:
    """Put the ranks' outputs per micro-batch, each `[rows, columns]` or `[rows]`, into one array of
    `shape`."""
    whole = np.zeros(shape, dtype=np.float32)
    for micro_batches, results in zip(shares, outputs, strict=True):
        for rows, result in zip(micro_batches, results, strict=True):
            if result.ndim == 1:
                whole[rows] = result[: len(rows)]
            else:
                whole[rows, : result.shape[1]] = result[: len(rows)]
    return whole
