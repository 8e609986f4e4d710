"""The points that a run's calls become: which point a call belongs to, and the median of its
repeats."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from executor.data.batch import Sequences
from executor.measuring.group import BatchSize
from planner.predict.likeness import MoveCall
from planner.predict.points import (
    HostPoint,
    MovePoint,
    Point,
    RolloutPoint,
    TrainerPoint,
    TransferPoint,
)
from planner.spec.plan import Plan
from planner.spec.timeline import Span
from planner.spec.workload import TRAINED, Shape

OPEN = 1.0  # the seconds of a point that has not been summed up


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What one call adds to the point `key` (whose tokens, seconds and bytes are left open)."""

    key: Point
    seconds: float
    tokens: dict[str, Any]
    memory: dict[str, int]


def samples_of(
    plan: Plan, span: Span, batch: BatchSize, made: Sequences, memory: dict[str, int]
) -> Iterator[Sample]:
    """The samples of a span: of the call itself, and of its moves between host and GPU. `made` are
    the sequences of its step, `memory` the most bytes that the call had in use, by kind.

    Seconds run from when the call could start, not from when its processes did: the way through the
    controller is part of what a call costs."""
    key, tokens = _key(plan, span, made, batch)
    moves: tuple[MoveCall, ...] = ("wake", "offload")
    moved = {call: span.parts.get(call, 0.0) for call in moves}
    seconds = span.end - span.ready - sum(moved.values())
    yield Sample(key=key, seconds=seconds, tokens=tokens, memory=memory)
    for call, taken in moved.items():
        move = _move(call, plan, span, key.model) if taken > 0 else None
        if move is not None:
            yield Sample(key=move, seconds=taken, tokens={}, memory={})


def _key(plan: Plan, span: Span, made: Sequences, batch: BatchSize) -> tuple[Point, dict[str, Any]]:
    """The point that a span belongs to, and the tokens that the span had. Its seconds are left
    open."""
    kind, sequences = plan.dataflow[span.call].kind, len(made.lengths)
    if kind == "host":
        host = HostPoint(call="host", role=span.call, sequences=sequences, seconds=OPEN)
        return host, _tokens(made)
    shape = plan.workload.model_of(span.role).shape
    model = None if shape == plan.workload.actor.shape else shape
    if kind == "generate":
        return _generated(plan, span, sequences, model), _tokens(made)
    if kind == "transfer":
        return _moved(plan, span, model), {}
    return _trained(plan, span, sequences, batch, model), _tokens(made)


def _generated(plan: Plan, span: Span, sequences: int, model: Shape | None) -> RolloutPoint:
    return RolloutPoint(
        call="generate",
        role=span.role,
        gpus=plan.gpus_of(span.pools),
        tensor_parallel=plan.rollout.tensor_parallel,
        engines=plan.rollout.replicas,
        concurrency=plan.rollout.concurrency,
        sequences=sequences,
        model=model,
        seconds=OPEN,
    )


def _moved(plan: Plan, span: Span, model: Shape | None) -> TransferPoint:
    """The point of a weight sync."""
    rollout, layout = plan.rollout, plan.trainers[plan.dataflow[span.call].roles[0]]
    shared = rollout.pools == layout.pools
    return TransferPoint(
        call="transfer",
        role=span.role,
        gpus=layout.gpus,
        shard=layout.shard,
        tensor_parallel=rollout.tensor_parallel,
        engines=rollout.replicas,
        shared=shared,
        partly=not shared and layout.pools[0] in rollout.pools,
        model=model,
        seconds=OPEN,
    )


def _trained(
    plan: Plan, span: Span, sequences: int, batch: BatchSize, model: Shape | None
) -> TrainerPoint:
    """The point of a forward pass over a batch, or of an update."""
    call, workload = plan.dataflow[span.call], plan.workload
    layout, train = plan.trainers[call.roles[0]], call.kind == "train"
    return TrainerPoint(
        call="train" if train else "infer",
        role=span.role,
        gpus=layout.gpus,
        shard=layout.shard,
        micro_batch_tokens=batch.micro_batch_tokens or layout.micro_batch_tokens,
        recompute=train and layout.recompute,
        sequences=sequences,
        minibatch=workload.minibatch if train else None,
        epochs=workload.algorithm.epochs if train else 1,
        model=model,
        seconds=OPEN,
    )


def _tokens(made: Sequences) -> dict[str, Any]:
    """Totals over a step's sequences, and each response where they differ."""
    responses = made.response_lengths
    tokens: dict[str, Any] = {
        "prompt_tokens": int(made.prompt_lengths.sum()),
        "response_tokens": int(responses.sum()),
    }
    if len(set(responses.tolist())) > 1 and responses.min() > 0:
        tokens["response_lengths"] = tuple(responses.tolist())
    return tokens


def _move(call: MoveCall, plan: Plan, span: Span, model: Shape | None) -> MovePoint | None:
    """What a call moves, as far as it is all of one role's: an update's memory, with its optimizer,
    a forward pass's of a role that does not train, an engine's."""
    caller, role = plan.dataflow[span.call], span.role
    if caller.kind == "generate":
        size = plan.rollout.tensor_parallel
        return MovePoint(
            call=call, role="rollout", gpus=size, tensor_parallel=size, model=model, seconds=OPEN
        )
    if caller.kind == "train" or (caller.kind == "infer" and role not in TRAINED):
        layout = plan.trainers[role]
        return MovePoint(
            call=call,
            role=role,
            gpus=layout.gpus,
            shard=layout.shard,
            offload=layout.offload,
            model=model,
            seconds=OPEN,
        )
    return None


def summed_up(key: Point, samples: Sequence[Sample]) -> Point:
    """The median, the lower one of an even number, with the tokens of that sample, and the most
    memory. Disturbances only add: of two repeats the quicker is the one to expect."""
    seconds = np.array([sample.seconds for sample in samples])
    low, high = np.quantile(seconds, [0.25, 0.75])
    middle = int(np.argsort(seconds, kind="stable")[(len(seconds) - 1) // 2])
    median, tokens = seconds[middle], samples[middle].tokens
    most = {
        kind: max(s.memory.get(kind, 0) for s in samples)
        for kind in ("used", "reserved", "allocated")
    }
    figures = {
        "seconds": float(median),
        "spread": float(high - low) / 2,
        "repeats": len(samples),
        "peak_bytes": most["used"],
        "reserved_bytes": most["reserved"],
        "allocated_bytes": most["allocated"],
    }
    return type(key).model_validate({**key.model_dump(), **tokens, **figures})
