"""The command line: parsing only. Each command imports what it needs when it runs, so that `plan
--help` is instant."""

import shlex
import sys
from pathlib import Path
from typing import Any, Literal, NoReturn

import click
from click.exceptions import NoArgsIsHelpError

from planner import __version__
from planner.commands.options import (
    COUNT,
    COUNT_OR_NONE,
    STALENESS,
    STEP_COUNT,
    Duration,
    JobOptions,
    file_path,
    gpu_counts,
    inputs,
    inputs_but_gpus,
    max_staleness,
    minutes,
    profiles_of_plan,
    settings_of_workload,
)
from planner.spec.errors import UserError
from planner.spec.limits import MOST_STEPS

FILE_KINDS = ("plan", "timeline", "profile", "workload", "cluster", "study", "cell")
FRAMEWORKS_READ = ("verl",)
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


class Commands(click.Group):
    """A group whose every failure that a user can mend is one line on stderr and exit code 2,
    without a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order in which a newcomer needs them."""
        return list(self.commands)

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        extra["standalone_mode"] = False
        try:
            outcome = super().main(*args, **extra)
        except UserError as error:
            _end(str(error))
        except PermissionError as error:
            _end(
                f"{error.filename}: may not be read or written by this user; check the permissions"
            )
        except NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            sys.exit(2)
        except click.UsageError as error:
            where = error.ctx.command_path if error.ctx else "plan"
            _end(f"{error.format_message()} See '{where} --help'.")
        except click.ClickException as error:
            _end(error.format_message())
        except click.Abort as error:
            _end(str(error.__cause__ or "") or "interrupted", INTERRUPTED)
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


# --- from inputs to a plan ---


@main.command()
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
    )
    search(job, options, out=out, picture=not no_picture, command=_command_line())


@main.command()
@click.argument("name")
@inputs
@click.option("--out", type=file_path(), required=True, help="Where to write the plan.")
def baseline(job: JobOptions, name: str, out: Path) -> None:
    """Write a named baseline as a plan.

    NAME is colocated, split, split-parallel, standalone or one-step-off."""
    from planner.commands.search import baseline

    baseline(job, name, out=out, command=_command_line())


@main.command()
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

    estimate(job, pools, layouts, staleness, out, _command_line())


@main.command()
@click.argument("plan", type=file_path("PLAN"))
@click.option("--here", is_flag=True, help="Fail if this machine cannot run it.")
@settings_of_workload
def check(plan: Path, here: bool, settings: tuple[str, ...]) -> None:
    """Check a plan as a whole, memory included.

    Also says whether this machine could run it: its GPUs, driver and engine, the models, prompts
    and reward."""
    from planner.commands.check import check

    check(plan, here, settings)


@main.command()
@click.argument("plan", type=file_path("PLAN"))
@profiles_of_plan
def explain(plan: Path, profiles: tuple[Path, ...]) -> None:
    """Say why a plan is as fast as it is.

    Shows what each decision on the way from the tutorial's split buys, what limits the step, where
    GPUs idle, how each call's cost changes the step, and what uses the memory."""
    from planner.commands.explain import explain

    explain(plan, profiles)


@main.command("what-if")
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


@main.command()
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


# --- running ---


@main.command()
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


@main.command()
@click.argument("plan", type=file_path("PLAN"), required=False)
@click.option("--name", default="", metavar="NAME", help="Name of the run (default: the plan's).")
@click.option(
    "--steps",
    type=STEP_COUNT,
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
    type=file_path("DIR"),
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
    type=Duration(),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help=(
        "A call fails after ten times its predicted time, but never before this. While a run "
        "begins, both are ten times as long."
    ),
)
@click.option(
    "--save-every",
    type=click.IntRange(0, MOST_STEPS),
    default=10,
    show_default=True,
    metavar="N",
    help="Steps between checkpoints (0: none).",
)
@click.option(
    "--keep",
    type=STEP_COUNT,
    default=2,
    show_default=True,
    metavar="K",
    help="Checkpoints to keep.",
)
@click.option(
    "--export-every",
    type=click.IntRange(0, MOST_STEPS),
    default=0,
    show_default=True,
    metavar="N",
    help="Steps between exports of the models from a checkpoint (0: only at the end).",
)
@click.option(
    "--max-restarts",
    type=click.IntRange(0, MOST_STEPS),
    default=3,
    show_default=True,
    metavar="N",
    help="How often to restart from the last checkpoint when processes fail.",
)
@click.option(
    "--track",
    type=click.Choice(["wandb", "mlflow"]),
    multiple=True,
    help=(
        "Also send the metrics to Weights & Biases or MLflow, set up by their own environment "
        "variables."
    ),
)
@click.option(
    "--samples",
    type=click.IntRange(0, 2**20),
    default=8,
    show_default=True,
    metavar="N",
    help="Sequences of a step to write into samples.jsonl (0: none, nor of evaluations).",
)
@click.option(
    "--samples-every",
    type=STEP_COUNT,
    default=10,
    show_default=True,
    metavar="N",
    help="Steps between two of which samples are written; evaluations are written whole.",
)
@click.option(
    "--resume", type=file_path("RUN_DIR"), help="Continue a run, or one of its checkpoints."
)
@click.option(
    "--plan", "other_plan", type=file_path(), help="With --resume: continue under this plan."
)
@profiles_of_plan
@settings_of_workload
def execute(
    plan: Path | None,
    name: str,
    steps: int | None,
    rehearse: bool,
    runs: Path,
    address: str | None,
    deadline_floor: float,
    save_every: int,
    keep: int,
    export_every: int,
    max_restarts: int,
    track: tuple[str, ...],
    samples: int,
    samples_every: int,
    resume: Path | None,
    other_plan: Path | None,
    profiles: tuple[Path, ...],
    settings: tuple[str, ...],
) -> None:
    """Run the job as the plan says, with live progress."""
    from executor.running.options import RunOptions
    from planner.commands import execute as commands

    options = RunOptions(
        steps=steps,
        save_every=save_every,
        keep=keep,
        max_restarts=max_restarts,
        deadline_floor=deadline_floor,
        address=address,
        track=tuple(dict.fromkeys(track)),
        samples=samples,
        samples_every=samples_every,
        export_every=export_every,
    )
    if resume is not None:
        if plan is not None or rehearse or name:
            raise UserError(
                "--resume continues a run: leave out PLAN, --name and --rehearse; --plan is "
                "another plan"
            )
        commands.resume(resume, other_plan, options, settings)
        return
    if plan is None or other_plan is not None:
        raise UserError(
            "name the PLAN to run; --plan is for continuing a run under another one, with --resume"
        )
    if rehearse:
        commands.rehearse(plan, options, name=name, runs=runs, profiles=profiles, settings=settings)
    else:
        commands.execute(plan, options, name=name, runs=runs, settings=settings)


@main.command()
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


@main.command()
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


@main.command()
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


# --- other frameworks ---


@main.command("import")
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
    import_run(read, out, __version__, _command_line())


# --- measuring ---


@main.command()
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
    profile(job, minutes=minutes, only=only, out=out, command=_command_line())


@main.command()
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

    judge(profiles, cluster, out, command=_command_line())


@main.command()
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
    asked = commands.read_study(study, out, _command_line())
    if plan_only:
        commands.plan_cells(asked)
    elif report:
        commands.write_report(asked)
    else:
        commands.run_study(asked, minutes)


@main.command()
@click.argument("name", metavar="NAME", type=click.Choice(["digits"]))
@click.option(
    "--out",
    type=file_path("DIR"),
    required=True,
    help="Directory for the models, prompts and workload file.",
)
@click.option("--seed", type=COUNT_OR_NONE, default=0, show_default=True)
def task(name: str, out: Path, seed: int) -> None:
    """Make the small task that is shipped.

    NAME is digits. Writes prompts, a tiny language model that is only partly right, and a tiny
    reward model."""
    from planner.commands.execute import task

    task(name, out, seed)


# --- looking at what there is ---


@main.command()
@inputs
@max_staleness
def space(job: JobOptions, max_staleness: int | None) -> None:
    """Count the placements, layouts and programs of a search."""
    from planner.commands.search import space

    space(job, max_staleness)


@main.command()
@click.argument("kind", metavar="KIND", type=click.Choice(FILE_KINDS))
def schema(kind: str) -> None:
    """Print the JSON Schema of a kind of file.

    KIND is plan, timeline, profile, workload, cluster, study or cell."""
    from planner.commands.check import schema

    schema(kind)


def _command_line() -> str:
    """The command as it was typed, for the plan's provenance."""
    return shlex.join(["plan", *sys.argv[1:]])


if __name__ == "__main__":
    main()
