"""What a profile measures: groups of small plans that run side by side on the GPUs, each with
batches of several sizes that the same processes run one after the other, and how long that
takes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from executor.rollout.vllm.worker import made_for
from planner.predict.cost import CostModel
from planner.predict.layouts import MICRO_BATCH_TOKENS, rollout_layouts, trainer_layouts
from planner.predict.memory import host_bytes
from planner.predict.memory_check import check_memory
from planner.spec.cluster import Cluster, Device
from planner.spec.errors import UserError
from planner.spec.lengths import Fixed
from planner.spec.machine import memory_bytes
from planner.spec.plan import Gpu, Issue, Plan, Pool, RolloutRole, TrainerRole
from planner.spec.workload import Workload

# Seconds in addition to the calls themselves, as they were on hosts of 1 to 4 H200 and on the cores
# of a laptop.
SESSION_START_SECONDS = {"cuda": 25.0, "cpu": 8.0}  # Ray, and importing libraries in all processes
ENGINE_START_SECONDS = {"cuda": 60.0, "cpu": 1.0}  # to start some side by side
PEERS_START_SECONDS = 15.0  # beyond that, if an engine has several GPUs
PINNING_SECONDS_PER_BYTE = 0.5e-9  # per byte of the host that is taken for what is offloaded
TRAINER_START_SECONDS = {"cuda": 12.0, "cpu": 2.0}  # to load models and take over the weights
COMPILING_SECONDS = {"cuda": 20.0, "cpu": 0.0}  # in the first step of all
# Of these two repeats are enough, and what is not the whole batch is the first to be left out.
LONG_STEP_SECONDS = 15.0


@dataclass(frozen=True, kw_only=True)
class BatchSize:
    """What a step has instead of the workload's batch: so many `sequences`, with responses
    `stretch` times as long, in micro-batches of at most so many tokens (None: as the plan says). An
    `extra` one is the first to be left out."""

    sequences: int
    repeats: int
    stretch: float = 1.0
    micro_batch_tokens: int | None = None
    held_out: bool = False
    extra: bool = False

    @property
    def name(self) -> str:
        text = f"{self.sequences} sequences"
        text += f", {self.stretch:g} times as long" if self.stretch != 1 else ""
        return text + (
            f", {self.micro_batch_tokens} tokens at once" if self.micro_batch_tokens else ""
        )


@dataclass(frozen=True, kw_only=True)
class Group:
    """Plans on disjoint GPUs that run at the same time, and their batches in the order of their
    steps. `seconds` are an estimate, of the start of its processes and of one step of each
    batch."""

    name: str
    plans: tuple[Plan, ...]
    batches: tuple[BatchSize, ...]
    start_seconds: float = 0.0
    step_seconds: tuple[float, ...] = ()

    @property
    def steps(self) -> tuple[tuple[BatchSize, bool], ...]:
        """The batch of each step, and whether it counts: a warm-up does not, before the first batch
        and before those whose micro-batches are so small that other code is compiled for them."""
        found: list[tuple[BatchSize, bool]] = []
        for number, batch in enumerate(self.batches):
            found += [(batch, False)] * (number == 0 or batch.micro_batch_tokens is not None)
            found += [(batch, True)] * batch.repeats
        return tuple(found)

    @property
    def seconds(self) -> float:
        each = dict(zip(self.batches, self.step_seconds, strict=True))
        return self.start_seconds + sum(each[batch] for batch, _ in self.steps)

    def only(self, batches: Sequence[BatchSize]) -> "Group":
        kept = [number for number, batch in enumerate(self.batches) if batch in batches]
        each = tuple(self.step_seconds[number] for number in kept)
        return replace(
            self, batches=tuple(self.batches[number] for number in kept), step_seconds=each
        )

    def label(self, batch: BatchSize) -> str:
        return f"{self.name}: {batch.name}"


def groups_of(workload: Workload, cluster: Cluster, only: str = "") -> list[Group]:
    """All groups of a workload on one node whose names contain `only`, the most valuable first,
    with their estimates. Raises UserError if there are others alone."""
    found = _all(workload, cluster)
    if not (chosen := [group for group in found if only in group.name]) and found:
        raise UserError(
            f"--only {only}: no group is named so; there are "
            f"{'; '.join(group.name for group in found)}"
        )
    return _estimated(chosen, workload, cluster)


def _all(workload: Workload, cluster: Cluster) -> list[Group]:
    on_cpu = cluster.device_of(cluster.gpus[0]).kind == "cpu"
    return list(_on_cores(workload, cluster) if on_cpu else _on_gpus(workload, cluster))


def groups_here(
    workload: Workload, cluster: Cluster, only: str, say: Callable[[str], None]
) -> list[Group]:
    """The groups of `groups_of` without those that offload more than this machine's memory holds;
    `say` is told of them. Raises UserError if no other is left."""
    (node,) = cluster.nodes
    there = min(node.host_memory_bytes, memory_bytes())
    smaller = cluster.model_copy(
        update={"nodes": (node.model_copy(update={"host_memory_bytes": there}),)}
    )
    every, here = (
        groups_of(workload, cluster, only),
        [g for g in _all(workload, smaller) if only in g.name],
    )
    left_out = [group.name for group in every if group.name not in {g.name for g in here}]
    why = f"this machine's {there / 1e9:.0f} GB of memory do not hold what it offloads"
    if left_out and not here:
        raise UserError(
            f"{'; '.join(left_out)}: {why}; measure something else, or on a machine that has more"
        )
    for name in left_out:
        say(f"left out, for {why}: {name}")
    return _estimated(here, workload, cluster)


def fitting(groups: Sequence[Group], seconds: float) -> list[Group | None]:
    """Each group, or what is left of it, or None, so that all together take no longer: first the
    groups without their extra batches in the order of their value, then extra batches in that
    order."""
    found: list[Group | None] = []
    for group in groups:
        least = group.only([batch for batch in group.batches if not batch.extra])
        fits = bool(least.batches) and least.seconds <= seconds
        found.append(least if fits else None)
        seconds -= least.seconds if fits else 0.0
    for number, group in enumerate(groups):
        kept = found[number]
        if kept is None and not all(batch.extra for batch in group.batches):
            continue
        more = group.seconds - (kept.seconds if kept else 0.0)
        if more <= seconds:
            found[number], seconds = group, seconds - more
    return found


# --- what is measured ---


def _on_cores(workload: Workload, cluster: Cluster) -> Iterator[Group]:
    """Groups for each number of cores: all roles on one pool, repeated as often as there is room,
    and the tutorial's two pools with a rollout over both, whose updates and weights go from one
    pool to the other."""
    count = len(cluster.gpus)
    batches = (BatchSize(sequences=workload.batch, repeats=6),)  # cores are noisier than GPUs
    for size in (2**power for power in range(count.bit_length())):
        places = (range(first, first + size) for first in range(0, count - size + 1, size))
        yield from _group(
            batches, *(_shared(workload, cluster, cores, size, 1) for cores in places)
        )
    if count > 1:
        yield from _group(
            batches, _split(workload, cluster, count // 2, count // 2, 1, asleep=True)
        )


def _on_gpus(workload: Workload, cluster: Cluster) -> Iterator[Group]:
    """Shards over one GPU (what is chosen where it fits), over all, over those that an engine
    leaves and over half; engines of one, half and all; weights that stay within their GPUs, others
    and both; updates side by side on halves; roles awake and asleep. In few groups, and those with
    the same engines together: an engine of another kind takes one to three minutes to start. The
    first is measured with all batches."""
    count = len(cluster.gpus)
    every, most = _batches(workload), range(count)
    regular = tuple(
        batch for batch in every if not batch.held_out and batch.micro_batch_tokens is None
    )
    large = tuple(batch for batch in regular if not batch.extra)
    small = list(_group(every, _shared(workload, cluster, most, 1, 1)))
    yield from small
    if count == 1:
        yield from _group(large, _shared(workload, cluster, most, 1, 1, asleep=True))
        return
    yield from _group(large if small else every, _shared(workload, cluster, most, count, 1))
    yield from _group(large, _split(workload, cluster, count // 2, 1, 1))
    yield from _group(regular, _apart(workload, cluster, count - max(1, count // 4)))
    if count > 2:
        yield from _group(
            large, _split(workload, cluster, count // 2, count // 2, count // 2, asleep=True)
        )
    yield from _group(large, _shared(workload, cluster, most, count // 2, count, asleep=count == 2))


def _group(batches: Sequence[BatchSize], *plans: Plan | None) -> Iterator[Group]:
    """The group of these plans, which are alike, if they fit the memory."""
    there = tuple(plan for plan in plans if plan is not None)
    if there:
        tokens = there[0].trainers["actor"].micro_batch_tokens
        batches = [
            b for b in batches if b.micro_batch_tokens is None or b.micro_batch_tokens < tokens
        ]
        copies = f"{len(there)} times " if len(there) > 1 else ""
        yield Group(name=copies + there[0].name, plans=there, batches=tuple(batches))


def _batches(workload: Workload) -> tuple[BatchSize, ...]:
    """A quarter, half and all of the workload's batch, in whole minibatches; half of it in small
    micro-batches; and the held-out one. Only all of it where prompts come from a file."""
    sizes = sorted({_share(workload, 0.25), _share(workload, 0.5), workload.batch})
    if workload.data is not None:
        return (BatchSize(sequences=workload.batch, repeats=3),)
    plain = [BatchSize(sequences=n, repeats=3, extra=2 * n < workload.batch) for n in sizes]
    tokens = max(MICRO_BATCH_TOKENS[0], workload.longest)
    narrow = BatchSize(sequences=sizes[-2:][0], repeats=3, micro_batch_tokens=tokens, extra=True)
    stretch = 0.5 if isinstance(workload.response, Fixed) else 1.5
    unseen = BatchSize(sequences=_share(workload, 0.75), repeats=2, stretch=stretch, held_out=True)
    return (*plain, narrow, unseen)


def _share(workload: Workload, share: float) -> int:
    """A share of the batch, in whole minibatches."""
    return max(1, round(share * workload.batch / workload.minibatch)) * workload.minibatch


# --- plans ---


def _shared(
    workload: Workload,
    cluster: Cluster,
    gpus: range,
    shard: int,
    tensor_parallel: int,
    *,
    asleep: bool = False,
) -> Plan | None:
    """All roles on one pool."""
    roles = dict.fromkeys(workload.models, "all")
    return _plan(workload, cluster, {"all": gpus}, roles, ("all",), shard, tensor_parallel, asleep)


def _apart(workload: Workload, cluster: Cluster, trainers: int) -> Plan | None:
    """The rollout on GPUs of its own."""
    homes = {"train": range(trainers), "generate": range(trainers, len(cluster.gpus))}
    roles = dict.fromkeys(workload.models, "train")
    return _plan(workload, cluster, homes, roles, ("generate",), trainers, 1, asleep=False)


def _split(
    workload: Workload,
    cluster: Cluster,
    half: int,
    shard: int,
    tensor_parallel: int,
    *,
    asleep: bool = False,
) -> Plan | None:
    """The tutorial's two pools with a rollout over both."""
    home = {"actor": "a", "reference": "a", "critic": "b", "reward": "b"}
    homes = {"a": range(half), "b": range(half, 2 * half)}
    roles = {role: home[role] for role in workload.models}
    return _plan(workload, cluster, homes, roles, ("a", "b"), shard, tensor_parallel, asleep)


def _plan(
    workload: Workload,
    cluster: Cluster,
    homes: dict[str, range],
    roles: dict[str, str],
    rollout_pools: tuple[str, ...],
    shard: int,
    tensor_parallel: int,
    asleep: bool,
) -> Plan | None:
    """The calls in the order of the dataflow, without waits, so what can overlap does. The first
    layouts that fit the memory: nothing offloaded (unless all is to be `asleep`), nothing
    recomputed, large micro-batches. None if none fits, or if engines of that size are not
    possible."""
    device = cluster.device_of(cluster.gpus[0])
    parts = tuple((len(homes[pool]),) for pool in rollout_pools)
    for away in (True,) if asleep else (False, True):
        rollout = _rollout(workload, parts, rollout_pools, device, tensor_parallel, away)
        if rollout is None:
            continue
        for recompute, tokens in product((False, True), reversed(MICRO_BATCH_TOKENS)):
            trainers = {
                role: _trainer(
                    workload, role, len(homes[pool]), pool, device, shard, tokens, recompute, away
                )
                for role, pool in roles.items()
            }
            plan = Plan(
                name="measured",
                workload=workload,
                cluster=cluster,
                pools={
                    pool: Pool(gpus=tuple(cluster.gpus[i] for i in home))
                    for pool, home in homes.items()
                },
                roles={**trainers, "rollout": rollout},
                program=tuple(Issue(call=call.name) for call in workload.dataflow.calls),
                staleness=0,
            )
            if _fits(plan):
                return plan.model_copy(update={"name": _name(plan)})
    return None


def _fits(plan: Plan) -> bool:
    try:
        check_memory(plan)
    except UserError:
        return False
    return True


def _trainer(
    workload: Workload,
    role: str,
    gpus: int,
    pool: str,
    device: Device,
    shard: int,
    tokens: int,
    recompute: bool,
    away: bool,
) -> TrainerRole:
    """The layout that the search knows and that is nearest to what is wanted."""
    offload = "all" if away else "none"

    def distance(layout: TrainerRole) -> tuple[float, ...]:
        used = (
            abs(layout.gpus - gpus),
            abs(layout.shard - shard),
            abs(layout.micro_batch_tokens - tokens),
        )
        return *used, layout.recompute != recompute, layout.offload != offload

    return min(trainer_layouts(workload, role, gpus, pool, device), key=distance)


def _rollout(
    workload: Workload,
    parts: tuple[tuple[int, ...], ...],
    pools: tuple[str, ...],
    device: Device,
    tensor_parallel: int,
    asleep: bool,
) -> RolloutRole | None:
    """Engines that run their share of the batch at once."""
    known = [
        layout
        for layout in rollout_layouts(workload, parts, pools, device)
        if layout.tensor_parallel == tensor_parallel
        and layout.offload == (asleep and device.kind == "cuda")
    ]
    return max(known, key=lambda layout: layout.concurrency, default=None)


def _name(plan: Plan) -> str:
    """What sets a plan apart from the others that are measured."""
    layout, rollout = plan.trainers["actor"], plan.rollout
    sizes = " + ".join(str(len(pool.gpus)) for pool in plan.pools.values())
    unit = "cores" if plan.device_of(layout.pools[0]).kind == "cpu" else "GPUs"
    replicas = f" x {layout.replicas}" if layout.replicas > 1 else ""
    moved = ", recomputed" * layout.recompute + ", offloaded" * (layout.offload != "none")
    engines = (
        f"{rollout.replicas} engine{'s' * (rollout.replicas > 1)} of {rollout.tensor_parallel}"
    )
    asleep = " that sleep" * rollout.offload
    return (
        f"{sizes} {unit}, shard {layout.shard}{replicas}, {layout.micro_batch_tokens} "
        f"tokens{moved}, {engines}{asleep}"
    )


# --- how long it takes ---


def _estimated(groups: Sequence[Group], workload: Workload, cluster: Cluster) -> list[Group]:
    """The groups with the seconds of their start and of their steps, the latter by the roofline."""
    kind = cluster.device_of(cluster.gpus[0]).kind
    models: dict[int, CostModel] = {}
    running: set[tuple[tuple[Gpu, ...], str]] = set()
    found = []
    for number, group in enumerate(groups):
        engines = {(gpus, made_for(plan)) for plan in group.plans for _, gpus in plan.engine_gpus()}
        start = TRAINER_START_SECONDS[kind]
        if not engines <= running:
            start += ENGINE_START_SECONDS[kind] + PEERS_START_SECONDS * any(
                plan.rollout.tensor_parallel > 1 for plan in group.plans
            )
        pinned = sum(sum(host_bytes(plan).values()) for plan in group.plans)
        start += PINNING_SECONDS_PER_BYTE * pinned
        start += COMPILING_SECONDS[kind] / (1 if number == 0 else 3)
        if number == 0:
            start += SESSION_START_SECONDS[kind]
        running = engines  # an engine of another kind on the same GPUs ends
        steps, batches = [], []
        for batch in group.batches:
            if batch.sequences not in models:
                sized = workload.model_copy(update={"batch": batch.sequences})
                models[batch.sequences] = CostModel(sized, cluster, scenarios=1)
            model, plan = models[batch.sequences], group.plans[0]
            seconds = sum(float(model.call(call, plan).seconds[0]) for call in plan.dataflow.calls)
            steps.append(max(1.0, batch.stretch) * seconds)
            if steps[-1] > LONG_STEP_SECONDS:
                less = batch.sequences < workload.batch and not batch.held_out
                batch = replace(batch, repeats=min(2, batch.repeats), extra=batch.extra or less)
            batches.append(batch)
        found.append(
            replace(group, batches=tuple(batches), start_seconds=start, step_seconds=tuple(steps))
        )
    return found
