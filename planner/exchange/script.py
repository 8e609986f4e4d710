"""A launch script: sections of options with a comment on each, and what a framework cannot say."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Any

COMMENT_WIDTH = 96


@dataclass
class Script:
    """A command with its options. `variables` are set at the beginning, and can be set otherwise
    when the script is called: name -> default and what it is; one without a default has to be.
    `unsaid` is what the framework has no option for."""

    head: Sequence[str]
    command: str
    separator: str  # between an option and its value
    variables: dict[str, tuple[str, str]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    unsaid: list[str] = field(default_factory=list)

    def section(self, title: str) -> None:
        self.lines += ["", *(f"  # {line}" for line in wrap(title, COMMENT_WIDTH))]

    def add(self, option: str, value: Any = None, why: str = "") -> None:
        """An option with its value, or alone; a value `$NAME` is a variable."""
        text = option if value is None else f"{option}{self.separator}{_quoted(value)}"
        self.lines.append(f"  {text}" + (f"  # {why}" if why else ""))

    def variable(self, name: str, default: str, what: str) -> str:
        """A variable that the options may name; returns how they do."""
        self.variables[name] = (default, what)
        return f"${name}"

    def text(self) -> str:
        lines = ["#!/usr/bin/env bash", *comments(self.head), "set -euo pipefail", ""]
        for name, (default, what) in self.variables.items():
            lines.append(f"# {what}")
            missing, known = f'{name}=${{{name}:?"set it: {what}"}}', _quoted(default)
            lines.append(f"{name}=${{{name}:-{known}}}" if default else missing)
        lines += unsaid_lines(self.unsaid)
        lines += [
            "",
            "options=(",
            *self.lines[1:],
            ")",
            "",
            f'{self.command} "${{options[@]}}" "$@"',
        ]
        return "\n".join(lines) + "\n"


def comments(lines: Sequence[str]) -> Iterator[str]:
    for line in lines:
        yield from (f"# {part}" for part in wrap(line, COMMENT_WIDTH))


def unsaid_lines(unsaid: Sequence[str]) -> Iterator[str]:
    """Comments on what a framework has no option for."""
    if unsaid:
        yield from ("", "# What cannot be expressed:")
    for what in unsaid:
        first, *rest = wrap(what, COMMENT_WIDTH)
        yield from (f"# - {first}", *(f"#   {line}" for line in rest))


def _quoted(value: Any) -> str:
    if isinstance(value, bool):
        return str(value)
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f'"{text}"' if text.startswith(("$", "[$")) else shlex.quote(text)
