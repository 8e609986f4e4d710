"""`plan profile`: measure the calls of a workload."""

from dataclasses import replace
from pathlib import Path

from planner.commands.execute import need_extra
from planner.commands.inputs import check_target, make_console, read_cluster, read_workload
from planner.commands.options import JobOptions
from planner.predict.judge import judge
from planner.report.judged import tables


def profile(job: JobOptions, *, minutes: float | None, only: str, out: Path, command: str) -> None:
    need_extra("plan profile")
    check_target(out, ".json")
    workload = read_workload(job.workload, job.settings)
    if job.cluster is None:  # all GPUs on one node, or else this machine's cores
        where = "local" if job.gpus is None else None
        job = replace(job, cluster=where, gpus_per_node=job.gpus)
    cluster = read_cluster(job)
    from executor.measuring.profile import profile  # ray and torch are slow to load

    console = make_console()
    found = profile(
        workload,
        cluster,
        out,
        minutes=minutes,
        only=only,
        command=command,
        progress=lambda text: console.print(text, markup=False, soft_wrap=True),
    )
    for table in tables(judge((found,), cluster)):
        console.print(table)
    console.print(f"Wrote {out}: {len(found.points)} points.", markup=False, soft_wrap=True)
