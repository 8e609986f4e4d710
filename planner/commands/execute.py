"""`plan execute` and `plan task`."""

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import count
from pathlib import Path

from planner.commands.inputs import make_console, positive, profiles_of
from planner.predict.forecast import task_seconds
from planner.predict.schedule import load_plan
from planner.report import trace
from planner.report.live import LiveProgress
from planner.spec.errors import UserError
from planner.spec.plan import Plan
from planner.spec.timeline import Timeline, step_seconds

REHEARSED_STEPS = 3  # a rehearsal takes as long as the real run would
NEEDED = ("ray", "torch", "transformers", "safetensors")


def need_extra(command: str) -> None:
    """Raise UserError if what the executor runs on is not installed."""
    if missing := missing_extra():
        raise UserError(f"{command} needs {', '.join(missing)}; install it with: pip install 'splitplan[execute]'")


def missing_extra() -> list[str]:
    """What the executor runs on and is not installed."""
    return [name for name in NEEDED if find_spec(name) is None]


def execute(
    plan: Path,
    name: str,
    steps: int | None,
    rehearse: bool,
    runs: Path,
    address: str | None,
    deadline_floor: float,
    profiles: Sequence[Path],
) -> None:
    need_extra("plan execute")
    positive("--steps", steps)
    if not 0 < deadline_floor < float("inf"):
        raise UserError(f"--deadline-floor {deadline_floor:g}: choose a positive number of seconds")
    checked = load_plan(plan)
    seconds = None
    if rehearse:
        steps = steps or REHEARSED_STEPS
        seconds = task_seconds(checked, profiles_of(checked, plan, profiles, make_console(stderr=True)))
    from executor.run import execute  # ray and torch are slow to load

    console = make_console()
    with LiveProgress(checked, steps or checked.workload.steps, console) as progress:
        run = execute(
            checked,
            name=name or free_name(runs, checked.name),
            runs=runs,
            steps=steps,
            rehearse=rehearse,
            seconds=seconds,
            address=address,
            progress=progress,
            deadline_floor=deadline_floor,
        )
    timeline = Timeline.read(run / "timeline.json")
    console.print(summary(checked, timeline, progress), soft_wrap=True)
    trace.write(timeline, run / "trace.json")
    from planner.report.gantt import draw  # matplotlib is slow to load

    draw([timeline], checked, run / "gantt.png")
    console.print(f"The run is in {run}: timeline.json, trace.json, gantt.png, metrics.jsonl, log.txt.", soft_wrap=True)
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
    from executor.task import make

    console = make_console()
    with console.status("making prompts, the language model and the reward model (a minute or two)"):
        make(out, seed)
    console.print(f"Wrote the task to {out}; its workload is {out / 'workload.toml'}.", markup=False, soft_wrap=True)
