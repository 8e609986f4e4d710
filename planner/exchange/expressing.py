"""What a framework makes of a plan: where it has to do something else, and what that costs."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from planner.predict.cost import CostModel
from planner.predict.forecast import predict
from planner.predict.profile import Profile
from planner.search.questions.frameworks import Mode, as_executed, modes_of
from planner.search.solver.problem import scenarios_of
from planner.spec.errors import UserError
from planner.spec.frameworks import FrameworkName
from planner.spec.plan import Issue, Plan, Predicted, TrainerRole
from planner.spec.workload import TRAINED


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
    mode = _mode(framework, plan)
    grids = {pool: _grid(framework, plan, pool) for pool in plan.pools}
    stages: tuple[tuple[str, Callable[[Plan], Plan]], ...] = (
        (_order_text(mode), lambda plan: _in_order(plan, mode)),
        ("every role computes on all GPUs of its pool", lambda plan: _filled(plan, framework)),
        ("engines are on all GPUs of their pools, and sleep where they share them", as_executed),
    )
    if framework == "openrlhf":
        stages += (
            ("all roles have the same micro-batches, and both updates recompute or none", _alike),
        )
    scenarios = scenarios_of(plan)

    def predicted(plan: Plan) -> Predicted:
        model = CostModel(plan.workload, plan.cluster, profiles, scenarios)
        return predict(plan, model=model)

    found, now = list[Change](), predicted(plan).step_seconds
    for what, change in stages:
        after = change(plan)
        if after.roles == plan.roles and after.program == plan.program:
            continue
        seconds = predicted(after).step_seconds
        found.append(Change(what=what, seconds=seconds - now))
        plan, now = after, seconds
    plan = plan.changed(predicted=predicted(plan))
    return Expressed(plan=plan, mode=mode, changes=tuple(found), grids=grids)


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
    """Nodes of a pool and its GPUs on each. Raises UserError where they differ."""
    on = Counter(node for node, _ in plan.pools[pool].gpus)
    if len(set(on.values())) > 1:
        counts = " and ".join(str(count) for count in sorted(on.values(), reverse=True))
        raise UserError(
            f"{framework} wants as many GPUs on each node, and pool {pool!r} has {counts}; find "
            f"the best plan that it can execute with `plan search --for {framework}`"
        )
    return len(on), next(iter(on.values()))


def _order_text(mode: Mode) -> str:
    if mode.ahead:
        return "calls are issued one step after the other, with generation one step ahead"
    return "every call waits for the one before it"


def _in_order(plan: Plan, mode: Mode) -> Plan:
    """The plan with a mode's program, and the monitors where they were."""
    issues = [item for item in plan.program if isinstance(item, Issue)]
    monitors = [item for item in issues if plan.dataflow[item.call].monitor]
    items = (*mode.program.items, *monitors)
    workload, staleness = plan.workload, mode.program.staleness
    if workload.max_staleness < staleness:
        workload = workload.changed(max_staleness=staleness)
    return plan.changed(workload=workload, program=items, staleness=staleness, predicted=None)


def _alike(plan: Plan) -> Plan:
    """The plan with the smallest micro-batches for all roles, and recomputation for both updates
    where one has it."""
    tokens = min(layout.micro_batch_tokens for layout in plan.trainers.values())
    recompute = any(plan.trainers[role].recompute for role in TRAINED if role in plan.trainers)
    roles = dict(plan.roles)
    for role, layout in plan.trainers.items():
        own = recompute if role in TRAINED else layout.recompute
        roles[role] = layout.changed(micro_batch_tokens=tokens, recompute=own)
    return plan.changed(roles=roles)


def _filled(plan: Plan, framework: FrameworkName) -> Plan:
    """The plan with every role that trains or infers on all GPUs of its pool."""
    roles = dict(plan.roles)
    for role, layout in plan.roles.items():
        if isinstance(layout, TrainerRole):
            roles[role] = _on_all(layout, len(plan.pools[layout.pools[0]].gpus), framework)
    return plan.changed(roles=roles)


def _on_all(layout: TrainerRole, gpus: int, framework: FrameworkName) -> TrainerRole:
    one_group = framework == "openrlhf" or gpus % layout.shard
    shard = gpus if one_group else layout.shard
    return layout.changed(shard=shard, replicas=gpus // shard)
