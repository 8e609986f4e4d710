"""What verl prints: its whole configuration, then a line of metrics for each step.

The facts were read from verl 0.9.1: the v1 trainer and its console logger."""

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.exchange.known_models import CountedModel
from planner.spec.files import read_text

COLOURS = re.compile(r"\x1b\[[0-9;]*m")
STAMP = re.compile(r"^\d{9,}\.\d+ ")
PROCESS = re.compile(r"^\((\w[\w.]*) pid=\d+(?:, ip=[\d.]+)?\) ?")
STEP_LINE = re.compile(r"(?:^|\s)step:(\d{1,15}) - (.*)")
NUMBER_VALUE = re.compile(r"^(?:np\.\w+\()?([-+]?[\d.]+(?:e[-+]?\d+)?)\)?$", re.IGNORECASE)
COUNTED_LINE = re.compile(r"(\w+) contains ([\d.]+)B parameters")
MEMORY_LINE = re.compile(r"device memory used/total \(GB\): [\d.]+/([\d.]+)")
FAILED = re.compile(r"^(?:[\w.]*(?:Error|Exception)): .*")


@dataclass(frozen=True, kw_only=True)
class VerlLog:
    """The configuration, the metrics of each step by their names in verl, the models that it
    counted the parameters of, the GiB of a GPU, and the last line of an error that ended it."""

    config: dict[str, Any] | None
    steps: tuple[dict[str, float], ...]
    models: tuple[CountedModel, ...]
    memory_gib: float | None
    failure: str | None


def read_verl_log(path: Path) -> VerlLog:
    """Read a log, whether or not each line has a time and the name of its process before it. Raises
    UserError."""
    text = read_text(path, damaged=True)
    lines = [_bare(line) for line in text.splitlines()]
    steps: dict[int, dict[str, float]] = {}
    models, memory, failure = list[CountedModel](), None, None
    for _, line in lines:
        if match := STEP_LINE.search(line):
            steps[int(match[1])] = _metrics(match[2])
        elif match := COUNTED_LINE.search(line):
            models.append(CountedModel(architecture=match[1], billions=_float(match[2])))
        elif match := MEMORY_LINE.search(line):
            memory = _float(match[1])
        elif FAILED.match(line):
            failure = line[:120]
    return VerlLog(
        config=_config(lines),
        steps=tuple(steps[number] for number in sorted(steps)),
        models=tuple(models),
        memory_gib=memory,
        failure=failure,
    )


def _bare(line: str) -> tuple[str, str]:
    """The process of a line, and the line without what stands before it."""
    line = STAMP.sub("", COLOURS.sub("", line))
    match = PROCESS.match(line)
    return (match[1], line[match.end() :]) if match else ("", line)


def _metrics(text: str) -> dict[str, float]:
    """The numbers of a line `name:number - name:number - ...`."""
    found = {}
    for part in text.split(" - "):
        name, _, value = part.strip().rpartition(":")
        if match := NUMBER_VALUE.match(value):
            found[name] = _float(match[1])
    return found


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _config(lines: Iterable[tuple[str, str]]) -> dict[str, Any] | None:
    """The first mapping with the section of the actor that the lines of one process print; None if
    there is none, or its end is missing."""
    process, parts = None, list[str]()
    for name, line in lines:
        if process is None:
            if not line.startswith("{'actor_rollout_ref'"):
                continue
            process = name
        elif name != process:
            continue
        parts.append(line)
        if line.rstrip().endswith("}") and (found := _mapping("\n".join(parts))) is not None:
            return found
    return None


def _mapping(text: str) -> dict[str, Any] | None:
    if text.count("{") != text.count("}"):  # quick, and nearly always right
        return None
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    return found if isinstance(found, dict) else None
