"""What a call and a measured point of it have in common.

A measured point stands for the calls that are like it. The functions here say for each kind of call
what that means; the cost model uses them for the calls of many layouts at once, a point for its
own."""

from collections.abc import Hashable
from typing import Literal, NamedTuple

from planner.predict.columns import Column
from planner.spec.cluster import Device
from planner.spec.workload import Shape, head_of

Way = Literal["all", "some", "none"]  # which engines of a transfer share the actor's GPUs
TrainerCall = Literal["infer", "train"]
MoveCall = Literal["wake", "offload"]


class Likeness(NamedTuple):
    """The place where a call is looked up among the points, and the values that are compared there.

    Only points with the same `key` count. Those with the nearest `split` (the shard size, or the
    tensor-parallel size of engines) are taken; of these the ones of the same `role`; then those
    with each of the `preferred` values, the most important first, as far as there are any. A point
    that has all of this and the `exact` values too is a measurement of this very call.
    """

    key: Hashable
    role: str
    split: Column
    preferred: tuple[Column, ...] = ()
    exact: tuple[Column, ...] = ()


def like_trainer(
    call: TrainerCall,
    role: str,
    shape: Shape,
    device: Device,
    *,
    shard: Column,
    gpus: Column,
    micro_batch_tokens: Column,
    recompute: Column,
    sequences: int,
    minibatch: int,
    epochs: int,
) -> Likeness:
    """A forward pass over the batch, or an update."""
    key = (call, shape, head_of(role), device)
    if call == "infer":
        return Likeness(key, role, shard, (micro_batch_tokens, gpus), (sequences,))
    preferred = (recompute, micro_batch_tokens, gpus)
    return Likeness(key, role, shard, preferred, (sequences, minibatch, epochs))


def like_generate(
    shape: Shape,
    device: Device,
    *,
    tensor_parallel: int,
    engines: Column,
    concurrency: Column,
    sequences: int,
) -> Likeness:
    key = ("generate", shape, device)
    return Likeness(key, "rollout", tensor_parallel, (concurrency,), (engines, sequences))


def like_transfer(
    role: str,
    shape: Shape,
    device: Device,
    way: Way,
    *,
    shard: int,
    gpus: int,
    tensor_parallel: int,
    engines: int,
) -> Likeness:
    """Weights of a role on their way to the engines."""
    key = transfer_key(role, shape, device, way)
    return Likeness(key, role, shard, (), (shard, gpus, tensor_parallel, engines))


def transfer_key(role: str, shape: Shape, device: Device, way: Way) -> Hashable:
    return "transfer", shape, head_of(role), device, way


def like_trainer_move(
    call: MoveCall, role: str, shape: Shape, device: Device, *, shard: Column, gpus: Column
) -> Likeness:
    """A role's memory on its way to the GPUs or back. The GPUs of a host share its memory, so
    points of as many come first."""
    return Likeness((call, "trainer", shape, device), role, shard, (gpus,))


def like_engine_move(
    call: MoveCall, shape: Shape, device: Device, *, tensor_parallel: int
) -> Likeness:
    """An engine that wakes or goes to sleep."""
    return Likeness((call, "engine", shape, device), "rollout", tensor_parallel)


def like_host(name: str, *, sequences: int) -> Likeness:
    """A call on the controller, by its name."""
    return Likeness(("host", name), name, 1, (), (sequences,))


def way_of(*, shared: bool, separate: bool) -> Way:
    """The way of a transfer to engines on the actor's GPUs (`shared`), elsewhere (`separate`), or
    both."""
    if not shared:
        return "none"
    return "some" if separate else "all"
