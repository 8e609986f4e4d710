"""The small plans that a profile measures."""

from dataclasses import dataclass
from itertools import product

from planner.predict.kv_cache import AMPLE
from planner.predict.layouts import MICRO_BATCH_TOKENS, rollout_layouts, trainer_layouts
from planner.predict.memory import kv_room
from planner.predict.memory_check import check_memory
from planner.spec.cluster import Cluster
from planner.spec.errors import UserError
from planner.spec.plan import Issue, Plan, Pool, RolloutRole, TrainerRole
from planner.spec.wording import counted, plural
from planner.spec.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Homes:
    """Where the roles of a small plan are: the GPUs of each pool, as places in the cluster's list,
    the pool of each role that trains or infers, and the pools of the rollout."""

    gpus: dict[str, range]
    roles: dict[str, str]
    rollout: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class WantedLayout:
    """The layouts that a small plan should have, as far as the search knows them: of the roles a
    shard size, of engines a tensor-parallel size, and everything offloaded while it is `asleep`."""

    shard: int
    tensor_parallel: int
    asleep: bool


def shared_plan(
    workload: Workload,
    cluster: Cluster,
    gpus: range,
    shard: int,
    tensor_parallel: int,
    *,
    asleep: bool = False,
) -> Plan | None:
    """All roles on one pool."""
    homes = Homes(gpus={"all": gpus}, roles=dict.fromkeys(workload.models, "all"), rollout=("all",))
    wanted = WantedLayout(shard=shard, tensor_parallel=tensor_parallel, asleep=asleep)
    return _plan(workload, cluster, homes, wanted)


def apart_plan(workload: Workload, cluster: Cluster, trainers: int) -> Plan | None:
    """The rollout on GPUs of its own."""
    homes = Homes(
        gpus={"train": range(trainers), "generate": range(trainers, len(cluster.gpus))},
        roles=dict.fromkeys(workload.models, "train"),
        rollout=("generate",),
    )
    wanted = WantedLayout(shard=trainers, tensor_parallel=1, asleep=False)
    return _plan(workload, cluster, homes, wanted)


def split_plan(
    workload: Workload,
    cluster: Cluster,
    half: int,
    shard: int,
    tensor_parallel: int,
    *,
    asleep: bool = False,
) -> Plan | None:
    """The tutorial's two pools with a rollout over both."""
    pool_of = {"actor": "a", "reference": "a", "critic": "b", "reward": "b"}
    homes = Homes(
        gpus={"a": range(half), "b": range(half, 2 * half)},
        roles={role: pool_of[role] for role in workload.models},
        rollout=("a", "b"),
    )
    wanted = WantedLayout(shard=shard, tensor_parallel=tensor_parallel, asleep=asleep)
    return _plan(workload, cluster, homes, wanted)


def _plan(workload: Workload, cluster: Cluster, homes: Homes, wanted: WantedLayout) -> Plan | None:
    """A plan that issues the calls in the order of the dataflow, without waits, so that what can
    overlap does. Its layouts are the first that fit the memory: nothing offloaded (unless all is to
    be asleep), nothing recomputed, large micro-batches. None if none fits, or if engines of that
    size are not possible."""
    pools = {
        pool: Pool(gpus=tuple(cluster.gpus[i] for i in gpus)) for pool, gpus in homes.gpus.items()
    }
    for away in (True,) if wanted.asleep else (False, True):
        rollout = _rollout(workload, cluster, homes, wanted.tensor_parallel, asleep=away)
        if rollout is None:
            continue
        for recompute, tokens in product((False, True), reversed(MICRO_BATCH_TOKENS)):
            trainers = {}
            for role, pool in homes.roles.items():
                layout = TrainerRole(
                    pools=(pool,),
                    shard=wanted.shard,
                    micro_batch_tokens=tokens,
                    recompute=recompute,
                    offload="all" if away else "none",
                )
                trainers[role] = _nearest(workload, cluster, role, len(homes.gpus[pool]), layout)
            plan = Plan(
                name="measured",
                workload=workload,
                cluster=cluster,
                pools=pools,
                roles={**trainers, "rollout": rollout},
                program=tuple(Issue(call=call.name) for call in workload.dataflow.calls),
                staleness=0,
            )
            if _fits(plan):
                return plan.changed(name=_name(plan))
    return None


def _fits(plan: Plan) -> bool:
    try:
        check_memory(plan, saves=False)
    except UserError:
        return False
    return True


def _nearest(
    workload: Workload, cluster: Cluster, role: str, gpus: int, wanted: TrainerRole
) -> TrainerRole:
    """The layout on so many GPUs that the search knows and that is nearest to the wanted one."""

    def distance(layout: TrainerRole) -> tuple[int, ...]:
        return (
            abs(layout.gpus - gpus),
            abs(layout.shard - wanted.shard),
            abs(layout.micro_batch_tokens - wanted.micro_batch_tokens),
            int(layout.recompute != wanted.recompute),
            int(layout.offload != wanted.offload),
        )

    (pool,) = wanted.pools
    device = cluster.device_of(cluster.gpus[0])
    return min(trainer_layouts(workload, role, gpus, pool, device), key=distance)


def _rollout(
    workload: Workload, cluster: Cluster, homes: Homes, tensor_parallel: int, *, asleep: bool
) -> RolloutRole | None:
    """Engines that run their share of the batch at once."""
    device = cluster.device_of(cluster.gpus[0])
    parts = tuple((len(homes.gpus[pool]),) for pool in homes.rollout)
    known = [
        layout
        for layout in rollout_layouts(workload, parts, homes.rollout, device)
        if layout.tensor_parallel == tensor_parallel
        and layout.offload == (asleep and device.kind == "cuda")
        and kv_room(workload, layout, device) == AMPLE
    ]
    return max(known, key=lambda layout: layout.concurrency, default=None)


def _name(plan: Plan) -> str:
    """A name that tells a plan from the others that are measured."""
    layout, rollout = plan.trainers["actor"], plan.rollout
    sizes = [len(pool.gpus) for pool in plan.pools.values()]
    unit = "core" if plan.device_of(layout.pools[0]).kind == "cpu" else "GPU"
    text = f"{' + '.join(map(str, sizes))} {plural(unit, sum(sizes))}, shard {layout.shard}"
    if layout.replicas > 1:
        text += f" x {layout.replicas}"
    text += f", {layout.micro_batch_tokens} tokens"
    if layout.recompute:
        text += ", recomputed"
    if layout.offload != "none":
        text += ", offloaded"
    text += f", {counted(rollout.replicas, 'engine')} of {rollout.tensor_parallel}"
    return text + (" that sleep" if rollout.offload else "")
