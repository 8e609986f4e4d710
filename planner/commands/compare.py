"""`plan compare`."""

from collections.abc import Sequence
from pathlib import Path

from planner.commands.inputs import check_target, make_console, profiles_of
from planner.predict.forecast import forecast_of
from planner.predict.schedule import load_plan
from planner.report.compare import compare as compare_timelines
from planner.report.compare import whole_steps
from planner.report.tables import comparison_tables, verdict
from planner.spec.errors import UserError
from planner.spec.plan import Plan
from planner.spec.timeline import Timeline


def compare(plan: Path, run: Path, out: Path | None, profiles: Sequence[Path]) -> None:
    checked = load_plan(plan)
    measured = read_run(run, checked)
    target = out or run / "compare.png"
    check_target(target, ".png", ".svg", ".pdf")
    found = profiles_of(checked, plan, profiles, make_console(stderr=True))
    predicted = forecast_of(checked, measured, found)
    comparison = compare_timelines(checked, predicted, measured)
    from planner.report.gantt import draw  # matplotlib is slow to load

    draw([predicted, measured], checked, target)
    console = make_console()
    for table in comparison_tables(comparison):
        console.print(table)
        console.print()
    for sentence in verdict(comparison):
        console.print(sentence)
    console.print(f"Wrote {target}.", markup=False, soft_wrap=True)


def read_run(run: Path, plan: Plan) -> Timeline:
    """The timeline of the whole steps of a run, checked to be one of this plan. Raises
    UserError."""
    if not run.is_dir():
        raise UserError(
            f"{run}: no such run directory; give the one that `plan execute` named at its end"
        )
    timeline = Timeline.read(run / "timeline.json")
    if (run / "plan.json").exists():
        ran = Plan.read(run / "plan.json")
        for key in ("pools", "roles", "program"):
            if getattr(ran, key) != getattr(plan, key):
                raise UserError(
                    f"{run} was run by another plan (its {key} differ); compare it with "
                    f"{run / 'plan.json'} instead"
                )
    return whole_steps(plan, timeline)
