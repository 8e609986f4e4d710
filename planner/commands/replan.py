"""`plan replan`."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from executor.running.options import RunOptions
from planner.commands.inputs import check_target, make_console
from planner.exchange.own_run import OwnRun, read_own_run
from planner.exchange.replanning import PlannedAnew, plan_anew, plan_to_go_on_with
from planner.predict.profile import load_profiles
from planner.report.tables import plain_table, pools_table, pools_text, seconds
from planner.search import SearchOptions
from planner.spec.errors import UserError
from planner.spec.wording import counted


def replan(
    run: Path,
    last: int,
    max_staleness: int | None,
    out: Path,
    given: Sequence[Path],
    command: str,
    options: RunOptions,
    *,
    apply: bool,
) -> None:
    """Plan a run anew, and go on with it under the new plan if that is to be applied and pays."""
    check_target(out, ".json")
    if apply:
        _check_can_go_on(run)
    elif options != RunOptions():
        raise UserError("options of how a plan is run are for --apply; leave them out or add it")
    found, others = read_own_run(run, last), load_profiles(given)
    wanted = SearchOptions(max_staleness=max_staleness, runners_up=0)
    with make_console(stderr=True).status("searching"):
        anew = plan_anew(found, wanted, others, command)
    plan_to_go_on_with(found, anew.best, others, out.stem, command).write(out)
    console = make_console()
    _show(console, found, anew, out)
    options = replace(options, steps=options.steps or found.asked)
    left = max(0, (options.steps or 0) - found.done)
    gain, kept = _gain(found, anew, left), _why_kept(found, anew, left)
    if not apply:
        console.print(f"{gain}{kept or _how(run, out)}", soft_wrap=True)
        return
    if kept:
        raise UserError(f"{run}: nothing is applied. {gain}{kept}")
    from planner.commands.execute import resume  # ray and torch are slow to load

    console.print(f"{gain}The run goes on under {out}.", markup=False, soft_wrap=True)
    resume(run, out, options)


def _check_can_go_on(run: Path) -> None:
    """Raise UserError, before a search, for a run that has no checkpoint or still goes on."""
    from planner.commands.execute import need_extra

    need_extra("plan replan --apply")
    if not run.is_dir():
        raise UserError(f"{run}: no such run directory; give the one that `plan execute` named")
    from executor.running import checkpoint  # torch is slow to load
    from executor.running.run_directory import check_ended

    check_ended(run)
    checkpoint.find(run)


def _show(console: Console, found: OwnRun, anew: PlannedAnew, out: Path) -> None:
    """What the run took and what the best plan would."""
    best, now = anew.best, anew.now
    assert best.predicted
    console.print(_drift(found, now.call_seconds))
    console.print()
    console.print(pools_table(best))
    console.print()
    measured = float(np.mean(found.step_seconds))
    console.print(
        f"A step took {seconds(measured)} s in the last {len(found.steps)} steps; with their "
        f"seconds and lengths this plan is predicted {seconds(now.step_seconds)} s, the best one "
        f"[bold]{seconds(best.predicted.step_seconds)} s[/bold] ({pools_text(best)}).",
        soft_wrap=True,
    )
    sources = best.predicted.sources.get("measured", 0.0)
    console.print(
        f"{sources:.0%} of the seconds of its calls were measured in this run; the rest is taken "
        f"from the same calls in other layouts. Wrote {out}.",
        soft_wrap=True,
    )


def _drift(found: OwnRun, now: dict[str, float]) -> Table:
    """Each call as the plan predicts it and as it went in the last steps."""
    table = plain_table()
    table.add_column("call", no_wrap=True)
    for title in ("in the plan s", "measured s", "drift"):
        table.add_column(title, justify="right", no_wrap=True)
    expected = found.plan.predicted.call_seconds if found.plan.predicted else {}
    for call in found.plan.dataflow.steady.names:
        measured = float(np.mean([step[call] for step in found.steps]))
        before = expected.get(call)
        drift = f"{measured / before - 1:+.0%}" if before else "–"
        table.add_row(call, seconds(before) if before else "–", seconds(measured), drift)
    return table


def _gain(found: OwnRun, anew: PlannedAnew, left: int) -> str:
    """What is saved, what a switch costs, and after how many steps of those that are left it pays;
    nothing if nothing is surely saved."""
    if not anew.is_surely_faster:
        return ""
    between = f"{seconds(anew.low)} to {seconds(anew.high)}"
    text = f"It saves {seconds(anew.saved)} s a step ({between} s). "
    cost = found.start_seconds
    if cost is None:
        return f"{text}The log does not tell what a start costs. "
    pays = counted(anew.pays_after(cost), "step")
    return (
        f"{text}Switching costs about {seconds(cost)} s, as long as this run took to start: it "
        f"pays after {pays}, and {left} are left. "
    )


def _why_kept(found: OwnRun, anew: PlannedAnew, left: int) -> str:
    """Why the plan is better kept for the steps that are left; nothing if it is not."""
    if not anew.is_surely_faster:
        return "Keep the plan: no other one is surely faster by more than a hundredth."
    if left <= anew.pays_after(found.start_seconds or 0.0):
        return "Keep the plan."
    return ""


def _how(run: Path, out: Path) -> str:
    command = shlex.join(["plan", "execute", "--resume", str(run), "--plan", str(out)])
    return f"Switch with `{command}`, or add --apply."
