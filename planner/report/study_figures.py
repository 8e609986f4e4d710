"""The figures of a measured cell of a study: how long its calls took beside what was predicted,
what its memory held, and how much of the GPUs' rate its updates reached."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from planner.predict.cost import CostModel
from planner.predict.roofline import matrix_parameters
from planner.report.compare import compare
from planner.spec.plan import Plan
from planner.spec.study import CellResult
from planner.spec.timeline import Span, Timeline
from planner.spec.workload import head_of

UPDATES = ("update_actor", "update_critic")
LEAST_COMPANY = 0.05  # a call alone for all but this share of its time has no cost of overlap


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


class MeasuredCell(NamedTuple):
    """What was measured of a cell, as it lies in its directory."""

    result: CellResult
    timeline: Timeline
    log_prob_gap: float | None


def medians_of(timeline: Timeline) -> dict[str, float]:
    """The median seconds of each call over the steps that count."""
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


def figures_of(
    plan: Plan,
    predicted: Timeline,
    found: MeasuredCell,
    alone: dict[str, float],
    matrix_flops: float | None,
) -> Figures:
    """The figures of a plan that was measured. `alone` is measured over predicted seconds of each
    call where it runs alone; `matrix_flops` the measured rate of a GPU, if it is known."""
    result, measured, gap = found
    comparison = compare(plan, predicted, measured)
    spans = _counted(measured)
    generated = sum(span.tokens for span in spans["generate"])
    generating = sum(span.seconds for span in spans["generate"])
    reached, computed = {}, {}
    if matrix_flops is not None:
        for call in UPDATES:
            if call in spans:
                reached[call], computed[call] = _flops_shares(plan, call, spans[call], matrix_flops)
    return Figures(
        result=result,
        measured=measured,
        step_seconds=comparison.step.measured,
        error=comparison.step.error,
        overhead=comparison.controller_overhead,
        calls=_calls(predicted, measured, alone),
        memory=_memory(plan, result),
        tokens_per_second=generated / generating,
        flops_share=reached,
        computed_share=computed,
        log_prob_gap=gap,
    )


def _calls(predicted: Timeline, measured: Timeline, alone: dict[str, float]) -> tuple[CallRow, ...]:
    expected, taken, spans = medians_of(predicted), medians_of(measured), _counted(measured)
    rows = []
    for call, seconds in expected.items():
        if call not in taken:
            continue
        beside = company(spans[call], measured.spans)
        overlap = None
        if seconds and beside >= LEAST_COMPANY and call in alone:
            overlap = taken[call] / seconds / alone[call] - 1
        row = CallRow(
            call=call, predicted=seconds, measured=taken[call], beside=beside, overlap=overlap
        )
        rows.append(row)
    return tuple(rows)


def company(spans: Sequence[Span], every: Sequence[Span]) -> float:
    """The share of these spans' time in which another call ran on GPUs."""
    shared = 0.0
    for span in spans:
        others = [other for other in every if other is not span and other.pools]
        parts = [(max(other.start, span.start), min(other.end, span.end)) for other in others]
        reached = span.start
        for start, end in sorted(part for part in parts if part[0] < part[1]):
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
    plan: Plan, call: str, spans: Sequence[Span], matrix_flops: float
) -> tuple[float, float]:
    """An update's shares of the matrix rate: by 6 FLOPs per parameter and token, and by the
    operations that are computed (see `Figures`). Lengths are those of the workload's distribution,
    exact for random weights."""
    role = plan.dataflow[call].roles[0]
    shape, head = plan.workload.models[role].shape, head_of(role)
    model, epochs = CostModel(plan.workload, plan.cluster), plan.workload.algorithm.epochs
    passes = 3 * epochs  # one forward, two backward
    per_token = 2.0 * matrix_parameters(shape, head)
    per_square = float(2 * shape.layers * shape.heads * shape.head_dim)  # as in roofline.py
    per_prompt_token = 2.0 * shape.embedding_parameters if head == "lm" else 0.0
    whole = computed = 0.0
    for span in spans:
        scenario = span.step % model.scenarios
        prompts = model.prompts[scenario]
        lengths = prompts + model.responses[scenario]
        every = per_token * lengths.sum() + per_square * (lengths**2).sum()
        whole += passes * every
        computed += passes * (every - per_prompt_token * prompts.sum())
    seconds = sum(span.seconds for span in spans)
    rate = matrix_flops * plan.trainers[role].gpus * seconds
    return whole / rate, computed / rate
