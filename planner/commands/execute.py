"""`plan execute` and `plan task`."""

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import count
from pathlib import Path

from rich.console import Console

from executor.fleet.signals import interruptible
from executor.running.options import RunOptions
from planner.commands.autopilot import Autopilot
from planner.commands.inputs import make_console, profiles_of
from planner.predict.forecast import task_seconds
from planner.predict.schedule import load_plan, with_settings
from planner.report import trace
from planner.report.live import LiveProgress, evaluated
from planner.spec.errors import UserError
from planner.spec.plan import Plan
from planner.spec.timeline import Timeline, step_seconds

# A rehearsal takes as long as the real run would. The steps that fill a pipeline come on top.
REHEARSED_STEPS = 3
WRITTEN = ("timeline.json", "trace.json", "gantt.png", "metrics.jsonl", "samples.jsonl", "log.txt")
NEEDED = ("ray", "torch", "transformers", "safetensors", "pynvml")


def need_extra(command: str) -> None:
    """Raise UserError if what the executor runs on is not installed."""
    if missing := missing_extra():
        raise UserError(
            f"{command} needs {', '.join(missing)}; install it with: pip install "
            "'splitplan[execute]'"
        )


def missing_extra() -> list[str]:
    """The packages that the executor needs and that are not installed."""
    return [name for name in NEEDED if find_spec(name) is None]


@interruptible()
def execute(
    plan: Path,
    options: RunOptions,
    *,
    name: str,
    runs: Path,
    settings: Sequence[str] = (),
    switches: int = 0,
) -> None:
    """Run a plan for real, and write down what happened. `name` may be empty. An autopilot may
    switch so many times to another plan."""
    need_extra("plan execute")
    from executor.running.execute import execute  # ray and torch are slow to load

    checked, console = load_plan(plan, settings), make_console()
    name = name or free_name(runs, checked.name)
    pilot = _pilot(checked, plan, options, switches)
    with _progress(checked, options, console) as progress:
        run = execute(
            checked, name=name, runs=runs, options=options, progress=progress, pilot=pilot
        )
    _report(run, plan if progress.plan == checked else run / "plan.json", console, progress)


@interruptible()
def rehearse(
    plan: Path,
    options: RunOptions,
    *,
    name: str,
    runs: Path,
    profiles: Sequence[Path],
    settings: Sequence[str] = (),
) -> None:
    """Run a plan with processes that sleep as long as its calls are predicted to take."""
    need_extra("plan execute")
    from executor.running.execute import rehearse  # ray is slow to load

    checked, console = load_plan(plan, settings), make_console()
    name = name or free_name(runs, checked.name)
    costs = profiles_of(checked, plan, profiles, make_console(stderr=True))
    seconds = task_seconds(checked, costs)
    options = replace(options, steps=options.steps or REHEARSED_STEPS + checked.staleness)
    with _progress(checked, options, console) as progress:
        run = rehearse(checked, seconds, name=name, runs=runs, options=options, progress=progress)
    _report(run, plan, console, progress)


@interruptible()
def resume(
    path: Path,
    other_plan: Path | None,
    options: RunOptions,
    settings: Sequence[str] = (),
    switches: int = 0,
) -> None:
    """Continue a run from its last checkpoint, or from the one that is named. An autopilot may
    switch so many times to another plan."""
    need_extra("plan execute")
    from executor.running import checkpoint  # torch is slow to load
    from executor.running.execute import resume

    found = checkpoint.find(path)
    plan = found.plan if other_plan is None else load_plan(other_plan)
    where = other_plan or found.run / "plan.json"
    plan = with_settings(plan, settings, where)
    pilot = _pilot(plan, where, options, switches)
    console = make_console()
    with _progress(plan, options, console) as progress:
        run = resume(found, plan=plan, options=options, progress=progress, pilot=pilot)
    _report(run, run / "plan.json", console, progress)


def _pilot(plan: Plan, path: Path, options: RunOptions, switches: int) -> Autopilot | None:
    """The autopilot that may switch so many times; None if it may not. Raises UserError."""
    if not switches:
        return None
    if not options.save_every:
        raise UserError("--autopilot switches at checkpoints; leave out --save-every 0")
    if plan.streams:
        raise UserError(
            "--autopilot: the plan streams its generation, whose seconds say nothing of other "
            "plans; leave it out, or search again with --set sync=boundary"
        )
    return Autopilot(plan, profiles_of(plan, path, (), make_console(stderr=True)), switches)


def _progress(plan: Plan, options: RunOptions, console: Console) -> LiveProgress:
    return LiveProgress(plan, options.steps or plan.workload.steps, console)


def _report(run: Path, plan: Path, console: Console, progress: LiveProgress) -> None:
    checked, timeline = progress.plan, Timeline.read(run / "timeline.json")
    console.print(summary(checked, timeline, progress), soft_wrap=True)
    trace.write(timeline, run / "trace.json")
    from planner.report.gantt import draw  # matplotlib is slow to load

    draw([timeline], checked, run / "gantt.png")
    written = ", ".join(name for name in WRITTEN if (run / name).exists())
    console.print(f"The run is in {run}: {written}.", soft_wrap=True)
    console.print(f"Next: plan compare {plan} {run}", soft_wrap=True)


def free_name(runs: Path, wanted: str) -> str:
    """The plan's name, with a number if there is such a run already."""
    names = (wanted if number == 1 else f"{wanted}-{number}" for number in count(1))
    return next(name for name in names if not (runs / name).exists())


def summary(plan: Plan, timeline: Timeline, progress: LiveProgress) -> str:
    measured = step_seconds(timeline)
    text = f"{timeline.steps} steps, {measured:.3g} s per step after {timeline.warmup} to warm up"
    if plan.predicted is not None:
        text += f" (predicted {plan.predicted.step_seconds:.3g} s)"
    for key in ("reward", "exact_match", "evaluation_score"):
        if isinstance(value := progress.metrics.get(key), float):
            text += f", last {key.replace('_', ' ')} {value:.3f}"
    for title, value in evaluated(progress.metrics).items():
        text += f", {title} {value:.3f}"
    return text + "."


def task(name: str, out: Path, seed: int) -> None:
    need_extra("plan task")
    assert name == "digits"
    from executor.digits.task import make

    console = make_console()
    make(out, seed, say=lambda text: console.print(text, markup=False, soft_wrap=True))
    console.print(
        f"Wrote the task to {out}; its workload is {out / 'workload.toml'}.",
        markup=False,
        soft_wrap=True,
    )
