"""`plan check` and `plan schema`."""

import json
from collections.abc import Sequence
from pathlib import Path

from planner.commands.execute import missing_extra
from planner.commands.inputs import make_console
from planner.predict.memory import plan_memory
from planner.predict.memory_check import check_memory
from planner.predict.profile import Profile
from planner.predict.schedule import load_plan
from planner.report.hosts import host_sentences
from planner.report.tables import memory_table
from planner.spec.cluster import Cluster
from planner.spec.errors import UserError
from planner.spec.files import File
from planner.spec.plan import Plan
from planner.spec.study import CellResult, Study
from planner.spec.timeline import Timeline
from planner.spec.workload import Workload

WORTH_SAYING = 0.005  # of a host's memory

KINDS: dict[str, type[File]] = {
    "plan": Plan,
    "timeline": Timeline,
    "profile": Profile,
    "workload": Workload,
    "cluster": Cluster,
    "study": Study,
    "cell": CellResult,
}


def check(plan: Path, here: bool, settings: Sequence[str] = ()) -> None:
    """The file, its program, and the memory of each pool; and whether this machine could run it."""
    checked = load_plan(plan, settings)
    try:
        check_memory(checked)
    except UserError as error:
        raise UserError(f"{plan}: {error}") from None
    found = _missing_here(checked)
    if here and found:
        raise UserError(f"{plan} cannot be run on this machine: {'; '.join(found)}")
    console = make_console()
    console.print(
        memory_table({pool: (m.peak, m.allowed) for pool, m in plan_memory(checked).items()})
    )
    for line in host_sentences(checked, WORTH_SAYING):
        console.print(line, soft_wrap=True)
    console.print()
    console.print(
        f"{plan} is sound: its program runs, with staleness {checked.staleness}, and its memory "
        "suffices."
    )
    console.print(
        "It cannot be run on this machine:" if found else "It can be run on this machine."
    )
    for line in found:
        console.print(f"- {line}", markup=False, soft_wrap=True)
    if newer := _newer_than_tried(checked):
        line = f"Newer than what was tried on GPUs: {', '.join(newer)}; see docs/run.md."
        console.print(line, markup=False, soft_wrap=True)


def _missing_here(plan: Plan) -> list[str]:
    """The problems that would end a run on this machine before it starts anything."""
    if missing := missing_extra():
        return [f"{', '.join(missing)} not installed; pip install 'splitplan[execute]'"]
    from executor.running.preflight import problems  # torch and ray are slow to load

    return problems(plan)


def _newer_than_tried(plan: Plan) -> list[str]:
    """The packages here that a plan for GPUs would be the first to try on some."""
    from executor.measuring import software

    if all(plan.device_of(pool).kind != "cuda" for pool in plan.pools):
        return []
    elsewhere = set(plan.rollout.pools) - set(plan.roles["actor"].pools)
    return software.newer_than_tried(over_nccl=bool(elsewhere))


def schema(kind: str) -> None:
    print(json.dumps(KINDS[kind].json_schema(), indent=1))
