"""The result of a study: each cell's prediction with its measurement, and sums over all cells.
Numbers only; `study_page.py` and `study_data.py` write them down."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from planner.report.study_figures import Figures, MeasuredCell, figures_of, medians_of
from planner.spec.errors import UserError
from planner.spec.plan import Plan
from planner.spec.study import Cell, CellResult, Study
from planner.spec.timeline import Timeline, step_seconds

REFERENCES = ("split", "colocated")


@dataclass(frozen=True, kw_only=True)
class CellRow:
    """One cell: its plan and prediction, and what was measured, if it was. `same_as` names an
    earlier cell that has the same plan, and so its measurement."""

    cell: Cell
    plan: Plan
    predicted: Timeline
    predicted_seconds: float
    result: CellResult | None = None
    changed: bool = False  # it was measured, and its plan is another one since
    figures: Figures | None = None
    same_as: str | None = None
    # reference -> (predicted, measured)
    speed_ups: dict[str, tuple[float, float]] = field(default_factory=dict)


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def same_plan(one: Plan, other: Plan) -> bool:
    """Whether two plans do the same on the same GPUs."""
    keys = ("pools", "roles", "program", "cluster")
    return all(getattr(one, key) == getattr(other, key) for key in keys)


def read_result(directory: Path) -> CellResult | None:
    """The result in a cell's directory, if it is of the plan that lies there. Raises UserError."""
    if not (directory / "result.json").exists():
        return None
    result = CellResult.read(directory / "result.json")
    return result if result.plan_sha256 == sha256_of(directory / "plan.json") else None


def rows_of(study: Study, directory: Path) -> list[CellRow]:
    """All cells that are planned, in the study's order. Raises UserError."""
    rows: list[CellRow] = []
    for cell in study.cells:
        if (directory / cell.name / "plan.json").exists():
            rows.append(_row_of(cell, directory / cell.name, rows))
    if not rows:
        raise UserError(
            f"{directory} holds no plans of this study; write them with plan study --plan-only"
        )
    return _with_figures(study, rows, directory)


def _row_of(cell: Cell, directory: Path, before: Sequence[CellRow]) -> CellRow:
    """The plan and the prediction of a cell, and how its run ended. `before` are earlier cells."""
    plan = Plan.read(directory / "plan.json")
    predicted = Timeline.read(directory / "predicted.json")
    result = read_result(directory)
    firsts = [row for row in before if row.same_as is None]
    twin = next((row for row in firsts if same_plan(row.plan, plan)), None)
    return CellRow(
        cell=cell,
        plan=plan,
        predicted=predicted,
        predicted_seconds=step_seconds(predicted),
        result=result,
        changed=result is None and (directory / "result.json").exists(),
        same_as=twin.cell.name if twin else None,
    )


def _with_figures(study: Study, rows: Sequence[CellRow], directory: Path) -> list[CellRow]:
    """The rows with what was measured. A cell that has the plan of an earlier one has its
    measurement."""
    measured: dict[str, MeasuredCell] = {}
    for row in rows:
        if row.same_as in measured:
            measured[row.cell.name] = measured[row.same_as]
        elif row.result is not None and row.result.status == "done":
            measured[row.cell.name] = _measured(row, row.result, directory / row.cell.name)
    alone = _alone(rows, measured)
    found = []
    for row in rows:
        if row.cell.name in measured:
            here = measured[row.cell.name]
            ratios = alone.get(here.result.host, {})
            figures = figures_of(row.plan, row.predicted, here, ratios, study.matrix_flops)
            row = replace(row, figures=figures)
        found.append(row)
    return [replace(row, speed_ups=_speed_ups(row, found)) for row in found]


def _measured(row: CellRow, result: CellResult, directory: Path) -> MeasuredCell:
    compared = any(call.name == "old_logprobs" for call in row.plan.dataflow.calls)
    gap = log_prob_gap(directory / "metrics.jsonl") if compared else None
    return MeasuredCell(result, Timeline.read(directory / "timeline.json"), gap)


def log_prob_gap(metrics: Path) -> float | None:
    """The gap of step 0 in a run's metrics; None where they do not have it. Raises UserError."""
    if not metrics.exists():
        return None
    with metrics.open(encoding="utf-8") as lines:
        try:
            first = json.loads(next(lines, "{}"))
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{metrics}: its first line is no JSON ({error}); measure the cell again"
            ) from None
    gap = first.get("log_prob_gap") if isinstance(first, dict) and first.get("step") == 0 else None
    return gap if isinstance(gap, float) and np.isfinite(gap) else None


def _alone(
    rows: Sequence[CellRow], measured: dict[str, MeasuredCell]
) -> dict[str, dict[str, float]]:
    """Host -> call -> measured over predicted seconds where every call runs alone."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.cell.baseline == "colocated" and row.cell.name in measured:
            result, timeline, _ = measured[row.cell.name]
            predicted, taken = medians_of(row.predicted), medians_of(timeline)
            ratios = {call: taken[call] / predicted[call] for call in taken if predicted[call]}
            found.setdefault(result.host, ratios)
    return found


def _speed_ups(row: CellRow, rows: Sequence[CellRow]) -> dict[str, tuple[float, float]]:
    """The predicted and the measured speed-up of a row against each reference that was measured on
    the same host, since the host was started."""
    found: dict[str, tuple[float, float]] = {}
    if row.figures is None:
        return found
    for reference in rows:
        name, figures = reference.cell.baseline, reference.figures
        if name not in REFERENCES or figures is None:
            continue
        if figures.result.host == row.figures.result.host:
            predicted = reference.predicted_seconds / row.predicted_seconds
            found[name] = (predicted, figures.step_seconds / row.figures.step_seconds)
    return found


# --- over all cells ---


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A summary of the plans that were measured, each counted once. Errors are of the step time,
    without their sign."""

    plans: int
    median_error: float
    worst_error: float
    worst: str
    fastest_predicted: str
    fastest_measured: str
    behind: float  # seconds of the plan predicted fastest over those of the fastest, less 1
    worst_overhead: float
    log_prob_gaps: tuple[float, float] | None  # least and most
    memory_error: float | None  # worst
    memory_above: tuple[str, ...]  # cells that used more than was allowed


def summary_of(rows: Sequence[CellRow]) -> Summary | None:
    """None if nothing has been measured."""
    done = measured_rows(rows)
    if not done:
        return None
    errors = {row.cell.name: abs(figures.error) for row, figures in done}
    worst = max(errors, key=lambda name: errors[name])
    chosen, figures_of_chosen = min(done, key=lambda pair: pair[0].predicted_seconds)
    quickest, figures_of_quickest = min(done, key=lambda pair: pair[1].step_seconds)
    memory = [(row.cell.name, memory) for row, figures in done for memory in figures.memory]
    above = [name for name, found in memory if found.measured > found.allowed]
    gaps = [figures.log_prob_gap for _, figures in done if figures.log_prob_gap is not None]
    return Summary(
        plans=len(done),
        median_error=float(np.median(list(errors.values()))),
        worst_error=errors[worst],
        worst=worst,
        fastest_predicted=chosen.cell.name,
        fastest_measured=quickest.cell.name,
        behind=figures_of_chosen.step_seconds / figures_of_quickest.step_seconds - 1,
        worst_overhead=max(figures.overhead for _, figures in done),
        log_prob_gaps=(min(gaps), max(gaps)) if gaps else None,
        memory_error=max((abs(found.error) for _, found in memory), default=None),
        memory_above=tuple(dict.fromkeys(above)),
    )


def measured_rows(rows: Sequence[CellRow]) -> list[tuple[CellRow, Figures]]:
    """The cells that were measured, without those that share a measurement."""
    return [(row, row.figures) for row in rows if row.figures is not None and row.same_as is None]


def ranks(rows: Sequence[CellRow]) -> tuple[dict[str, int], dict[str, int]]:
    """Places of the measured cells by predicted and by measured step time."""
    predicted, measured = {}, {}
    for row in rows:
        if row.figures:
            predicted[row.cell.name] = row.predicted_seconds
            measured[row.cell.name] = row.figures.step_seconds
    return _places(predicted), _places(measured)


def _places(seconds_of: Mapping[str, float]) -> dict[str, int]:
    """The shortest is first."""
    ordered = sorted(seconds_of, key=lambda name: seconds_of[name])
    return {name: place for place, name in enumerate(ordered, start=1)}
