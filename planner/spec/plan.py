"""A decision: pools of GPUs, the pool and the layout of each role, and the program of calls."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from planner.spec.cluster import Cluster, Device
from planner.spec.dataflow import Call, Dataflow
from planner.spec.engines import EngineName
from planner.spec.files import Bytes, Count, File, Seed, Spec, Tokens, by_key
from planner.spec.wording import counted
from planner.spec.workload import Workload

Gpu = tuple[NonNegativeInt, NonNegativeInt]
Offload = Literal["none", "optimizer", "all"]


class Pool(Spec):
    """A set of GPUs, each `[node, index]`, that no other pool has."""

    gpus: Annotated[tuple[Gpu, ...], Field(min_length=1)]


class TrainerRole(Spec):
    """Layout of an actor, critic, reference or reward model: FSDP over `shard` GPUs, `replicas` of
    that (HSDP).

    `micro_batch_tokens` bounds the tokens of one forward pass on one GPU; `recompute` is activation
    checkpointing; `offload` says what moves to host memory while the role idles (inference roles
    have no optimizer)."""

    engine: Literal["fsdp"] = "fsdp"
    pools: Annotated[tuple[str, ...], Field(min_length=1, max_length=1)]
    shard: Count
    replicas: Count = 1
    micro_batch_tokens: Tokens
    recompute: bool = True
    offload: Offload = "none"
    tp: PositiveInt = 1
    cp: PositiveInt = 1
    pp: PositiveInt = 1
    ep: PositiveInt = 1

    @model_validator(mode="after")
    def _built(self) -> Self:
        for key in ("tp", "cp", "pp", "ep"):
            if getattr(self, key) != 1:
                raise ValueError(
                    f"{key} = {getattr(self, key)} is not supported yet; leave it at 1 and use "
                    "shard"
                )
        return self

    @property
    def gpus(self) -> int:
        """GPUs that the role computes on (the pool may have more, which then idle)."""
        return self.shard * self.replicas


class RolloutRole(Spec):
    """Layout of the rollout: `replicas` engines of `tensor_parallel` GPUs over all of its pools,
    each running at most `concurrency` sequences at once in `memory_fraction` of its GPUs' memory;
    with `offload` it sleeps while idle."""

    engine: EngineName
    pools: Annotated[tuple[str, ...], Field(min_length=1)]
    tensor_parallel: Count
    replicas: Count
    memory_fraction: Annotated[float, Field(gt=0, le=1)]
    concurrency: Count
    offload: bool = False


Role = Annotated[TrainerRole | RolloutRole, Field(discriminator="engine")]


class Issue(Spec):
    """An entry of a program: issue `call` for step (round + `offset`). `blocking` is shorthand for
    a wait on it right after."""

    call: str
    offset: NonNegativeInt = 0
    blocking: bool = False


class Wait(Spec):
    """An entry of a program: start nothing later before the latest instances of these calls have
    ended."""

    wait: Annotated[tuple[str, ...], Field(min_length=1)]


Item = Annotated[
    Annotated[Wait, Tag("Wait")] | Annotated[Issue, Tag("Issue")], by_key("wait", "Wait", "Issue")
]


class Proof(Spec):
    """What is proven of a plan. `optimal` holds for these costs, scenarios and this space, never
    for more."""

    status: Literal["optimal", "gap", "time_limit", "none"]
    objective: str = "mean"
    scenarios: Count = 1
    space: str = ""


class Predicted(Spec):
    """The planner's figures for a plan. `sources` are shares of the busy time, by the source of the
    costs."""

    step_seconds: PositiveFloat
    step_seconds_p95: PositiveFloat
    tokens_per_second: PositiveFloat
    lower_bound_seconds: NonNegativeFloat
    gap: NonNegativeFloat
    proof: Proof
    search_seconds: NonNegativeFloat = 0.0
    memory_bytes: dict[str, Bytes] = Field(default_factory=dict)  # per pool, of its fullest GPU
    call_seconds: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    busy: dict[str, NonNegativeFloat] = Field(default_factory=dict)  # per pool, share of the step
    sources: dict[str, NonNegativeFloat] = Field(default_factory=dict)


class Provenance(Spec):
    version: str
    seed: Seed = 0
    command: str = ""
    profiles: dict[str, str] = Field(default_factory=dict)  # name -> sha256


class Plan(File):
    """A complete decision that can be simulated and executed."""

    SCHEMA: ClassVar[str] = "splitplan/plan/1"

    name: str
    workload: Workload
    cluster: Cluster
    pools: Annotated[dict[str, Pool], Field(min_length=1)]
    roles: dict[str, Role]
    program: Annotated[tuple[Item, ...], Field(min_length=1)]
    staleness: NonNegativeInt
    sync: Annotated[
        Literal["boundary", "in_flight"], Field(exclude_if=lambda sync: sync == "boundary")
    ] = "boundary"
    predicted: Predicted | None = None
    provenance: Provenance | None = None

    @model_validator(mode="before")
    @classmethod
    def _program_items(cls, data: Any) -> Any:
        """Choose Issue or Wait by the key, so that a mistake is named once and plainly."""
        if isinstance(data, dict) and isinstance(data.get("program"), list):
            for number, item in enumerate(data["program"]):
                if not isinstance(item, dict) or ("call" in item) == ("wait" in item):
                    raise ValueError(f'program item {number} needs either "call" or "wait"')
                if item.get("chunks", 1) != 1:
                    raise ValueError(
                        f"program item {number}: calls in chunks are not supported yet; leave "
                        "chunks out"
                    )
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _check_pools(self)
        for needed in self.workload.roles:
            if needed not in self.roles:
                raise ValueError(
                    f"roles: {needed} is missing, and the workload needs it; give it a pool"
                )
        for name, role in self.roles.items():
            if name not in self.workload.roles:
                raise ValueError(
                    f"roles: the workload has no role {name!r}; it has "
                    f"{', '.join(self.workload.roles)}"
                )
            _check_role(self, name, role)
        _check_program(self)
        if self.streams:
            _check_stream(self)
        return self

    @property
    def streams(self) -> bool:
        """Whether generation streams, and weights arrive in flight."""
        return self.sync == "in_flight"

    @property
    def dataflow(self) -> Dataflow:
        flow = self.workload.dataflow
        return flow.streamed if self.streams else flow

    @property
    def rollout(self) -> RolloutRole:
        role = self.roles["rollout"]
        assert isinstance(role, RolloutRole)
        return role

    @property
    def trainers(self) -> dict[str, TrainerRole]:
        return {name: role for name, role in self.roles.items() if isinstance(role, TrainerRole)}

    def pools_of(self, call: Call) -> tuple[str, ...]:
        """The pools that a call occupies, in the plan's order."""
        used = {pool for role in call.roles for pool in self.roles[role].pools}
        return tuple(pool for pool in self.pools if pool in used)

    def gpus_of(self, pools: tuple[str, ...]) -> int:
        return sum(len(self.pools[pool].gpus) for pool in pools)

    def device_of(self, pool: str) -> Device:
        """The kind of GPU of a pool (a pool is of one kind)."""
        return self.cluster.device_of(self.pools[pool].gpus[0])

    def engine_gpus(self) -> tuple[tuple[str, tuple[Gpu, ...]], ...]:
        """Pool and GPUs of each engine of the rollout, pool by pool: neighbouring GPUs of one
        node."""
        return _engine_gpus(self, self.rollout)[: self.rollout.replicas]


def _check_pools(plan: Plan) -> None:
    owner: dict[tuple[int, int], str] = {}
    known = set(plan.cluster.gpus)
    for name, pool in plan.pools.items():
        for gpu in pool.gpus:
            if gpu not in known:
                raise ValueError(
                    f"pools.{name}: GPU {list(gpu)} is not in the cluster of "
                    f"{counted(len(known), 'GPU')}"
                )
            if owner.get(gpu) == name:
                raise ValueError(f"pools.{name}: GPU {list(gpu)} is listed twice; list it once")
            if gpu in owner:
                raise ValueError(
                    f"pools: GPU {list(gpu)} is in both {owner[gpu]!r} and {name!r}; give it to one"
                )
            owner[gpu] = name
        if len({plan.cluster.nodes[node].device for node, _ in pool.gpus}) > 1:
            raise ValueError(f"pools.{name}: mixes kinds of GPU; a pool is of one kind")


def _check_role(plan: Plan, name: str, role: TrainerRole | RolloutRole) -> None:
    if (name == "rollout") != isinstance(role, RolloutRole):
        raise ValueError(f"roles.{name}: engine {role.engine!r} is for another role")
    for pool in role.pools:
        if pool not in plan.pools:
            raise ValueError(
                f"roles.{name}: there is no pool {pool!r}; there are {', '.join(plan.pools)}"
            )
    if isinstance(role, RolloutRole):
        shape = plan.workload.actor.shape
        if not shape.splits_into(role.tensor_parallel):
            raise ValueError(
                f"roles.{name}: tensor_parallel {role.tensor_parallel} does not divide "
                f"{shape.heads} heads with {shape.kv_heads} of keys"
            )
        engines = len(_engine_gpus(plan, role))
        if role.replicas > engines:
            needed = f"{role.replicas} engines of {counted(role.tensor_parallel, 'GPU')} do not fit"
            raise ValueError(f"roles.{name}: {needed}; the nodes of its pools hold {engines}")
    elif role.gpus > len(plan.pools[role.pools[0]].gpus):
        needed = f"shard {role.shard} x replicas {role.replicas} needs {counted(role.gpus, 'GPU')}"
        raise ValueError(
            f"roles.{name}: {needed}; pool {role.pools[0]!r} has "
            f"{len(plan.pools[role.pools[0]].gpus)}"
        )


def _engine_gpus(plan: Plan, rollout: RolloutRole) -> tuple[tuple[str, tuple[Gpu, ...]], ...]:
    """Pool and GPUs of every engine that there is room for; an engine lies within one node."""
    size, found = rollout.tensor_parallel, []
    for pool in rollout.pools:
        gpus = plan.pools[pool].gpus
        for node in dict.fromkeys(node for node, _ in gpus):
            there = tuple(gpu for gpu in gpus if gpu[0] == node)
            found += [
                (pool, there[begin : begin + size])
                for begin in range(0, len(there) - size + 1, size)
            ]
    return tuple(found)


def _check_program(plan: Plan) -> None:
    calls = [item.call for item in plan.program if isinstance(item, Issue)]
    names = plan.dataflow.names
    for item in plan.program:
        for call in (item.call,) if isinstance(item, Issue) else item.wait:
            if call not in names:
                raise ValueError(
                    f"program: there is no call {call!r}; there are {', '.join(names)}"
                )
    for call in names:
        if calls.count(call) != 1:
            raise ValueError(
                f"program: {call} is issued {calls.count(call)} times a round; issue it once"
            )


def _check_stream(plan: Plan) -> None:
    """Raise ValueError where weights cannot arrive in flight."""
    if plan.workload.sync == "boundary":
        raise ValueError(
            "sync = 'in_flight', but the workload has sync = 'boundary'; set that to 'in_flight' "
            "or 'any'"
        )
    if not plan.staleness:
        raise ValueError(
            "sync = 'in_flight' with a staleness of 0: nothing is in flight when weights arrive; "
            "give generate an offset, or leave sync out"
        )
    if any(isinstance(item, Wait) or item.blocking for item in plan.program):
        raise ValueError(
            "sync = 'in_flight': a wait in the program would stop the stream; take it out, and "
            "`blocking` too"
        )
    if plan.rollout.offload:
        raise ValueError("sync = 'in_flight': engines never sleep; set roles.rollout.offload=false")
    for name, role in plan.trainers.items():
        if set(role.pools) & set(plan.rollout.pools):
            raise ValueError(
                f"sync = 'in_flight': {name} is on pool {role.pools[0]!r}, which generation holds "
                "all the time; give it another pool"
            )
