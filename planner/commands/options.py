"""Kinds of values on the command line, and options that several commands share. The command line
loads this before it knows which command will run, so nothing here is slow to import."""

import functools
import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import click

from planner.spec.limits import MOST_GPUS_ASKED, MOST_SEED, MOST_STALENESS, MOST_STEPS

Command = TypeVar("Command", bound=Callable[..., Any])
Option = Callable[[Any], Any]  # what click.option makes: it takes a command and returns one


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """Which job is planned, on which GPUs, at which measured costs. `cluster` and `workload` are
    each a file or a name, and `settings` are other values for keys of the workload.
    `planner.commands.inputs` reads and checks them."""

    gpus: int | None = None
    device: str | None = None
    gpus_per_node: int | None = None
    cluster: str | None = None
    workload: str = "7b"
    profiles: tuple[Path, ...] = ()
    settings: tuple[str, ...] = ()


class Duration(click.FloatRange):
    """A number of seconds or minutes above 0."""

    def __init__(self) -> None:
        super().__init__(min=0, min_open=True)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


def gpu_counts(
    context: click.Context, parameter: click.Parameter, text: str | None
) -> tuple[int, ...]:
    """Numbers of GPUs, written with commas between them, in rising order."""
    if text is None:
        return ()
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise click.BadParameter(
            f"{text!r}: write numbers with commas between them, such as 4,8,16."
        ) from None
    if counts[0] < 1 or counts[-1] > MOST_GPUS_ASKED:
        raise click.BadParameter(f"{text!r}: each number must be 1 to {MOST_GPUS_ASKED:,}.")
    return tuple(counts)


COUNT = click.IntRange(min=1)
COUNT_OR_NONE = click.IntRange(min=0)
SEED = click.IntRange(0, MOST_SEED)
STALENESS = click.IntRange(0, MOST_STALENESS)
STEP_COUNT = click.IntRange(1, MOST_STEPS)


def file_path(name: str = "FILE") -> click.Path:
    """A path that the command itself checks, for one clear line."""
    kind = click.Path(path_type=Path)
    kind.name = name
    return kind


def parted(kind: Any, given: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A dataclass of this kind, made of the options that have the names of its fields, and the
    other options."""
    names = {field.name for field in fields(kind)}
    own = {name: value for name, value in given.items() if name in names}
    others = {name: value for name, value in given.items() if name not in names}
    return kind(**own), others


def with_options(command: Any, options: Sequence[Option]) -> Any:
    """The command with more options. Its help shows them in this order."""
    for option in reversed(options):
        command = option(command)
    return command


def inputs(command: Command) -> Command:
    """Adds the options that say which job is planned and on which GPUs. The command receives them
    as one `job`."""
    gpus = click.option(
        "--gpus", type=COUNT, metavar="N", help="Number of GPUs (with --cluster local: of cores)."
    )
    return gpus(inputs_but_gpus(command))


def inputs_but_gpus(command: Command) -> Command:
    """Adds the options of `inputs` except --gpus, for a command that takes several numbers."""

    @functools.wraps(command)
    def gathered(**given: Any) -> Any:
        job, others = parted(JobOptions, given)
        return command(job=job, **others)

    options = (
        click.option("--device", metavar="NAME", help="Kind of GPU (default: h200)."),
        click.option(
            "--gpus-per-node", type=COUNT, metavar="N", help="GPUs of a full node (default 8)."
        ),
        click.option(
            "--cluster", metavar="FILE|local", help="A cluster file, or this machine's cores."
        ),
        click.option(
            "--workload",
            metavar="FILE|NAME",
            default="7b",
            show_default=True,
            help="A workload file, or the name of a shipped workload.",
        ),
        click.option(
            "--profile",
            "profiles",
            type=file_path(),
            multiple=True,
            help="Costs that `plan profile` measured. May be given more than once.",
        ),
    )
    decorated: Command = with_options(settings_of_workload(gathered), options)
    return decorated


def settings_of_workload(command: Command) -> Command:
    """Adds `--set`."""
    return click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        help=(
            "Another value for a key of the workload, such as algorithm.clip=0.3. May be given "
            "more than once."
        ),
    )(command)


def profiles_of_plan(command: Command) -> Command:
    """Adds `--profile` to a command that takes a plan."""
    return click.option(
        "--profile",
        "profiles",
        type=file_path(),
        multiple=True,
        help="Measured costs (default: the profiles that the plan was searched with).",
    )(command)


def max_staleness(command: Command) -> Command:
    """Adds `--max-staleness`."""
    return click.option(
        "--max-staleness",
        type=STALENESS,
        metavar="K",
        help="How many updates old sequences may be (default: the workload's).",
    )(command)


def minutes(text: str) -> Callable[[Command], Command]:
    """Adds `--minutes` with its help text."""
    return click.option("--minutes", type=Duration(), metavar="M", help=text)


def command_line() -> str:
    """The command as it was typed, for the plan's provenance."""
    return shlex.join(["plan", *sys.argv[1:]])
