"""Strings that end responses, looked for while these are generated."""

from collections.abc import Sequence
from typing import Any

from executor.data.tokenizer import tokenizer_of
from planner.spec.tokenizers import stop_strings
from planner.spec.workload import Workload

PARTIAL = "\ufffd"  # what a token decodes to that has a part of a character
MARGIN = 4  # tokens: the first of a text may decode to another text than within one


class StopStrings:
    """Says of a response, asked after each of its tokens, whether it has completed one of some
    strings. Few tokens can complete one, and only behind these a text is decoded: first the end of
    it, which is short. What is missed here is cut later (`Dataset.stopped`), and costs time only.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Any) -> None:
        self._strings, self._tokenizer = strings, tokenizer
        self._last = {string[-1] for string in strings}
        self._longest = MARGIN + max(len(string.encode()) for string in strings)
        self._may_complete: dict[int, bool] = {}  # by token, of those that were seen

    def completed(self, tokens: Sequence[int]) -> bool:
        """Whether the response has one, asked for the first time with its last token."""
        if not self._may(tokens[-1]):
            return False
        return self._has_one(tokens[-self._longest :]) and self._has_one(tokens)

    def _may(self, token: int) -> bool:
        if token not in self._may_complete:
            text = self._decode([token])
            spaced = " " in self._last  # a space at the beginning of a text may be left out
            found = spaced or PARTIAL in text or not self._last.isdisjoint(text)
            self._may_complete[token] = found
        return self._may_complete[token]

    def _has_one(self, tokens: Sequence[int]) -> bool:
        text = self._decode(tokens)
        return any(string in text for string in self._strings)

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=False)
        return text


def stops_of(workload: Workload) -> StopStrings | None:
    """What looks for a workload's strings; None if there are none that are no tokens."""
    strings = stop_strings(workload)
    if not strings or workload.actor.path is None:
        return None
    return StopStrings(strings, tokenizer_of(workload.actor.path))
