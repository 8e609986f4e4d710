"""Mappings as TOML. The standard library reads it and does not write it."""

import json
import re
from collections.abc import Mapping
from typing import Any


def toml_text(data: Mapping[str, Any], comments: tuple[str, ...] = ()) -> str:
    """A mapping of strings, numbers, truth values, lists and mappings as a TOML file below some
    comments. Keys whose value is None are left out, for TOML has no such value.

    >>> print(toml_text({"a": 1, "b": {"c": [True, "x"]}}), end="")
    a = 1
    <BLANKLINE>
    [b]
    c = [true, "x"]
    """
    lines = [f"# {line}" for line in comments]
    lines += _section(data, ())
    return "\n".join(lines).lstrip("\n") + "\n"


def _section(data: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    """The lines of a section: its own keys first, for a section ends where the next one begins."""
    plain = {k: v for k, v in data.items() if not isinstance(v, Mapping) and v is not None}
    inner = {key: value for key, value in data.items() if isinstance(value, Mapping)}
    lines = [f"{_key(key)} = {_value(value)}" for key, value in plain.items()]
    if path and (lines or not inner):
        lines = ["", f"[{'.'.join(map(_key, path))}]", *lines]
    for key, value in inner.items():
        lines += _section(value, (*path, key))
    return lines


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _string(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        given = {key: each for key, each in value.items() if each is not None}
        return "{ " + ", ".join(f"{_key(key)} = {_value(given[key])}" for key in given) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    return _string(str(value))


def _string(text: str) -> str:
    """A TOML string. It is written as JSON writes it, which escapes all that TOML has escaped but
    the character 127."""
    return json.dumps(text).replace("\x7f", "\\u007f")
