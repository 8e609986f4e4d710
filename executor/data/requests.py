"""What is asked of engines, as arrays, and what every random choice is keyed by. All data here is
plain numpy: it runs on the controller and travels through Ray's object store."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Rows = NDArray[np.int64]

# The last word of every key (seed, ...) says what it is for. The first two are the planner's, with
# which it draws the same lengths. numpy takes (a, b) and (a, b, 0) for one key; so only the first
# may be 0, whose key is none's beginning.
PROMPT_LENGTHS, RESPONSE_LENGTHS, TOKENS, ORDER, MINIBATCHES, SAMPLING, EVALUATION = range(7)


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

    def distinct(self) -> tuple[Rows, Rows]:
        """The first row of each prompt that stands once or several times in a row, and for each
        row the number of its prompt among these."""
        prompts = self.prompts()
        new = [
            row == 0 or not np.array_equal(prompt, prompts[row - 1])
            for row, prompt in enumerate(prompts)
        ]
        return np.flatnonzero(new), np.cumsum(new) - 1


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


def keys_of(count: int, *key: int, samples: int = 1) -> NDArray[np.int64]:
    """The keys (..., prompt, sample, purpose) of each sample of `count` prompts."""
    rows = [(prompt, sample) for prompt in range(count) for sample in range(samples)]
    return np.array([(*key, *row, SAMPLING) for row in rows], dtype=np.int64)


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


def permutation(count: int, *key: int) -> Rows:
    """An order of `count` things, fixed by a key whose last word is a purpose."""
    return np.random.default_rng(key).permutation(count)
