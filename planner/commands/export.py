"""`plan export`."""

from collections.abc import Callable, Sequence
from pathlib import Path

from planner.commands.inputs import check_target, make_console, profiles_of
from planner.exchange.areal_config import areal_config
from planner.exchange.expressing import Expressed, expressed
from planner.exchange.openrlhf_script import openrlhf_script
from planner.exchange.skyrl_script import skyrl_script
from planner.exchange.verl_script import verl_script
from planner.predict.schedule import load_plan
from planner.report.tables import seconds
from planner.spec.files import write_atomic
from planner.spec.frameworks import FrameworkName

# What is written for each framework, and the suffix of the file.
TEXTS: dict[FrameworkName, tuple[Callable[[Expressed, str], str], str]] = {
    "verl": (verl_script, ".sh"),
    "openrlhf": (openrlhf_script, ".sh"),
    "areal": (areal_config, ".yaml"),
    "skyrl": (skyrl_script, ".sh"),
}


def export(
    framework: FrameworkName, plan: Path, out: Path, profiles: Sequence[Path], command: str
) -> None:
    text_of, suffix = TEXTS[framework]
    check_target(out, suffix)
    checked = load_plan(plan)
    found = expressed(
        framework, checked, profiles_of(checked, plan, profiles, make_console(stderr=True))
    )
    write_atomic(out, text_of(found, command))
    if suffix == ".sh":
        out.chmod(0o755)
    console = make_console()
    assert found.plan.predicted
    console.print(
        f"[bold]{seconds(found.plan.predicted.step_seconds)} s per step[/bold] predicted under "
        f"{framework}.",
        soft_wrap=True,
    )
    for change in found.changes:
        console.print(f"- {change.what}: {change.seconds:+.3g} s a step", soft_wrap=True)
    console.print(f"Wrote {out}; its comments say what each option is for.", soft_wrap=True)
