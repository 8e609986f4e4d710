"""Commands that exchange runs with other frameworks."""

from pathlib import Path

import click

from planner import __version__
from planner.commands.options import COUNT_OR_NONE, command_line, file_path, profiles_of_plan
from planner.spec.frameworks import FrameworkName

FRAMEWORKS_READ = ("verl",)
FRAMEWORKS_WRITTEN = ("verl",)


@click.command("import")
@click.argument("framework", metavar="FRAMEWORK", type=click.Choice(FRAMEWORKS_READ))
@click.argument("log", type=file_path("LOG"))
@click.option("--out", type=file_path("DIR"), required=True, help="A new directory for the files.")
@click.option(
    "--config",
    type=file_path(),
    help="Its configuration in YAML (default: what the log has of it).",
)
@click.option("--model", metavar="NAME|DIR", help="The actor's model, where the log does not tell.")
@click.option("--device", metavar="NAME", help="Kind of GPU, where the log does not tell.")
@click.option(
    "--warmup",
    type=COUNT_OR_NONE,
    metavar="N",
    help="First steps that do not count (default: 2, fewer of short runs).",
)
def import_(
    framework: str,
    log: Path,
    out: Path,
    config: Path | None,
    model: str | None,
    device: str | None,
    warmup: int | None,
) -> None:
    """Take a run of another framework as workload, cluster, plan, timeline and profile.

    FRAMEWORK is verl. Shows where a step goes; all commands work on what is written."""
    from planner.commands.import_run import import_run
    from planner.commands.import_sources import reader

    read = reader(framework, log, config=config, model=model, device=device, warmup=warmup)
    import_run(read, out, __version__, command_line())


@click.command()
@click.argument("framework", metavar="FRAMEWORK", type=click.Choice(FRAMEWORKS_WRITTEN))
@click.argument("plan", type=file_path("PLAN"))
@click.option("--out", type=file_path(), required=True, help="The script to write (.sh).")
@profiles_of_plan
def export(framework: FrameworkName, plan: Path, out: Path, profiles: tuple[Path, ...]) -> None:
    """Write a plan as a launch script of another framework.

    FRAMEWORK is verl. Each option has a comment, and what the framework does otherwise is said with
    what it costs."""
    from planner.commands.export import export

    export(framework, plan, out, profiles, command_line())
