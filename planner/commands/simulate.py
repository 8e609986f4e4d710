"""`plan simulate`."""

from collections.abc import Sequence
from pathlib import Path

from planner.commands.inputs import check_target, make_console, profiles_of
from planner.predict.forecast import forecast
from planner.predict.schedule import load_plan
from planner.report import trace as traces
from planner.report.compare import occupancy, pool_busy
from planner.report.tables import calls_table, seconds
from planner.spec.plan import Plan
from planner.spec.timeline import Timeline, mean_call_seconds, step_seconds


def simulate(
    plan: Path,
    steps: int,
    *,
    gantt: Path | None,
    trace: Path | None,
    timeline: Path | None,
    profiles: Sequence[Path],
    settings: Sequence[str] = (),
) -> None:
    for target, suffixes in (
        (gantt, (".png", ".svg", ".pdf")),
        (trace, (".json",)),
        (timeline, (".json",)),
    ):
        if target is not None:
            check_target(target, *suffixes)
    console = make_console()
    checked = load_plan(plan, settings)
    simulated = forecast(
        checked, steps, profiles_of(checked, plan, profiles, make_console(stderr=True))
    )
    console.print(calls_table(checked, mean_call_seconds(simulated)))
    console.print()
    console.print(_summary(checked, simulated), soft_wrap=True)
    if timeline is not None:
        simulated.write(timeline)
    if trace is not None:
        traces.write(simulated, trace)
    if gantt is not None:
        from planner.report.gantt import draw  # matplotlib is slow to load

        draw([simulated], checked, gantt)
    written = [str(path) for path in (timeline, trace, gantt) if path is not None]
    if written:
        console.print(f"Wrote {', '.join(written)}.", markup=False, soft_wrap=True)


def _summary(plan: Plan, simulated: Timeline) -> str:
    """The step time of the steps that count, and the plan's own if it reads otherwise."""
    shown, busy = seconds(step_seconds(simulated)), occupancy(plan, pool_busy(simulated))
    drained = f" and before {simulated.drain} to drain" if simulated.drain else ""
    text = (
        f"{simulated.steps} steps: {shown} s per step after {simulated.warmup} to warm up"
        f"{drained}, {busy:.0%} of all GPU time busy."
    )
    if plan.predicted is not None and (own := seconds(plan.predicted.step_seconds)) != shown:
        text += f" The plan itself says {own} s: the steady state, averaged over its scenarios."
    return text
