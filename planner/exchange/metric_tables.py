"""Metrics by step: a table as Weights & Biases and TensorBoard export it, or a console log with a
mapping of metrics for each step, as OpenRLHF prints it."""

import ast
import csv
import io
import re
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path

from planner.spec.errors import UserError
from planner.spec.files import read_text

STEP_MAPPING = re.compile(r"Global step (\d{1,15}): (\{.*\})")
EXTREMES = ("__MIN", "__MAX")  # further columns of Weights & Biases
OF_STEP, OF_TAG = "Step", "Value"  # the columns of one tag's table by TensorBoard

StepMetrics = dict[int, dict[str, float]]


def read_metrics(path: Path) -> StepMetrics:
    """The metrics of each step by their names. Raises UserError."""
    text = read_text(path, damaged=True)
    if STEP_MAPPING.search(text):
        return _of_log(text)
    return _of_table(text, path)


def _of_log(text: str) -> StepMetrics:
    rows: StepMetrics = {}
    for line in text.splitlines():
        if not (match := STEP_MAPPING.search(line)):
            continue
        try:
            metrics = ast.literal_eval(match[2])
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue  # cut, or holds what is no number
        if isinstance(metrics, dict):
            numbers = {str(key): _number(str(value)) for key, value in metrics.items()}
            known = {key: value for key, value in numbers.items() if value is not None}
            rows[int(match[1])] = known
    return rows


def _of_table(text: str, path: Path) -> StepMetrics:
    try:
        lines = list(csv.reader(io.StringIO(text)))
    except csv.Error as error:
        raise UserError(f"{path}: no table ({error}); export it as CSV") from None
    if len(lines) < 2 or len(lines[0]) < 2:
        raise UserError(f"{path}: no table with a line for each step; export it as CSV")
    titles = [title.rpartition(" - ")[2] for title in lines[0]]
    at = titles.index(OF_STEP) if OF_STEP in titles else None
    rows: StepMetrics = {}
    for number, line in enumerate(lines[1:]):
        numbers = {t: _number(x) for t, x in zip(titles, line, strict=False)}
        known = {
            title: value
            for title, value in numbers.items()
            if value is not None and not title.endswith(EXTREMES)
        }
        step = known.get(OF_STEP) if at is not None else float(number)
        if step is not None and 0 <= step < 2**53:
            rows.setdefault(int(step), {}).update(known)
    return rows


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if isfinite(value) else None


def columns_of(
    rows: StepMetrics, columns: Mapping[str, str], path: Path, seconds_per_unit: float
) -> tuple[tuple[int, dict[str, float]], ...]:
    """The seconds of each phase in its column, of all steps that have every column. A column that
    is a file is TensorBoard's table of one tag. Raises UserError."""
    found: dict[str, dict[int, float]] = {}
    for phase, column in columns.items():
        beside = path.parent / column
        if column.endswith(".csv") and beside.is_file():
            of_tag = _of_table(read_text(beside, damaged=True), beside)
            values = {step: row[OF_TAG] for step, row in of_tag.items() if OF_TAG in row}
        else:
            values = {step: row[column] for step, row in rows.items() if column in row}
        if not values:
            raise UserError(f"{path}: no step has {column!r}; {_has(rows)}")
        found[phase] = values
    whole = set.intersection(*(set(values) for values in found.values()))
    if not whole:
        raise UserError(f"{path}: no step has all of {', '.join(columns.values())}")
    steps = []
    for step in sorted(whole):
        seconds = {phase: values[step] * seconds_per_unit for phase, values in found.items()}
        if min(seconds.values()) < 0:
            raise UserError(f"{path}: step {step} has a column below 0; is it in seconds?")
        steps.append((step, seconds))
    return tuple(steps)


def _has(rows: StepMetrics) -> str:
    names: Sequence[str] = sorted({name for row in rows.values() for name in row})
    if not names:
        return "there is no step with a number in it"
    told = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
    return f"the columns are {told}"
