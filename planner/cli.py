"""The command line: parsing only. Each command imports what it needs when it runs, so that `plan
--help` is instant."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click
from click.exceptions import NoArgsIsHelpError

from planner import __version__
from planner.spec.errors import UserError

KINDS = ("plan", "timeline", "profile", "workload", "cluster", "study", "cell")
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it

Command = TypeVar("Command", bound=Callable[..., Any])


class Commands(click.Group):
    """A group whose every failure that a user can mend is one line on stderr and exit code 2,
    without a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which a newcomer needs them."""
        return list(self.commands)

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        extra["standalone_mode"] = False
        try:
            outcome = super().main(*args, **extra)
        except UserError as error:
            _end(str(error))
        except NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            sys.exit(2)
        except click.UsageError as error:
            where = error.ctx.command_path if error.ctx else "plan"
            _end(f"{error.format_message()} See '{where} --help'.")
        except click.ClickException as error:
            _end(error.format_message())
        except click.Abort:
            _end("interrupted", INTERRUPTED)
        sys.exit(outcome if isinstance(outcome, int) else 0)


def _end(message: str, code: int = 2) -> NoReturn:
    click.echo("plan: " + " ".join(message.splitlines()), err=True)
    sys.exit(code)


@click.group(
    cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="splitplan")
def main() -> None:
    """Decide how a PPO job is split over GPUs, run it that way, and compare what was predicted with
    what happened."""


def _file(name: str = "FILE") -> click.Path:
    """A path that the command itself checks, for one clear line."""
    kind = click.Path(path_type=Path)
    kind.name = name
    return kind


def inputs(command: Command) -> Command:
    """The options that say what is asked and what there is."""
    gpus = click.option(
        "--gpus", type=int, metavar="N", help="Number of GPUs (with --cluster local: of cores)."
    )
    return gpus(inputs_but_gpus(command))


def inputs_but_gpus(command: Command) -> Command:
    """As `inputs`, for a command that takes several numbers of GPUs."""
    options = (
        click.option("--device", metavar="NAME", help="Kind of GPU: h200 (default), h100 or a100."),
        click.option(
            "--gpus-per-node", type=int, metavar="N", help="GPUs of a full node (default 8)."
        ),
        click.option(
            "--cluster", metavar="FILE|local", help="A cluster file, or this machine's cores."
        ),
        click.option(
            "--workload",
            metavar="FILE|NAME",
            default="7b",
            show_default=True,
            help="A workload file, or the name of one that is shipped.",
        ),
        click.option(
            "--profile",
            "profiles",
            type=_file(),
            multiple=True,
            help="Measured costs, from `plan profile`. May be given more than once.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def profiles_of_plan(command: Command) -> Command:
    """`--profile` for a command that takes a plan."""
    return click.option(
        "--profile",
        "profiles",
        type=_file(),
        multiple=True,
        help=(
            "Measured costs; by default the profiles that the plan was searched with, if they "
            "are still there."
        ),
    )(command)


@main.command()
@inputs
@click.option(
    "--max-staleness",
    type=int,
    metavar="K",
    help="Updates that sequences may lag (default: the workload's).",
)
@click.option(
    "--objective",
    type=click.Choice(["mean", "p95", "cost"]),
    default="mean",
    show_default=True,
    help=(
        "What is minimised over the length scenarios: the mean step time, its 95th percentile, "
        "or dollars per step."
    ),
)
@click.option(
    "--scenarios",
    type=int,
    default=16,
    show_default=True,
    metavar="S",
    help=(
        "Draws of the response lengths, fewer where a batch is large; with 1 each call takes a "
        "fixed time."
    ),
)
@click.option(
    "--time-limit",
    type=float,
    metavar="SECONDS",
    help="End the search then, with the best plan so far; baselines are found besides.",
)
@click.option(
    "--keep", type=int, default=3, show_default=True, metavar="N", help="Runners-up to show."
)
@click.option(
    "--pin",
    "pins",
    multiple=True,
    metavar="PIN",
    help=(
        "actor=8 (GPUs of a role), actor+critic (together) or actor/critic (apart). May be "
        "given often."
    ),
)
@click.option(
    "--out",
    type=_file(),
    default=Path("best.json"),
    show_default=True,
    help="Where to write the plan.",
)
@click.option("--no-picture", is_flag=True, help="Do not draw the plan beside it.")
def search(**options: Any) -> None:
    """Find the best plan and print it beside the baselines.

    Writes the plan, and a picture of some of its steps beside it."""
    from planner.commands.search import search

    search(command=_command_line(), **options)


@main.command()
@click.argument("name")
@inputs
@click.option("--out", type=_file(), required=True, help="Where to write the plan.")
def baseline(**options: Any) -> None:
    """Write a named baseline as a plan.

    NAME is colocated, split, split-parallel, standalone or one-step-off."""
    from planner.commands.search import baseline

    baseline(command=_command_line(), **options)


@main.command()
@click.argument("plan", type=_file("PLAN"))
@click.option("--here", is_flag=True, help="Fail if this machine cannot run it.")
def check(plan: Path, here: bool) -> None:
    """Check a plan as a whole, memory included.

    Also says whether this machine could run it: its GPUs, driver and engine, the models, prompts
    and reward."""
    from planner.commands.check import check

    check(plan, here)


@main.command()
@click.argument("plan", type=_file("PLAN"))
@profiles_of_plan
def explain(**options: Any) -> None:
    """Say why a plan is as fast as it is.

    What each decision on the way from the tutorial's split buys, what binds the step, where GPUs
    idle, what each call's cost does to the step, and what the memory is used for."""
    from planner.commands.explain import explain

    explain(**options)


@main.command("what-if")
@click.argument("plan", type=_file("PLAN"))
@click.option(
    "--gpus",
    metavar="N,N,…",
    help="Numbers of GPUs to try (default: half, double, a node more and less).",
)
@profiles_of_plan
def what_if(**options: Any) -> None:
    """Plan again under other conditions, and say where the decision flips.

    Other numbers of GPUs, longer responses, a longer tail, slower links, other models, more
    staleness."""
    from planner.commands.whatif import what_if

    what_if(**options)


@main.command()
@click.option("--gpus", metavar="N,N,…", required=True, help="Numbers of GPUs, such as 4,8,16.")
@inputs_but_gpus
@click.option(
    "--max-staleness", type=int, metavar="K", help="Up to how many updates sequences may lag."
)
@click.option(
    "--out", type=_file(), default=Path("pareto.png"), show_default=True, help="Where to draw it."
)
@click.option("--csv", "table", type=_file(), help="Where to write the figures.")
def pareto(**options: Any) -> None:
    """Step time against GPUs, dollars and staleness.

    The best plan of each combination, as a table and a picture."""
    from planner.commands.whatif import pareto

    pareto(**options)


@main.command()
@click.argument("plan", type=_file("PLAN"))
@click.option(
    "--steps", type=int, default=8, show_default=True, metavar="N", help="Steps to simulate."
)
@click.option("--gantt", type=_file(), help="Draw the steady-state steps (.png, .svg or .pdf).")
@click.option("--trace", type=_file(), help="Write a trace that opens in Perfetto.")
@click.option("--timeline", type=_file(), help="Write the simulated timeline.")
@profiles_of_plan
def simulate(**options: Any) -> None:
    """Run a plan on a simulated clock."""
    from planner.commands.simulate import simulate

    simulate(**options)


@main.command()
@click.argument("plan", type=_file("PLAN"), required=False)
@click.option("--name", default="", metavar="NAME", help="Name of the run (default: the plan's).")
@click.option(
    "--steps",
    type=int,
    metavar="N",
    help="Steps to run (default: the workload's; 3 for a rehearsal).",
)
@click.option(
    "--rehearse",
    is_flag=True,
    help="Replace every GPU by a light process that sleeps the predicted time.",
)
@click.option(
    "--runs",
    type=_file("DIR"),
    default=Path("runs"),
    show_default=True,
    help="Where runs are kept.",
)
@click.option(
    "--address",
    metavar="ADDR",
    help="A Ray cluster to join, HOST:PORT or auto (default: one is started here).",
)
@click.option(
    "--deadline-floor",
    type=float,
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help=(
        "A call may take ten times its predicted time, but at least this long; ten times that "
        "in the beginning."
    ),
)
@click.option(
    "--save-every",
    type=int,
    default=10,
    show_default=True,
    metavar="N",
    help="Steps between checkpoints.",
)
@click.option(
    "--keep", type=int, default=2, show_default=True, metavar="K", help="Checkpoints to keep."
)
@click.option(
    "--max-restarts",
    type=int,
    default=3,
    show_default=True,
    metavar="N",
    help="How often to start again from the last checkpoint when processes fail.",
)
@click.option(
    "--track",
    type=click.Choice(["wandb", "mlflow"]),
    multiple=True,
    help="Tell Weights & Biases or MLflow the metrics too, as their own environment variables say.",
)
@click.option(
    "--resume", type=_file("RUN_DIR"), help="Go on with a run, or from one of its checkpoints."
)
@click.option("--plan", "other_plan", type=_file(), help="With --resume: go on under this plan.")
@profiles_of_plan
def execute(**options: Any) -> None:
    """Run the job as the plan says, with live progress."""
    from planner.commands.execute import execute

    execute(**options)


@main.command()
@click.argument("plan", type=_file("PLAN"))
@click.argument("run", type=_file("RUN_DIR"))
@click.option(
    "--out", type=_file(), help="The picture of both (default: compare.png in the run directory)."
)
@profiles_of_plan
def compare(**options: Any) -> None:
    """Show what was predicted beside what was measured.

    Per call and per step, with one picture of both."""
    from planner.commands.compare import compare

    compare(**options)


@main.command()
@click.option(
    "--cluster",
    metavar="FILE|local",
    help="What to measure, if not --gpus: a cluster file of one node, or cores.",
)
@click.option(
    "--gpus",
    type=int,
    metavar="N",
    help="Number of GPUs to measure (with --cluster local: of cores).",
)
@click.option("--device", metavar="NAME", help="Kind of GPU: h200 (default), h100 or a100.")
@click.option("--workload", required=True, metavar="FILE|NAME", help="Whose calls to measure.")
@click.option(
    "--minutes", type=float, metavar="M", help="At most so long; the least valuable is left out."
)
@click.option(
    "--only",
    default="",
    metavar="TEXT",
    help="Only groups of measurements whose name contains this.",
)
@click.option(
    "--out",
    type=_file(),
    required=True,
    help="Where to write the profile; what is there is not done again.",
)
def profile(**options: Any) -> None:
    """Measure what the calls of a workload take here.

    The profile is for `plan search --profile`. Without --cluster and --gpus this machine's cores
    are measured."""
    from planner.commands.profile import profile

    profile(command=_command_line(), **options)


@main.command()
@click.argument("profiles", type=_file("PROFILE"), nargs=-1, required=True)
@click.option(
    "--cluster",
    metavar="FILE|local",
    help="What they were measured on, if its device is not shipped.",
)
@click.option(
    "--out", type=_file(), help="Write a page (.md) with it; what it says under '## Notes' is kept."
)
def judge(**options: Any) -> None:
    """Say how good estimates from profiles are.

    Per call, the errors of what is estimated without knowing the measured points, and those of the
    roofline alone."""
    from planner.commands.judge import judge

    judge(command=_command_line(), **options)


@main.command()
@click.argument("study", type=_file("STUDY"))
@click.option(
    "--out",
    type=_file("DIR"),
    help="Where plans and results lie (default: STUDY without its suffix).",
)
@click.option(
    "--minutes", type=float, metavar="M", help="Start no cell that would not end within M minutes."
)
@click.option(
    "--plan-only",
    is_flag=True,
    help="Write every cell's plan and predicted timeline, and run nothing.",
)
@click.option(
    "--report", is_flag=True, help="Write the report of what has been measured, and run nothing."
)
def study(**options: Any) -> None:
    """Run a list of plans and hold each prediction against its measurement.

    Cells that have been measured are skipped. Plans that are there already are run as they are."""
    from planner.commands.study import study

    study(command=_command_line(), **options)


@main.command()
@click.argument("name", type=click.Choice(["digits"]))
@click.option(
    "--out",
    type=_file("DIR"),
    required=True,
    help="Directory for the models, prompts and workload file.",
)
@click.option("--seed", type=int, default=0, show_default=True)
def task(**options: Any) -> None:
    """Make the small task that is shipped.

    Prompts, a tiny language model that is only partly right, and a tiny reward model."""
    from planner.commands.execute import task

    task(**options)


@main.command()
@inputs
@click.option(
    "--max-staleness",
    type=int,
    metavar="K",
    help="Updates that sequences may lag (default: the workload's).",
)
def space(**options: Any) -> None:
    """Count what a search chooses from: placements, layouts and programs."""
    from planner.commands.search import space

    space(**options)


@main.command()
@click.argument("kind", type=click.Choice(KINDS))
def schema(kind: str) -> None:
    """Print the JSON Schema of a kind of file."""
    from planner.commands.check import schema

    schema(kind)


def _command_line() -> str:
    """The command as it was typed, for the plan's provenance."""
    import shlex

    return shlex.join(["plan", *sys.argv[1:]])


if __name__ == "__main__":
    main()
