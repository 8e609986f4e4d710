"""`plan check` and `plan schema`."""

import json
from pathlib import Path

from planner.commands.inputs import make_console
from planner.predict.memory import check_memory, plan_memory
from planner.predict.profile import Profile
from planner.predict.schedule import load_plan
from planner.report.tables import memory_table
from planner.spec.cluster import Cluster
from planner.spec.errors import UserError
from planner.spec.files import File
from planner.spec.plan import Plan
from planner.spec.study import CellResult, Study
from planner.spec.timeline import Timeline
from planner.spec.workload import Workload

KINDS: dict[str, type[File]] = {
    "plan": Plan,
    "timeline": Timeline,
    "profile": Profile,
    "workload": Workload,
    "cluster": Cluster,
    "study": Study,
    "cell": CellResult,
}


def check(plan: Path) -> None:
    """The file, its program, and the memory of each pool."""
    checked = load_plan(plan)
    try:
        check_memory(checked)
    except UserError as error:
        raise UserError(f"{plan}: {error}") from None
    console = make_console()
    console.print(memory_table({pool: (m.peak, m.allowed) for pool, m in plan_memory(checked).items()}))
    console.print()
    console.print(f"{plan} is sound: its program runs, with staleness {checked.staleness}, and its memory suffices.")


def schema(kind: str) -> None:
    print(json.dumps(KINDS[kind].json_schema(), indent=1))
