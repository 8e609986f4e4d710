"""What all measured calls have: seconds, and where they have them a place, a layout and a batch.

In a file every point has the keys of all kinds, in one order. A key that says nothing about a kind
has its default value there (`LAID_OUT`), and any other value is refused.
"""

from typing import Any, Self

import numpy as np
from pydantic import (
    ConfigDict,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from planner.predict.columns import Integers
from planner.predict.roofline import Place
from planner.spec.cluster import Device
from planner.spec.files import Bytes, Count, Spec, Tokens
from planner.spec.plan import Offload, TrainerRole
from planner.spec.workload import Shape

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
