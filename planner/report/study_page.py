"""A study written down: the page, the table as CSV, everything as JSON."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from planner.report.study import REFERENCES, UPDATES, Figures, Row, Summary, summary_of
from planner.report.tables import pools_text, seconds
from planner.spec.study import Study

PICTURE = "steps.png"
SCHEMA = "splitplan/study-results/1"


def page(study: Study, rows: Sequence[Row], path: str) -> str:
    """The study, which lies at `path`, as Markdown."""
    parts = [
        f"# {study.name}",
        _conditions(study, rows, path),
        _summary(rows),
        f"![Predicted and measured seconds per step]({PICTURE})"
        if any(row.figures for row in rows)
        else "",
        _main_table(rows),
        _calls_table(rows),
        _memory_table(rows),
        _pictures(rows),
        _not_measured(rows),
        _provenance(rows),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _conditions(study: Study, rows: Sequence[Row], path: str) -> str:
    workload, cluster = rows[0].plan.workload, rows[0].plan.cluster
    drained = ", ".join(f"`{row.cell.name}`" for row in rows if row.predicted.drain)
    behind = (
        f"; of {drained} as many as the staleness follow, which do not count either"
        if drained
        else ""
    )
    text = (
        f"Workload `{workload.name}`: batch {workload.batch}, minibatch {workload.minibatch}, "
        "prompts "
        f"{_lengths(workload.prompt)}, responses {_lengths(workload.response)}; "
        f"{len(cluster.gpus)} GPUs "
        f"({cluster.name}). {study.steps} measured steps of each plan, after {study.warmup} (or "
        "staleness + 1) before"
        f"{behind}. Each plan and its predicted timeline were written before anything was measured."
    )
    results = [row.figures.result for row in rows if row.figures]
    if results:
        dates = sorted(result.date for result in results)
        hosts = list(dict.fromkeys(result.host for result in results))
        versions = ", ".join(f"{name} {version}" for name, version in results[-1].versions.items())
        when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        text += f" Measured {when} on {results[-1].gpu}, host {' and '.join(hosts)}; {versions}."
    return f"{text}\n\n```\nplan study {path} --plan-only\nplan study {path}\n```"


def _lengths(lengths: Any) -> str:
    known = lengths.model_dump()
    kind = known.pop("kind")
    if kind == "fixed":
        return f"of {known['tokens']} tokens"
    known.pop("values", None)
    return f"{kind} ({', '.join(f'{key} {value:g}' for key, value in known.items())}) tokens"


def _summary(rows: Sequence[Row]) -> str:
    return "\n".join(f"- {line}" for line in summary_lines(rows))


def summary_lines(rows: Sequence[Row]) -> list[str]:
    """Sentences over all cells."""
    found = summary_of(rows)
    if found is None:
        return ["Nothing has been measured yet."]
    lines = [
        f"{found.plans} plan{'s' * (found.plans != 1)} measured. Step time, predicted against "
        "measured: median error "
        f"{found.median_error:.1%}, worst {found.worst_error:.1%} (`{found.worst}`).",
        *([_ranking(found)] if found.plans > 1 else []),
        *_ratios(rows, found),
        f"Controller overhead: {found.worst_overhead:.1%} at most.",
    ]
    if found.log_prob_gaps is not None:
        least, most = (f"{gap:.3g}" for gap in found.log_prob_gaps)
        apart = least if least == most else f"{least} to {most}"
        lines.append(
            f"Log-probs of engine and trainer, same weights (step 0): {apart} apart, the mean over "
            "tokens."
        )
    if found.memory_error is not None:
        above = ", ".join(f"`{name}`" for name in found.memory_above)
        lines.append(
            f"Peak memory: worst error {found.memory_error:.1%}; "
            + (f"above what was allowed in {above}." if above else "never above what was allowed.")
        )
    return lines


def _ranking(found: Summary) -> str:
    if found.fastest_predicted == found.fastest_measured:
        return (
            f"The plan predicted fastest, `{found.fastest_predicted}`, is the one measured fastest."
        )
    return (
        f"Predicted fastest: `{found.fastest_predicted}`; measured fastest: "
        f"`{found.fastest_measured}`, by "
        f"{found.behind:.1%}."
    )


def _ratios(rows: Sequence[Row], found: Summary) -> list[str]:
    winner = next(row for row in rows if row.cell.name == found.fastest_predicted)
    return [
        f"`{winner.cell.name}` against `{reference}`: predicted {predicted:.2f}×, measured "
        f"{measured:.2f}× "
        f"(error {predicted / measured - 1:+.1%})."
        for reference, (predicted, measured) in winner.speed_ups.items()
        if reference != winner.cell.baseline
    ]


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first two columns are words, the others figures."""
    right = ["---"] * 2 + ["---:"] * (len(titles) - 2)
    lines = [titles, right, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ranks(rows: Sequence[Row]) -> tuple[dict[str, int], dict[str, int]]:
    """Places of the measured cells by predicted and by measured step time."""
    done = [
        (row.cell.name, row.predicted_seconds, row.figures.step_seconds)
        for row in rows
        if row.figures
    ]
    predicted = {
        name: place for place, (name, _, _) in enumerate(sorted(done, key=lambda x: x[1]), start=1)
    }
    measured = {
        name: place for place, (name, _, _) in enumerate(sorted(done, key=lambda x: x[2]), start=1)
    }
    return predicted, measured


PLANS = (
    "Seconds per step are (end of the last `update_actor` that counts − end of the last warm-up "
    "one) / steps between, "
    "of the predicted timeline of the same steps and of the measured one; an error is predicted "
    "over measured, less 1. "
    "Rank: predicted → measured. Overhead: measured step time over the same program re-simulated "
    "with the measured "
    "seconds, less 1. Against a reference: predicted / measured, of cells measured on one host. "
    "MFU: 6 FLOPs per "
    "parameter and token and attention (recomputation not counted), over the measured bf16 matrix "
    "rate of the GPUs; "
    "`results.json` has it also with the vocabulary's head counted for responses only, for which "
    "alone it is computed."
)


def _main_table(rows: Sequence[Row]) -> str:
    predicted, measured = ranks(rows)
    titles = [
        "plan",
        "GPUs of each pool: its roles",
        "stale",
        "predicted s",
        "measured s",
        "error",
        "rank",
    ]
    titles += [
        "overhead",
        *(f"vs {name}" for name in REFERENCES),
        "generate tokens/s",
        "actor MFU",
        "critic MFU",
    ]
    lines = []
    for row in rows:
        name, figures = row.cell.name, row.figures
        line = [
            f"`{name}`" + (f" (= `{row.same_as}`)" if row.same_as else ""),
            pools_text(row.plan, "; "),
        ]
        line += [str(row.plan.staleness), seconds(row.predicted_seconds)]
        if figures is None:
            lines.append([*line, *["–"] * 9])
            continue
        line += [
            seconds(figures.step_seconds),
            f"{figures.error:+.1%}",
            f"{predicted[name]} → {measured[name]}",
        ]
        line += [
            f"{figures.overhead:+.1%}",
            *(_ratio(row.speed_ups.get(name)) for name in REFERENCES),
        ]
        line += [f"{figures.tokens_per_second:,.0f}"]
        line += [
            f"{figures.flops_share[call]:.0%}" if call in figures.flops_share else "–"
            for call in UPDATES
        ]
        lines.append(line)
    return f"{_table(titles, lines)}\n\n{PLANS}"


def _ratio(speed_up: tuple[float, float] | None) -> str:
    return f"{speed_up[0]:.2f} / {speed_up[1]:.2f}" if speed_up else "–"


CALLS = (
    "Median seconds over the measured steps. Beside others: share of the call's time in which "
    "another call ran on "
    "other GPUs. Cost of overlap: measured over predicted here, over the same in `colocated`, "
    "where every call runs "
    "alone, less 1."
)
MEMORY = (
    "Peak of each pool's fullest GPU over all steps, of all processes, as the driver counts. "
    "Torch's own: the peak of "
    "what the tensors of a trainer and of an engine took there, and what allocators held for them."
)
RETRIES = " Retries: how often an allocator had to give back what it held before it got more."


def _calls_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in _own(rows):
        assert row.figures is not None
        for call in row.figures.calls:
            overlap = "–" if call.overlap is None else f"{call.overlap:+.1%}"
            cells = [
                f"`{row.cell.name}`",
                call.call,
                seconds(call.predicted),
                seconds(call.measured),
            ]
            lines.append([*cells, f"{call.error:+.1%}", f"{call.beside:.0%}", overlap])
    titles = [
        "plan",
        "call",
        "predicted s",
        "measured s",
        "error",
        "beside others",
        "cost of overlap",
    ]
    return f"## Calls\n\n{_table(titles, lines)}\n\n{CALLS}" if lines else ""


def _memory_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in _own(rows):
        assert row.figures is not None
        for found in row.figures.memory:
            held = {kind: f" of {_gb(count)}" for kind, count in found.reserved.items()}
            held |= {
                kind: f"{held.get(kind, '')} (retries: {count})"
                for kind, count in found.retries.items()
            }
            parts = ", ".join(
                f"{kind} {_gb(count)}{held.get(kind, '')}"
                for kind, count in found.allocated.items()
            )
            cells = [
                f"`{row.cell.name}`",
                found.pool,
                _gb(found.predicted),
                _gb(found.measured),
                f"{found.error:+.1%}",
            ]
            lines.append([*cells, _gb(found.allowed), parts or "–"])
    titles = ["plan", "pool", "predicted GB", "measured GB", "error", "allowed GB", "torch's own"]
    counted = any(
        found.retries for row in _own(rows) if row.figures for found in row.figures.memory
    )
    return (
        f"## Memory\n\n{_table(titles, lines)}\n\n{MEMORY}{RETRIES if counted else ''}"
        if lines
        else ""
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f}"


def _own(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.figures is not None and row.same_as is None]


def _pictures(rows: Sequence[Row]) -> str:
    lines = [f"- [{row.cell.name}]({row.cell.name}/gantt.png)" for row in _own(rows)]
    return (
        "## Timelines\n\nPredicted above, measured below, on one time axis.\n\n" + "\n".join(lines)
        if lines
        else ""
    )


def _not_measured(rows: Sequence[Row]) -> str:
    lines = [f"- `{row.cell.name}`: {_why_not(row)}" for row in rows if row.figures is None]
    return "## Not measured\n\n" + "\n".join(lines) if lines else ""


def _why_not(row: Row) -> str:
    if row.result:
        return f"failed: {row.result.reason}"
    return "not run since its plan changed" if row.changed else "not run yet"


def _provenance(rows: Sequence[Row]) -> str:
    found: dict[str, str] = {}
    for row in rows:
        found.update(row.plan.provenance.profiles if row.plan.provenance else {})
    if not found:
        return "## Profiles\n\nNone: all costs are the roofline model's."
    lines = [f"- `{name}`, sha256 `{sha256}`" for name, sha256 in found.items()]
    return "## Profiles\n\nThe predictions use only these.\n\n" + "\n".join(lines)


# --- data ---


def as_json(study: Study, rows: Sequence[Row]) -> str:
    """Everything that the page says, and more."""
    found = summary_of(rows)
    body = {
        "schema": SCHEMA,
        "study": study.name,
        "summary": asdict(found) if found else None,
        "cells": [_cell(row, *ranks(rows)) for row in rows],
    }
    return json.dumps(body, indent=1, allow_nan=False) + "\n"


def _cell(row: Row, predicted: dict[str, int], measured: dict[str, int]) -> dict[str, Any]:
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
    row: Row, figures: Figures, predicted_rank: int, measured_rank: int
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


def as_csv(rows: Sequence[Row]) -> str:
    """One line per cell."""
    text = io.StringIO()
    extra = [f"{kind}_vs_{name}" for name in REFERENCES for kind in ("predicted", "measured")]
    writer = csv.DictWriter(
        text, (*CSV_COLUMNS, *extra), extrasaction="ignore", lineterminator="\n"
    )
    writer.writeheader()
    for row in rows:
        cell = _cell(row, *ranks(rows))
        speed_ups = {
            f"{kind}_vs_{name}": x
            for name, both in cell.get("speed_up", {}).items()
            for kind, x in both.items()
        }
        writer.writerow({**cell, **speed_ups})
    return text.getvalue()
