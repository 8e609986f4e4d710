"""`plan what-if` and `plan pareto`."""

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from planner.commands.inputs import (
    check_target,
    make_console,
    profiles_of,
    read_cluster,
    read_workload,
)
from planner.commands.options import JobOptions
from planner.predict.profile import load_profiles
from planner.predict.schedule import load_plan
from planner.report.insight import pareto_sentences, pareto_table, what_if_table
from planner.report.tables import pools_text, seconds
from planner.search.questions.pareto import ParetoPoint, pareto_points
from planner.search.questions.variants import resized
from planner.search.questions.what_if import Refused, Replanned, conditions
from planner.search.questions.what_if import what_if as plan_under
from planner.spec.cluster import Cluster
from planner.spec.errors import UserError
from planner.spec.files import write_atomic
from planner.spec.wording import counted

MODELS = ("1.5b", "7b", "70b")  # shipped workloads whose models are tried
CSV_TITLES = (
    "gpus",
    "max_staleness",
    "staleness",
    "step_seconds",
    "tokens_per_second",
    "dollars_per_step",
    "best",
    "pools",
)


def what_if(plan: Path, gpus: Sequence[int], profiles: Sequence[Path]) -> None:
    checked = load_plan(plan)
    errors, console = make_console(stderr=True), make_console()
    found = profiles_of(checked, plan, profiles, errors)
    shape = checked.workload.actor.shape
    others = [other for other in map(read_workload, MODELS) if other.actor.shape != shape]
    rows: list[Replanned | Refused] = []
    asked = list(conditions(checked, gpus, others))
    with errors.status("planning") as status:
        for number, condition in enumerate(asked, 1):
            status.update(f"planning {number} of {len(asked)}: {condition.what}")
            try:
                rows.append(plan_under(checked, condition, found))
            except UserError as error:
                rows.append(Refused(condition.what, str(error)))
    console.print(f"[bold]{plan.stem}[/bold]: {pools_text(checked)}", soft_wrap=True)
    console.print(what_if_table(rows))
    console.print(
        "\nEach row is planned anew. “As in the plan”: how much longer a step takes with the roles "
        f"on pools as in {plan.stem}, with the sizes, layouts and order of calls that are best "
        "then.",
        soft_wrap=True,
    )


def pareto(
    job: JobOptions,
    counts: Sequence[int],
    max_staleness: int | None,
    out: Path,
    table: Path | None,
) -> None:
    check_target(out, ".png", ".svg", ".pdf")
    if table is not None:
        check_target(table, ".csv")
    workload, profiles = read_workload(job.workload, job.settings), load_profiles(job.profiles)
    stalest = workload.max_staleness if max_staleness is None else max_staleness
    clusters = [_cluster_of(job, count) for count in counts]
    errors, console = make_console(stderr=True), make_console()
    with errors.status("planning"):
        freshest = int(workload.sync == "in_flight")
        limits = range(freshest, stalest + 1)
        points, reasons = pareto_points(workload, clusters, limits, profiles)
    if not points:
        raise UserError(reasons[-1])  # of the most GPUs
    for reason in reasons:
        errors.print(reason, style="yellow", markup=False, soft_wrap=True)
    from planner.report.pareto import draw  # matplotlib is slow to load

    draw(points, _title(workload.name, clusters[-1]), out)
    if table is not None:
        write_atomic(table, _csv(points))
    console.print(pareto_table(points))
    fastest = min(points, key=lambda point: point.seconds)
    console.print(
        f"\nFastest: {seconds(fastest.seconds)} s per step on {counted(fastest.gpus, 'GPU')}."
    )
    for sentence in pareto_sentences(points):
        console.print(sentence, soft_wrap=True)
    written = str(out) if table is None else f"{out} and {table}"
    console.print(f"Wrote {written}.", markup=False, soft_wrap=True)


def _cluster_of(job: JobOptions, gpus: int) -> Cluster:
    """The cluster that was asked for, with another number of GPUs."""
    if job.cluster is None or job.cluster == "local":
        return read_cluster(replace(job, gpus=gpus))
    return resized(read_cluster(job), gpus)


def _title(workload: str, cluster: Cluster) -> str:
    return f"{workload} on {', '.join(cluster.devices)}: the best plans"


def _csv(points: Sequence[ParetoPoint]) -> str:
    """A line per point. Units: seconds, US dollars, tokens."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_TITLES)
    for point in points:
        writer.writerow(
            [
                point.gpus,
                point.max_staleness,
                point.plan.staleness,
                f"{point.seconds:.6g}",
                f"{point.tokens_per_second:.6g}",
                f"{point.dollars:.6g}",
                int(point.best),
                pools_text(point.plan),
            ]
        )
    return text.getvalue()
