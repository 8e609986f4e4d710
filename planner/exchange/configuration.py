"""A configuration in YAML: nested sections of options with a comment on each, and what a framework
cannot say."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Any

from planner.exchange.script import COMMENT_WIDTH, comments, unsaid_lines

PLAIN_TEXT = re.compile(r"[A-Za-z][\w./-]*|\$\{[\w.:/-]+\}")  # text that YAML takes as it is
RESERVED = {"yes", "no", "on", "off", "true", "false", "null", "y", "n"}


@dataclass
class Configuration:
    """Options by their path, such as `actor.optimizer.lr`. `notes` are comments above a section or
    an option, `unsaid` is what the framework has no option for."""

    head: Sequence[str]
    tree: dict[str, Any] = field(default_factory=dict)
    whys: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    unsaid: list[str] = field(default_factory=list)

    def add(self, path: str, value: Any, why: str = "") -> None:
        *sections, last = path.split(".")
        place = self.tree
        for name in sections:
            place = place.setdefault(name, {})
        place[last] = value
        self.whys[path] = why

    def note(self, path: str, text: str) -> None:
        self.notes[path] = text

    def variable(self, name: str, default: str) -> str:
        """A value that is taken from the environment; without a default it has to be there."""
        return f"${{oc.env:{name},{default}}}" if default else f"${{oc.env:{name}}}"

    def text(self) -> str:
        lines = [*comments(self.head), *unsaid_lines(self.unsaid)]
        lines += self._written(self.tree, "", "")
        return "\n".join(lines) + "\n"

    def _written(self, tree: dict[str, Any], prefix: str, indent: str) -> Iterator[str]:
        for name, value in tree.items():
            path = f"{prefix}{name}"
            if not prefix and isinstance(value, dict):
                yield ""
            for line in wrap(self.notes.get(path, ""), COMMENT_WIDTH):
                yield f"{indent}# {line}"
            if isinstance(value, dict) and value:
                yield f"{indent}{name}:"
                yield from self._written(value, f"{path}.", f"{indent}  ")
                continue
            why = self.whys.get(path, "")
            yield f"{indent}{name}: {_scalar(value)}" + (f"  # {why}" if why else "")


def _scalar(value: Any) -> str:
    """A value as YAML has it. A number in powers of ten has a point, else it would be text."""
    if isinstance(value, float):
        text = f"{value:g}"
        return text.replace("e", ".0e") if "e" in text and "." not in text else text
    if isinstance(value, str):
        plain = PLAIN_TEXT.fullmatch(value) and value.lower() not in RESERVED
        return value if plain else json.dumps(value)
    return json.dumps(value)
