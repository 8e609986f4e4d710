"""Commands that make plans and explain them."""

from pathlib import Path
from typing import Literal

import click

from planner.commands.options import (
    COUNT,
    COUNT_OR_NONE,
    STALENESS,
    Duration,
    JobOptions,
    command_line,
    file_path,
    gpu_counts,
    inputs,
    inputs_but_gpus,
    max_staleness,
    profiles_of_plan,
    settings_of_workload,
)
from planner.spec.frameworks import FRAMEWORKS, FrameworkName


@click.command()
@inputs
@max_staleness
@click.option(
    "--objective",
    type=click.Choice(["mean", "p95", "cost"]),
    default="mean",
    show_default=True,
    help=(
        "What to minimise over the length scenarios: the mean step time, its 95th percentile, or "
        "dollars per step."
    ),
)
@click.option(
    "--scenarios",
    type=COUNT,
    default=16,
    show_default=True,
    metavar="S",
    help=(
        "How often response lengths are drawn (less often where a batch is large); with 1 each "
        "call takes a fixed time."
    ),
)
@click.option(
    "--time-limit",
    type=Duration(),
    metavar="SECONDS",
    help="End the search after this time, with the best plan so far; baselines are always found.",
)
@click.option(
    "--keep",
    "runners_up",
    type=COUNT_OR_NONE,
    default=3,
    show_default=True,
    metavar="N",
    help="Runners-up to show.",
)
@click.option(
    "--pin",
    "pins",
    multiple=True,
    metavar="PIN",
    help=(
        "actor=8 (GPUs of a role), actor+critic (together) or actor/critic (apart). May be given "
        "more than once."
    ),
)
@click.option(
    "--for",
    "framework",
    type=click.Choice(FRAMEWORKS),
    help="Only plans that this framework can execute; `plan export` writes its launch script.",
)
@click.option(
    "--out",
    type=file_path(),
    default=Path("best.json"),
    show_default=True,
    help="Where to write the plan.",
)
@click.option("--no-picture", is_flag=True, help="Do not draw the plan.")
def search(
    job: JobOptions,
    max_staleness: int | None,
    objective: Literal["mean", "p95", "cost"],
    scenarios: int,
    time_limit: float | None,
    runners_up: int,
    pins: tuple[str, ...],
    framework: FrameworkName | None,
    out: Path,
    no_picture: bool,
) -> None:
    """Find the best plan and compare it with the baselines.

    Writes the plan, and next to it a picture of some of its steps."""
    from planner.commands.search import search
    from planner.search import SearchOptions

    options = SearchOptions(
        max_staleness=max_staleness,
        objective=objective,
        scenarios=scenarios,
        time_limit=time_limit,
        runners_up=runners_up,
        pins=pins,
        framework=framework,
    )
    search(job, options, out=out, picture=not no_picture, command=command_line())


@click.command()
@click.argument("name")
@inputs
@click.option("--out", type=file_path(), required=True, help="Where to write the plan.")
def baseline(job: JobOptions, name: str, out: Path) -> None:
    """Write a named baseline as a plan.

    NAME is colocated, split, split-parallel, standalone or one-step-off."""
    from planner.commands.search import baseline

    baseline(job, name, out=out, command=command_line())


@click.command()
@inputs
@click.option(
    "--pool",
    "pools",
    multiple=True,
    required=True,
    metavar="ROLES=GPUS",
    help=(
        "actor,critic=8 (roles that share so many GPUs) or all=8. May be given more than once; the "
        "rollout may be in several pools."
    ),
)
@click.option(
    "--staleness",
    type=STALENESS,
    default=0,
    show_default=True,
    metavar="K",
    help="How many updates old sequences may be.",
)
@click.option(
    "--layout",
    "layouts",
    multiple=True,
    metavar="ROLE.KEY=VALUE",
    help="A layout that is not to be chosen, such as actor.shard=4. May be given more than once.",
)
@click.option("--out", type=file_path(), help="Also write it as a plan.")
def estimate(
    job: JobOptions,
    pools: tuple[str, ...],
    staleness: int,
    layouts: tuple[str, ...],
    out: Path | None,
) -> None:
    """Say what a step takes on pools that you name.

    Shows seconds of each call and of the step. Layouts are chosen, or given with --layout."""
    from planner.commands.estimate import estimate

    estimate(job, pools, layouts, staleness, out, command_line())


@click.command()
@click.argument("plan", type=file_path("PLAN"))
@click.option("--here", is_flag=True, help="Fail if this machine cannot run it.")
@settings_of_workload
def check(plan: Path, here: bool, settings: tuple[str, ...]) -> None:
    """Check a plan as a whole, memory included.

    Also says whether this machine could run it: its GPUs, driver and engine, the models, prompts
    and reward."""
    from planner.commands.check import check

    check(plan, here, settings)


@click.command()
@click.argument("plan", type=file_path("PLAN"))
@profiles_of_plan
def explain(plan: Path, profiles: tuple[Path, ...]) -> None:
    """Say why a plan is as fast as it is.

    Shows what each decision on the way from the tutorial's split buys, what limits the step, where
    GPUs idle, how each call's cost changes the step, and what uses the memory."""
    from planner.commands.explain import explain

    explain(plan, profiles)


@click.command("what-if")
@click.argument("plan", type=file_path("PLAN"))
@click.option(
    "--gpus",
    callback=gpu_counts,
    metavar="N,N,…",
    help="Numbers of GPUs to try (default: half, double, a node more and less).",
)
@profiles_of_plan
def what_if(plan: Path, gpus: tuple[int, ...], profiles: tuple[Path, ...]) -> None:
    """Show under which conditions the decision flips.

    Plans again with other numbers of GPUs, longer responses, a longer tail, slower links, other
    models and more staleness."""
    from planner.commands.whatif import what_if

    what_if(plan, gpus, profiles)


@click.command()
@click.option(
    "--gpus",
    "counts",
    callback=gpu_counts,
    metavar="N,N,…",
    required=True,
    help="Numbers of GPUs, such as 4,8,16.",
)
@inputs_but_gpus
@max_staleness
@click.option(
    "--out",
    type=file_path(),
    default=Path("pareto.png"),
    show_default=True,
    help="Where to draw it.",
)
@click.option("--csv", "table", type=file_path(), help="Where to write the figures.")
def pareto(
    job: JobOptions,
    counts: tuple[int, ...],
    max_staleness: int | None,
    out: Path,
    table: Path | None,
) -> None:
    """Show step time against GPUs, dollars and staleness.

    Finds the best plan of each combination, and shows them as a table and a picture."""
    from planner.commands.whatif import pareto

    pareto(job, counts, max_staleness, out, table)


@click.command()
@click.argument("plan", type=file_path("PLAN"))
@click.option("--run", type=file_path("RUN_DIR"), help="A run of the plan, to show beside it.")
@click.option("--out", type=file_path(), required=True, help="The page to write (.html).")
@click.option(
    "--for",
    "framework",
    type=click.Choice(FRAMEWORKS),
    help="Also show the best plan of this framework, and the best of all.",
)
@click.option("--what-if", "with_what_if", is_flag=True, help="Also plan under other conditions.")
@click.option(
    "--pareto",
    "counts",
    callback=gpu_counts,
    metavar="N,N,…",
    help="Also show what these numbers of GPUs buy.",
)
@profiles_of_plan
def report(
    plan: Path,
    run: Path | None,
    out: Path,
    framework: FrameworkName | None,
    with_what_if: bool,
    counts: tuple[int, ...],
    profiles: tuple[Path, ...],
) -> None:
    """Write a plan as one page for the person who decides.

    The page fetches nothing, and can be read on a phone and in print."""
    from planner.commands.report import PageOptions, report

    options = PageOptions(framework=framework, with_what_if=with_what_if, counts=counts)
    report(plan, run, out, profiles, options, command_line())
