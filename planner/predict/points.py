"""Measured calls, one class for each kind.

In a file every point has the keys of all kinds, in one order. A key that says nothing about a kind
has its default value there (`LAID_OUT`), and any other value is refused.
"""

from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    model_serializer,
    model_validator,
)

from planner.predict.columns import Grid, Integers, Seconds
from planner.predict.dealing import Work, shares
from planner.predict.generation import generation_seconds
from planner.predict.likeness import (
    Likeness,
    like_engine_move,
    like_generate,
    like_host,
    like_trainer,
    like_trainer_move,
    like_transfer,
    way_of,
)
from planner.predict.memory import engine_weight_bytes, moved_bytes
from planner.predict.roofline import (
    Place,
    host_seconds,
    infer_cost,
    sharding_of,
    sync_cost,
    train_cost,
)
from planner.predict.speed import engine_speed
from planner.spec.algorithm import Epochs
from planner.spec.cluster import Cluster, Device
from planner.spec.files import Bytes, Count, Spec, Tokens
from planner.spec.plan import Offload, TrainerRole
from planner.spec.workload import Shape, head_of

# The keys of a point in a file, in their order; the value is that of a key which says nothing about
# the point's kind. Every kind has the keys without such a value. `partly` came later and is left
# out where it is false, so that older files keep their sha256.
LAID_OUT: dict[str, object] = {
    "call": None,
    "role": None,
    "gpus": 1,
    "nodes": 1,
    "shard": 1,
    "micro_batch_tokens": None,
    "recompute": False,
    "offload": "none",
    "tensor_parallel": 1,
    "engines": 1,
    "concurrency": None,
    "shared": False,
    "partly": False,
    "sequences": 0,
    "minibatch": None,
    "epochs": 1,
    "prompt_tokens": 0,
    "response_tokens": 0,
    "response_lengths": [],
    "seconds": None,
    "spread": None,
    "repeats": None,
    "peak_bytes": None,
    "reserved_bytes": None,
    "allocated_bytes": None,
    "model": None,
}


def _with_keys_of_others(schema: dict[str, Any], kind: type[Spec]) -> None:
    """Add to a kind's JSON Schema the other keys that a file has, with their only value."""
    for key, value in LAID_OUT.items():
        if key not in kind.model_fields:
            schema["properties"][key] = {"const": value}


class Measurement(Spec):
    """One call, measured alone: the median `seconds` of `repeats`, and their spread (half the
    interquartile range).

    `seconds` of a wake and of an offload belong to these moves alone; those of the other calls are
    without them. `peak_bytes` is what the fullest GPU had in use, `reserved_bytes` what the
    allocator of the process that ran the call held of it, `allocated_bytes` its tensors; 0 where
    that is not known."""

    model_config = ConfigDict(json_schema_extra=_with_keys_of_others)

    role: str
    seconds: PositiveFloat
    spread: NonNegativeFloat = 0.0
    repeats: PositiveInt = 1
    peak_bytes: Bytes = 0
    reserved_bytes: Bytes = 0
    allocated_bytes: Bytes = 0
    model: Shape | None = None  # where it is not the profile's

    @model_validator(mode="before")
    @classmethod
    def _take_own_keys(cls, data: Any) -> Any:
        """Drop the keys of other kinds, which must have their default values."""
        if not isinstance(data, dict):
            return data
        own = dict(data)
        for key, default in LAID_OUT.items():
            if key in own and key not in cls.model_fields and own.pop(key) != default:
                raise ValueError(
                    f"{key} says nothing about a point of {data.get('call')}; remove it"
                )
        return own

    @model_serializer(mode="wrap")
    def _lay_out(self, own_keys: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The keys of all kinds, in the order of the file."""
        own = own_keys(self)
        found = {}
        for key, default in LAID_OUT.items():
            if key in own:
                found[key] = own[key]
            elif key not in type(self).model_fields:
                found[key] = default
        if not found.get("partly"):
            found.pop("partly", None)
        return found


class OnGpus(Spec):
    """The GPUs that a call ran on, and their nodes."""

    gpus: Count = 1
    nodes: Count = 1

    @model_validator(mode="after")
    def _a_gpu_on_every_node(self) -> Self:
        if self.nodes > self.gpus:
            raise ValueError(f"nodes = {self.nodes} is more than gpus = {self.gpus}")
        return self

    def place(self, device: Device) -> Place:
        """The GPUs, as evenly over the nodes as they go: 5 over 2 nodes are 3 and 2."""
        each, left = divmod(self.gpus, self.nodes)
        return Place(parts=tuple(each + (node < left) for node in range(self.nodes)), device=device)


class Sharded(OnGpus):
    """A trained or inference role's model over its GPUs: gpus / shard are its replicas."""

    shard: Count = 1

    @model_validator(mode="after")
    def _whole_replicas(self) -> Self:
        if self.gpus % self.shard:
            raise ValueError(f"shard = {self.shard} does not divide gpus = {self.gpus}")
        return self

    def layout(
        self, micro_batch_tokens: int = 1, *, recompute: bool = False, offload: Offload = "none"
    ) -> TrainerRole:
        return TrainerRole(
            pools=("measured",),
            shard=self.shard,
            replicas=self.gpus // self.shard,
            micro_batch_tokens=micro_batch_tokens,
            recompute=recompute,
            offload=offload,
        )


class Batched(Spec):
    """The batch of a call. `prompt_tokens` and `response_tokens` are totals over its `sequences`;
    `response_lengths` gives each sequence's response in the order of the batch where they
    differ."""

    sequences: Count
    prompt_tokens: Bytes = 0
    response_tokens: Bytes = 0
    response_lengths: tuple[Tokens, ...] = ()

    @model_validator(mode="after")
    def _lengths_add_up(self) -> Self:
        lengths = self.response_lengths
        if lengths and (len(lengths) != self.sequences or sum(lengths) != self.response_tokens):
            raise ValueError(
                "response_lengths must be one per sequence and add up to response_tokens"
            )
        return self

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.response_tokens

    @property
    def longest_response(self) -> int:
        """Tokens of the longest response; totals are spread evenly."""
        return max(self.response_lengths, default=-(-self.response_tokens // self.sequences))

    def lengths(self) -> tuple[Integers, Integers]:
        """Prompt and response lengths [1, sequences]; totals are spread evenly.

        >>> Batched(sequences=4, prompt_tokens=10, response_tokens=4).lengths()
        (array([[2, 3, 2, 3]]), array([[1, 1, 1, 1]]))
        """
        prompts = _evenly(self.prompt_tokens, self.sequences)
        responses = (
            np.array(self.response_lengths, dtype=np.int64)
            if self.response_lengths
            else _evenly(self.response_tokens, self.sequences)
        )
        return prompts[None], responses[None]


def _evenly(total: int, count: int) -> Integers:
    return np.diff(np.arange(count + 1) * total // count)


class TrainerPoint(Measurement, Sharded, Batched):
    """A forward pass of a role over a batch, or its update: `epochs` of minibatches."""

    call: Literal["infer", "train"]
    micro_batch_tokens: Tokens | None = None
    recompute: bool = False
    minibatch: Count | None = None
    epochs: Epochs = 1

    @model_validator(mode="after")
    def _whole_minibatches(self) -> Self:
        if self.minibatch and self.sequences % self.minibatch:
            raise ValueError(
                f"sequences = {self.sequences} is no multiple of minibatch = {self.minibatch}"
            )
        return self

    def trainer(self) -> TrainerRole:
        """The role's layout. Without a bound every rank takes its tokens at once."""
        tokens = self.micro_batch_tokens or max(1, self.tokens)
        return self.layout(tokens, recompute=self.recompute)

    def likeness(self, shape: Shape, device: Device) -> Likeness:
        return like_trainer(
            self.call,
            self.role,
            shape,
            device,
            shard=self.shard,
            gpus=self.gpus,
            micro_batch_tokens=self.micro_batch_tokens or 0,
            recompute=self.recompute,
            sequences=self.sequences,
            minibatch=self.minibatch or 0,
            epochs=self.epochs,
        )

    def size(self) -> float:
        """The logarithm of the tokens per rank."""
        return float(np.log(self.tokens / self.gpus))

    def roofline(self, shape: Shape, device: Device, cluster: Cluster) -> float:
        head, grid = head_of(self.role), Grid.of(self.trainer())
        sharding = sharding_of(grid, self.place(device))
        prompts, responses = self.lengths()
        if self.call == "infer":
            work = _one_row(shares(prompts + responses, self.sequences, self.gpus))
            cost = infer_cost(shape, head, sharding, device, cluster, work)
        else:
            minibatch = self.minibatch or self.sequences
            work = _one_row(shares(prompts + responses, minibatch, self.gpus))
            cost = train_cost(shape, head, sharding, device, cluster, work, self.epochs)
        return _only(cost.compute + cost.transfer)


class RolloutPoint(Measurement, OnGpus, Batched):
    """A batch generated by `engines` of `tensor_parallel` GPUs, each with at most `concurrency`
    sequences at once."""

    call: Literal["generate"]
    tensor_parallel: Count = 1
    engines: Count = 1
    concurrency: Count | None = None

    def likeness(self, shape: Shape, device: Device) -> Likeness:
        return like_generate(
            shape,
            device,
            tensor_parallel=self.tensor_parallel,
            engines=self.engines,
            concurrency=self.concurrency or 0,
            sequences=self.sequences,
        )

    def size(self) -> float:
        """The logarithm of the sequences per engine."""
        return float(np.log(self.sequences / self.engines))

    def roofline(self, shape: Shape, device: Device, cluster: Cluster) -> float:
        prompts, responses = self.lengths()
        speeds = [engine_speed(shape, self.tensor_parallel, device)] * self.engines
        slots, limit = self.concurrency or self.sequences, int(responses.max())
        seconds = generation_seconds(prompts, responses, speeds, slots, limit)
        return _only(seconds) + device.overhead_seconds


class TransferPoint(Measurement, Sharded):
    """Weights on their way to the engines. `gpus` and `shard` are the actor's. All engines are on
    its GPUs (`shared`), some are (`partly`), or none."""

    call: Literal["transfer"]
    tensor_parallel: Count = 1
    engines: Count = 1
    shared: bool = False
    partly: bool = False

    @property
    def meets_shared(self) -> bool:
        """Whether there are engines on the actor's GPUs."""
        return self.shared or self.partly

    def likeness(self, shape: Shape, device: Device) -> Likeness:
        return like_transfer(
            self.role,
            shape,
            device,
            way_of(shared=self.meets_shared, separate=not self.shared),
            shard=self.shard,
            gpus=self.gpus,
            tensor_parallel=self.tensor_parallel,
            engines=self.engines,
        )

    def size(self) -> float:
        """All transfers that go one way count as equally large."""
        return 0.0

    def roofline(self, shape: Shape, device: Device, cluster: Cluster) -> float:
        seconds = sync_cost(
            shape,
            sharding_of(Grid.of(self.layout()), self.place(device)),
            device,
            cluster,
            self.tensor_parallel,
            same_node=self.nodes == 1,
            shared=self.meets_shared,
            separate=not self.shared,
        )
        return _only(seconds)


class MovePoint(Measurement, Sharded):
    """A move of what a role keeps in host memory, to the GPUs (`wake`) or back (`offload`). It is
    that of an update, so the optimizer counts. An engine has a `tensor_parallel` size; another role
    has a `shard` size, and the `offload` of its layout."""

    call: Literal["wake", "offload"]
    offload: Offload = "none"
    tensor_parallel: Count = 1

    def likeness(self, shape: Shape, device: Device) -> Likeness:
        if self.role == "rollout":
            split = self.tensor_parallel
            return like_engine_move(self.call, shape, device, tensor_parallel=split)
        return like_trainer_move(
            self.call, self.role, shape, device, shard=self.shard, gpus=self.gpus
        )

    def size(self) -> float:
        """The ratio is that of a rate, whatever the number of bytes."""
        return 0.0

    def roofline(self, shape: Shape, device: Device, cluster: Cluster) -> float:
        if self.role == "rollout":
            count = engine_weight_bytes(shape, self.tensor_parallel, device)
        else:
            grid = Grid.of(self.layout(offload=self.offload))
            (count,) = moved_bytes(shape, self.role, grid, device, train=True).tolist()
        return max(1, count) / device.host_bandwidth


class HostPoint(Measurement, Batched):
    """A call on the controller, whose name is the `role`: `score` or `advantages`."""

    call: Literal["host"]

    def likeness(self, shape: Shape, device: Device) -> Likeness:
        return like_host(self.role, sequences=self.sequences)

    def size(self) -> float:
        """The logarithm of the sequences."""
        return float(np.log(self.sequences))

    def roofline(self, shape: Shape, device: Device, cluster: Cluster) -> float:
        return _only(host_seconds(np.array([self.tokens])))


Point = Annotated[
    TrainerPoint | RolloutPoint | TransferPoint | MovePoint | HostPoint,
    Field(discriminator="call"),
]
_any_point: TypeAdapter[Point] = TypeAdapter(Point)


def point_of(**keys: Any) -> Point:
    """The point with these keys, of the kind that its `call` says. Raises ValidationError."""
    return _any_point.validate_python(keys)


def _one_row(work: Work) -> Work:
    """The work of one layout as a column of length one."""
    return Work(tokens=work.tokens[None], squares=work.squares[None])


def _only(seconds: Seconds) -> float:
    """The one figure in an array."""
    return float(seconds.item())
