"""Commands that measure, and judge what was measured."""

from pathlib import Path

import click

from planner.commands.options import (
    COUNT,
    SEED,
    JobOptions,
    command_line,
    file_path,
    minutes,
    settings_of_workload,
)
from planner.spec.errors import UserError


@click.command()
@click.option(
    "--cluster",
    metavar="FILE|local",
    help="What to measure, if not --gpus: a cluster file of one node, or this machine's cores.",
)
@click.option(
    "--gpus",
    type=COUNT,
    metavar="N",
    help="Number of GPUs to measure (with --cluster local: of cores).",
)
@click.option("--device", metavar="NAME", help="Kind of GPU (default: h200).")
@click.option("--workload", required=True, metavar="FILE|NAME", help="Whose calls to measure.")
@minutes("Time to spend; the least valuable measurements are left out.")
@click.option(
    "--only",
    default="",
    metavar="TEXT",
    help="Only groups of measurements whose name contains this.",
)
@click.option(
    "--out",
    type=file_path(),
    required=True,
    help="Where to write the profile; measurements that it already has are kept.",
)
@settings_of_workload
def profile(
    cluster: str | None,
    gpus: int | None,
    device: str | None,
    workload: str,
    minutes: float | None,
    only: str,
    out: Path,
    settings: tuple[str, ...],
) -> None:
    """Measure how long the calls of a workload take on this machine.

    The profile is for `plan search --profile`. Without --cluster and --gpus this machine's cores
    are measured."""
    from planner.commands.profile import profile

    job = JobOptions(
        gpus=gpus, device=device, cluster=cluster, workload=workload, settings=settings
    )
    profile(job, minutes=minutes, only=only, out=out, command=command_line())


@click.command()
@click.argument("profiles", type=file_path("PROFILE"), nargs=-1, required=True)
@click.option(
    "--cluster",
    metavar="FILE|local",
    help="What they were measured on, if its device is not shipped.",
)
@click.option(
    "--out",
    type=file_path(),
    help="Write a page (.md) about them; what the file has under '## Notes' is kept.",
)
def judge(profiles: tuple[Path, ...], cluster: str | None, out: Path | None) -> None:
    """Say how good estimates from profiles are.

    For each kind of call, shows how far estimates are from measured points that they were made
    without, and how far the roofline alone is."""
    from planner.commands.judge import judge

    judge(profiles, cluster, out, command=command_line())


@click.command()
@click.argument("study", type=file_path("STUDY"))
@click.option(
    "--out",
    type=file_path("DIR"),
    help="Directory of plans and results (default: STUDY without its suffix).",
)
@minutes("Start no cell that would not end within M minutes.")
@click.option(
    "--plan-only",
    is_flag=True,
    help="Write every cell's plan and predicted timeline, and run nothing.",
)
@click.option(
    "--report", is_flag=True, help="Write the report of what has been measured, and run nothing."
)
def study(
    study: Path, out: Path | None, minutes: float | None, plan_only: bool, report: bool
) -> None:
    """Measure a list of plans and compare with the predictions.

    Cells that have been measured are skipped. Plans that exist already are run as they are."""
    from planner.commands import study as commands

    if plan_only and report:
        raise UserError("--plan-only and --report exclude each other; give one of them")
    asked = commands.read_study(study, out, command_line())
    if plan_only:
        commands.plan_cells(asked)
    elif report:
        commands.write_report(asked)
    else:
        commands.run_study(asked, minutes)


@click.command()
@click.argument("name", metavar="NAME", type=click.Choice(["digits"]))
@click.option(
    "--out",
    type=file_path("DIR"),
    required=True,
    help="Directory for the models, prompts and workload file.",
)
@click.option(
    "--seed",
    type=SEED,
    default=0,
    show_default=True,
    metavar="N",
    help="Another seed makes other prompts and models.",
)
def task(name: str, out: Path, seed: int) -> None:
    """Make the small task that is shipped.

    NAME is digits. Writes prompts, a tiny language model that is only partly right, and a tiny
    reward model."""
    from planner.commands.execute import task

    task(name, out, seed)
