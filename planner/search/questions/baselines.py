"""Named splits that people use today: placement and program are given, layouts and free pool sizes
are searched."""

from collections.abc import Sequence

from planner.search.questions.why_nothing_fits import what_binds_pools
from planner.search.solver.best_program import Program
from planner.search.solver.branch_and_bound import best_of_families
from planner.search.solver.evaluate import Candidate
from planner.search.solver.problem import Problem
from planner.search.space.pins import Restrict, parse_pins, restriction
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
    cluster = problem.cluster
    listed = []
    for family in families(structure, cluster):
        given = _given_sizes(name, family, cluster)
        if given is not None:
            listed.append(family._replace(given=given))
    if pins:
        listed = _pinned(listed, restriction(parse_pins(pins, problem.workload.roles, cluster)))
    if not listed:
        told = " ".join(f"--pin {pin}" for pin in pins)
        raise UserError(f"{name}: its pools cannot meet {told}; change the pins")
    found = best_of_families(problem, listed, 1, [_program(name, problem)] * len(listed))
    if found.ended:  # a baseline that is not the best of its kind would flatter the best plan
        raise KeyboardInterrupt
    if not found.best:
        reason = what_binds_pools(problem, listed[0])
        raise UserError(f"{name}: {reason}; use more GPUs or smaller models")
    return found.best[0]


def _pinned(listed: Sequence[PlacementFamily], meet: Restrict) -> list[PlacementFamily]:
    """The families of a baseline that pins allow, with the sizes that both of them give."""
    found = []
    for family in listed:
        met = meet(family)
        if met is None:
            continue
        agreed = {**family.given, **met.given}
        if all(agreed[pool] == size for pool, size in family.given.items()):
            found.append(met._replace(given=agreed))
    return found


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


def _given_sizes(name: str, family: PlacementFamily, cluster: Cluster) -> dict[int, int] | None:
    """The sizes of pools that a baseline gives (none where they are free), or None if it cannot be.
    Each half of a split has whole nodes (or half of the only one); an odd node stays idle. With two
    kinds of GPU each half is one of them."""
    if name == "colocated":
        return {0: family.limits[0][1]}
    if name not in ("split", "split-parallel") or len(family.structure) != 2:
        return {}
    if len(family.limits) == 2:
        return {pools[0]: most for pools, most in family.limits}
    nodes = [node.gpus for node in cluster.nodes if node.device == family.kinds[0]]
    if len(nodes) == 1:
        half = nodes[0] // 2
        return {0: half, 1: half} if half else None
    nodes.sort(reverse=True)
    half = len(nodes) // 2
    return {0: sum(nodes[:half]), 1: sum(nodes[half : 2 * half])}


def _program(name: str, problem: Problem) -> Program:
    """The program of a baseline, with its waits."""
    flow = problem.flow
    generates, installs = flow.generates.name, flow.installs.name
    infer = [call.name for call in flow.calls if call.kind == "infer" or call.scores]
    between = [call.name for call in flow.calls if call.kind in ("infer", "host")]
    updates = [call.name for call in flow.calls if call.kind == "train"]
    together = tuple(infer) if name in ("split-parallel", "standalone", "one-step-off") else ()
    ahead = 1 if name == "one-step-off" else 0
    items: list[Issue | Wait] = [Issue(call=generates, offset=ahead, blocking=ahead == 0)]
    for call in between:
        items.append(Issue(call=call, blocking=call not in together))
        items += [Wait(wait=together)] if together and call == infer[-1] else []
    blocking = name == "colocated"
    items += [Issue(call=call, blocking=blocking) for call in updates]
    items += [] if blocking else [Wait(wait=(*updates, *((generates,) if ahead else ())))]
    items += [Issue(call=installs, blocking=True)]
    return Program(tuple(items), ahead)
