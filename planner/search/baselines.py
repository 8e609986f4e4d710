"""Named splits that people use today: placement and program are given, layouts and free pool sizes are searched."""

from collections.abc import Sequence

import numpy as np

from planner.predict.cycle import cycles
from planner.predict.schedule import steady_edges
from planner.search.bound import Bounds, sharing_of
from planner.search.evaluate import Candidate, evaluate
from planner.search.options import Problem
from planner.search.pins import allows, parse_pins
from planner.search.programs import Program, rates
from planner.search.space import Structure, sizes
from planner.spec.cluster import Cluster
from planner.spec.errors import UserError
from planner.spec.plan import Issue, Wait

NAMES = ("colocated", "split", "split-parallel", "standalone", "one-step-off")
WHAT = {
    "colocated": "all roles on all GPUs, one call after the other",
    "split": "the tutorial: actor, rollout and reference on one half, critic and reward on the other; only the two "
    "updates overlap",
    "split-parallel": "as split, with reference, values and reward overlapped too",
    "standalone": "each role on its own pool, strictly on-policy",
    "one-step-off": "the rollout on its own pool, one step ahead of training",
}


def best_of(name: str, problem: Problem, pins: Sequence[str] = ()) -> Candidate:
    """The best layouts (and pool sizes, where neither the split nor a pin gives them) of a baseline. Raises
    UserError."""
    structure = _structure(name, problem.workload.roles)
    if len(structure) > len(problem.cluster.gpus):
        raise UserError(f"{name}: needs {len(structure)} pools, and there are {len(problem.cluster.gpus)} GPUs")
    if name == "one-step-off" and problem.max_staleness < 1:
        raise UserError(f"{name}: trains on sequences 1 update old, and the workload allows 0")
    program = _program(name, problem, structure)
    counts = np.array(_sizes(name, problem.cluster, len(structure)))
    if pins:
        pinned = parse_pins(pins, problem.workload.roles, len(problem.cluster.gpus))
        counts = counts[allows(pinned)(structure, counts)]
    if not len(counts):
        raise UserError(f"{name}: its pools cannot meet {' '.join(f'--pin {pin}' for pin in pins)}; change the pins")
    bounds = Bounds(problem).at_rates(rates(program), structure, counts)
    best: Candidate | None = None
    for at in np.argsort(bounds, kind="stable"):
        limit = best.seconds if best else np.inf
        if bounds[at] >= limit or np.isinf(bounds[at]):
            break
        best = evaluate(problem, structure, counts[at].tolist(), limit, fixed=program)[0] or best
    if best is None:
        raise UserError(f"{name}: no layout fits into the GPUs' memory; use more GPUs or smaller models")
    return best


def _structure(name: str, roles: Sequence[str]) -> Structure:
    """Pools of roles, those without any left out (a workload may lack critic, reference or reward model)."""
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


def _sizes(name: str, cluster: Cluster, pools: int) -> list[tuple[int, ...]]:
    """Pool sizes to try. A split gives each half whole nodes (or half of the only one); what is odd stays idle."""
    total = len(cluster.gpus)
    if name in ("split", "split-parallel") and pools == 2:
        nodes = sorted((node.gpus for node in cluster.nodes), reverse=True)
        half = total // 2 if len(nodes) == 1 else sum(nodes[: len(nodes) // 2])
        other = total // 2 if len(nodes) == 1 else sum(nodes[len(nodes) // 2 : 2 * (len(nodes) // 2)])
        return [(half, other)]
    return [tuple(int(n) for n in counts) for counts in sizes(total, pools)]


def _program(name: str, problem: Problem, structure: Structure) -> Program:
    """The program of a baseline, with its waits, and the cycles of its event graph."""
    infer = [call for call in problem.calls if problem.flow[call].kind == "infer" or call == "score"]
    updates = [call for call in ("update_critic", "update_actor") if call in problem.calls]
    together = tuple(infer) if name in ("split-parallel", "standalone", "one-step-off") else ()
    ahead = 1 if name == "one-step-off" else 0
    items: list[Issue | Wait] = [Issue(call="generate", offset=ahead, blocking=ahead == 0)]
    items += [Issue(call=call, blocking=call not in together) for call in infer]
    items += [Wait(wait=together)] if together else []
    items += [Issue(call="advantages", blocking=True)]
    blocking = name == "colocated"
    items += [Issue(call=call, blocking=blocking) for call in updates]
    items += [] if blocking else [Wait(wait=(*updates, *(("generate",) if ahead else ())))]
    items += [Issue(call="sync_weights", blocking=True)]
    pools = dict(sharing_of(problem, structure))
    edges = steady_edges(problem.flow, items, lambda call: pools[call.name])
    return Program(tuple(items), ahead, cycles(tuple(pools), edges))
