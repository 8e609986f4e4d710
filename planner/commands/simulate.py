"""`plan simulate`."""

from collections.abc import Sequence
from pathlib import Path

from planner.commands.inputs import check_target, make_console, profiles_of
from planner.predict.forecast import forecast
from planner.predict.schedule import load_plan
from planner.report import trace as traces
from planner.report.compare import occupancy, pool_busy
from planner.report.tables import calls_table, seconds
from planner.spec.timeline import mean_call_seconds, step_seconds


def simulate(
    plan: Path,
    steps: int,
    *,
    gantt: Path | None,
    trace: Path | None,
    timeline: Path | None,
    profiles: Sequence[Path],
) -> None:
    for target, suffixes in (
        (gantt, (".png", ".svg", ".pdf")),
        (trace, (".json",)),
        (timeline, (".json",)),
    ):
        if target is not None:
            check_target(target, *suffixes)
    console = make_console()
    checked = load_plan(plan)
    simulated = forecast(
        checked, steps, profiles_of(checked, plan, profiles, make_console(stderr=True))
    )
    console.print(calls_table(checked, mean_call_seconds(simulated)))
    console.print()
    busy = pool_busy(simulated)
    console.print(
        f"{steps} steps: {seconds(step_seconds(simulated))} s per step after {simulated.warmup} to "
        f"warm up, {occupancy(checked, busy):.0%} of all GPU time busy."
    )
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
