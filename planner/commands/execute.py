"""`plan execute` and `plan task`."""

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import count
from pathlib import Path

from rich.console import Console

from executor.running.options import RunOptions
from planner.commands.inputs import make_console, profiles_of
from planner.predict.forecast import task_seconds
from planner.predict.profile import Profile
from planner.predict.schedule import load_plan
from planner.report import trace
from planner.report.live import LiveProgress
from planner.spec.errors import UserError
from planner.spec.plan import Plan
from planner.spec.timeline import Timeline, step_seconds

# Beside those that fill and drain the pipeline: a rehearsal takes as long as the real run would.
REHEARSED_STEPS = 3
NEEDED = ("ray", "torch", "transformers", "safetensors")


def need_extra(command: str) -> None:
    """Raise UserError if what the executor runs on is not installed."""
    if missing := missing_extra():
        raise UserError(
            f"{command} needs {', '.join(missing)}; install it with: pip install "
            "'splitplan[execute]'"
        )


def missing_extra() -> list[str]:
    """What the executor runs on and is not installed."""
    return [name for name in NEEDED if find_spec(name) is None]


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
    max_restarts: int,
    track: Sequence[str],
    resume: Path | None,
    other_plan: Path | None,
    profiles: Sequence[Path],
) -> None:
    need_extra("plan execute")
    options = RunOptions(
        steps=steps,
        save_every=save_every,
        keep=keep,
        max_restarts=max_restarts,
        deadline_floor=deadline_floor,
        address=address,
        track=tuple(dict.fromkeys(track)),
    )
    if resume is not None:
        if plan is not None or rehearse or name:
            raise UserError(
                "--resume goes on with a run: leave out PLAN, --name and --rehearse; --plan is "
                "another plan"
            )
        return _resume(resume, other_plan, options)
    if plan is None or other_plan is not None:
        raise UserError(
            "name the PLAN to run; --plan is for going on with a run under another one, with "
            "--resume"
        )
    checked, console = load_plan(plan), make_console()
    name = name or free_name(runs, checked.name)
    if rehearse:
        costs = profiles_of(checked, plan, profiles, make_console(stderr=True))
        run, progress = _rehearse(checked, name, runs, options, costs, console)
    else:
        run, progress = _execute(checked, name, runs, options, console)
    _report(run, plan, console, progress)


def _execute(
    plan: Plan, name: str, runs: Path, options: RunOptions, console: Console
) -> tuple[Path, LiveProgress]:
    from executor.running.execute import execute  # ray and torch are slow to load

    with LiveProgress(plan, options.steps or plan.workload.steps, console) as progress:
        run = execute(plan, name=name, runs=runs, options=options, progress=progress)
    return run, progress


def _rehearse(
    plan: Plan,
    name: str,
    runs: Path,
    options: RunOptions,
    costs: Sequence[Profile],
    console: Console,
) -> tuple[Path, LiveProgress]:
    from executor.running.execute import rehearse  # ray is slow to load

    steps = options.steps or REHEARSED_STEPS + plan.staleness
    options, seconds = replace(options, steps=steps), task_seconds(plan, costs)
    with LiveProgress(plan, steps, console) as progress:
        run = rehearse(plan, seconds, name=name, runs=runs, options=options, progress=progress)
    return run, progress


def _resume(path: Path, other: Path | None, options: RunOptions) -> None:
    from executor.running import checkpoint  # torch is slow to load
    from executor.running.execute import resume

    found = checkpoint.find(path)
    plan = load_plan(other) if other is not None else found.plan
    console = make_console()
    console.print(f"Going on from {found.directory}.", markup=False, soft_wrap=True)
    with LiveProgress(plan, options.steps or plan.workload.steps, console) as progress:
        run = resume(found, plan=plan, options=options, progress=progress)
    _report(run, run / "plan.json", console, progress)


def _report(run: Path, plan: Path, console: Console, progress: LiveProgress) -> None:
    checked, timeline = progress.plan, Timeline.read(run / "timeline.json")
    console.print(summary(checked, timeline, progress), soft_wrap=True)
    trace.write(timeline, run / "trace.json")
    from planner.report.gantt import draw  # matplotlib is slow to load

    draw([timeline], checked, run / "gantt.png")
    console.print(
        f"The run is in {run}: timeline.json, trace.json, gantt.png, metrics.jsonl, log.txt.",
        soft_wrap=True,
    )
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
    for key in ("reward", "exact_match"):
        if isinstance(value := progress.metrics.get(key), float):
            text += f", last {key.replace('_', ' ')} {value:.3f}"
    return text + "."


def task(name: str, out: Path, seed: int) -> None:
    need_extra("plan task")
    assert name == "digits"
    from executor.digits import make

    console = make_console()
    with console.status(
        "making prompts, the language model and the reward model (a minute or two)"
    ):
        make(out, seed)
    console.print(
        f"Wrote the task to {out}; its workload is {out / 'workload.toml'}.",
        markup=False,
        soft_wrap=True,
    )
