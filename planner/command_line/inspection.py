"""Commands that tell what there is: the space of a search, and the form of files."""

import click

from planner.commands.options import (
    JobOptions,
    inputs,
    max_staleness,
)

FILE_KINDS = ("plan", "timeline", "profile", "workload", "cluster", "study", "cell")


@click.command()
@inputs
@max_staleness
def space(job: JobOptions, max_staleness: int | None) -> None:
    """Count the placements, layouts and programs of a search."""
    from planner.commands.search import space

    space(job, max_staleness)


@click.command()
@click.argument("kind", metavar="KIND", type=click.Choice(FILE_KINDS))
def schema(kind: str) -> None:
    """Print the JSON Schema of a kind of file.

    KIND is plan, timeline, profile, workload, cluster, study or cell."""
    from planner.commands.check import schema

    schema(kind)
