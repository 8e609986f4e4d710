"""Commands that exchange runs with other frameworks."""

from pathlib import Path

import click

from planner import __version__
from planner.commands.options import (
    COUNT_OR_NONE,
    JobOptions,
    command_line,
    file_path,
    inputs,
    profiles_of_plan,
)
from planner.spec.frameworks import FRAMEWORKS, FrameworkName

FRAMEWORKS_READ = ("verl", "openrlhf", "csv")


@click.command("import")
@click.argument("framework", metavar="FRAMEWORK", type=click.Choice(FRAMEWORKS_READ))
@click.argument("log", type=file_path("LOG"))
@click.option("--out", type=file_path("DIR"), required=True, help="A new directory for the files.")
@click.option(
    "--config",
    type=file_path(),
    help="verl: its configuration in YAML (default: what the log has of it).",
)
@click.option(
    "--model", metavar="NAME|DIR", help="verl: the actor's model, where the log does not tell."
)
@click.option(
    "--warmup",
    type=COUNT_OR_NONE,
    metavar="N",
    help="First steps that do not count (default: 2, fewer of short runs).",
)
@click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="CALLS=COLUMN",
    help=(
        "csv: generate=timing_s/gen; several calls may share a column, and step=COLUMN is the "
        "whole step. May be given more than once."
    ),
)
@click.option(
    "--unit",
    type=click.Choice(["s", "ms", "us"]),
    default="s",
    show_default=True,
    help="csv: of columns.",
)
@click.option(
    "--pool",
    "pools",
    multiple=True,
    metavar="ROLES=GPUS",
    help="csv, openrlhf: where roles are, as for `plan estimate`. May be given more than once.",
)
@click.option(
    "--layout",
    "layouts",
    multiple=True,
    metavar="ROLE.KEY=VALUE",
    help="csv, openrlhf: a layout, as for `plan estimate`. May be given more than once.",
)
@inputs
def import_(
    framework: str,
    log: Path,
    out: Path,
    config: Path | None,
    model: str | None,
    warmup: int | None,
    columns: tuple[str, ...],
    unit: str,
    pools: tuple[str, ...],
    layouts: tuple[str, ...],
    job: JobOptions,
) -> None:
    """Take a run of another framework as workload, cluster, plan, timeline and profile.

    FRAMEWORK is verl, openrlhf or csv. Shows where a step goes; all commands work on what is
    written. Of verl the console's output tells nearly all; of the others only seconds are read, and
    --workload, the GPUs and --pool say the rest."""
    from planner.commands.import_run import import_run
    from planner.commands.import_sources import Sources, reader
    from planner.exchange.verl_run import Told

    sources = Sources(
        log=log,
        config=config,
        told=Told(model=model, device=job.device, warmup=warmup),
        job=job,
        pools=pools,
        layouts=layouts,
        columns=columns,
        unit=unit,
    )
    import_run(reader(framework, sources), out, __version__, command_line())


@click.command()
@click.argument("framework", metavar="FRAMEWORK", type=click.Choice(FRAMEWORKS))
@click.argument("plan", type=file_path("PLAN"))
@click.option(
    "--out", type=file_path(), required=True, help="The file to write (.sh; areal: .yaml)."
)
@profiles_of_plan
def export(framework: FrameworkName, plan: Path, out: Path, profiles: tuple[Path, ...]) -> None:
    """Write a plan as a launch script of another framework.

    FRAMEWORK is verl, openrlhf, areal (whose configuration is written) or skyrl. Options have
    comments, and what the framework does otherwise is said with what it costs."""
    from planner.commands.export import export

    export(framework, plan, out, profiles, command_line())
