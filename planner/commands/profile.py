"""`plan profile`: measure the calls of a workload."""

from pathlib import Path

from planner.commands.execute import need_extra
from planner.commands.inputs import check_target, make_console, read_cluster, read_workload
from planner.predict.judge import judge
from planner.report.judged import tables
from planner.spec.errors import UserError


def profile(
    cluster: str | None,
    gpus: int | None,
    device: str | None,
    workload: str,
    minutes: float | None,
    only: str,
    out: Path,
    command: str,
) -> None:
    need_extra("plan profile")
    check_target(out, ".json")
    if minutes is not None and not minutes > 0:
        raise UserError(f"--minutes {minutes:g}: must be more than 0")
    asked = read_workload(workload)
    where = "local" if cluster is None and gpus is None else cluster
    per_node = gpus if where is None else None  # all on one node
    there = read_cluster(gpus=gpus, device=device, gpus_per_node=per_node, cluster=where)
    from executor.measuring.profile import profile

    console = make_console()
    found = profile(
        asked,
        there,
        out,
        minutes=minutes,
        only=only,
        command=command,
        progress=lambda text: console.print(text, markup=False, soft_wrap=True),
    )
    for table in tables(judge((found,), there)):
        console.print(table)
    console.print(f"Wrote {out}: {len(found.points)} points.", markup=False, soft_wrap=True)
