"""The plans that another framework can execute, and what it makes of a plan."""

from collections.abc import Collection, Iterator, Sequence
from itertools import product

from planner.predict.memory_check import check_memory
from planner.search.questions.framework_modes import RANKS, Mode, modes_of
from planner.search.solver.best_program import Program
from planner.search.solver.problem import Problem
from planner.search.space.placements import PlacementFamily, families, pack
from planner.spec.errors import UserError
from planner.spec.frameworks import VERSIONS, FrameworkName
from planner.spec.plan import Plan, RolloutRole
from planner.spec.wording import counted
from planner.spec.workload import TRAINED, Workload

ONE_FOR_ALL: tuple[FrameworkName, ...] = ("openrlhf", "skyrl")  # micro-batches, recomputation
FEW_POOLS = 3
FEW_GPUS = 32  # of which pools may have any number, where nodes need not be alike
FRACTION_ALONE = 0.85  # of the memory of a GPU that an engine has for itself
MEMORY_FRACTIONS = (0.5, 0.4, 0.3, 0.2)  # of engines that sleep, the first that fits


def splits_of(
    framework: FrameworkName, problem: Problem
) -> Iterator[tuple[PlacementFamily, Program]]:
    """Every placement that a framework can make, a family with all sizes given, and its program: of
    plans that stream if the problem does, else of those with boundaries."""
    several_nodes = len(problem.cluster.nodes) > 1
    for mode in _modes_as_allowed(framework, problem):
        for family in families(mode.structure, problem.cluster):
            limited = family._replace(
                ranks=RANKS[framework], offloads=mode.offloads, widest_engine=mode.widest_engine
            )
            for given in _sizes(framework, limited, problem):
                for within in (True, False) if several_nodes else (None,):
                    yield limited._replace(given=given, within=within), mode.program


def _modes_as_allowed(framework: FrameworkName, problem: Problem) -> list[Mode]:
    """The modes of plans that stream, or of those with boundaries, as the problem is. Raises
    UserError for a framework that has none."""
    modes = list(modes_of(framework, problem.workload.roles, problem.flow))
    if problem.workload.sync == "in_flight" and not any(mode.streams for mode in modes):
        raise UserError(
            f"{framework} brings no weights in flight, as sync = 'in_flight' asks; set sync to "
            "'any' or 'boundary'"
        )
    found = [mode for mode in modes if mode.streams == problem.streams]
    return [mode for mode in found if problem.max_staleness or not mode.ahead]


def _sizes(
    framework: FrameworkName, family: PlacementFamily, problem: Problem
) -> Iterator[dict[int, int]]:
    """The sizes of pools that a framework can have. Where `needs_alike_nodes`, a pool has as many
    GPUs on each of its nodes, and lies within one or fills several. Of many pools each has a power
    of two."""
    each = []
    for pool, kind in enumerate(family.kinds):
        node, most = problem.node(kind), problem.gpus[kind]
        listed = [*range(1, min(node, most) + 1), *range(2 * node, most + 1, node)]
        if most <= FEW_GPUS and not needs_alike_nodes(framework, family.structure[pool]):
            listed = list(range(1, most + 1))
        if len(family.kinds) > FEW_POOLS:
            listed = [size for size in listed if size & (size - 1) == 0]
        if not family.structure[pool] <= {"rollout", "reward"}:
            whole = dealt_evenly(framework, problem.workload)
            listed = [size for size in listed if whole % size == 0]
        each.append(listed)
    for sizes in product(*each):
        given = dict(enumerate(sizes))
        if not all(sum(given[pool] for pool in pools) <= most for pools, most in family.limits):
            continue
        packed = pack(sizes, problem.cluster, family.kinds)
        if all(
            len({part.gpus for part in parts}) == 1 or not needs_alike_nodes(framework, roles)
            for roles, parts in zip(family.structure, packed, strict=True)
        ):
            yield given


def needs_alike_nodes(framework: FrameworkName, roles: Collection[str]) -> bool:
    """Whether a pool of these roles has as many GPUs on each of its nodes. AReaL places every rank
    and every engine by itself, SkyRL every engine; a reward model is beside them."""
    if framework == "areal":
        return "reward" in roles
    return framework != "skyrl" or set(roles) != {"rollout"}


def is_held_back(framework: FrameworkName, problem: Problem) -> bool:
    """Whether a framework could generate ahead, were weights allowed to arrive in flight."""
    if problem.workload.sync != "boundary" or not problem.max_staleness:
        return False
    modes = modes_of(framework, problem.workload.roles, problem.flow)
    return all(mode.streams for mode in modes if mode.ahead)


def nothing_for(framework: FrameworkName, problem: Problem, pins: Sequence[str]) -> str:
    """One line on why a framework can execute no plan of a problem."""
    modes = modes_of(framework, problem.workload.roles, problem.flow)
    fewest = min((mode.structure for mode in modes), key=len)
    gpus = len(problem.cluster.gpus)
    if len(fewest) > gpus:
        pools = " | ".join("+".join(sorted(roles)) for roles in fewest)
        return f"{framework} wants {counted(len(fewest), 'GPU')} at least ({pools}), not {gpus}"
    under = f" under {', '.join(pins)}" if pins else ""
    return (
        f"no plan that {framework} {VERSIONS[framework]} can execute fits {problem.workload.name} "
        f"on {counted(gpus, 'GPU')}{under}; use more GPUs, smaller models"
        f"{', other pins' if pins else ''} or no --for"
    )


def dealt_evenly(framework: FrameworkName, workload: Workload) -> int:
    """What a framework deals to the GPUs of a role, each of which has to get as much: AReaL the
    prompts of a batch, SkyRL the sequences of a minibatch. 0 where the GPUs may be any number."""
    if framework == "areal":
        return workload.batch // workload.group
    return workload.minibatch if framework == "skyrl" else 0


def check_algorithm(framework: FrameworkName, workload: Workload) -> None:
    """Raise UserError for a job that a framework would run as another one, with other calls or
    other advantages."""
    algorithm, wrong = workload.algorithm, ""
    if framework == "areal" and algorithm.epochs > 1:
        wrong = f"passes once over a batch, and algorithm.epochs is {algorithm.epochs}; set it to 1"
    elif framework == "skyrl" and algorithm.advantage == "reinforce++-baseline":
        wrong = "has no advantage 'reinforce++-baseline'; choose another algorithm.advantage"
    elif framework == "skyrl" and workload.proximal == "rollout":
        wrong = f"computes old log-probs for loss {algorithm.loss!r}; set proximal to 'recompute'"
    if wrong:
        raise UserError(f"{framework} {VERSIONS[framework]} {wrong}")


def workload_for(framework: FrameworkName, workload: Workload) -> Workload:
    """The workload as a framework runs it: AReaL computes keys and values of what is in flight anew
    when weights arrive. Raises UserError for one that it cannot run."""
    check_algorithm(framework, workload)
    if framework != "areal" or workload.sync == "boundary":
        return workload
    return workload.changed(kv="recompute")


# --- what it makes of a plan ---


def as_executed(framework: FrameworkName, plan: Plan) -> Plan:
    """A plan whose roles fill their pools, as a framework runs it."""
    plan = with_all_engines(plan)
    return alike(plan) if framework in ONE_FOR_ALL else plan


def alike(plan: Plan) -> Plan:
    """The plan with the smallest micro-batches for all roles, and recomputation for both updates
    where one has it."""
    tokens = min(layout.micro_batch_tokens for layout in plan.trainers.values())
    recompute = any(plan.trainers[role].recompute for role in TRAINED if role in plan.trainers)
    roles = dict(plan.roles)
    for role, layout in plan.trainers.items():
        own = recompute if role in TRAINED else layout.recompute
        roles[role] = layout.changed(micro_batch_tokens=tokens, recompute=own)
    return plan.changed(roles=roles)


def with_all_engines(plan: Plan) -> Plan:
    """The plan with engines on all GPUs of theirs, which sleep where they share them, with as much
    memory then as fits."""
    rollout = plan.rollout
    rooms = [len(plan.pools[pool].gpus) // rollout.tensor_parallel for pool in rollout.pools]
    homes = {pool for layout in plan.trainers.values() for pool in layout.pools}
    shared = bool(homes & set(rollout.pools)) and rollout.engine == "vllm"
    share = -(-plan.workload.generated // sum(rooms))
    slots = rollout.concurrency if plan.streams else min(rollout.concurrency, share)
    alone = not shared and rollout.engine == "vllm"
    fraction = max(rollout.memory_fraction, FRACTION_ALONE) if alone else rollout.memory_fraction
    filled = rollout.changed(
        memory_fraction=fraction,
        replicas=sum(rooms),
        concurrency=slots,
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
