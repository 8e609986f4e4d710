"""A run of this project as what a new search needs: lengths and seconds of the calls, of the last
steps that it has made, and what a start costs."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.exchange.observed_lengths import SeenLengths, fitted
from planner.predict.schedule import load_plan
from planner.spec.errors import UserError
from planner.spec.plan import Plan
from planner.spec.timeline import Timeline
from planner.spec.workload import Workload

START = re.compile(r"INFO start: ([\d.]+) s, of which ")
FEWEST = 2  # steps
_TIMELINE, _METRICS = "timeline.json", "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class OwnRun:
    """The plan of a run; the same under the lengths of its last steps; the seconds of each call in
    these steps; the seconds from one step's end to the next; how many steps are done, of how many
    that were asked for; and what a start took, if that is known."""

    plan: Plan
    observed: Plan
    steps: tuple[dict[str, float], ...]
    step_seconds: tuple[float, ...]
    done: int
    asked: int
    start_seconds: float | None


def read_own_run(run: Path, last: int) -> OwnRun:
    """The last steps of a run that count; of one that goes on or was killed, as its last checkpoint
    has them. Raises UserError."""
    if not run.is_dir():
        raise UserError(f"{run}: no such run directory; give the one that `plan execute` named")
    measured = run
    if not (run / _TIMELINE).exists():
        saved = sorted(run.glob(f"checkpoints/step-*/{_TIMELINE}"))
        measured = saved[-1].parent if saved else run
    timeline, rows = Timeline.read(measured / _TIMELINE), lines_of(measured / _METRICS)
    try:
        return own_run(load_plan(run / "plan.json"), timeline, rows, last, _start(run / "log.txt"))
    except UserError as error:
        raise UserError(f"{run}: {error}") from None


def own_run(
    plan: Plan,
    timeline: Timeline,
    rows: Sequence[dict[str, Any]],
    last: int,
    start_seconds: float | None,
) -> OwnRun:
    """The last steps that count of a run whose lines of metrics are `rows`. Raises UserError."""
    if plan.streams:
        raise UserError(
            "its generation streams, and what it takes then does not say what it would take "
            "otherwise; measure its calls with plan profile, and search with that"
        )
    ends = timeline.ends
    whole = [step for step in sorted(ends) if timeline.counts(step) and step - 1 in ends]
    taken = whole[-last:]
    if len(taken) < FEWEST:
        raise UserError(
            f"has {len(whole)} of the {FEWEST} steps that must count; let it run for some more"
        )
    steps = _calls(plan, timeline, taken)
    known = [row for row in rows if row.get("step") in taken]
    observed = plan.changed(workload=_with_lengths(plan.workload, known), predicted=None)
    return OwnRun(
        plan=plan,
        observed=observed,
        steps=steps,
        step_seconds=tuple(ends[step] - ends[step - 1] for step in taken),
        done=max(ends) + 1,
        asked=timeline.steps,
        start_seconds=start_seconds,
    )


def _calls(plan: Plan, timeline: Timeline, taken: Sequence[int]) -> tuple[dict[str, float], ...]:
    """Seconds of each call of some steps. Raises UserError where a call is missing."""
    found = {step: dict[str, float]() for step in taken}
    for span in timeline.spans:
        if span.step in found:
            found[span.step][span.call] = span.seconds
    for step, calls in found.items():
        for name in plan.dataflow.steady.names:
            if name not in calls:
                raise UserError(f"step {step} has no {name}; its timeline is of another plan")
    return tuple(found[step] for step in taken)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The mappings in a file of JSON lines; none where there is no such file."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line, parse_int=_number)
        except (ValueError, RecursionError):
            continue  # the last line of a run that goes on
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _number(digits: str) -> float:
    """A whole number; as a float where it is larger than any count, so that no sum overflows."""
    return int(digits) if len(digits) < 16 else float(digits)


def _with_lengths(workload: Workload, rows: Sequence[dict[str, Any]]) -> Workload:
    """The workload with responses as long as these steps had them; as it is where they do not
    say."""
    keys = ("response_tokens", "response_tokens_min", "response_tokens_max", "truncated_share")
    known = [row for row in rows if all(isinstance(row.get(key), int | float) for key in keys)]
    if not known:
        return workload
    mean, least, most, cut = ([float(row[key]) for row in known] for key in keys)
    seen = SeenLengths(
        named="response_tokens",
        means=mean,
        least=least,
        most=most,
        cut=min(0.99, sum(cut) / len(cut)),
        limit=workload.response.longest,
        batch=workload.generated,
    )
    return workload.changed(response=fitted(seen))


def _start(log: Path) -> float | None:
    """Seconds of the latest start that a log tells of."""
    if not log.is_file():
        return None
    told = START.findall(log.read_text(encoding="utf-8", errors="replace"))
    return float(told[-1]) if told else None
