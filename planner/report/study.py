"""The result of a study: each cell's prediction with its measurement, and sums over all cells.
Numbers only; `study_page.py` writes them down."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from planner.predict.cost import CostModel
from planner.predict.roofline import matrix_parameters
from planner.report.compare import compare
from planner.spec.errors import UserError
from planner.spec.plan import Plan
from planner.spec.study import Cell, CellResult, Study
from planner.spec.timeline import Span, Timeline, step_seconds
from planner.spec.workload import head_of

REFERENCES = ("split", "colocated")
UPDATES = ("update_actor", "update_critic")
LEAST_COMPANY = (
    0.05  # share of its time that a call must have company for, to have a cost of overlap
)


@dataclass(frozen=True, kw_only=True)
class CallRow:
    """Median seconds of a call over the counted steps. `beside` is the share of its time in which
    another call ran on other GPUs. `overlap` is what that cost: measured over predicted here, over
    the same in the cell `colocated`, where every call runs alone, less 1; so that other layouts and
    the model's own error for this call cancel."""

    call: str
    predicted: float
    measured: float
    beside: float
    overlap: float | None = None

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """Peak bytes of a pool's fullest GPU. `allocated` is what tensors took in the trainer and in
    the engine, `reserved` what the allocators held for them, `retries` how often they had to give
    it back to get more."""

    pool: str
    predicted: int
    measured: int
    allowed: int
    allocated: dict[str, int]
    reserved: dict[str, int]
    retries: dict[str, int]

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The figures of a measured cell. `flops_share` is the share of the measured matrix rate that
    an update reaches, by 6 FLOPs per parameter and token and attention. `computed_share` counts the
    vocabulary's head only for the responses, because it is computed only for them. `log_prob_gap`
    is the mean distance per token between the log-probs of engine and trainer at step 0, where both
    have the same weights: rounding."""

    result: CellResult
    measured: Timeline
    step_seconds: float
    error: float
    overhead: float
    calls: tuple[CallRow, ...]
    memory: tuple[MemoryRow, ...]
    tokens_per_second: float
    flops_share: dict[str, float]
    computed_share: dict[str, float]
    log_prob_gap: float | None


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
    speed_ups: dict[str, tuple[float, float]] = field(
        default_factory=dict
    )  # reference -> (predicted, measured)


class MeasuredCell(NamedTuple):
    """What was measured of a cell, as it lies in its directory."""

    result: CellResult
    timeline: Timeline
    log_prob_gap: float | None


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
            row = replace(row, figures=_figures(study, row, here, alone.get(here.result.host, {})))
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
        except ValueError as error:
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
            predicted, taken = _medians(row.predicted), _medians(timeline)
            found.setdefault(
                result.host,
                {call: taken[call] / predicted[call] for call in taken if predicted[call]},
            )
    return found


def _medians(timeline: Timeline) -> dict[str, float]:
    return {
        call: float(np.median([span.seconds for span in spans]))
        for call, spans in _counted(timeline).items()
    }


def _counted(timeline: Timeline) -> dict[str, list[Span]]:
    """The spans of each call in the steps that count."""
    found: dict[str, list[Span]] = {}
    for span in timeline.spans:
        if timeline.counts(span.step):
            found.setdefault(span.call, []).append(span)
    return found


def _figures(study: Study, row: CellRow, found: MeasuredCell, alone: dict[str, float]) -> Figures:
    result, measured, gap = found
    comparison = compare(row.plan, row.predicted, measured)
    spans = _counted(measured)
    made = sum(span.tokens for span in spans["generate"])
    shares = {
        call: _flops_shares(study, row.plan, call, spans[call]) for call in UPDATES if call in spans
    }
    return Figures(
        result=result,
        measured=measured,
        step_seconds=comparison.step.measured,
        error=comparison.step.error,
        overhead=comparison.controller_overhead,
        calls=_calls(row.predicted, measured, alone),
        memory=_memory(row.plan, result),
        tokens_per_second=made / sum(span.seconds for span in spans["generate"]),
        flops_share={call: share[0] for call, share in shares.items() if share},
        computed_share={call: share[1] for call, share in shares.items() if share},
        log_prob_gap=gap,
    )


def _calls(predicted: Timeline, measured: Timeline, alone: dict[str, float]) -> tuple[CallRow, ...]:
    expected, taken, spans = _medians(predicted), _medians(measured), _counted(measured)
    rows = []
    for call, seconds in expected.items():
        if call not in taken:
            continue
        beside = company(spans[call], measured.spans)
        ratio = taken[call] / seconds if seconds else None
        costs = ratio is not None and beside >= LEAST_COMPANY and call in alone
        overlap = ratio / alone[call] - 1 if costs and ratio is not None else None
        rows.append(
            CallRow(
                call=call, predicted=seconds, measured=taken[call], beside=beside, overlap=overlap
            )
        )
    return tuple(rows)


def company(spans: Sequence[Span], every: Sequence[Span]) -> float:
    """The share of these spans' time in which another call ran on GPUs."""
    shared = 0.0
    for span in spans:
        others = sorted(
            (max(other.start, span.start), min(other.end, span.end))
            for other in every
            if other is not span
            and other.pools
            and other.start < span.end
            and other.end > span.start
        )
        reached = span.start
        for start, end in others:
            shared += max(0.0, end - max(start, reached))
            reached = max(reached, end)
    total = sum(span.seconds for span in spans)
    return shared / total if total else 0.0


def _memory(plan: Plan, result: CellResult) -> tuple[MemoryRow, ...]:
    """The memory of each pool; none where nothing was measured (on cores)."""
    by_gpu = {memory.gpu: memory for memory in result.memory}
    rows = []
    for name, pool in plan.pools.items():
        found = [by_gpu[gpu] for gpu in pool.gpus if gpu in by_gpu]
        if found and plan.predicted is not None:
            fullest = max(found, key=lambda memory: memory.used)
            rows.append(
                MemoryRow(
                    pool=name,
                    predicted=plan.predicted.memory_bytes.get(name, 0),
                    measured=fullest.used,
                    allowed=plan.device_of(name).memory_bytes,
                    allocated=fullest.allocated,
                    reserved=fullest.reserved,
                    retries=fullest.retries,
                )
            )
    return tuple(rows)


def _flops_shares(
    study: Study, plan: Plan, call: str, spans: Sequence[Span]
) -> tuple[float, float] | None:
    """An update's shares of the matrix rate: by 6 FLOPs per parameter and token, and by the
    operations that are computed (see `Figures`). Lengths are those of the workload's distribution,
    exact for random weights."""
    if study.matrix_flops is None:
        return None
    role = plan.dataflow[call].roles[0]
    shape, head, layout = plan.workload.models[role].shape, head_of(role), plan.trainers[role]
    model, epochs = CostModel(plan.workload, plan.cluster), plan.workload.algorithm.epochs
    attention = (
        2 * shape.layers * shape.heads * shape.head_dim
    )  # as in roofline.py, per square of a length
    whole = computed = 0.0
    for span in spans:
        prompts, responses = (
            drawn[span.step % model.scenarios] for drawn in (model.prompts, model.responses)
        )
        lengths = prompts + responses
        passes = 3 * epochs
        every = (
            2.0 * matrix_parameters(shape, head) * lengths.sum()
            + float(attention) * (lengths**2).sum()
        )
        whole += passes * every
        computed += passes * (
            every - (2.0 * shape.embedding_parameters * prompts.sum() if head == "lm" else 0.0)
        )
    rate = study.matrix_flops * layout.gpus * sum(span.seconds for span in spans)
    return whole / rate, computed / rate


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
