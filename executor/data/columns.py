"""What a row says: its prompt and its answer, in the columns that the workload names."""

from dataclasses import dataclass
from typing import Any

from executor.data.rows import Row
from planner.spec.errors import UserError

Message = dict[str, Any]  # with role and content
MOST_KEYS = 12  # that a message names
ANSWER = "answer"  # the column of answers, if there is one and none is named


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A prompt, a text or messages, and the answer to it of any JSON type, with all columns of its
    row; `where` it stands, such as file:line."""

    prompt: str | list[Message]
    answer: Any
    columns: dict[str, Any]
    where: str


def asked_in(row: Row, prompt: str, answer: str | None, *, need_answer: bool = False) -> Asked:
    """What a row asks, with columns of these names. An answer may be missing where none is named
    and none is needed. Raises UserError."""
    there, question = value_at(row.columns, prompt)
    if not there:
        raise _no_column(row, prompt, "prompt")
    there, wanted = value_at(row.columns, answer or ANSWER)
    if answer is not None and not there:
        raise _no_column(row, answer, "answer")
    if need_answer and wanted is None:
        raise UserError(
            f"{row.where}: needs an answer in column {answer or ANSWER!r}, for responses are "
            "compared with it; add it, or name another column with data.answer"
        )
    _check_prompt(row.where, prompt, question)
    _check_unicode(f"{row.where}: {prompt}", question)
    _check_unicode(f"{row.where}: {answer or ANSWER}", wanted)
    messages = question if isinstance(question, str) else [_without_none(m) for m in question]
    return Asked(prompt=messages, answer=wanted, columns=row.columns, where=row.where)


def _no_column(row: Row, name: str, key: str) -> UserError:
    names = names_of(row.columns)
    shown = ", ".join(names[:MOST_KEYS]) + (", ..." if len(names) > MOST_KEYS else "")
    return UserError(
        f"{row.where}: has no column {name!r}; it has {shown or 'none'}: name the right one with "
        f"data.{key}"
    )


def _check_prompt(where: str, name: str, question: Any) -> None:
    """Raise UserError unless this is a text or a conversation that asks for an answer."""
    if isinstance(question, str) and question:
        return
    if not isinstance(question, list) or not question:
        raise UserError(
            f"{where}: column {name!r} needs a text that is not empty, or a list of messages, not "
            f"{repr(question)[:60]}"
        )
    for number, message in enumerate(question, start=1):
        texts = [message.get(key) for key in ("role", "content")] if _is_dict(message) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(
                f"{where}: message {number} of column {name!r} needs a role and a content that are "
                f"texts, not {repr(message)[:60]}"
            )
    if question[-1]["role"] == "assistant":
        raise UserError(
            f"{where}: column {name!r} ends with an assistant's message, and the model is to write "
            "that; leave it out"
        )


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _without_none(message: Message) -> Message:
    """A message without the keys that others of its table have, and it has not."""
    return {key: value for key, value in message.items() if value is not None}


def _check_unicode(where: str, value: Any) -> None:
    """Raise UserError for half of a surrogate pair, which JSON can write and no tokenizer reads,
    anywhere in a value."""
    match value:
        case str():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                half = ascii(value[error.start])[1:-1]
                raise UserError(
                    f"{where}: character {error.start + 1} is {half}, half of a surrogate pair; "
                    "write the other half too, or remove it"
                ) from None
        case dict():
            for key, part in value.items():
                _check_unicode(where, key)
                _check_unicode(where, part)
        case list():
            for part in value:
                _check_unicode(where, part)


def value_at(columns: dict[str, Any], name: str) -> tuple[bool, Any]:
    """Whether a row has a column, and its value; `a.b` is `b` of the mapping in column `a` unless
    a column is called so."""
    if name in columns:
        return True, columns[name]
    found: Any = columns
    for part in name.split("."):
        if not isinstance(found, dict) or part not in found:
            return False, None
        found = found[part]
    return True, found


def names_of(columns: dict[str, Any]) -> list[str]:
    """The names by which the columns of a row can be had, nested ones included."""
    names = []
    for name, value in columns.items():
        names.append(name)
        if isinstance(value, dict):
            names += [f"{name}.{part}" for part in names_of(value)]
    return names
