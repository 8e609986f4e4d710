"""A run of this project as what a new search needs: lengths and seconds of the calls, of the last
steps that it has made, and what a start costs."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from planner.exchange.observed_lengths import SeenLengths, fitted
from planner.predict.schedule import load_plan
from planner.spec.errors import UserError
from planner.spec.plan import Plan
from planner.spec.timeline import Timeline
from planner.spec.workload import Workload

LINE = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) INFO (.*)$")
BEGAN, FIRST_STEP = re.compile(r"plan .* steps, .*"), re.compile(r"step 0 ended, ([\d.,]+) s")
FEWEST = 2  # steps


@dataclass(frozen=True, kw_only=True)
class OwnRun:
    """The plan of a run; the same under the lengths of its last steps; the seconds of each call in
    these steps; the seconds from one step's end to the next; how many steps there are in all; and
    what a start took, if the log tells."""

    plan: Plan
    observed: Plan
    steps: tuple[dict[str, float], ...]
    step_seconds: tuple[float, ...]
    done: int
    start_seconds: float | None


def read_own_run(run: Path, last: int) -> OwnRun:
    """The last steps of a run that count. Raises UserError."""
    if not run.is_dir():
        raise UserError(f"{run}: no such run directory; give the one that `plan execute` named")
    plan, timeline = load_plan(run / "plan.json"), Timeline.read(run / "timeline.json")
    ends = timeline.ends
    whole = [step for step in sorted(ends) if timeline.counts(step) and step - 1 in ends]
    taken = whole[-last:]
    if len(taken) < FEWEST:
        raise UserError(f"{run}: has {len(whole)} steps that count; let it run for some more")
    steps = _calls(plan, timeline, taken)
    rows = [row for row in lines_of(run / "metrics.jsonl") if row.get("step") in taken]
    observed = plan.changed(workload=_with_lengths(plan.workload, rows), predicted=None)
    return OwnRun(
        plan=plan,
        observed=observed,
        steps=steps,
        step_seconds=tuple(ends[step] - ends[step - 1] for step in taken),
        done=max(ends) + 1,
        start_seconds=_start_seconds(run / "log.txt"),
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
            row = json.loads(line)
        except ValueError:
            continue  # the last line of a run that goes on
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _with_lengths(workload: Workload, rows: Sequence[dict[str, Any]]) -> Workload:
    """The workload with responses as long as these steps had them; as it is where they do not
    say."""
    keys = ("response_tokens", "response_tokens_min", "response_tokens_max", "truncated_share")
    known = [row for row in rows if all(isinstance(row.get(key), int | float) for key in keys)]
    if not known:
        return workload
    mean, least, most, cut = ([float(row[key]) for row in known] for key in keys)
    seen = SeenLengths(
        means=mean,
        least=least,
        most=most,
        cut=min(0.99, sum(cut) / len(cut)),
        limit=workload.response.longest,
        batch=workload.generated,
    )
    return workload.changed(response=fitted(seen))


def _start_seconds(log: Path) -> float | None:
    """Seconds from the first line of a log to where its first step began."""
    began = None
    if not log.is_file():
        return None
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if not (match := LINE.match(line)):
            continue
        now = datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S,%f")
        if BEGAN.fullmatch(match[2]):
            began = now
        elif began and (first := FIRST_STEP.fullmatch(match[2])):
            taken = float(first[1].replace(",", ""))
            return max(0.0, (now - began).total_seconds() - taken)
    return None
