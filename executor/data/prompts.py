"""Where prompts come from: the rows of a dataset, or random tokens."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from executor.data.chat import Chat
from executor.data.columns import asked_in
from executor.data.order import Shuffled
from executor.data.requests import (
    EVALUATION,
    PROMPT_LENGTHS,
    RESPONSE_LENGTHS,
    TOKENS,
    Ints,
    Requests,
    Rows,
    keys_of,
    make_requests,
)
from executor.data.sources import read_rows
from planner.spec.data import DataFile, EvaluationSet, TooLong, files_of
from planner.spec.errors import UserError
from planner.spec.lengths import sample
from planner.spec.workload import Workload

MOST_LINES = 4  # that a message names
UNNAMED = "held-out"  # what the evaluation of `data.evaluation` is called


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of one batch, with the texts, the answers and all columns that rewards and an
    evaluation need."""

    requests: Requests
    texts: list[str]
    answers: list[Any]
    columns: list[dict[str, Any]] = field(default_factory=list)
    where: list[str] = field(default_factory=list)  # file:line; nothing for random tokens

    def take(self, rows: Rows) -> "Prompts":
        def chosen(given: list[Any]) -> list[Any]:
            return [given[row] for row in rows.tolist()] if given else []

        return Prompts(
            requests=self.requests.take(rows),
            texts=chosen(self.texts),
            answers=chosen(self.answers),
            columns=chosen(self.columns),
            where=chosen(self.where),
        )

    def named(self, rows: Rows) -> str:
        """Some of the prompts, by the lines that they are in."""
        if not self.where:
            return f"{len(rows)} prompts of random tokens"
        lines = list(dict.fromkeys(self.where[row] for row in rows.tolist()))
        more = f" and {len(lines) - MOST_LINES} more" if len(lines) > MOST_LINES else ""
        return f"the prompts of {', '.join(lines[:MOST_LINES])}{more}"


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What one evaluation asks: the prompts, each as often in a row as it is sampled."""

    settings: EvaluationSet
    prompts: Prompts


class PromptSource(Protocol):
    """Where the prompts of a step come from, and how responses read. `held_out` is the number of
    responses of all evaluations; `notes` are lines to say once."""

    held_out: int
    notes: list[str]

    def step(self, step: int) -> Prompts: ...
    def evaluations(self) -> list[HeldOut]: ...
    def decode(self, responses: Sequence[Ints]) -> list[str]: ...
    def stopped(self, responses: Sequence[Ints]) -> list[int | None]: ...
    def save_tokenizer(self, directory: Path) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt as the model gets it."""

    tokens: Ints
    text: str
    answer: Any
    columns: dict[str, Any]
    where: str


class Dataset:
    """Prompts from the workload's data, in the order of `Shuffled`. Raises UserError for what is
    wrong with any of them."""

    def __init__(self, workload: Workload, tokenizer: Any) -> None:
        assert workload.data is not None
        self._workload, self._data, self._tokenizer = workload, workload.data, tokenizer
        self._before, self._after = _framing(tokenizer)
        self._chat = Chat(workload.data, tokenizer)
        self.notes: list[str] = []
        files, seed = workload.data.files, workload.seed
        columns = workload.data.prompt, workload.data.answer
        read = [self._read(file, columns) for file in files]
        weighted = any(file.weight is not None for file in files)
        self._pools = read if weighted else [[prompt for part in read for prompt in part]]
        weights = [file.weight or 1.0 for file in files] if weighted else [1.0]
        self._order = Shuffled([len(pool) for pool in self._pools], weights, seed)
        self._held_out = [
            HeldOut(settings=settings, prompts=self._asked_again(number, settings))
            for number, settings in enumerate(self._sets())
        ]
        self.held_out = sum(len(each.prompts.texts) for each in self._held_out)
        self._note_bare()
        self._note_judge()

    def _sets(self) -> Iterator[EvaluationSet]:
        """The evaluations, that of `data.evaluation` first."""
        if self._data.evaluation is not None:
            yield EvaluationSet(name=UNNAMED, files=self._data.evaluation)
        yield from self._workload.evaluation

    def _asked_again(self, number: int, settings: EvaluationSet) -> Prompts:
        """The prompts of an evaluation, each as often in a row as it is to be sampled."""
        # A reward function may do without answers; what is compared with them does not.
        compared = not self._workload.host_rewards
        columns = settings.prompt or self._data.prompt, settings.answer or self._data.answer
        found = [
            prompt
            for file in files_of(settings.files)
            for prompt in self._read(file, columns, need_answer=compared)
        ]
        samples, seed = settings.samples, self._workload.seed
        keys = keys_of(len(found), seed)
        if settings.name != UNNAMED:
            rows = [(p, s) for p in range(len(found)) for s in range(samples)]
            keys = np.array([(seed, number, *row, EVALUATION) for row in rows], dtype=np.int64)
        return self._prompts([prompt for prompt in found for _ in range(samples)], keys)

    def _note_bare(self) -> None:
        if self._chat.bare and self._data.template is None:
            self.notes.append(
                "prompts are texts and go to the model as they are, though its tokenizer has a "
                'chat template: data.template = "chat" applies it, "none" says that this is meant'
            )

    def _note_judge(self) -> None:
        """The GPUs of a reward model have their order of calls, in which evaluations are not."""
        if self._held_out and "reward" in self._workload.models:
            others = self._workload.host_rewards
            how = "score only with the other rewards" if others else "compare with the answers"
            self.notes.append(
                f"evaluations {how}: a reward model is asked for the batches of steps alone, as "
                "the plan orders its GPUs' calls"
            )

    # --- reading ---

    def _read(
        self, file: DataFile, columns: tuple[str, str | None], *, need_answer: bool = False
    ) -> list[Prompt]:
        """The prompts of a source, tokenized, and as long as the workload allows."""
        asked = [asked_in(row, *columns, need_answer=need_answer) for row in read_rows(file)]
        texts = [self._chat.text(each) for each in asked]
        tokens = self._tokens([text for text, _ in texts], [framed for _, framed in texts])
        fitting = self._fit(file.name, [each.where for each in asked], tokens)
        return [
            Prompt(
                tokens=np.asarray(tokens, dtype=np.int32),
                text=text,
                answer=each.answer,
                columns=each.columns,
                where=each.where,
            )
            for each, (text, _), tokens in zip(asked, texts, fitting, strict=True)
            if tokens is not None
        ]

    def _tokens(self, prompts: list[str], framed: list[bool]) -> list[list[int]]:
        """The tokens of prompts. Those that a template `framed` have all special tokens. Others get
        what the tokenizer puts before any text (a BOS) once, also where they begin with it, and
        nothing after it: a prompt goes on in its response."""
        found: list[list[int]] = [[] for _ in prompts]
        for special in (False, True):
            rows = [row for row, has in enumerate(framed) if has != special]
            asked = [prompts[row] for row in rows]
            if not asked:
                continue
            made = self._tokenizer(asked, add_special_tokens=special, return_attention_mask=False)
            for row, tokens in zip(rows, made["input_ids"], strict=True):
                found[row] = self._once(tokens) if special else tokens
        return found

    def _once(self, tokens: list[int]) -> list[int]:
        before, tokens = self._before, tokens[: len(tokens) - len(self._after)]
        twice = before and tokens[: 2 * len(before)] == before + before
        return tokens[len(before) :] if twice else tokens

    def _fit(self, name: str, where: list[str], prompts: list[list[int]]) -> list[list[int] | None]:
        """The tokens of prompts that the workload allows; None for those that are dropped."""
        longest, how = self._workload.prompt.longest, self._data.overlong
        wrong = [row for row, tokens in enumerate(prompts) if not 0 < len(tokens) <= longest]
        too_long = [row for row in wrong if prompts[row]]
        if wrong and (how == "error" or len(too_long) < len(wrong)):
            raise self._does_not_fit(where, prompts, wrong)
        if not too_long:
            return list(prompts)
        self.notes.append(_what_was_done(how, name, len(too_long), len(prompts), longest))
        if how == "truncate":
            return [tokens[-longest:] for tokens in prompts]
        if len(too_long) == len(prompts):
            raise UserError(
                f"{name}: all {len(prompts)} prompts have more than {longest} tokens, so none is "
                "left; raise the prompt length in the workload and search again"
            )
        return [tokens if len(tokens) <= longest else None for tokens in prompts]

    def _does_not_fit(
        self, where: list[str], prompts: list[list[int]], wrong: list[int]
    ) -> UserError:
        longest, first = self._workload.prompt.longest, wrong[0]
        others = ""
        if len(wrong) > 1:
            most = max(len(prompts[row]) for row in wrong)
            others = f" (and {len(wrong) - 1} more of {len(prompts)}; the longest has {most})"
        return UserError(
            f"{where[first]}: the prompt has {len(prompts[first])} tokens, and the workload allows "
            f'1 to {longest}{others}; shorten such prompts, set data.overlong to "drop" or '
            '"truncate", or raise the prompt length in the workload and search again'
        )

    # --- what a step gets ---

    def step(self, step: int) -> Prompts:
        samples, seed = self._workload.group, self._workload.seed
        count = self._workload.generated // samples
        places = self._order.places(step * count, (step + 1) * count)
        chosen = [self._pools[pool][place] for pool, place in places for _ in range(samples)]
        return self._prompts(chosen, keys_of(count, seed, step, samples=samples))

    def evaluations(self) -> list[HeldOut]:
        return self._held_out

    def _prompts(self, chosen: list[Prompt], keys: Any) -> Prompts:
        count = len(chosen)
        longest = np.full(count, self._workload.response.longest)
        tokens = [prompt.tokens for prompt in chosen]
        return Prompts(
            requests=make_requests(tokens, keys, longest, np.zeros(count, dtype=bool)),
            texts=[prompt.text for prompt in chosen],
            answers=[prompt.answer for prompt in chosen],
            columns=[prompt.columns for prompt in chosen],
            where=[prompt.where for prompt in chosen],
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


def _what_was_done(how: TooLong, name: str, count: int, of: int, longest: int) -> str:
    done = "dropped" if how == "drop" else f"cut to their last {longest}"
    return f"{name}: {count:,} of {of:,} prompts have more than {longest} tokens and were {done}"


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
    notes: list[str] = []

    def __init__(self, workload: Workload) -> None:
        self._workload = workload

    def step(self, step: int) -> Prompts:
        workload = self._workload
        generated, samples, seed = workload.generated, workload.group, workload.seed
        prompts = sample(workload.prompt, generated // samples, seed, step, PROMPT_LENGTHS)
        responses = sample(workload.response, generated, seed, step, RESPONSE_LENGTHS)
        rng = np.random.default_rng((seed, step, TOKENS))
        drawn = [
            rng.integers(workload.actor.shape.vocab, size=n, dtype=np.int32)
            for n in prompts.tolist()
        ]
        tokens = [prompt for prompt in drawn for _ in range(samples)]
        keys = keys_of(len(drawn), seed, step, samples=samples)
        requests = make_requests(tokens, keys, responses, np.ones(generated, dtype=bool))
        texts, none = self.decode(tokens), [None] * len(tokens)
        return Prompts(requests=requests, texts=texts, answers=none, columns=[{} for _ in none])

    def evaluations(self) -> list[HeldOut]:
        return []

    def stopped(self, responses: Sequence[Ints]) -> list[int | None]:
        return [None] * len(responses)

    def decode(self, responses: Sequence[Ints]) -> list[str]:
        return [" ".join(map(str, response)) for response in responses]

    def save_tokenizer(self, directory: Path) -> None:
        """There is none."""
