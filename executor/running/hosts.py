"""Whether the machines of a run have the memory that its hosts are to hold. Raises UserError."""

from collections.abc import Mapping

from planner.predict.host_memory import allowed_of, host_memory, merged, named
from planner.spec.errors import UserError
from planner.spec.plan import Plan
from planner.spec.wording import gigabytes


def check_here(plan: Plan, there: int, saves: bool) -> None:
    """Whether one machine with so many bytes of memory holds what is planned for all nodes."""
    _check("this machine", there, plan, merged(host_memory(plan, saves).values()))


def check_each(plan: Plan, there: Mapping[int, int], saves: bool) -> None:
    """Whether the nodes of a cluster, with so many bytes of memory each, hold what is planned."""
    parts = host_memory(plan, saves)
    for node, memory in there.items():
        _check(f"the machine of node {node}", memory, plan, parts[node])


def _check(which: str, there: int, plan: Plan, parts: Mapping[str, int]) -> None:
    if sum(parts.values()) > allowed_of(there):
        raise UserError(
            f"plan {plan.name!r} needs {gigabytes(sum(parts.values()))} of the host's memory "
            f"({named(parts)}), and {which} has {gigabytes(there)}, of which Ray lets "
            f"{gigabytes(allowed_of(there))} be used; search again with a --cluster file that has "
            "its host_memory_bytes"
        )
