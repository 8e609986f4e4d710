"""Whether the models of a workload share a tokenizer: whether a number means the same token to all.

What counts is what each number stands for, which is not told by how many there are: vocabularies
are padded to round sizes, and tokenizers of one size differ. How text is cut into tokens does not
count, because only the actor's tokenizer is asked to."""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.spec.errors import UserError

if TYPE_CHECKING:  # a workload asks this module
    from planner.spec.workload import Workload

Vocabulary = Mapping[int, str]  # what each number stands for


def check_tokenizers(workload: "Workload", *, must_know: bool = False) -> None:
    """Raise UserError for a role to whose model a token of the actor means something else. Random
    weights know no tokens; they need room for the actor's. Of a directory without a tokenizer
    nothing is known: that is refused only where one `must_know` and there is text."""
    actors = None if workload.actor.path is None else tokens_of(workload.actor.path)
    for role, model in workload.models.items():
        if role == "actor" or model.path == workload.actor.path is not None:
            continue
        if role == "reward" and reads_text(workload):
            continue
        theirs = None if model.path is None else tokens_of(model.path)
        if actors is not None and (theirs is not None or model.random_weights):
            _check_same(role, actors, theirs, model.shape.vocab)
        elif must_know and actors is not None and workload.data is not None:
            raise UserError(
                f"{role}: {model.path} holds no tokenizer to compare with the actor's "
                "(tokenizer.json); save it beside the model"
            )
        elif must_know and model.shape.vocab != workload.actor.shape.vocab:
            raise UserError(
                f"{role}: its vocabulary has {model.shape.vocab} tokens and the actor's "
                f"{workload.actor.shape.vocab}; "
                "all models of a workload share one tokenizer"
            )


def _check_same(role: str, actors: Vocabulary, theirs: Vocabulary | None, vocab: int) -> None:
    for number, token in sorted(actors.items()):
        if number >= vocab:
            raise UserError(
                f"{role}: its vocabulary has {vocab} tokens, and the actor's tokenizer has token "
                f"{number} ({token!r}); all models of a workload share one tokenizer"
            )
        if theirs is not None and theirs.get(number) != token:
            other = theirs.get(number)
            means = f"means {other!r} to this model" if other is not None else "is unknown to it"
            raise UserError(
                f"{role}: another tokenizer than the actor's: token {number}, {token!r} to the "
                f"actor, {means}; name a model with the actor's tokenizer"
            )


def reads_text(workload: "Workload") -> bool:
    """Whether the reward model has another tokenizer than the actor, and there is text that it can
    read by it. Raises UserError for a tokenizer that cannot be read."""
    model, actor = workload.models.get("reward"), workload.actor
    if workload.data is None or model is None or model.path is None or actor.path is None:
        return False
    theirs, ours = tokens_of(model.path), tokens_of(actor.path)
    if theirs is None or ours is None:
        return False
    return any(theirs.get(number) != token for number, token in ours.items())


def tokens_of(directory: Path) -> Vocabulary | None:
    """What each number stands for, by the tokenizer in a model's directory; None where there is no
    `tokenizer.json`. Raises UserError for one that cannot be read."""
    files = [directory / name for name in ("tokenizer.json", "tokenizer_config.json")]
    if not files[0].is_file():
        return None
    return _read(directory, tuple(_changed(file) for file in files))


def stop_tokens(workload: "Workload") -> list[int]:
    """The tokens at which an engine ends a response besides the model's EOS: those that the
    workload names by number, and those of its strings that the tokenizer has as added tokens."""
    stops = workload.data.stop if workload.data else ()
    found = [stop for stop in stops if isinstance(stop, int)]
    directory = workload.actor.path
    if directory is not None and (directory / "tokenizer.json").is_file():
        added = _json(directory / "tokenizer.json").get("added_tokens") or ()
        found += [token["id"] for token in added if token["content"] in stops]
    return list(dict.fromkeys(found))


def stop_strings(workload: "Workload") -> list[str]:
    """The strings that end a response and are no tokens of their own."""
    stops = workload.data.stop if workload.data else ()
    directory = workload.actor.path
    added: set[str] = set()
    if directory is not None and (directory / "tokenizer.json").is_file():
        listed = _json(directory / "tokenizer.json").get("added_tokens") or ()
        added = {token["content"] for token in listed}
    return [stop for stop in stops if isinstance(stop, str) and stop not in added]


def _changed(file: Path) -> int:
    return file.stat().st_mtime_ns if file.is_file() else 0


@lru_cache(maxsize=8)
def _read(directory: Path, changed: tuple[int, ...]) -> Vocabulary:
    """`changed` is when the files were: a file that changes is read again."""
    whole = _json(directory / "tokenizer.json")
    try:
        vocabulary = whole["model"]["vocab"]
        if isinstance(vocabulary, dict):
            found = {number: token for token, number in vocabulary.items()}
        else:  # of a unigram model: pairs of a token and its score
            found = {number: pair[0] for number, pair in enumerate(vocabulary)}
        found |= {token["id"]: token["content"] for token in whole.get("added_tokens") or ()}
        if (directory / "tokenizer_config.json").is_file():
            further = _json(directory / "tokenizer_config.json").get("added_tokens_decoder") or {}
            found |= {int(number): token["content"] for number, token in further.items()}
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        raise UserError(
            f"{directory}/tokenizer.json: not a tokenizer's file; save it again"
        ) from None
    return found


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{file}: the tokenizer cannot be loaded ({error}); save it again"
        ) from None
