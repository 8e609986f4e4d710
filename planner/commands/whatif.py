"""`plan what-if` and `plan pareto`."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from planner.commands.inputs import (
    check_target,
    make_console,
    profiles_of,
    read_cluster,
    read_workload,
)
from planner.predict.profile import load_profiles
from planner.predict.schedule import load_plan
from planner.report.insight import pareto_table, what_if_table
from planner.report.tables import pools_text, seconds
from planner.search.questions.pareto import ParetoPoint, pareto_points
from planner.search.questions.variants import resized
from planner.search.questions.what_if import Refused, Replanned, conditions
from planner.search.questions.what_if import what_if as plan_under
from planner.spec.cluster import Cluster
from planner.spec.errors import UserError
from planner.spec.files import write_atomic

MODELS = ("1.5b", "7b", "70b")  # shipped workloads whose models are tried
MOST_GPUS = 4096


def what_if(plan: Path, gpus: str | None, profiles: Sequence[Path]) -> None:
    checked = load_plan(plan)
    errors, console = make_console(stderr=True), make_console()
    found = profiles_of(checked, plan, profiles, errors)
    shape = checked.workload.actor.shape
    others = [other for other in map(read_workload, MODELS) if other.actor.shape != shape]
    rows: list[Replanned | Refused] = []
    asked = list(conditions(checked, counts_of(gpus) if gpus else (), others))
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
        "on pools as in "
        f"{plan.stem}, with the sizes, layouts and order of calls that are best then.",
        soft_wrap=True,
    )


def pareto(
    *,
    gpus: str,
    device: str | None,
    gpus_per_node: int | None,
    cluster: str | None,
    workload: str,
    profiles: Sequence[Path],
    max_staleness: int | None,
    out: Path,
    table: Path | None,
) -> None:
    check_target(out, ".png", ".svg", ".pdf")
    if table is not None:
        check_target(table, ".csv")
    asked, found = read_workload(workload), load_profiles(profiles)
    stalest = asked.max_staleness if max_staleness is None else max_staleness
    if stalest < 0:
        raise UserError(f"--max-staleness {stalest}: must be at least 0")
    clusters = [_cluster(count, device, gpus_per_node, cluster) for count in counts_of(gpus)]
    errors, console = make_console(stderr=True), make_console()
    with errors.status("planning"):
        points, reasons = pareto_points(asked, clusters, range(stalest + 1), found)
    if not points:
        raise UserError(reasons[-1])  # of the most GPUs
    for reason in reasons:
        errors.print(reason, style="yellow", markup=False, soft_wrap=True)
    from planner.report.pareto import draw  # matplotlib is slow to load

    draw(points, _title(asked.name, clusters[-1]), out)
    if table is not None:
        write_atomic(table, _csv(points))
    console.print(pareto_table(points))
    fastest = min(points, key=lambda point: point.seconds)
    console.print(f"\nFastest: {seconds(fastest.seconds)} s per step on {fastest.gpus} GPUs.")
    console.print(f"Wrote {out}{f' and {table}' if table else ''}.", markup=False, soft_wrap=True)


def counts_of(text: str) -> list[int]:
    """Numbers of GPUs, written with commas between them, in rising order. Raises UserError."""
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UserError(
            f"--gpus {text}: write numbers with commas between them, such as 4,8,16"
        ) from None
    if counts[0] < 1 or counts[-1] > MOST_GPUS:
        raise UserError(f"--gpus {text}: each must be 1 to {MOST_GPUS:,}")
    return counts


def _cluster(
    gpus: int, device: str | None, gpus_per_node: int | None, cluster: str | None
) -> Cluster:
    if cluster is None or cluster == "local":
        return read_cluster(gpus=gpus, device=device, gpus_per_node=gpus_per_node, cluster=cluster)
    return resized(
        read_cluster(gpus=None, device=device, gpus_per_node=gpus_per_node, cluster=cluster), gpus
    )


def _title(workload: str, cluster: Cluster) -> str:
    return f"{workload} on {', '.join(cluster.devices)}: the best plans"


def _csv(points: Sequence[ParetoPoint]) -> str:
    """Units: seconds, US dollars, tokens."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            "gpus",
            "max_staleness",
            "staleness",
            "step_seconds",
            "tokens_per_second",
            "dollars_per_step",
            "best",
            "pools",
        ]
    )
    for p in points:
        figures = [f"{value:.6g}" for value in (p.seconds, p.tokens_per_second, p.dollars)]
        writer.writerow(
            [
                p.gpus,
                p.max_staleness,
                p.plan.staleness,
                *figures,
                int(p.best),
                pools_text(p.plan),
            ]
        )
    return text.getvalue()
