"""Bytes per GPU of each role of a plan; `host_memory.py` has those of hosts.

Sizes. N parameters of a model, s its shard size, T tokens of a micro-batch. On a GPU weights
compute in bf16 (2 bytes) and a trained model keeps a master copy in fp32 (4); on a CPU everything
is fp32. Trained, per GPU: master weights 4N/s, Adam's two moments 8N/s, and gradients 4N/s. These
lie in a stream of each model's own, so on a GPU what they took stays with the model, unless it is
offloaded. Where an engine sleeps on the GPU every call gives it back, so that roles idle without
their gradients. A frozen model (reference, reward) keeps its compute copy only, 2N/s.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from planner.predict.columns import Booleans, Grid, Integers
from planner.predict.kv_cache import AMPLE, held_tokens
from planner.spec.cluster import Device
from planner.spec.engines import ENGINES, EngineName, engine_for
from planner.spec.plan import Plan, RolloutRole, TrainerRole
from planner.spec.workload import TRAINED, Head, Shape, Workload, head_of

# Log-probabilities are taken of this many tokens at a time: the full logits never exist.
LOGIT_CHUNK_TOKENS = 4096
# NCCL's buffers and a packed buffer for weights, in each process on a GPU.
COMMUNICATION_BYTES = 1_000_000_000
# The actor's window through which weights reach the engines; a larger weight fills one alone.
SYNC_BYTES = 2**30
# What a vLLM engine takes in addition to weights and KV cache: CUDA graphs, sampling, activations.
ENGINE_WORKSPACE_BYTES = 4_000_000_000
# What stays of an engine on the GPU while it sleeps, in addition to its weights.
ENGINE_ASLEEP_BYTES = 1_500_000_000
# One in this many bytes of a role that runs is held unused by its allocator, between its tensors.
SPARE = 32


@dataclass(frozen=True, kw_only=True)
class RoleMemory:
    """Bytes of one role on one GPU: `idle` while another role of its pool runs, `running` (at its
    peak), and `host`, the pinned copies per GPU of what it offloads. Where an engine sleeps on the
    GPU, `idle` is less by what is `given_back`: see `beside_sleeping`. `detail` splits `running` by
    kind."""

    idle: int
    running: int
    host: int
    given_back: int = 0
    detail: dict[str, int] = field(default_factory=dict)

    def beside_sleeping(self) -> "RoleMemory":
        """The memory of the role on a GPU where an engine sleeps."""
        return replace(self, idle=self.idle - self.given_back, given_back=0)


@dataclass(frozen=True, kw_only=True)
class PoolMemory:
    """Bytes of a pool's fullest GPU and what there is; `detail`: role -> kind -> bytes while that
    role runs, and `idle` what it keeps while others do."""

    peak: int
    allowed: int
    detail: dict[str, dict[str, int]]


def process_bytes(device: Device) -> int:
    """Bytes that a process takes on a GPU before it holds a model: its context and its
    communication buffers."""
    return device.context_bytes + (COMMUNICATION_BYTES if device.kind == "cuda" else 0)


def compute_bytes(device: Device) -> int:
    """Bytes of one number in a forward pass."""
    return 4 if device.kind == "cpu" else 2


def activation_bytes(shape: Shape, device: Device) -> tuple[int, int]:
    """Bytes that one token leaves for the backward pass in one block: (everything, with
    recomputation its input only).

    Counted as Korthikanti et al. 2022 (arXiv:2205.05198, equation 1) do, but with grouped-query
    attention, a gated MLP, RMS norms and flash attention, and for a block that is compiled whole:
    what matrix products and attention need is kept, what lies between them is computed again. So
    there are the residual stream before the block; what both norms and the attention's output
    projection give; queries, keys, values and the attention's output; gate, up and the activated
    product; in fp32 a factor per norm and a log-sum-exp per head. These are the tensors that
    `torch.autograd.graph.saved_tensors_hooks` finds (tests/test_activations.py). On a CPU, where
    nothing is compiled, it is up to half more."""
    width, query, key = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    numbers = 3 * width + 2 * query + 2 * key + 3 * shape.intermediate
    kept = 4 * width  # the residual stream is fp32
    return kept + compute_bytes(device) * numbers + 4 * (2 + shape.heads), kept


def trainer_memory(
    workload: Workload, role: str, layout: TrainerRole, device: Device
) -> RoleMemory:
    """The memory of an actor, critic, reference or reward model on one GPU of its pool, without
    that of the process."""
    found = trainer_bytes(workload, role, Grid.of(layout), device)
    return RoleMemory(
        idle=found.idle.item(),
        running=found.running.item(),
        host=found.host.item(),
        given_back=found.given_back.item(),
        detail={kind: size.item() for kind, size in found.detail.items()},
    )


class TrainerBytes(NamedTuple):
    """Bytes per GPU [n] of a role in many layouts: what it keeps while it idles, what it has in use
    while it runs, by kind, what it offloads to the host, and what of `idle` is given back where an
    engine sleeps."""

    idle: Integers
    detail: dict[str, Integers]
    host: Integers
    given_back: Integers

    @property
    def running(self) -> Integers:
        return np.asarray(np.sum(list(self.detail.values()), axis=0))


def trainer_bytes(workload: Workload, role: str, grid: Grid, device: Device) -> TrainerBytes:
    """The memory of a trained or inference role in each layout of a grid, as in the sizes above."""
    shape, head, size = workload.models[role].shape, head_of(role), compute_bytes(device)
    trained, on_gpu = role in TRAINED, device.kind == "cuda"
    parameters = shape.parameters(head)
    weights = (4 if trained else size) * parameters // grid.shard
    moments = (8 if trained else 0) * parameters // grid.shard
    gradients = (4 if trained else 0) * parameters // grid.shard
    tokens = _micro_batch_tokens(workload, grid, role)
    activations = _activation_bytes(shape, grid.recompute, device, trained) * tokens
    needs_gathering = (grid.shard > 1) | (size < 4)
    window = 0
    if role == "actor" and size == 2:
        window = max(SYNC_BYTES, 2 * shape.embedding_parameters)
    logits = np.zeros_like(tokens)
    if head == "lm":
        logits = _logits(shape, tokens, size, trained, activations)
    detail = {
        "weights": weights,
        "optimizer": moments,
        "gradients": gradients,
        "gathered": _gathered_bytes(shape, head, size, trained) * needs_gathering,
        "activations": activations,
        "weight window": np.full_like(grid.shard, window),
        "logits": logits,
    }
    if on_gpu:
        detail["spare"] = np.sum(list(detail.values()), axis=0) // SPARE
    kept = gradients * (1 - grid.optimizer_offloaded) * on_gpu
    host = weights * grid.weights_offloaded + moments * grid.optimizer_offloaded
    return TrainerBytes(weights + moments + kept - host + window, detail, host, kept)


def moved_bytes(shape: Shape, role: str, grid: Grid, device: Device, *, train: bool) -> Integers:
    """Bytes per GPU [n] that a call moves to the device before it starts, and back after it: an
    update (`train`) needs the optimizer and the weights, an inference the weights only."""
    parameters, trained = shape.parameters(head_of(role)), role in TRAINED
    weights = (4 if trained else compute_bytes(device)) * parameters // grid.shard
    moments = 8 * parameters // grid.shard if trained and train else 0
    return np.asarray(weights * grid.weights_offloaded + moments * grid.optimizer_offloaded)


def _micro_batch_tokens(workload: Workload, grid: Grid, role: str) -> Integers:
    """Tokens of the largest micro-batch: a sequence is never cut, and a rank has no more than its
    share of a minibatch."""
    sequences = workload.minibatch if role in TRAINED else workload.inferred_by(role)
    share = -(-sequences // grid.gpus)
    bound = np.maximum(grid.micro_batch_tokens, workload.longest)
    return np.minimum(bound, share * workload.longest)


def _activation_bytes(
    shape: Shape, recompute: Booleans, device: Device, trained: bool
) -> Integers | int:
    """Bytes of one token's activations. A forward pass alone is widest in an MLP, with the residual
    stream and the norm's output. An update holds one block's activations and what the others have
    kept."""
    full, kept = activation_bytes(shape, device)
    if not trained:
        return kept + compute_bytes(device) * (shape.hidden + 3 * shape.intermediate)
    return np.where(recompute, full + kept * shape.layers, full * shape.layers)


def _logits(
    shape: Shape, tokens: Integers, size: int, trained: bool, activations: Integers
) -> Integers:
    """Bytes of a chunk's logits. An update holds those of the next chunk and a gradient too, and
    all activations; a forward pass alone has let its blocks' activations go by then. On a GPU fp32
    copies are fused away."""
    chunk = np.minimum(tokens, LOGIT_CHUNK_TOKENS) * shape.vocab * size
    return 3 * chunk if trained else np.maximum(chunk - activations, 0)


def _gathered_bytes(shape: Shape, head: Head, size: int, trained: bool) -> int:
    """Bytes that FSDP2 has unsharded at once: the block that computes and the next, embedding and
    head throughout. An update also has a block's gradients, before they are reduced in fp32, and
    the vocabulary head's, which come first of all (the embedding's come last, when no activations
    are left). In fp32 a single shard has nothing to gather and nothing to cast."""
    ends = shape.embedding_parameters * (1 if head == "scalar" or shape.tied_embeddings else 2)
    gathered = size * (2 * shape.block_parameters + ends)
    if not trained:
        return gathered
    gradients = (size + 4) * shape.block_parameters
    if head == "lm":
        gradients += size * shape.embedding_parameters
    return gathered + gradients


# --- rollout ---


def kv_bytes_per_token(shape: Shape, tensor_parallel: int, device: Device) -> int:
    """Bytes of a token's keys and values on each GPU of an engine. Heads are split over its GPUs,
    and copied where they are too few."""
    heads = -(-shape.kv_heads // tensor_parallel)
    return 2 * shape.layers * heads * shape.head_dim * compute_bytes(device)


def engine_weight_bytes(shape: Shape, tensor_parallel: int, device: Device) -> int:
    """Bytes of the actor's weights on each GPU of an engine."""
    return compute_bytes(device) * shape.parameters() // tensor_parallel


def _engine_detail(
    workload: Workload, engine: EngineName, tensor_parallel: int, concurrency: int, device: Device
) -> dict[str, int]:
    """Bytes of an engine by kind. One that preempts has a KV cache for what its slots hold together
    by the distribution of lengths, any other for as many longest sequences."""
    per_token = kv_bytes_per_token(workload.actor.shape, tensor_parallel, device)
    tokens = min(concurrency, workload.most_in_flight) * workload.longest
    if ENGINES[engine].preempts:
        tokens = held_tokens(workload, concurrency)
    return {
        "weights": engine_weight_bytes(workload.actor.shape, tensor_parallel, device),
        "kv_cache": tokens * per_token,
        "workspace": ENGINE_WORKSPACE_BYTES if device.kind == "cuda" else 0,
    }


def rollout_fraction(
    workload: Workload, tensor_parallel: int, concurrency: int, device: Device
) -> float:
    """The `memory_fraction` that holds an engine's weights, its workspace and process, and the KV
    cache of `concurrency` sequences, so that hardly one is ever preempted; rounded up to a
    hundredth. Above 1 it does not fit."""
    engine = engine_for(device.kind)
    detail = _engine_detail(workload, engine, tensor_parallel, concurrency, device)
    needed = sum(detail.values()) + process_bytes(device)
    return math.ceil(100 * needed / device.memory_bytes) / 100


def rollout_memory(workload: Workload, layout: RolloutRole, device: Device) -> RoleMemory:
    """One engine on one of its GPUs, its process not counted. An engine that reserves its fraction
    has it from the start; any other allocates what it needs while it runs. Asleep it has its
    weights from a sync until it has generated. They count for all calls in between and for all
    others: which those are is the program's choice, and layouts are chosen before programs."""
    size, slots = layout.tensor_parallel, layout.concurrency
    detail = _engine_detail(workload, layout.engine, size, slots, device)
    weights = detail["weights"]
    if ENGINES[layout.engine].reserves:
        left = _kv_reserved(layout, detail, device)
        detail["kv_cache"] = min(detail["kv_cache"], left)
        detail["reserve"] = left - detail["kv_cache"]
        kept = sum(detail.values()) if not layout.offload else ENGINE_ASLEEP_BYTES + weights
    else:
        kept = 0 if layout.offload else weights
    return RoleMemory(
        idle=kept,
        running=sum(detail.values()),
        host=weights if layout.offload else 0,
        detail=detail,
    )


def kv_room(workload: Workload, layout: RolloutRole, device: Device) -> int:
    """Tokens whose keys and values an engine has room for, where its slots may need more and it
    then preempts; AMPLE where they do not."""
    size, slots, traits = layout.tensor_parallel, layout.concurrency, ENGINES[layout.engine]
    if not (traits.preempts and traits.reserves):
        return AMPLE
    detail = _engine_detail(workload, layout.engine, size, slots, device)
    left = _kv_reserved(layout, detail, device)
    if left >= detail["kv_cache"]:
        return AMPLE
    return left // kv_bytes_per_token(workload.actor.shape, size, device)


def _kv_reserved(layout: RolloutRole, detail: dict[str, int], device: Device) -> int:
    """Bytes that an engine's `memory_fraction` leaves for its KV cache."""
    reserved = int(layout.memory_fraction * device.memory_bytes) - process_bytes(device)
    return max(0, reserved - detail["weights"] - detail["workspace"])


# --- pools ---


def pool_peak(members: Sequence[RoleMemory], trainer: bool, engine: bool, device: Device) -> int:
    """Bytes of a pool's fullest GPU: its processes (one `trainer` for all roles, one `engine`),
    what every role keeps, and the largest surplus of a running one."""
    processes = int(trainer) + int(engine)
    surplus = max((member.running - member.idle for member in members), default=0)
    kept = sum(member.idle for member in members)
    return processes * process_bytes(device) + kept + max(0, surplus)


def role_memory(plan: Plan, role: str) -> RoleMemory:
    """The memory of a role of a plan on one of its GPUs."""
    layout = plan.roles[role]
    device = plan.device_of(layout.pools[0])
    if isinstance(layout, RolloutRole):
        return rollout_memory(plan.workload, layout, device)
    return trainer_memory(plan.workload, role, layout, device)


def pool_members(plan: Plan, pool: str) -> dict[str, RoleMemory]:
    """The memory of each role of a pool on one of its GPUs. Beside an engine that sleeps they keep
    less."""
    members = {
        role: role_memory(plan, role) for role, layout in plan.roles.items() if pool in layout.pools
    }
    if pool in plan.rollout.pools and plan.rollout.offload:
        return {role: memory.beside_sleeping() for role, memory in members.items()}
    return members


def plan_memory(plan: Plan) -> dict[str, PoolMemory]:
    """The memory of each pool of a plan, on its fullest GPU."""
    found = {}
    for pool in plan.pools:
        members, device = pool_members(plan, pool), plan.device_of(pool)
        engine = "rollout" in members
        trainer = bool(members.keys() - {"rollout"})
        peak = pool_peak(list(members.values()), trainer, engine, device)
        detail = {role: {**memory.detail, "idle": memory.idle} for role, memory in members.items()}
        found[pool] = PoolMemory(peak=peak, allowed=device.memory_bytes, detail=detail)
    return found


def kv_cache_bytes(plan: Plan) -> int:
    """Bytes of the KV cache on each GPU of an engine: the part of its `memory_fraction` that its
    other needs leave."""
    detail = role_memory(plan, "rollout").detail
    return detail["kv_cache"] + detail["reserve"]


def trainer_allowance(plan: Plan, pool: str) -> int:
    """Bytes that the roles of a pool's trainer process may take on a GPU: their planned bytes, and
    the workspaces of libraries as far as the processes themselves and an idle engine leave room.
    Without a limit torch may keep much more than its tensors ever take at a time."""
    members, device = pool_members(plan, pool), plan.device_of(pool)
    engine = members.pop("rollout", None)
    left = device.memory_bytes - process_bytes(device) * (1 if engine is None else 2)
    if engine is not None:
        left -= engine.idle
    planned = pool_peak(list(members.values()), False, False, device)
    return min(left, planned + COMMUNICATION_BYTES)
