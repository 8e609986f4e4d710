"""Why nothing fits, or a baseline does not, in one line with its numbers, and what would."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from planner.predict.cost import CostModel
from planner.predict.host_memory import allowed, host_memory, named
from planner.predict.layouts import (
    CONCURRENCY,
    rollout_layouts,
    tensor_parallels,
    trainer_layouts,
)
from planner.predict.memory import (
    RoleMemory,
    pool_peak,
    process_bytes,
    rollout_fraction,
    rollout_memory,
    trainer_memory,
)
from planner.search.questions.other_ways import pins_that_fail, what_others_do
from planner.search.questions.variants import resized, with_response
from planner.search.solver.evaluate import Candidate, evaluate_structure
from planner.search.solver.problem import Problem
from planner.search.solver.write_plan import assemble
from planner.search.space.placements import PlacementFamily, Structure, sizes, structures
from planner.spec.cluster import Cluster, Device
from planner.spec.limits import MOST_GPUS, MOST_GPUS_ASKED
from planner.spec.wording import counted, gigabytes
from planner.spec.workload import TENSOR_PARALLEL, Workload

EVERY_PLACEMENT = 3  # GPUs up to which all placements are tried, and not the leanest only
SHORTEST = 1 / 64  # of the given response length
ENOUGH_BYTES = 2**56  # of host memory, for any plan


class RoleNeed(NamedTuple):
    """Bytes per GPU of a role in the layout that needs least, that layout's split in words, and the
    shard from which on it fits a GPU (0: from none)."""

    role: str
    bytes: int
    at: str
    fits_from: int = 0


def nothing_fits(problem: Problem, pins: Sequence[str] = ()) -> str:
    """The constraint that binds, with its numbers, and the nearest changes that would do."""
    workload, cluster = problem.workload, problem.cluster
    wanted, most = workload.tensor_parallel or 1, max(node.gpus for node in cluster.nodes)
    if wanted > most:
        return (
            f"no plan fits {workload.name}: its engines take {counted(wanted, 'GPU')} of one node "
            f"(tensor_parallel), and no node has more than {most}; use larger nodes, or leave "
            "tensor_parallel out"
        )
    where = f"{workload.name} on {counted(len(cluster.gpus), 'GPU')}"
    if pins and fits(problem) is not None:
        told = " ".join(f"--pin {pin}" for pin in pins)
        failing = pins_that_fail(problem, pins, _leanest)
        why = f": {failing}" if failing else ""
        return f"no plan fits {where} with {told}, and one does without them{why}; loosen the pins"
    others = what_others_do(problem, *_largest(cluster))
    return f"no plan fits {where}: {what_binds(problem)}; {_fixes(problem)}{others}"


def what_binds(problem: Problem) -> str:
    """The constraint that binds where nothing fits: roles that need too much each alone, all
    together, or the host."""
    device, gpus = _largest(problem.cluster)
    needs = _needs(problem.workload, problem.cluster)
    over = [need for need in needs if need.bytes > device.memory_bytes]
    if not over:
        return _together(problem, device, gpus)
    worst, *others = sorted(over, key=lambda need: -need.bytes)
    also = "".join(f", {need.role} {gigabytes(need.bytes)}" for need in others)
    fits_from = f" (it fits from shard {worst.fits_from})" if worst.fits_from else ""
    told = f"{worst.role} needs {gigabytes(worst.bytes)} per GPU at {worst.at}{fits_from}{also}"
    return f"{told}, and a GPU has {gigabytes(device.memory_bytes)}"


def what_binds_pools(problem: Problem, family: PlacementFamily) -> str:
    """Why no layouts fit the pools of a family: the first pool that needs too much even at
    its leanest, on as many GPUs as it may have."""
    workload, cluster = problem.workload, problem.cluster
    for number, members in enumerate(family.structure):
        device, gpus = cluster.devices[family.kinds[number]], _most_gpus(family, number)
        roles = [role for role in workload.roles if role in members]
        pool, engine = "+".join(roles), min(tensor_parallels(workload, device))
        if "rollout" in roles and engine > gpus:
            return (
                f"an engine takes {counted(engine, 'GPU')} (tensor_parallel), and {pool} has {gpus}"
            )
        needs = {role: _leanest(workload, cluster, role, device, gpus) for role in roles}
        if "rollout" in roles:
            needs = {role: memory.beside_sleeping() for role, memory in needs.items()}
        peak = pool_peak(list(needs.values()), roles != ["rollout"], "rollout" in roles, device)
        if peak > device.memory_bytes:
            told = [f"{role} {gigabytes(memory.running)}" for role, memory in needs.items()]
            return (
                f"{pool} on {counted(gpus, 'GPU')} take at least {gigabytes(peak)} per GPU (while "
                f"it runs {', '.join(told)}), and a GPU has {gigabytes(device.memory_bytes)}"
            )
    host = gigabytes(min(node.host_memory_bytes for node in cluster.nodes))
    return (
        "each of its pools would fit on the most GPUs that it may have, but not all of them "
        f"together, or {host} of host memory do not hold what is offloaded and what checkpoints "
        "copy"
    )


def _most_gpus(family: PlacementFamily, number: int) -> int:
    """The most GPUs that a pool of a family can have: every other pool has its given number, or a
    single GPU."""
    if number in family.given:
        return family.given[number]
    left = []
    for pools, most in family.limits:
        if number in pools:
            others = sum(family.given.get(pool, 1) for pool in pools if pool != number)
            left.append(most - others)
    return min(left)


def _leanest(
    workload: Workload, cluster: Cluster, role: str, device: Device, gpus: int
) -> RoleMemory:
    """The need of a role in the layout that needs least while it runs, and of those while it
    idles."""
    widest = _widest(cluster, device)
    if role != "rollout":
        layouts = trainer_layouts(workload, role, gpus, "pool", device, widest)
        found = [trainer_memory(workload, role, layout, device) for layout in layouts]
    else:
        parts = (*[widest] * (gpus // widest), *[gpus % widest] * (gpus % widest > 0))
        engines = rollout_layouts(workload, (parts,), ("pool",), device)
        found = [rollout_memory(workload, layout, device) for layout in engines]
        if not found:
            needed = _engine_need(workload, cluster, device, gpus).bytes - process_bytes(device)
            return RoleMemory(idle=0, running=needed, host=0)
    return min(found, key=lambda memory: (memory.running, memory.idle))


def fits(problem: Problem) -> Candidate | None:
    """Some plan that fits, or None: of all placements on few GPUs, else of those that need least
    memory (all roles on all GPUs, or the rollout apart)."""
    for structure, counts in _placements(problem):
        if len(structure) <= len(problem.cluster.gpus):
            candidate = evaluate_structure(problem, structure, counts)
            if candidate is not None:
                return candidate
    return None


def _placements(problem: Problem) -> Iterator[tuple[Structure, tuple[int, ...]]]:
    roles, gpus = problem.workload.roles, len(problem.cluster.gpus)
    yield (frozenset(roles),), (gpus,)
    for apart in TENSOR_PARALLEL:
        if apart < gpus:
            yield (frozenset(roles) - {"rollout"}, frozenset({"rollout"})), (gpus - apart, apart)
    if gpus <= EVERY_PLACEMENT:
        for structure in structures(roles):
            for counts in sizes(gpus, len(structure)):
                yield structure, tuple(int(count) for count in counts)


def _largest(cluster: Cluster) -> tuple[Device, int]:
    """The kind of GPU with the most memory, and how many there are."""
    kinds = [cluster.device_of(gpu) for gpu in cluster.gpus]
    device = max(kinds, key=lambda kind: kind.memory_bytes)
    return device, kinds.count(device)


def _needs(workload: Workload, cluster: Cluster) -> Iterator[RoleNeed]:
    """What each role needs where it has all GPUs of the largest kind for itself."""
    device, gpus = _largest(cluster)
    for role in workload.roles:
        if role != "rollout":
            yield _trainer_need(workload, role, device, gpus)
    yield _engine_need(workload, cluster, device, gpus)


def _engine_need(workload: Workload, cluster: Cluster, device: Device, gpus: int) -> RoleNeed:
    """The need of the engines that need least."""
    engines = []
    for split in (t for t in tensor_parallels(workload, device) if t <= _widest(cluster, device)):
        share = -(-workload.generated // max(1, gpus // split))
        fraction = rollout_fraction(workload, split, min(share, min(CONCURRENCY)), device)
        engines.append(
            RoleNeed("rollout", int(fraction * device.memory_bytes), f"tensor-parallel {split}")
        )
    return min(engines, key=lambda need: need.bytes)


def _widest(cluster: Cluster, device: Device) -> int:
    """GPUs of the largest node of a kind."""
    return max(node.gpus for node in cluster.nodes if cluster.devices[node.device] == device)


def _trainer_need(workload: Workload, role: str, device: Device, gpus: int) -> RoleNeed:
    """The need of the layout that needs least, and the shard from which on it would fit alone."""

    def leanest(count: int) -> tuple[int, int]:
        layouts = trainer_layouts(workload, role, count, "pool", device)
        return min(
            (trainer_memory(workload, role, each, device).running, each.shard) for each in layouts
        )

    def alone(count: int) -> bool:
        return leanest(count)[0] + process_bytes(device) <= device.memory_bytes

    running, shard = leanest(gpus)
    enough = None if alone(gpus) else _fewest(alone, gpus)
    return RoleNeed(
        role, running + process_bytes(device), f"shard {shard}", leanest(enough)[1] if enough else 0
    )


def _together(problem: Problem, device: Device, gpus: int) -> str:
    """Each role would fit alone: it is the host's memory that does not suffice, or all of them do
    not fit together."""
    cluster = problem.cluster
    roomy = tuple(node.changed(host_memory_bytes=ENOUGH_BYTES) for node in cluster.nodes)
    candidate = fits(replace(problem, cluster=cluster.changed(nodes=roomy)))
    if candidate is not None:
        used = host_memory(assemble(candidate, "candidate", problem))
        totals = {node: sum(parts.values()) for node, parts in used.items()}
        node = max(totals, key=lambda n: totals[n] - allowed(cluster.nodes[n]))
        return (
            f"the GPUs' memory would do, but node {node} then needs {gigabytes(totals[node])} of "
            f"host memory ({named(used[node])}), and {gigabytes(allowed(cluster.nodes[node]))} of "
            f"its {gigabytes(cluster.nodes[node].host_memory_bytes)} are there before Ray ends "
            "processes"
        )
    needs = _needs(problem.workload, cluster)
    told = ", ".join(f"{need.role} {gigabytes(need.bytes)}" for need in needs)
    return (
        f"each role alone fits {gpus} of them ({told} per GPU of "
        f"{gigabytes(device.memory_bytes)} at its leanest), but together they do not, even with "
        "all that can be offloaded"
    )


def _fixes(problem: Problem) -> str:
    """More GPUs, or shorter responses; what is named was found to fit."""
    found = []
    more = _more_gpus(problem)
    if more is not None:
        found.append(f"{counted(more, 'GPU')} of the same kind")
    tokens = _shorter_responses(problem)
    if tokens is not None:
        found.append(f"responses of at most {tokens:,} tokens")
    if not found:
        return (
            f"not on {MOST_GPUS_ASKED:,} GPUs of the same kind either; use GPUs with more memory "
            "or smaller models"
        )
    return f"it fits with {' or with '.join(found)}"


def _more_gpus(problem: Problem) -> int | None:
    """The fewest GPUs of the same kind on which a plan fits, if any."""
    workload, cluster = problem.workload, problem.cluster
    if _hopeless(workload, cluster):
        return None

    def enough(gpus: int) -> bool:
        if gpus > MOST_GPUS:
            return False
        return fits(_with(problem, workload, resized(cluster, gpus))) is not None

    return _fewest(enough, len(cluster.gpus))


def _shorter_responses(problem: Problem) -> int | None:
    """Tokens of the longest response at which a plan fits: the given one halved, as often as it
    takes."""
    factor = 0.5
    while factor >= SHORTEST:
        shorter = with_response(problem.workload, factor)
        if fits(_with(problem, shorter, problem.cluster)) is not None:
            return shorter.response.longest
        factor /= 2
    return None


def _hopeless(workload: Workload, cluster: Cluster) -> bool:
    """Whether some role would fit on no number of GPUs of the largest kind."""
    most = resized(cluster, MOST_GPUS_ASKED)
    return any(need.bytes > _largest(cluster)[0].memory_bytes for need in _needs(workload, most))


def _with(problem: Problem, workload: Workload, cluster: Cluster) -> Problem:
    """The problem changed, at roofline costs: what fits does not depend on them."""
    model = CostModel(workload, cluster, scenarios=1)
    return Problem(
        workload=workload,
        cluster=cluster,
        model=model,
        flow=problem.flow,
        max_staleness=problem.max_staleness,
    )


def _fewest(enough: Callable[[int], bool], gpus: int) -> int | None:
    """The fewest GPUs that are enough, where `gpus` are not: doubled until they are, then halved in
    between."""
    low, high = gpus, 2 * gpus
    while not enough(high):
        low, high = high, 2 * high
        if high > MOST_GPUS_ASKED:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
