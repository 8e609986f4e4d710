"""`plan study`: plans are written with their predictions, measured cell by cell, and compared."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rich.console import Console
from rich.table import Table

from planner import __version__
from planner.commands.execute import need_extra
from planner.commands.inputs import Inputs, make_console, read_inputs
from planner.predict.forecast import forecast, predict
from planner.predict.profile import check_profiles, load_profiles
from planner.predict.schedule import check, load_plan
from planner.report import study_page
from planner.report.judged import with_notes
from planner.report.study import Row, read_result, rows_of, same_plan, sha256_of
from planner.report.tables import pools_text, seconds
from planner.search import Result, find
from planner.search import baseline as find_baseline
from planner.spec.errors import UserError
from planner.spec.files import write_atomic
from planner.spec.plan import Plan, Provenance
from planner.spec.study import Cell, Study, load_study
from planner.spec.timeline import Timeline, step_seconds
from planner.spec.workload import RewardFunction, Workload


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A study and its file, where its results lie, and the command that it was asked with."""

    study: Study
    path: Path
    directory: Path
    command: str


def study(
    study: Path,
    out: Path | None,
    minutes: float | None,
    plan_only: bool,
    report: bool,
    command: str,
) -> None:
    if plan_only and report:
        raise UserError("--plan-only and --report are two different things; give one of them")
    if minutes is not None and minutes <= 0:
        raise UserError(f"--minutes {minutes:g}: must be greater than 0")
    asked = Asked(
        study=load_study(study), path=study, directory=out or study.with_suffix(""), command=command
    )
    console = make_console()
    if plan_only:
        _plan(asked, console, [cell for cell in asked.study.cells if not _measured(asked, cell)])
        return
    if not report:
        need_extra("plan study")
        missing = [cell for cell in asked.study.cells if not _written(asked, cell)]
        if missing:
            _plan(asked, console, missing)
        _run(asked, console, minutes)
    _report(asked, console)


# --- plans ---


def _written(asked: Asked, cell: Cell) -> bool:
    return (asked.directory / cell.name / "plan.json").exists()


def _measured(asked: Asked, cell: Cell) -> bool:
    if not _written(asked, cell):
        return False
    result = read_result(asked.directory / cell.name)
    return result is not None and result.status == "done"


def _plan(asked: Asked, console: Console, cells: Sequence[Cell]) -> None:
    """Write the plans and predicted timelines of some cells; those that are measured stay as they
    are."""
    study = asked.study
    inputs = _inputs(study)

    @cache
    def searched(staleness: int, keep: int, pins: tuple[str, ...]) -> Result:
        return find(
            inputs.workload,
            inputs.cluster,
            profiles=inputs.profiles,
            max_staleness=staleness,
            keep=keep,
            pins=pins,
        )

    def plan_of(cell: Cell) -> Plan:
        if cell.plan is not None:
            return load_plan(cell.plan)
        if cell.baseline is not None:
            return find_baseline(
                cell.baseline,
                inputs.workload,
                inputs.cluster,
                profiles=inputs.profiles,
                pins=cell.pins,
            )
        assert cell.search is not None
        keep = 1 + max(
            other.runner_up
            for other in study.cells
            if (other.search, other.pins) == (cell.search, cell.pins)
        )
        found = searched(cell.search, keep, cell.pins)
        plans = (found.best, *found.runners_up)
        if cell.runner_up >= len(plans):
            raise UserError(
                f"the search found {len(plans)} placements, so there is no runner-up "
                f"{cell.runner_up}"
            )
        return plans[cell.runner_up]

    for cell in cells:
        try:
            plan = plan_of(cell)
            check(plan)
        except UserError as error:
            raise UserError(f"cell {cell.name!r}: {error}") from None
        _write(asked, plan.model_copy(update={"name": cell.name}), inputs)
    if kept := [cell.name for cell in study.cells if cell not in cells]:
        console.print(f"Left as they are: {', '.join(kept)}.", soft_wrap=True)
    console.print(_plans_table(asked))
    console.print(f"Wrote {len(cells)} plans to {asked.directory}.", markup=False, soft_wrap=True)


def _inputs(study: Study) -> Inputs:
    """With the paths as they are seen from here, so that a plan says nothing of the machine it was
    made on."""
    profiles = [Path(_from_here(path)) for path in study.profiles]
    gpus_per_node = study.gpus if study.cluster is None else None
    inputs = read_inputs(
        gpus=study.gpus, device=study.device, gpus_per_node=gpus_per_node, cluster=study.cluster,
        workload=study.workload, profiles=profiles,
    )  # fmt: skip
    return Inputs(**{**vars(inputs), "workload": _paths(inputs.workload, _from_here)})


def _from_here(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _absolute(path: Path) -> str:
    return str(path.absolute())


def _paths(workload: Workload, write: object) -> Workload:
    """The workload with its paths (of models, data and a reward function) written in another
    way."""
    assert callable(write)
    changes: dict[str, object] = {
        role: model.model_copy(update={"path": Path(write(model.path))})
        for role, model in workload.models.items()
        if model.path is not None
    }
    if isinstance(workload.reward, RewardFunction):
        file, _, name = workload.reward.function.rpartition(":")
        changes["reward"] = workload.reward.model_copy(
            update={"function": f"{write(Path(file))}:{name}"}
        )
    if workload.data is not None:
        files = {"train": workload.data.train, "evaluation": workload.data.evaluation}
        written = {key: Path(write(path)) for key, path in files.items() if path is not None}
        changes["data"] = workload.data.model_copy(update=written)
    return workload.model_copy(update=changes)


def _write(asked: Asked, plan: Plan, inputs: Inputs) -> None:
    directory = asked.directory / plan.name
    warmup, drain = asked.study.warmup_of(plan.staleness), plan.staleness
    provenance = Provenance(
        version=__version__,
        seed=plan.workload.seed,
        command=asked.command,
        profiles=inputs.provenance,
    )
    check_profiles(
        inputs.profiles, plan.workload, plan.cluster
    )  # a plan from a file has not been searched with them
    predicted = plan.predicted or predict(plan, inputs.profiles)
    plan = plan.model_copy(update={"provenance": provenance, "predicted": predicted})
    timeline = forecast(plan, warmup + asked.study.steps + drain, inputs.profiles)
    timeline.model_copy(update={"warmup": warmup, "drain": drain}).write(
        directory / "predicted.json"
    )
    plan.write(directory / "plan.json")


def _plans_table(asked: Asked) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("cell", "predicted s", "stale", "GPUs of each pool: its roles"):
        table.add_column(title, justify="right" if title in ("predicted s", "stale") else "left")
    for row in rows_of(asked.study, asked.directory):
        same = f" (= {row.same_as})" if row.same_as else ""
        pools = pools_text(row.plan, "; ")
        table.add_row(
            row.cell.name + same, seconds(row.predicted_seconds), str(row.plan.staleness), pools
        )
    return table


# --- running ---


def _run(asked: Asked, console: Console, minutes: float | None) -> None:
    from executor.measuring.study import Job, run  # ray and torch are slow to load

    jobs: list[Job] = []
    seen: list[Plan] = []
    for cell in asked.study.cells:
        directory = asked.directory / cell.name
        plan = load_plan(directory / "plan.json")
        predicted = Timeline.read(directory / "predicted.json")
        _check_steps(asked, cell, plan, predicted)
        again = any(same_plan(plan, other) for other in seen)
        seen.append(plan)
        if again or _measured(asked, cell):
            continue
        _check_profiles(asked.study, plan)
        located = plan.model_copy(update={"workload": _paths(plan.workload, _absolute)})
        sha256 = sha256_of(directory / "plan.json")
        jobs.append(
            Job(plan=located, steps=predicted.steps, warmup=predicted.warmup, drain=predicted.drain,
                seconds=step_seconds(predicted), directory=directory, sha256=sha256)
        )  # fmt: skip
    if not jobs:
        console.print("Every cell has been measured.")
        return
    left = run(
        jobs,
        seconds=None if minutes is None else 60 * minutes,
        say=lambda line: console.print(line, markup=False, soft_wrap=True),
    )
    if left:
        console.print(
            f"No time for {', '.join(left)}; give the same command again.", soft_wrap=True
        )


def _check_steps(asked: Asked, cell: Cell, plan: Plan, predicted: Timeline) -> None:
    """Raise UserError unless the committed prediction is of the steps that the study asks for."""
    directory = asked.directory / cell.name
    counted, warmup = (
        predicted.steps - predicted.warmup - predicted.drain,
        asked.study.warmup_of(plan.staleness),
    )
    if (predicted.plan, counted, predicted.warmup) != (plan.name, asked.study.steps, warmup):
        first = f"delete {directory / 'result.json'} and " if _measured(asked, cell) else ""
        raise UserError(
            f"{directory / 'predicted.json'} is of {counted} steps of plan {predicted.plan!r} "
            f"after {predicted.warmup} "
            f"to warm up, not of {asked.study.steps} of {plan.name!r} after {warmup}; {first}write "
            "it anew with "
            "--plan-only"
        )


def _check_profiles(study: Study, plan: Plan) -> None:
    """Raise UserError unless the plan was made with the profiles that the study names, as they are
    now."""
    now = sorted(profile.sha256 for profile in load_profiles(study.profiles))
    made_with = sorted(plan.provenance.profiles.values()) if plan.provenance else []
    if now != made_with:
        raise UserError(
            f"cell {plan.name!r} was planned with other profiles than the study has now; plan "
            "again with --plan-only"
        )


# --- the report ---


def _report(asked: Asked, console: Console) -> None:
    study, directory = asked.study, asked.directory
    rows = rows_of(study, directory)
    for row in rows:
        _check_steps(asked, row.cell, row.plan, row.predicted)
    _draw(study, rows, directory)
    page = directory / "README.md"
    before = page.read_text(encoding="utf-8") if page.exists() else ""
    write_atomic(page, with_notes(study_page.page(study, rows, _from_here(asked.path)), before))
    write_atomic(directory / "results.json", study_page.as_json(study, rows))
    write_atomic(directory / "results.csv", study_page.as_csv(rows))
    for line in study_page.summary_lines(rows):
        console.print(line.replace("`", ""), markup=False, soft_wrap=True)
    console.print(
        f"Wrote {directory / 'README.md'}, results.json and results.csv.",
        markup=False,
        soft_wrap=True,
    )


def _draw(study: Study, rows: Sequence[Row], directory: Path) -> None:
    done = [(row, row.figures) for row in rows if row.figures is not None and row.same_as is None]
    if not done:
        return
    from planner.report import gantt, steps  # matplotlib is slow to load

    bars = [
        steps.StepBar(row.cell.name, row.predicted_seconds, figures.step_seconds)
        for row, figures in done
    ]
    steps.draw(bars, study.name, directory / study_page.PICTURE)
    for row, figures in done:
        gantt.draw(
            [row.predicted, figures.measured], row.plan, directory / row.cell.name / "gantt.png"
        )
