"""What a framework makes of a plan: where it has to do something else, and what that costs."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import gcd

from planner.predict.cost import CostModel
from planner.predict.forecast import predict
from planner.predict.memory import rollout_fraction
from planner.predict.memory_check import check_memory
from planner.predict.profile import Profile
from planner.search.questions.framework_modes import RANKS, Mode, modes_of
from planner.search.questions.frameworks import (
    ONE_FOR_ALL,
    alike,
    check_algorithm,
    dealt_evenly,
    needs_alike_nodes,
    with_all_engines,
)
from planner.search.solver.problem import scenarios_of
from planner.spec.errors import UserError
from planner.spec.frameworks import FrameworkName
from planner.spec.plan import Issue, Plan, Predicted, TrainerRole
from planner.spec.wording import counted

Stage = tuple[str, Callable[[Plan], Plan]]


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a framework does otherwise than a plan says, and the seconds that it adds to a step."""

    what: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Expressed:
    """A plan as a framework executes it, with its prediction; the mode that it runs in; what is
    otherwise than in the plan that was asked for; and the nodes and GPUs of each node of a pool."""

    plan: Plan
    mode: Mode
    changes: tuple[Change, ...]
    grids: dict[str, tuple[int, int]]

    def pool_of(self, role: str) -> str:
        return self.plan.roles[role].pools[0]

    def grid_of(self, role: str) -> tuple[int, int]:
        """The nodes of a role's pool, and its GPUs on each of them."""
        return self.grids[self.pool_of(role)]


def expressed(framework: FrameworkName, plan: Plan, profiles: Sequence[Profile]) -> Expressed:
    """The plan as a framework executes it. Raises UserError for one that it cannot execute at
    all."""
    check_algorithm(framework, plan.workload)
    mode = _mode(framework, plan)
    grids = {pool: _grid(framework, plan, pool) for pool in plan.pools}
    _check_deal(framework, plan)
    stages = _stages(framework, mode)
    scenarios = scenarios_of(plan)

    def predicted(plan: Plan) -> Predicted:
        model = CostModel(plan.workload, plan.cluster, profiles, scenarios)
        return predict(plan, model=model)

    found, now = list[Change](), predicted(plan).step_seconds
    for what, change in stages:
        after = change(plan)
        if _decided(after) == _decided(plan):
            continue
        seconds = predicted(after).step_seconds
        found.append(Change(what=what, seconds=seconds - now))
        plan, now = after, seconds
    try:
        check_memory(plan, saves=False)
    except UserError as error:
        raise UserError(f"as {framework} executes this plan, {error}") from None
    plan = plan.changed(predicted=predicted(plan))
    return Expressed(plan=plan, mode=mode, changes=tuple(found), grids=grids)


def _decided(plan: Plan) -> tuple[object, ...]:
    return plan.roles, plan.program, plan.sync, plan.workload.kv


def _stages(framework: FrameworkName, mode: Mode) -> Iterator[Stage]:
    """What a framework makes of a plan, one thing after the other, and how each is told."""
    yield _order_text(mode), lambda plan: _in_order(plan, mode)
    yield "every role computes on all GPUs of its pool", lambda plan: _filled(plan, framework)
    if mode.offloads:
        yield (
            "what it may not move stays on its GPUs, and what takes turns there leaves them",
            lambda plan: _moved(plan, mode),
        )
    yield "engines have no more GPUs than it gives them", lambda plan: _narrow(plan, mode)
    yield (
        "engines are on all GPUs of their pools, and sleep where they share them",
        with_all_engines,
    )
    if framework in ONE_FOR_ALL:
        yield "all roles have the same micro-batches, and both updates recompute or none", alike


def _mode(framework: FrameworkName, plan: Plan) -> Mode:
    """The mode with the plan's pools. Raises UserError where there is none."""
    homes = {
        pool: frozenset(role for role, layout in plan.roles.items() if pool in layout.pools)
        for pool in plan.pools
    }
    wanted = Counter(homes.values())
    flow = plan.dataflow.steady
    fits = [
        mode
        for mode in modes_of(framework, plan.workload.roles, flow)
        if Counter(mode.structure) == wanted
    ]
    ahead = plan.staleness > 0
    matching = [mode for mode in fits if mode.ahead == ahead] or fits
    if not matching or (matching[0].ahead and not plan.workload.max_staleness):
        pools = " | ".join("+".join(sorted(roles)) for roles in homes.values())
        raise UserError(
            f"{framework} cannot make the pools of this plan ({pools}); find the best plan that it "
            f"can execute with `plan search --for {framework}`"
        )
    return matching[0]


def _grid(framework: FrameworkName, plan: Plan, pool: str) -> tuple[int, int]:
    """Nodes of a pool and its GPUs on each, the most of any. Raises UserError where a framework
    wants as many on each."""
    on = Counter(node for node, _ in plan.pools[pool].gpus)
    roles = [role for role, layout in plan.roles.items() if pool in layout.pools]
    if len(set(on.values())) > 1 and needs_alike_nodes(framework, roles):
        counts = " and ".join(str(count) for count in sorted(on.values(), reverse=True))
        raise UserError(
            f"{framework} wants as many GPUs on each node, and pool {pool!r} has {counts}; find "
            f"the best plan that it can execute with `plan search --for {framework}`"
        )
    return len(on), max(on.values())


def _check_deal(framework: FrameworkName, plan: Plan) -> None:
    """Raise UserError where a framework would deal less to one GPU of a role than to another, and
    refuses that."""
    whole = dealt_evenly(framework, plan.workload)
    for role, layout in plan.trainers.items():
        gpus = len(plan.pools[layout.pools[0]].gpus)
        if role != "reward" and whole % gpus:
            things = "prompts of a batch" if framework == "areal" else "sequences of a minibatch"
            raise UserError(
                f"{framework} deals as many of the {whole} {things} to each of the {gpus} GPUs of "
                f"{role}, which does not come out even; find the best plan that it can execute "
                f"with `plan search --for {framework}`"
            )


def _order_text(mode: Mode) -> str:
    if mode.streams:
        return "generation is ahead, and weights arrive in the middle of sequences"
    if mode.ahead:
        return "calls are issued one step after the other, with generation one step ahead"
    return "every call waits for the one before it"


def _in_order(plan: Plan, mode: Mode) -> Plan:
    """The plan with a mode's program, and the monitors where they were. One that streams already,
    and is to, stays as it is but for what becomes of keys and values."""
    workload, staleness = plan.workload, mode.program.staleness
    if mode.streams and plan.streams:
        return plan.changed(workload=workload.changed(kv="recompute"), predicted=None)
    issues = [item for item in plan.program if isinstance(item, Issue)]
    monitors = [item for item in issues if plan.dataflow[item.call].monitor]
    if mode.streams:
        workload = workload.changed(sync="in_flight", kv="recompute")
    elif workload.sync == "in_flight":
        workload = workload.changed(sync="any")
    if workload.max_staleness < staleness:
        workload = workload.changed(max_staleness=staleness)
    roles = dict(plan.roles)
    if mode.streams:
        roles["rollout"] = plan.rollout.changed(offload=False)
    return plan.changed(
        workload=workload,
        roles=roles,
        program=(*mode.program.items, *monitors),
        staleness=staleness,
        sync="in_flight" if mode.streams else "boundary",
        predicted=None,
    )


def _filled(plan: Plan, framework: FrameworkName) -> Plan:
    """The plan with every role that trains or infers on all GPUs of its pool."""
    roles = dict(plan.roles)
    for role, layout in plan.roles.items():
        if isinstance(layout, TrainerRole):
            roles[role] = _on_all(layout, len(plan.pools[layout.pools[0]].gpus), framework)
    return plan.changed(roles=roles)


def _on_all(layout: TrainerRole, gpus: int, framework: FrameworkName) -> TrainerRole:
    one_group = RANKS[framework] == "one group" or gpus % layout.shard
    shard = gpus if one_group else layout.shard
    return layout.changed(shard=shard, replicas=gpus // shard)


def _moved(plan: Plan, mode: Mode) -> Plan:
    """The plan with roles that go to the host as a mode has it: as a whole rather than in part."""
    roles = dict(plan.roles)
    for role, layout in plan.trainers.items():
        allowed = mode.offloads[role]
        offload = layout.offload if layout.offload in allowed else allowed[-1]
        roles[role] = layout.changed(offload=offload)
    return plan.changed(roles=roles)


def _narrow(plan: Plan, mode: Mode) -> Plan:
    """The plan with engines that are no wider than a mode has them, and fill their pools. Each has
    memory for a longest sequence at least."""
    rollout = plan.rollout
    sizes = [len(plan.pools[pool].gpus) for pool in rollout.pools]
    width = gcd(rollout.tensor_parallel, *sizes)
    if mode.widest_engine:
        width = min(width, mode.widest_engine)
    if width == rollout.tensor_parallel:
        return plan
    replicas = sum(size // width for size in sizes)
    device = plan.device_of(rollout.pools[0])
    least = rollout_fraction(plan.workload, width, 1, device)
    if least > 1:
        gpus = counted(width, "GPU")
        raise UserError(
            f"engines of {gpus} each, the widest that are possible there, do not hold the actor; "
            "find the best plan that can be executed with `plan search --for`"
        )
    narrow = rollout.changed(
        tensor_parallel=width,
        replicas=replicas,
        memory_fraction=max(least, rollout.memory_fraction),
    )
    return plan.changed(roles={**plan.roles, "rollout": narrow})
