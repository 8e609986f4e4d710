"""Whether a plan fits its GPUs and its hosts, and what to change where it does not."""

from planner.predict.host_memory import allowed, host_memory, named
from planner.predict.memory import (
    PoolMemory,
    plan_memory,
    pool_members,
    pool_peak,
    rollout_fraction,
    trainer_memory,
)
from planner.spec.engines import ENGINES
from planner.spec.errors import UserError
from planner.spec.plan import Plan, RolloutRole, TrainerRole
from planner.spec.wording import gigabytes
from planner.spec.workload import TRAINED


def check_memory(plan: Plan, saves: bool = True) -> None:
    """Raise UserError with the numbers for a plan that does not fit its GPUs or its hosts, with
    checkpoints or without."""
    for pool, memory in plan_memory(plan).items():
        if memory.peak > memory.allowed:
            raise UserError(_too_much(plan, pool, memory))
    layout, device = plan.rollout, plan.device_of(plan.rollout.pools[0])
    # Of a stream nobody says what preemption takes: all of its slots need room.
    slots = layout.concurrency if plan.streams else 1
    needed = rollout_fraction(plan.workload, layout.tensor_parallel, slots, device)
    if ENGINES[layout.engine].reserves and layout.memory_fraction < needed:
        held = f"{slots} sequences that stream" if plan.streams else "a longest sequence"
        lower = ", lower concurrency" if plan.streams else ""
        raise UserError(
            f"rollout needs a memory_fraction of {needed:.2f} for {held} at tensor_parallel "
            f"{layout.tensor_parallel}, but has {layout.memory_fraction:.2f}; raise it{lower} or "
            "raise tensor_parallel"
        )
    for node, parts in host_memory(plan, saves).items():
        spec = plan.cluster.nodes[node]
        if sum(parts.values()) > allowed(spec):
            raise UserError(
                f"node {node} needs {gigabytes(sum(parts.values()))} of host memory "
                f"({named(parts)}), but {gigabytes(allowed(spec))} of its "
                f"{gigabytes(spec.host_memory_bytes)} are there before Ray ends processes; "
                "offload less, lower max_staleness, or use nodes with more"
            )


def _too_much(plan: Plan, pool: str, memory: PoolMemory) -> str:
    """One line that names the role that needs most on an overfull pool, and what it could do."""
    roles = pool_members(plan, pool)
    worst = max(roles, key=lambda role: roles[role].running)
    is_engine = worst == "rollout"
    size, changes = _changes(plan, worst, pool)
    use = ", ".join(changes)
    available = f"but {gigabytes(memory.allowed)} are there"
    alone = pool_peak([roles[worst]], not is_engine, is_engine, plan.device_of(pool))
    if alone > memory.allowed:
        return (
            f"{worst} needs {gigabytes(alone)} per GPU at {size}, {available}; use {use} or offload"
        )
    others = [
        f"{role} keeps {gigabytes(found.idle)}" for role, found in roles.items() if role != worst
    ]
    needs = f"pool {pool!r} needs {gigabytes(memory.peak)} per GPU while {worst} runs at {size}"
    kept = f"({', '.join(others)})"
    return f"{needs} {kept}, {available}; offload the other roles, or use {use}"


def _changes(plan: Plan, role: str, pool: str) -> tuple[str, list[str]]:
    """How a role is split on a pool, and the changes of its layout that would take less memory."""
    layout = plan.roles[role]
    if isinstance(layout, RolloutRole):
        changes = ["a smaller memory_fraction and concurrency", "a larger tensor_parallel"]
        return f"tensor_parallel {layout.tensor_parallel}", changes
    fitting = _fitting_shard(plan, role, layout, pool)
    changes = [] if fitting is None else [f"shard {fitting}"]
    changes.append("a smaller micro_batch_tokens")
    if role in TRAINED and not layout.recompute:
        changes.append("recompute")
    return f"shard {layout.shard}", changes


def _fitting_shard(plan: Plan, role: str, layout: TrainerRole, pool: str) -> int | None:
    """The smallest larger shard size, doubling within the pool, at which a role alone would
    fit."""
    device, shard = plan.device_of(pool), 2 * layout.shard
    while shard <= len(plan.pools[pool].gpus):
        wider = layout.changed(shard=shard, replicas=1)
        memory = trainer_memory(plan.workload, role, wider, device)
        if pool_peak([memory], True, False, device) <= device.memory_bytes:
            return shard
        shard *= 2
    return None
