"""The plans that another framework can execute: the pools that it can make, the order in which it
issues calls, and the layouts that it has.

verl 0.9.1 has one pool for all roles that train or infer. Its synchronous trainer generates there
too, and waits for every call; its trainer `separate_async` generates on a pool of its own, one step
ahead. A reward model may have a pool of its own, and has to beside the second.

OpenRLHF 0.11.2 has all roles on the same GPUs, or actor and reference on some, critic and reward
model on others, or each on its own; its engines are then on further ones. It asks for all forward
passes at once, and for both updates at once, except where all roles share GPUs. Models are sharded
by ZeRO-3 over all GPUs of their role."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Literal, NamedTuple

from planner.predict.memory_check import check_memory
from planner.search.solver.best_program import Program
from planner.search.solver.problem import Problem
from planner.search.space.placements import PlacementFamily, Structure, families, pack
from planner.spec.dataflow import Dataflow
from planner.spec.errors import UserError
from planner.spec.frameworks import FrameworkName
from planner.spec.plan import Issue, Plan, RolloutRole, Wait

FEW_POOLS = 3
FRACTION_ALONE = 0.85  # of the memory of a GPU that an engine has for itself
MEMORY_FRACTIONS = (0.5, 0.4, 0.3, 0.2)  # of engines that sleep, the first that fits


class Mode(NamedTuple):
    """A way in which a framework runs: the roles of each pool, the program, and whether it updates
    beside generation."""

    structure: Structure
    program: Program
    ahead: bool


def splits_of(
    framework: FrameworkName, problem: Problem
) -> Iterator[tuple[PlacementFamily, Program]]:
    """Every placement that a framework can make, a family with all sizes given, and its program."""
    several_nodes = len(problem.cluster.nodes) > 1
    ranks: Literal["all", "one group"] = "all" if framework == "verl" else "one group"
    for mode in modes_of(framework, problem.workload.roles, problem.flow):
        if mode.ahead and problem.max_staleness < 1:
            continue
        for family in families(mode.structure, problem.cluster):
            for given in _sizes(family, problem):
                for within in (True, False) if several_nodes else (None,):
                    fixed = family._replace(given=given, within=within, ranks=ranks)
                    yield fixed, mode.program


def _sizes(family: PlacementFamily, problem: Problem) -> Iterator[dict[int, int]]:
    """The sizes of pools that have as many GPUs on each of their nodes, as frameworks want it:
    within a node, or whole nodes. Of many pools each has a power of two."""
    each = []
    for kind in family.kinds:
        node, most = problem.node(kind), problem.gpus[kind]
        listed = [*range(1, min(node, most) + 1), *range(2 * node, most + 1, node)]
        if len(family.kinds) > FEW_POOLS:
            listed = [size for size in listed if size & (size - 1) == 0]
        each.append(listed)
    for sizes in product(*each):
        given = dict(enumerate(sizes))
        if not all(sum(given[pool] for pool in pools) <= most for pools, most in family.limits):
            continue
        packed = pack(sizes, problem.cluster, family.kinds)
        if all(len({part.gpus for part in parts}) == 1 for parts in packed):
            yield given


# --- modes ---


def modes_of(framework: FrameworkName, roles: Sequence[str], flow: Dataflow) -> Iterator[Mode]:
    """The ways in which a framework can run a workload with these roles."""
    yield from (_of_verl if framework == "verl" else _of_openrlhf)(roles, flow)


def _of_verl(roles: Sequence[str], flow: Dataflow) -> Iterator[Mode]:
    every = frozenset(roles)
    reward, rollout = frozenset({"reward"}) & every, frozenset({"rollout"})
    serial = serial_program(flow, ahead=False)
    yield Mode((every,), serial, False)
    if reward:
        yield Mode((every - reward, reward), serial, False)
    apart = tuple(filter(None, (every - rollout - reward, rollout, reward)))
    yield Mode(apart, serial_program(flow, ahead=True), True)


def _of_openrlhf(roles: Sequence[str], flow: Dataflow) -> Iterator[Mode]:
    every = frozenset(roles)
    rollout = frozenset({"rollout"})
    yield Mode((every,), serial_program(flow, ahead=False), False)
    actor, critic = frozenset({"actor", "reference"}), frozenset({"critic", "reward"})
    alone = [frozenset({role}) for role in roles if role != "rollout"]
    both = (actor & every, critic & every)
    splits = {
        (every - rollout,),
        tuple(filter(None, both)),
        (both[0], *(frozenset({role}) for role in roles if role in critic)),
        (*(frozenset({role}) for role in roles if role in actor), *filter(None, both[1:])),
        tuple(alone),
    }
    for pools in sorted(splits, key=lambda pools: (len(pools), str(sorted(map(sorted, pools))))):
        if len(pools) == 1:  # engines are apart from all others only if they are ahead
            yield Mode((*pools, rollout), serial_program(flow, ahead=True), True)
            continue
        for ahead in (False, True):
            yield Mode((*pools, rollout), _grouped_program(flow, ahead), ahead)


def serial_program(flow: Dataflow, ahead: bool) -> Program:
    """Every call waits for the one before it; `ahead`: but generation, which is of the next step
    and ends before new weights come."""
    generates, installs = flow.generates.name, flow.installs.name
    between = [name for name in flow.names if name not in (generates, installs)]
    items: list[Issue | Wait] = [Issue(call=generates, offset=int(ahead), blocking=not ahead)]
    items += [Issue(call=name, blocking=True) for name in between]
    items += [Wait(wait=(generates,))] if ahead else []
    return Program((*items, Issue(call=installs, blocking=True)), int(ahead))


def _grouped_program(flow: Dataflow, ahead: bool) -> Program:
    """All forward passes are asked for at once, and all updates; the controller waits for both."""
    generates, installs = flow.generates.name, flow.installs.name
    infer = tuple(call.name for call in flow.calls if call.kind == "infer" or call.scores)
    updates = tuple(call.name for call in flow.calls if call.kind == "train")
    rest = set(flow.names) - {generates, installs, *infer, *updates}
    items: list[Issue | Wait] = [Issue(call=generates, offset=int(ahead), blocking=not ahead)]
    items += [*(Issue(call=name) for name in infer), Wait(wait=infer)]
    items += [Issue(call=name, blocking=True) for name in flow.names if name in rest]
    items += [*(Issue(call=name) for name in updates), Wait(wait=updates)]
    items += [Wait(wait=(generates,))] if ahead else []
    return Program((*items, Issue(call=installs, blocking=True)), int(ahead))


# --- what it makes of a plan ---


def as_executed(plan: Plan) -> Plan:
    """A plan whose roles fill their pools, as a framework runs it: engines on all GPUs of theirs,
    which sleep where they share them, with as much memory then as fits."""
    rollout = plan.rollout
    rooms = [len(plan.pools[pool].gpus) // rollout.tensor_parallel for pool in rollout.pools]
    homes = {pool for layout in plan.trainers.values() for pool in layout.pools}
    shared = bool(homes & set(rollout.pools)) and rollout.engine == "vllm"
    share = -(-plan.workload.generated // sum(rooms))
    alone = not shared and rollout.engine == "vllm"
    fraction = max(rollout.memory_fraction, FRACTION_ALONE) if alone else rollout.memory_fraction
    filled = rollout.changed(
        memory_fraction=fraction,
        replicas=sum(rooms),
        concurrency=min(rollout.concurrency, share),
        offload=shared or rollout.offload,
    )
    plan = plan.changed(roles={**plan.roles, "rollout": filled})
    return _with_memory(plan, filled) if shared else plan


def _with_memory(plan: Plan, rollout: RolloutRole) -> Plan:
    for fraction in MEMORY_FRACTIONS:
        if fraction <= rollout.memory_fraction:
            return plan
        larger = rollout.changed(memory_fraction=fraction)
        tried = plan.changed(roles={**plan.roles, "rollout": larger})
        try:
            check_memory(tried, saves=False)
        except UserError:
            continue
        return tried
    return plan
