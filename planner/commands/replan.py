"""`plan replan`."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from planner import __version__
from planner.commands.inputs import check_target, make_console
from planner.exchange.imported_run import ImportedRun, profile_of
from planner.exchange.own_run import OwnRun, read_own_run
from planner.predict.forecast import predict
from planner.predict.profile import Profile, load_profiles
from planner.report.tables import plain_table, pools_table, pools_text, seconds
from planner.search import SearchOptions, find
from planner.spec.plan import Plan, Provenance
from planner.spec.wording import counted
from planner.spec.workload import Workload

REPETITIONS = 20  # of the run's steps, for the range of what is saved
NOTHING_SAVED = 0.01  # of a step


def replan(
    run: Path, last: int, max_staleness: int | None, out: Path, given: Sequence[Path], command: str
) -> None:
    check_target(out, ".json")
    found = read_own_run(run, last)
    others = load_profiles(given)
    profile = _profile(found, found.steps, command)
    options = SearchOptions(max_staleness=max_staleness, runners_up=0)
    provenance = Provenance(version=__version__, seed=found.plan.workload.seed, command=command)
    with make_console(stderr=True).status("searching"):
        best = find(
            found.observed.workload,
            found.plan.cluster,
            options,
            profiles=(profile, *others),
            provenance=provenance,
        ).best
        low, high = _range_of_saving(found, best, others)
    now = predict(found.observed, (profile, *others))
    assert best.predicted
    saved = now.step_seconds - best.predicted.step_seconds
    written = best.changed(name=out.stem, workload=_allowed(found.plan, best), predicted=None)
    written = written.changed(predicted=predict(written, (profile, *others)))
    written.write(out)
    console = make_console()
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
    console.print(_verdict(found, run, out, saved, (low, high), now.step_seconds), soft_wrap=True)
    sources = best.predicted.sources.get("measured", 0.0)
    console.print(
        f"{sources:.0%} of the seconds of its calls were measured in this run; the rest is taken "
        f"from the same calls in other layouts. Wrote {out}.",
        soft_wrap=True,
    )


def _allowed(plan: Plan, best: Plan) -> Workload:
    """The workload of the run, which goes on; with as much staleness as the new plan has."""
    return plan.workload.changed(max_staleness=max(plan.workload.max_staleness, best.staleness))


def _profile(found: OwnRun, steps: Sequence[dict[str, float]], command: str) -> Profile:
    """The points of some steps of a run."""
    imported = ImportedRun(plan=found.observed, steps=tuple(steps), phases={}, warmup=0)
    return profile_of(imported, steps, command)


def _range_of_saving(found: OwnRun, best: Plan, others: Sequence[Profile]) -> tuple[float, float]:
    """The 5th and 95th percentile of the seconds saved a step, over draws of the run's steps with
    repetition (the bootstrap of Efron 1979)."""
    rng, saved = np.random.default_rng(0), []
    for _ in range(REPETITIONS):
        chosen = rng.integers(len(found.steps), size=len(found.steps))
        profile = _profile(found, [found.steps[at] for at in chosen], "")
        profiles = (profile, *others)
        before, after = predict(found.observed, profiles), predict(best, profiles)
        saved.append(before.step_seconds - after.step_seconds)
    low, high = np.percentile(saved, (5, 95)).tolist()
    return low, high


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


def _verdict(
    found: OwnRun,
    run: Path,
    out: Path,
    saved: float,
    between: tuple[float, float],
    now: float,
) -> str:
    """Whether to switch: what is saved, what that costs, and after how many steps it pays."""
    low, high = between
    if saved < NOTHING_SAVED * now or low <= 0:
        return "Keep the plan: no other one is surely faster by more than a hundredth."
    left = max(0, found.plan.workload.steps - found.done)
    text = f"It saves {seconds(saved)} s a step ({seconds(low)} to {seconds(high)} s)"
    if found.start_seconds is None:
        return f"{text}. The log does not tell what a start costs. {_how(run, out)}"
    steps = int(np.ceil(found.start_seconds / low))
    text += (
        f". Switching costs about {seconds(found.start_seconds)} s, as long as this run took to "
        f"start: it pays after {counted(steps, 'step')}, and {left} are left."
    )
    return f"{text} {_how(run, out)}" if left > steps else f"{text} Keep the plan."


def _how(run: Path, out: Path) -> str:
    command = shlex.join(["plan", "execute", "--resume", str(run), "--plan", str(out)])
    return f"Switch with `{command}`."
