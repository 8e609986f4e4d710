"""`plan study`: plans are written with their predictions, measured cell by cell, and compared."""

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from planner.commands.execute import need_extra
from planner.commands.inputs import Inputs, make_console, read_inputs
from planner.commands.options import JobOptions
from planner.predict.forecast import forecast, predict
from planner.predict.profile import check_profiles, load_profiles
from planner.predict.schedule import check, load_plan
from planner.report import study_data, study_page
from planner.report.judged import with_notes
from planner.report.study import CellRow, measured_rows, read_result, rows_of, same_plan, sha256_of
from planner.report.tables import pools_text, seconds
from planner.search import Result, SearchOptions, find
from planner.search import baseline as find_baseline
from planner.spec.data import with_paths
from planner.spec.errors import UserError
from planner.spec.files import write_atomic
from planner.spec.plan import Plan
from planner.spec.rewards import RewardFunction
from planner.spec.study import Cell, Study, load_study
from planner.spec.timeline import Timeline, step_seconds
from planner.spec.workload import Reward, RewardModel, Workload


@dataclass(frozen=True, kw_only=True)
class StudyRequest:
    """A study and its file, where its results lie, and the command that asked for it."""

    study: Study
    path: Path
    directory: Path
    command: str


def read_study(path: Path, out: Path | None, command: str) -> StudyRequest:
    """Read a study. Raises UserError."""
    study = load_study(path)
    directory = out or path.with_suffix("")
    return StudyRequest(study=study, path=path, directory=directory, command=command)


def plan_cells(asked: StudyRequest) -> None:
    """Write the plan and the predicted timeline of every cell that has not been measured."""
    cells = [cell for cell in asked.study.cells if not _measured(asked, cell)]
    _plan(asked, make_console(), cells)


def run_study(asked: StudyRequest, minutes: float | None) -> None:
    """Plan the cells that have no plan, measure those that have not been measured, and report."""
    need_extra("plan study")
    console = make_console()
    missing = [cell for cell in asked.study.cells if not _written(asked, cell)]
    if missing:
        _plan(asked, console, missing)
    _run(asked, console, minutes)
    _report(asked, console)


def write_report(asked: StudyRequest) -> None:
    """Write the report of what has been measured."""
    _report(asked, make_console())


# --- plans ---


def _written(asked: StudyRequest, cell: Cell) -> bool:
    return (asked.directory / cell.name / "plan.json").exists()


def _measured(asked: StudyRequest, cell: Cell) -> bool:
    if not _written(asked, cell):
        return False
    result = read_result(asked.directory / cell.name)
    return result is not None and result.status == "done"


def _plan(asked: StudyRequest, console: Console, cells: Sequence[Cell]) -> None:
    """Write the plans and predicted timelines of some cells; those that are measured stay as they
    are."""
    inputs = _inputs(asked.study)
    searched = functools.cache(functools.partial(_searched, asked.study, inputs))
    for cell in cells:
        try:
            plan = _plan_of(cell, inputs, searched)
            check(plan)
        except UserError as error:
            raise UserError(f"cell {cell.name!r}: {error}") from None
        _write(asked, plan.changed(name=cell.name), inputs)
    if kept := [cell.name for cell in asked.study.cells if cell not in cells]:
        console.print(f"Left as they are: {', '.join(kept)}.", soft_wrap=True)
    console.print(_plans_table(asked))
    console.print(f"Wrote {len(cells)} plans to {asked.directory}.", markup=False, soft_wrap=True)


def _searched(study: Study, inputs: Inputs, staleness: int, pins: tuple[str, ...]) -> Result:
    """The search that some cells ask for, with the last runner-up that one of them wants."""
    cells = [cell for cell in study.cells if (cell.search, cell.pins) == (staleness, pins)]
    last = max(cell.runner_up for cell in cells)
    options = SearchOptions(max_staleness=staleness, runners_up=last, pins=pins)
    return find(inputs.workload, inputs.cluster, options, profiles=inputs.profiles)


def _plan_of(
    cell: Cell, inputs: Inputs, searched: Callable[[int, tuple[str, ...]], Result]
) -> Plan:
    """The plan of a cell: read, a baseline's, or one that was searched. Raises UserError."""
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
    found = searched(cell.search, cell.pins)
    plans = (found.best, *found.runners_up)
    if cell.runner_up >= len(plans):
        raise UserError(
            f"the search found {len(plans)} placements, so there is no runner-up {cell.runner_up}"
        )
    return plans[cell.runner_up]


def _inputs(study: Study) -> Inputs:
    """The inputs with paths as they are seen from here, so that a plan says nothing of the machine
    that it was made on."""
    profiles = tuple(Path(_from_here(path)) for path in study.profiles)
    job = JobOptions(
        gpus=study.gpus,
        device=study.device,
        gpus_per_node=study.gpus if study.cluster is None else None,  # all on one node
        cluster=study.cluster,
        workload=study.workload,
        profiles=profiles,
    )
    inputs = read_inputs(job)
    return replace(inputs, workload=_with_paths(inputs.workload, _from_here))


def _from_here(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _absolute(path: Path) -> str:
    return str(path.absolute())


def _with_paths(workload: Workload, written: Callable[[Path], str]) -> Workload:
    """The workload with its paths (of models, data and a reward function) written in another
    way."""
    changes: dict[str, Any] = {}
    for role, model in workload.models.items():
        if model.path is not None and role != "reward":
            changes[role] = model.changed(path=Path(written(model.path)))
    rewards = [_reward_with_path(reward, written) for reward in workload.all_rewards]
    changes |= {"rewards": tuple(rewards)} if workload.rewards else {"reward": rewards[0]}
    if workload.data is not None:
        files = {"train": workload.data.train, "evaluation": workload.data.evaluation}
        paths = {key: with_paths(given, written) for key, given in files.items()}
        changes["data"] = workload.data.changed(**paths)
    changes["evaluation"] = tuple(
        each.changed(files=with_paths(each.files, written)) for each in workload.evaluation
    )
    return workload.changed(**changes)


def _reward_with_path(reward: Reward, written: Callable[[Path], str]) -> Reward:
    if isinstance(reward, RewardModel) and reward.path is not None:
        return reward.changed(path=Path(written(reward.path)))
    if isinstance(reward, RewardFunction) and reward.file:
        return reward.changed(function=reward.at(written(Path(reward.file))))
    return reward


def _write(asked: StudyRequest, plan: Plan, inputs: Inputs) -> None:
    directory = asked.directory / plan.name
    # A plan from a file has not been searched with these profiles.
    check_profiles(inputs.profiles, plan.workload, plan.cluster)
    plan = plan.changed(
        provenance=inputs.provenance(asked.command).changed(seed=plan.workload.seed),
        predicted=plan.predicted or predict(plan, inputs.profiles),
    )
    warmup, drain = asked.study.warmup_of(plan.staleness), plan.staleness
    timeline = forecast(plan, warmup + asked.study.steps + drain, inputs.profiles)
    timeline.changed(warmup=warmup, drain=drain).write(directory / "predicted.json")
    plan.write(directory / "plan.json")


def _plans_table(asked: StudyRequest) -> Table:
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


def _run(asked: StudyRequest, console: Console, minutes: float | None) -> None:
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
        jobs.append(
            Job(
                plan=plan.changed(workload=_with_paths(plan.workload, _absolute)),
                steps=predicted.steps,
                warmup=predicted.warmup,
                drain=predicted.drain,
                seconds=step_seconds(predicted),
                directory=directory,
                sha256=sha256_of(directory / "plan.json"),
            )
        )
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


def _check_steps(asked: StudyRequest, cell: Cell, plan: Plan, predicted: Timeline) -> None:
    """Raise UserError unless the committed prediction is of the steps that the study asks for."""
    directory = asked.directory / cell.name
    counted = predicted.steps - predicted.warmup - predicted.drain
    warmup = asked.study.warmup_of(plan.staleness)
    wanted = (plan.name, asked.study.steps, warmup)
    if (predicted.plan, counted, predicted.warmup) == wanted:
        return
    first = f"delete {directory / 'result.json'} and " if _measured(asked, cell) else ""
    raise UserError(
        f"{directory / 'predicted.json'} is of {counted} steps of plan {predicted.plan!r} after "
        f"{predicted.warmup} to warm up, not of {asked.study.steps} of {plan.name!r} after "
        f"{warmup}; {first}write it again with --plan-only"
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


def _report(asked: StudyRequest, console: Console) -> None:
    study, directory = asked.study, asked.directory
    rows = rows_of(study, directory)
    for row in rows:
        _check_steps(asked, row.cell, row.plan, row.predicted)
    _draw(study, rows, directory)
    page = directory / "README.md"
    before = page.read_text(encoding="utf-8") if page.exists() else ""
    write_atomic(page, with_notes(study_page.page(study, rows, _from_here(asked.path)), before))
    write_atomic(directory / "results.json", study_data.as_json(study, rows))
    write_atomic(directory / "results.csv", study_data.as_csv(rows))
    for line in study_page.summary_lines(rows):
        console.print(line.replace("`", ""), markup=False, soft_wrap=True)
    console.print(
        f"Wrote {directory / 'README.md'}, results.json and results.csv.",
        markup=False,
        soft_wrap=True,
    )


def _draw(study: Study, rows: Sequence[CellRow], directory: Path) -> None:
    done = measured_rows(rows)
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
