"""The options of `plan execute` that say how a plan is run."""

import functools
from typing import Any

import click

from planner.commands.options import STEP_COUNT, Command, Duration, Option, parted, with_options
from planner.spec.limits import MOST_STEPS

STEPS_OR_NONE = click.IntRange(0, MOST_STEPS)
SAMPLES_OR_NONE = click.IntRange(0, 2**20)


def run_options(command: Command) -> Command:
    """Adds them. The command receives them as one `options`."""

    @functools.wraps(command)
    def gathered(*, track: tuple[str, ...], **given: Any) -> Any:
        from executor.running.options import RunOptions

        each_once = tuple(dict.fromkeys(track))
        options, others = parted(RunOptions, {"track": each_once, **given})
        return command(options=options, **others)

    options = (*_of_course(), *_of_checkpoints(), *_of_records())
    decorated: Command = with_options(gathered, options)
    return decorated


def _number(
    name: str, kind: click.IntRange | click.FloatRange, default: float, metavar: str, text: str
) -> Option:
    """An option with a number that has a default."""
    return click.option(
        name, type=kind, default=default, show_default=True, metavar=metavar, help=text
    )


def _of_course() -> tuple[Option, ...]:
    """How many steps, where, and when a call counts as stuck."""
    return (
        click.option(
            "--steps",
            type=STEP_COUNT,
            metavar="N",
            help="Steps to run (default: the workload's; for a rehearsal 3, and those that fill "
            "its pipeline).",
        ),
        click.option(
            "--address",
            metavar="ADDR",
            help="A Ray cluster to join, HOST:PORT or auto (default: one is started here).",
        ),
        _number(
            "--deadline-floor",
            Duration(),
            60.0,
            "SECONDS",
            "A call fails after ten times its predicted time, but never before this. While a run "
            "begins, both are ten times as long.",
        ),
    )


def _of_checkpoints() -> tuple[Option, ...]:
    """Checkpoints, exports from them, and restarts."""
    return (
        _number("--save-every", STEPS_OR_NONE, 10, "N", "Steps between checkpoints (0: none)."),
        _number("--keep", STEP_COUNT, 2, "K", "Checkpoints to keep."),
        _number(
            "--export-every",
            STEPS_OR_NONE,
            0,
            "N",
            "Steps between exports of the models from a checkpoint (0: only at the end).",
        ),
        _number(
            "--max-restarts",
            STEPS_OR_NONE,
            3,
            "N",
            "How often to restart from the last checkpoint when processes fail.",
        ),
    )


def _of_records() -> tuple[Option, ...]:
    """Where metrics go besides, and which samples are written."""
    return (
        click.option(
            "--track",
            type=click.Choice(["wandb", "mlflow"]),
            multiple=True,
            help=(
                "Also send the metrics to Weights & Biases or MLflow, set up by their own "
                "environment variables."
            ),
        ),
        click.option(
            "--prometheus",
            type=int,
            metavar="PORT",
            help="Let Prometheus read the metrics at this port of the loopback.",
        ),
        _number(
            "--samples",
            SAMPLES_OR_NONE,
            8,
            "N",
            "Sequences of a step to write into samples.jsonl (0: none, nor of evaluations).",
        ),
        _number(
            "--samples-every",
            STEP_COUNT,
            10,
            "N",
            "Steps between two of which samples are written; evaluations are written whole.",
        ),
    )
