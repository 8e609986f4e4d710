"""A study written down as a page in Markdown."""

from collections.abc import Sequence
from typing import Any

from planner.report.markdown import markdown_list, markdown_table
from planner.report.study import (
    REFERENCES,
    CellRow,
    Summary,
    measured_rows,
    ranks,
    summary_of,
)
from planner.report.study_figures import UPDATES, MemoryRow
from planner.report.tables import pools_text, seconds
from planner.spec.study import CellResult, Study
from planner.spec.wording import counted

PICTURE = "steps.png"


def page(study: Study, rows: Sequence[CellRow], path: str) -> str:
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


def _conditions(study: Study, rows: Sequence[CellRow], path: str) -> str:
    workload, cluster = rows[0].plan.workload, rows[0].plan.cluster
    drained = ", ".join(f"`{row.cell.name}`" for row in rows if row.predicted.drain)
    behind = ""
    if drained:
        behind = f"; of {drained} as many as the staleness follow, which do not count either"
    text = (
        f"Workload `{workload.name}`: batch {workload.batch}, minibatch {workload.minibatch}, "
        f"prompts {_lengths(workload.prompt)}, responses {_lengths(workload.response)}; "
        f"{counted(len(cluster.gpus), 'GPU')} ({cluster.name}). "
        f"{study.steps} measured steps of each plan, after {study.warmup} (or staleness + 1) "
        f"before{behind}. Each plan and its predicted timeline were written before anything was "
        "measured."
    )
    results = [row.figures.result for row in rows if row.figures]
    if results:
        text += _measured_where(results)
    return f"{text}\n\n```\nplan study {path} --plan-only\nplan study {path}\n```"


def _measured_where(results: Sequence[CellResult]) -> str:
    dates = sorted(result.date for result in results)
    hosts = dict.fromkeys(result.host for result in results)
    last = results[-1]
    versions = ", ".join(f"{name} {version}" for name, version in last.versions.items())
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return f" Measured {when} on {last.gpu}, host {' and '.join(hosts)}; {versions}."


def _lengths(lengths: Any) -> str:
    known = lengths.model_dump()
    kind = known.pop("kind")
    if kind == "fixed":
        return f"of {known['tokens']} tokens"
    known.pop("values", None)
    return f"{kind} ({', '.join(f'{key} {value:g}' for key, value in known.items())}) tokens"


def _summary(rows: Sequence[CellRow]) -> str:
    return markdown_list(summary_lines(rows))


def summary_lines(rows: Sequence[CellRow]) -> list[str]:
    """Sentences over all cells."""
    found = summary_of(rows)
    if found is None:
        return ["Nothing has been measured yet."]
    lines = [
        f"{counted(found.plans, 'plan')} measured. Step time, predicted against measured: median "
        f"error {found.median_error:.1%}, worst {found.worst_error:.1%} (`{found.worst}`)."
    ]
    if found.plans > 1:
        lines.append(_ranking(found))
    lines += _ratios(rows, found)
    lines.append(f"Controller overhead: {found.worst_overhead:.1%} at most.")
    if found.log_prob_gaps is not None:
        least, most = (f"{gap:.3g}" for gap in found.log_prob_gaps)
        apart = least if least == most else f"{least} to {most}"
        lines.append(
            f"Log-probs of engine and trainer, same weights (step 0): {apart} apart, the mean over "
            "tokens."
        )
    if found.memory_error is not None:
        cells = ", ".join(f"`{name}`" for name in found.memory_above)
        above = f"above what was allowed in {cells}" if cells else "never above what was allowed"
        lines.append(f"Peak memory: worst error {found.memory_error:.1%}; {above}.")
    return lines


def _ranking(found: Summary) -> str:
    if found.fastest_predicted == found.fastest_measured:
        return (
            f"The plan predicted fastest, `{found.fastest_predicted}`, is the one measured fastest."
        )
    return (
        f"Predicted fastest: `{found.fastest_predicted}`; measured fastest: "
        f"`{found.fastest_measured}`, by {found.behind:.1%}."
    )


def _ratios(rows: Sequence[CellRow], found: Summary) -> list[str]:
    """The speed-ups of the plan that was predicted fastest."""
    winner = next(row for row in rows if row.cell.name == found.fastest_predicted)
    lines = []
    for reference, (predicted, measured) in winner.speed_ups.items():
        if reference != winner.cell.baseline:
            lines.append(
                f"`{winner.cell.name}` against `{reference}`: predicted {predicted:.2f}×, measured "
                f"{measured:.2f}× (error {predicted / measured - 1:+.1%})."
            )
    return lines


PLANS = (
    "Seconds per step are (end of the last `update_actor` that counts − end of the last warm-up "
    "one) / steps between, of the predicted timeline of the same steps and of the measured one; an "
    "error is predicted over measured, less 1. Rank: predicted → measured. Overhead: measured step "
    "time over the same program re-simulated with the measured seconds, less 1. Against a "
    "reference: predicted / measured, of cells measured on one host. MFU: 6 FLOPs per parameter "
    "and token and attention (recomputation not counted), over the measured bf16 matrix rate of "
    "the GPUs; `results.json` has it also with the vocabulary's head counted for responses only, "
    "for which alone it is computed."
)


def _main_table(rows: Sequence[CellRow]) -> str:
    predicted, measured = ranks(rows)
    titles = ["plan", "GPUs of each pool: its roles", "stale", "predicted s", "measured s", "error"]
    titles += ["rank", "overhead", *(f"vs {name}" for name in REFERENCES)]
    titles += ["generate tokens/s", "actor MFU", "critic MFU"]
    lines = []
    for row in rows:
        name, figures = row.cell.name, row.figures
        line = [
            f"`{name}`" + (f" (= `{row.same_as}`)" if row.same_as else ""),
            pools_text(row.plan, "; "),
            str(row.plan.staleness),
            seconds(row.predicted_seconds),
        ]
        if figures is None:
            line += ["–"] * (len(titles) - len(line))
        else:
            rank = f"{predicted[name]} → {measured[name]}"
            line += [seconds(figures.step_seconds), f"{figures.error:+.1%}", rank]
            line.append(f"{figures.overhead:+.1%}")
            line += [_ratio(row.speed_ups.get(reference)) for reference in REFERENCES]
            line.append(f"{figures.tokens_per_second:,.0f}")
            line += [_share(figures.flops_share.get(call)) for call in UPDATES]
        lines.append(line)
    return f"{markdown_table(titles, lines)}\n\n{PLANS}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _ratio(speed_up: tuple[float, float] | None) -> str:
    return f"{speed_up[0]:.2f} / {speed_up[1]:.2f}" if speed_up else "–"


CALLS = (
    "Median seconds over the measured steps. Beside others: share of the call's time in which "
    "another call ran on other GPUs. Cost of overlap: measured over predicted here, over the same "
    "in `colocated`, where every call runs alone, less 1."
)
MEMORY = (
    "Peak of each pool's fullest GPU over all steps, of all processes, as the driver counts. "
    "Torch's own: the peak of what the tensors of a trainer and of an engine took there, and what "
    "allocators held for them."
)
RETRIES = " Retries: how often an allocator had to give back what it held before it got more."


def _calls_table(rows: Sequence[CellRow]) -> str:
    lines = []
    for row, figures in measured_rows(rows):
        for call in figures.calls:
            lines.append(
                [
                    f"`{row.cell.name}`",
                    call.call,
                    seconds(call.predicted),
                    seconds(call.measured),
                    f"{call.error:+.1%}",
                    f"{call.beside:.0%}",
                    "–" if call.overlap is None else f"{call.overlap:+.1%}",
                ]
            )
    if not lines:
        return ""
    titles = ["plan", "call", "predicted s", "measured s", "error"]
    titles += ["beside others", "cost of overlap"]
    return f"## Calls\n\n{markdown_table(titles, lines)}\n\n{CALLS}"


def _memory_table(rows: Sequence[CellRow]) -> str:
    lines = []
    retried = False
    for row, figures in measured_rows(rows):
        for memory in figures.memory:
            retried = retried or bool(memory.retries)
            lines.append(
                [
                    f"`{row.cell.name}`",
                    memory.pool,
                    _gb(memory.predicted),
                    _gb(memory.measured),
                    f"{memory.error:+.1%}",
                    _gb(memory.allowed),
                    _torchs_own(memory) or "–",
                ]
            )
    if not lines:
        return ""
    titles = ["plan", "pool", "predicted GB", "measured GB", "error", "allowed GB", "torch's own"]
    explained = MEMORY + (RETRIES if retried else "")
    return f"## Memory\n\n{markdown_table(titles, lines)}\n\n{explained}"


def _torchs_own(memory: MemoryRow) -> str:
    """What tensors took in the trainer and in the engine, what the allocators held, and how often
    they had to give it back."""
    parts = []
    for process, allocated in memory.allocated.items():
        text = f"{process} {_gb(allocated)}"
        if process in memory.reserved:
            text += f" of {_gb(memory.reserved[process])}"
        if process in memory.retries:
            text += f" (retries: {memory.retries[process]})"
        parts.append(text)
    return ", ".join(parts)


def _gb(count: int) -> str:
    """Gigabytes to a tenth, as in every table of a report."""
    return f"{count / 1e9:.1f}"


def _pictures(rows: Sequence[CellRow]) -> str:
    names = [row.cell.name for row, _ in measured_rows(rows)]
    if not names:
        return ""
    links = markdown_list(f"[{name}]({name}/gantt.png)" for name in names)
    return f"## Timelines\n\nPredicted above, measured below, on one time axis.\n\n{links}"


def _not_measured(rows: Sequence[CellRow]) -> str:
    left = [row for row in rows if row.figures is None]
    if not left:
        return ""
    return "## Not measured\n\n" + markdown_list(
        f"`{row.cell.name}`: {_why_not(row)}" for row in left
    )


def _why_not(row: CellRow) -> str:
    if row.result:
        return f"failed: {row.result.reason}"
    return "not run since its plan changed" if row.changed else "not run yet"


def _provenance(rows: Sequence[CellRow]) -> str:
    found: dict[str, str] = {}
    for row in rows:
        found.update(row.plan.provenance.profiles if row.plan.provenance else {})
    if not found:
        return "## Profiles\n\nNone: all costs are the roofline model's."
    used = markdown_list(f"`{name}`, sha256 `{sha256}`" for name, sha256 in found.items())
    return f"## Profiles\n\nThe predictions use only these.\n\n{used}"
