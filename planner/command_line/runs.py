"""Commands that run a plan, really or simulated, and look at what came of it."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from planner.command_line.run_options import run_options
from planner.commands.options import (
    COUNT,
    COUNT_OR_NONE,
    STEP_COUNT,
    command_line,
    file_path,
    max_staleness,
    profiles_of_plan,
    settings_of_workload,
)
from planner.spec.errors import UserError
from planner.spec.limits import MOST_STEPS

if TYPE_CHECKING:
    from executor.running.options import RunOptions


SWITCHES = 2  # of the autopilot


@click.command()
@click.argument("plan", type=file_path("PLAN"))
@click.option(
    "--steps", type=STEP_COUNT, default=8, show_default=True, metavar="N", help="Steps to simulate."
)
@click.option("--gantt", type=file_path(), help="Draw the steady-state steps (.png, .svg or .pdf).")
@click.option("--trace", type=file_path(), help="Write a trace that opens in Perfetto.")
@click.option("--timeline", type=file_path(), help="Write the simulated timeline.")
@profiles_of_plan
@settings_of_workload
def simulate(
    plan: Path,
    steps: int,
    gantt: Path | None,
    trace: Path | None,
    timeline: Path | None,
    profiles: tuple[Path, ...],
    settings: tuple[str, ...],
) -> None:
    """Run a plan on a simulated clock."""
    from planner.commands.simulate import simulate

    files = {"gantt": gantt, "trace": trace, "timeline": timeline}
    simulate(plan, steps, profiles=profiles, settings=settings, **files)


@click.command()
@click.argument("plan", type=file_path("PLAN"), required=False)
@click.option("--name", default="", metavar="NAME", help="Name of the run (default: the plan's).")
@click.option(
    "--rehearse",
    is_flag=True,
    help="Replace every GPU by a light process that sleeps the predicted time.",
)
@click.option(
    "--runs",
    type=file_path("DIR"),
    default=Path("runs"),
    show_default=True,
    help="Where runs are kept.",
)
@run_options
@click.option(
    "--resume", type=file_path("RUN_DIR"), help="Continue a run, or one of its checkpoints."
)
@click.option(
    "--plan", "other_plan", type=file_path(), help="With --resume: continue under this plan."
)
@click.option(
    "--autopilot",
    is_flag=True,
    help="Plan anew at checkpoints where calls or lengths have drifted, and switch where it pays.",
)
@click.option(
    "--switches",
    type=COUNT,
    default=SWITCHES,
    show_default=True,
    metavar="N",
    help="With --autopilot: how often it may switch to another plan.",
)
@profiles_of_plan
@settings_of_workload
def execute(
    plan: Path | None,
    name: str,
    rehearse: bool,
    runs: Path,
    options: "RunOptions",
    resume: Path | None,
    other_plan: Path | None,
    autopilot: bool,
    switches: int,
    profiles: tuple[Path, ...],
    settings: tuple[str, ...],
) -> None:
    """Run the job as the plan says, with live progress."""
    from planner.commands import execute as commands

    if switches != SWITCHES and not autopilot:
        raise UserError("--switches is for --autopilot; add it, or leave out --switches")
    if autopilot and rehearse:
        raise UserError("--autopilot is for real runs; a rehearsal has no checkpoints to switch at")
    if rehearse and (options.track or options.prometheus is not None):
        raise UserError(
            "--track and --prometheus are for real runs; leave them out, or leave out --rehearse"
        )
    allowed = switches if autopilot else 0
    if resume is not None:
        if plan is not None or rehearse or name:
            raise UserError(
                "--resume continues a run: leave out PLAN, --name and --rehearse; --plan is "
                "another plan"
            )
        commands.resume(resume, other_plan, options, settings, allowed)
        return
    if plan is None or other_plan is not None:
        raise UserError(
            "name the PLAN to run; --plan is for continuing a run under another one, with --resume"
        )
    if rehearse:
        commands.rehearse(plan, options, name=name, runs=runs, profiles=profiles, settings=settings)
    else:
        commands.execute(plan, options, name=name, runs=runs, settings=settings, switches=allowed)


@click.command()
@click.argument("plan", type=file_path("PLAN"))
@click.argument("run", type=file_path("RUN_DIR"))
@click.option(
    "--out",
    type=file_path(),
    help="The picture of both (default: compare.png in the run directory).",
)
@profiles_of_plan
def compare(plan: Path, run: Path, out: Path | None, profiles: tuple[Path, ...]) -> None:
    """Compare what was predicted with what was measured.

    Shows both for each call and each step, and draws one picture of both."""
    from planner.commands.compare import compare

    compare(plan, run, out, profiles)


@click.command()
@click.argument("what", type=click.Choice(["export"]))
@click.argument("checkpoint", type=file_path("CHECKPOINT"))
@click.argument("out", type=file_path("OUT"))
def checkpoint(what: str, checkpoint: Path, out: Path) -> None:
    """Write the models of a checkpoint as Hugging Face directories.

    CHECKPOINT is a directory such as runs/first/checkpoints/step-000010, or a run, whose last one
    is taken. The models are written in bf16, as OUT/actor and OUT/critic. The run may go on
    meanwhile."""
    from planner.commands.checkpoint import export

    assert what == "export"
    export(checkpoint, out)


@click.command()
@click.argument("run", type=file_path("RUN_DIR"))
@click.option("--step", type=COUNT_OR_NONE, metavar="N", help="Samples of this step only.")
@click.option("--best", type=COUNT, metavar="N", help="The N samples with the highest scores.")
@click.option("--worst", type=COUNT, metavar="N", help="The N samples with the lowest scores.")
@click.option("--evaluation", is_flag=True, help="Responses of evaluations, not of training.")
@click.option("--set", "only", metavar="NAME", help="Responses of the evaluation of this name.")
def samples(
    run: Path,
    step: int | None,
    best: int | None,
    worst: int | None,
    evaluation: bool,
    only: str | None,
) -> None:
    """Page through what the model said in a run.

    Shows prompts, responses and their scores, as the run has written them into samples.jsonl."""
    from planner.commands.samples import Choice, samples

    choice = Choice(step=step, evaluation=evaluation, only=only, best=best, worst=worst)
    samples(run, choice)


@click.command()
@click.argument("run", type=file_path("RUN_DIR"))
@click.option(
    "--last",
    type=click.IntRange(2, MOST_STEPS),
    default=10,
    show_default=True,
    metavar="N",
    help="Steps whose seconds and lengths count.",
)
@max_staleness
@click.option(
    "--out",
    type=file_path(),
    default=Path("replanned.json"),
    show_default=True,
    help="Where to write the new plan.",
)
@click.option(
    "--profile",
    "profiles",
    type=file_path(),
    multiple=True,
    help="Further measured costs. May be given more than once.",
)
@click.option(
    "--apply", is_flag=True, help="Go on with the run under the new plan, if a switch pays."
)
@run_options
def replan(
    run: Path,
    last: int,
    max_staleness: int | None,
    out: Path,
    profiles: tuple[Path, ...],
    apply: bool,
    options: "RunOptions",
) -> None:
    """Plan a run anew from what its last steps took.

    Says what another plan would save, how surely, and whether that pays what a switch costs. The
    run is left as it is, unless the new plan is to be applied: then it goes on from its last
    checkpoint. How it is run then is said as for `plan execute`."""
    from planner.commands.replan import replan

    replan(run, last, max_staleness, out, profiles, command_line(), options, apply=apply)
