"""Named splits that people use today: placement and program are given, layouts and free pool sizes
are searched."""

from collections.abc import Sequence

from planner.search.solver.best_program import Program
from planner.search.solver.branch_and_bound import best_of_families
from planner.search.solver.evaluate import Candidate
from planner.search.solver.problem import Problem
from planner.search.space.pins import parse_pins, restriction
from planner.search.space.placements import PlacementFamily, Structure, families
from planner.spec.cluster import Cluster
from planner.spec.errors import UserError
from planner.spec.plan import Issue, Wait

NAMES = ("colocated", "split", "split-parallel", "standalone", "one-step-off")


def best_of(name: str, problem: Problem, pins: Sequence[str] = ()) -> Candidate:
    """The best layouts (and pool sizes, where neither the split nor a pin gives them) of a
    baseline. Raises UserError."""
    structure = _structure(name, problem.workload.roles)
    if len(structure) > len(problem.cluster.gpus):
        gpus = len(problem.cluster.gpus)
        there = f"there {'is' if gpus == 1 else 'are'} {gpus}"
        raise UserError(f"{name}: its {len(structure)} pools need a GPU each, and {there}")
    if name == "one-step-off" and problem.max_staleness < 1:
        raise UserError(f"{name}: trains on sequences 1 update old, and the workload allows 0")
    program, cluster = _program(name, problem), problem.cluster
    listed: list[PlacementFamily] = []
    for a in families(structure, cluster):
        halves = _halves(name, a, cluster)
        listed += (
            [a._replace(given=dict(enumerate(halves)))] if halves else [] if halves == () else [a]
        )
    if pins:
        meet = restriction(parse_pins(pins, problem.workload.roles, cluster))
        met = [(a, meet(a)) for a in listed]
        listed = [
            b._replace(given={**a.given, **b.given})
            for a, b in met
            if b is not None and _agree(a, b)
        ]
    if not listed:
        raise UserError(
            f"{name}: its pools cannot meet {' '.join(f'--pin {pin}' for pin in pins)}; change the "
            "pins"
        )
    found = best_of_families(problem, listed, 1, [program] * len(listed))
    if found.ended:  # a baseline that is not the best of its kind would flatter the plan
        raise KeyboardInterrupt
    if not found.best:
        from planner.search.questions.why_nothing_fits import (
            what_binds_pools,  # which itself searches
        )

        raise UserError(
            f"{name}: {what_binds_pools(problem, listed[0])}; use more GPUs or smaller models"
        )
    return found.best[0]


def _structure(name: str, roles: Sequence[str]) -> Structure:
    """Pools of roles, those without any left out (a workload may lack critic, reference or reward
    model)."""
    others = [role for role in roles if role != "rollout"]
    wanted: dict[str, list[set[str]]] = {
        "colocated": [set(roles)],
        "split": [{"actor", "rollout", "reference"}, {"critic", "reward"}],
        "split-parallel": [{"actor", "rollout", "reference"}, {"critic", "reward"}],
        "standalone": [{role} for role in roles],
        "one-step-off": [set(others), {"rollout"}],
    }
    if name not in wanted:
        raise UserError(f"there is no baseline {name!r}; choose one of {', '.join(NAMES)}")
    return tuple(frozenset(pool & set(roles)) for pool in wanted[name] if pool & set(roles))


def _halves(name: str, a: PlacementFamily, cluster: Cluster) -> tuple[int, ...] | None:
    """The sizes of a split's pools; None where they are free. Each half has whole nodes (or half of
    the only one); what is odd stays idle. With two kinds of GPU each half is one of them."""
    if name == "colocated":
        return (a.limits[0][1],)
    if name not in ("split", "split-parallel") or len(a.structure) != 2:
        return None
    if len(a.limits) == 2:
        return tuple(next(most for pools, most in a.limits if i in pools) for i in range(2))
    nodes = sorted((node.gpus for node in cluster.nodes if node.device == a.kinds[0]), reverse=True)
    if len(nodes) == 1:
        return (nodes[0] // 2,) * 2 if nodes[0] > 1 else ()
    half = len(nodes) // 2
    return sum(nodes[:half]), sum(nodes[half : 2 * half])


def _agree(a: PlacementFamily, pinned: PlacementFamily) -> bool:
    """Whether pins leave the sizes that a split has."""
    return all(pinned.given.get(i, count) == count for i, count in a.given.items())


def _program(name: str, problem: Problem) -> Program:
    """The program of a baseline, with its waits."""
    flow = problem.flow
    generates, installs = flow.generates.name, flow.installs.name
    infer = [call.name for call in flow.calls if call.kind == "infer" or call.scores]
    hosts = [call.name for call in flow.calls if call.kind == "host" and not call.scores]
    updates = [call.name for call in flow.calls if call.kind == "train"]
    together = tuple(infer) if name in ("split-parallel", "standalone", "one-step-off") else ()
    ahead = 1 if name == "one-step-off" else 0
    items: list[Issue | Wait] = [Issue(call=generates, offset=ahead, blocking=ahead == 0)]
    items += [Issue(call=call, blocking=call not in together) for call in infer]
    items += [Wait(wait=together)] if together else []
    items += [Issue(call=call, blocking=True) for call in hosts]
    blocking = name == "colocated"
    items += [Issue(call=call, blocking=blocking) for call in updates]
    items += [] if blocking else [Wait(wait=(*updates, *((generates,) if ahead else ())))]
    items += [Issue(call=installs, blocking=True)]
    return Program(tuple(items), ahead)
