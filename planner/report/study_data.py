"""A study as data: the table as CSV, everything as JSON."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from planner.report.study import REFERENCES, CellRow, ranks, summary_of
from planner.report.study_figures import Figures
from planner.spec.study import Study

SCHEMA = "splitplan/study-results/1"


def as_json(study: Study, rows: Sequence[CellRow]) -> str:
    """Everything that the page says, and more."""
    found = summary_of(rows)
    body = {
        "schema": SCHEMA,
        "study": study.name,
        "summary": asdict(found) if found else None,
        "cells": [_cell(row, *ranks(rows)) for row in rows],
    }
    return json.dumps(body, indent=1, allow_nan=False) + "\n"


def _cell(row: CellRow, predicted: dict[str, int], measured: dict[str, int]) -> dict[str, Any]:
    name, figures, result = row.cell.name, row.figures, row.result
    base: dict[str, Any] = {
        "name": name,
        "same_as": row.same_as,
        "status": figures.result.status if figures else result.status if result else "not run",
        "reason": result.reason if result and not figures else "",
        "pools": {pool: len(found.gpus) for pool, found in row.plan.pools.items()},
        "staleness": row.plan.staleness,
        "predicted_step_seconds": row.predicted_seconds,
        "planned_step_seconds": row.plan.predicted.step_seconds if row.plan.predicted else None,
    }
    # What was planned for is the mean over all length scenarios, of a pipeline that neither fills
    # nor drains.
    return base | (_measured(row, figures, predicted[name], measured[name]) if figures else {})


def _measured(
    row: CellRow, figures: Figures, predicted_rank: int, measured_rank: int
) -> dict[str, Any]:
    result = figures.result
    return {
        "measured_step_seconds": figures.step_seconds,
        "error": figures.error,
        "predicted_rank": predicted_rank,
        "measured_rank": measured_rank,
        "controller_overhead": figures.overhead,
        "speed_up": {
            name: {"predicted": p, "measured": m} for name, (p, m) in row.speed_ups.items()
        },
        "generate_tokens_per_second": figures.tokens_per_second,
        "flops_share": figures.flops_share,
        "flops_share_computed": figures.computed_share,
        "log_prob_gap": figures.log_prob_gap,
        "calls": [{**asdict(call), "error": call.error} for call in figures.calls],
        "memory": [{**asdict(found), "error": found.error} for found in figures.memory],
        "start_seconds": result.start_seconds,
        "engines_started": result.engines_started,
        "host": result.host,
        "gpu": result.gpu,
        "date": result.date,
        "versions": result.versions,
    }


CSV_COLUMNS = (
    "name",
    "same_as",
    "status",
    "staleness",
    "predicted_step_seconds",
    "measured_step_seconds",
    "error",
    "predicted_rank",
    "measured_rank",
    "controller_overhead",
    "generate_tokens_per_second",
    "start_seconds",
    "host",
    "date",
    "reason",
)


def as_csv(rows: Sequence[CellRow]) -> str:
    """One line per cell."""
    text = io.StringIO()
    extra = [f"{kind}_vs_{name}" for name in REFERENCES for kind in ("predicted", "measured")]
    columns = (*CSV_COLUMNS, *extra)
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        line = _cell(row, *ranks(rows))
        for name, both in line.get("speed_up", {}).items():
            for kind, speed_up in both.items():
                line[f"{kind}_vs_{name}"] = speed_up
        writer.writerow(line)
    return text.getvalue()
