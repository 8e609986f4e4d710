"""What a model said in a run, as text to page through."""

import json
from typing import Any

from planner.spec.files import Spec

INDENT = "    "


class SampleLine(Spec):
    """A line of samples.jsonl: a sequence of a step, or of an `evaluation` of this name."""

    step: int
    evaluation: str | None
    row: int
    prompt: str
    response: str
    answer: Any
    scores: dict[str, float | None]
    response_tokens: int
    truncated: bool
    weights_version: int
    staleness: int | None
    segments: list[tuple[int, int]] = []
    where: str | None

    @property
    def score(self) -> float | None:
        return self.scores.get("score")


def told(sample: SampleLine) -> str:
    """A sample as text: where it comes from and how it was scored, then what was asked and said.
    Control characters, which could change the terminal, are shown as what they are."""
    parts = [f"step {sample.step}, {sample.evaluation or 'sample'} {sample.row}"]
    parts += [f"{name} {_number(value)}" for name, value in sample.scores.items()]
    parts.append(f"{sample.response_tokens} tokens{', truncated' * sample.truncated}")
    if sample.staleness:
        parts.append(f"staleness {sample.staleness}")
    if sample.where:
        parts.append(sample.where)
    lines = [" · ".join(parts)]
    answer = sample.answer if isinstance(sample.answer, str) else json.dumps(sample.answer)
    texts = {"prompt": sample.prompt, "response": sample.response}
    texts |= {} if sample.answer is None else {"answer": answer}
    for name, text in texts.items():
        lines += [f"  {name}", *(INDENT + _shown(line) for line in text.split("\n"))]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _shown(line: str) -> str:
    return "".join(c if c.isprintable() or c == "\t" else ascii(c)[1:-1] for c in line)
