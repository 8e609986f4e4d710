"""Responses as a reward model with a tokenizer of its own reads them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from executor.data.batch import Sequences
from executor.data.requests import Ints
from executor.data.reward_forms import Samples
from planner.spec.errors import UserError
from planner.spec.wording import reason_of


class Reader:
    """Turns samples into the tokens of a model's own `tokenizer`: through its chat template, or
    without one as the prompt and the response in one text. What is longer than the `longest` that
    the model has positions for loses its beginning."""

    def __init__(self, tokenizer: Any, longest: int | None) -> None:
        self._tokenizer, self._longest = tokenizer, longest
        self._template = getattr(tokenizer, "chat_template", None)

    def read(self, samples: Samples) -> Sequences:
        """The samples as sequences, whose last token is where they are scored. Raises UserError
        where the template fails."""
        rows = zip(samples.asked, samples.prompts, samples.responses, strict=True)
        return _sequences([self._tokens(*row) for row in rows])

    def _tokens(self, asked: Any, prompt: str, response: str) -> Ints:
        if self._template:
            messages = asked if isinstance(asked, list) else _message("user", asked)
            found = self._rendered([*messages, *_message("assistant", response)])
        else:
            whole = asked + response if isinstance(asked, str) else prompt + response
            found = self._tokenizer(whole, return_attention_mask=False)["input_ids"]
        kept = found[-self._longest :] if self._longest is not None else found
        return np.array(kept or [0], dtype=np.int32)

    def _rendered(self, messages: list[dict[str, Any]]) -> list[int]:
        try:
            tokens: list[int] = self._tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=False
            )
        except Exception as error:  # whatever a template raises
            reason = reason_of(error, named=True)
            raise UserError(
                f"reward: the chat template of its tokenizer fails ({reason}); mend it, or save "
                "the tokenizer without one"
            ) from None
        return tokens


def _message(role: str, content: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]


def _sequences(rows: Sequence[Ints]) -> Sequences:
    """Sequences with these tokens, of which the last one counts as the response."""
    lengths = np.array([len(row) for row in rows], dtype=np.int32)
    tokens = np.zeros((len(rows), int(lengths.max())), dtype=np.int32)
    for row, given in enumerate(rows):
        tokens[row, : len(given)] = given
    return Sequences(
        tokens=tokens,
        prompt_lengths=lengths - 1,
        response_lengths=np.ones_like(lengths),
        log_probs=np.zeros((len(rows), 1), dtype=np.float32),
        weights_versions=np.zeros((len(rows), 1), dtype=np.int32),
    )
