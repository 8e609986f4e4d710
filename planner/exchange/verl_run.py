"""A run of verl, from its configuration and its metrics.

verl's synchronous trainer has all roles on all GPUs, and every call waits for the one before it.
The facts were read from verl 0.9.1: from its v1 trainer what each timer has in it, from the files
of trainer/config what each key means, from its FSDP engine how models are sharded."""

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from planner.exchange.imported_run import STEP, ImportedRun, default_warmup
from planner.exchange.reading import Settings
from planner.exchange.verl_log import VerlLog
from planner.exchange.verl_workload import workload_of
from planner.spec.cluster import Cluster, make_cluster
from planner.spec.errors import UserError
from planner.spec.files import first_problem, profiles_dir, read_data
from planner.spec.plan import Issue, Offload, Plan, Pool, RolloutRole, TrainerRole
from planner.spec.wording import counted
from planner.spec.workload import Workload

TIMER = "timing_s/"
PHASES = {  # verl's timers and our calls, in verl's order
    "gen": "generate",
    "reward": "score",
    "old_log_prob": "old_logprobs",
    "ref": "ref_logprobs",
    "values": "values",
    "adv": "advantages",
    "update_critic": "update_critic",
    "update_actor": "update_actor",
    "update_weights": "sync_weights",
}
NO_CALLS = ("save_checkpoint", "testing", "dump_rollout_generations")  # timers of what is no call
DEVICE_OPTION = "--device"
POOL = "all"
BARELY_MORE = 1.03  # GiB of a device over its `memory_bytes`, which leave about 1 GB for the rest


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the user adds to a log."""

    model: str | None = None
    device: str | None = None
    warmup: int | None = None


def imported_verl(log: VerlLog, config: dict[str, Any], told: Told) -> ImportedRun:
    """The run of a log under its configuration. Raises UserError for what cannot be imported."""
    settings = Settings(config, "verl 0.9")
    _refuse_unknown(settings)
    steps = _steps(log, settings)
    warmup = default_warmup(len(steps)) if told.warmup is None else told.warmup
    if warmup >= len(steps):
        raise UserError(f"the log has {len(steps)} whole steps; --warmup {warmup} leaves none")
    cluster = _cluster(settings, log, told)
    workload = workload_of(settings, log, told.model, steps[warmup:])
    plan = _plan(settings, workload, cluster)
    phases = {TIMER + timer: (call,) for timer, call in PHASES.items() if _has(plan, call)}
    if TIMER + "reward" not in steps[-1]:
        settings.note("rewards are computed inside of generation, as verl's agent loop does")
    settings.note(
        f"the first {warmup} of {len(steps)} steps do not count (--warmup); seconds are means, "
        "which add up to the step"
    )
    return ImportedRun(
        plan=plan, steps=steps, phases=phases, warmup=warmup, notes=tuple(settings.notes)
    )


def _has(plan: Plan, call: str) -> bool:
    return call in plan.dataflow.names


def _refuse_unknown(settings: Settings) -> None:
    """What has a placement or calls that are not known here."""
    actor = "actor_rollout_ref.actor"
    settings.refuse("trainer.v1.trainer_mode", str, ("sync",), "sync")
    settings.refuse(f"{actor}.strategy", str, ("fsdp", "fsdp2"), "fsdp")
    settings.refuse(f"{actor}.ulysses_sequence_parallel_size", int, (1,), 1)
    settings.refuse("actor_rollout_ref.model.lora_rank", int, (0,), 0)
    settings.refuse("actor_rollout_ref.rollout.data_parallel_size", int, (1,), 1)
    settings.refuse("actor_rollout_ref.rollout.pipeline_model_parallel_size", int, (1,), 1)
    settings.refuse("reward.reward_model.enable", bool, (False,), False)
    settings.refuse("reward_model.enable", bool, (False,), False)
    settings.refuse("distillation.enabled", bool, (False,), False)


def _steps(log: VerlLog, settings: Settings) -> tuple[dict[str, float], ...]:
    """The steps with all timers, each with its whole time beside. A line that the end of the log
    cut has fewer timers than the others, and is left out."""
    failed = f"; the run failed: {log.failure}" if log.failure else ""
    if not log.steps:
        raise UserError(f"the log has no line of a finished step (step:1 - ...){failed}")
    timed = [step for step in log.steps if f"{TIMER}step" in step]
    if not timed:
        raise UserError("no step of the log has timing_s/step; it is of another version of verl")
    usual = {key for key in max(timed, key=len) if key.startswith((TIMER, "prompt_", "response_"))}
    needed = usual - {TIMER + timer for timer in NO_CALLS}
    whole = []
    for step in timed:
        beside = sum(step.get(TIMER + timer, 0.0) for timer in NO_CALLS)
        seconds = {key: value for key, value in step.items() if key.startswith(TIMER)}
        if not all(value >= 0 for value in seconds.values()):  # not a number, or none that can be
            raise UserError(f"a step has timing_s of {min(seconds.values()):g} s; it is damaged")
        if needed <= step.keys():
            whole.append({**step, STEP: step[f"{TIMER}step"] - beside})
    if len(whole) < len(log.steps):
        cut = len(log.steps) - len(whole)
        are = "is" if cut == 1 else "are"
        settings.note(f"{counted(cut, 'step')} {are} not whole, and left out")
    if log.failure:
        settings.note(f"the run ended with an error after these steps: {log.failure}")
    return tuple(whole)


# --- the cluster ---


def _cluster(settings: Settings, log: VerlLog, told: Told) -> Cluster:
    nodes = settings.counted("trainer.nnodes")
    gpus = settings.counted("trainer.n_gpus_per_node")
    device = told.device or _device_of(log)
    if told.device is None:
        settings.note(f"the GPUs are {device}, by the {log.memory_gib:g} GiB that the log says")
    settings.note("hosts are taken to have 2 TB of memory, and 50 GB/s per GPU between nodes")
    return make_cluster(nodes * gpus, device, gpus)


def _device_of(log: VerlLog) -> str:
    """The only shipped device with a GPU's memory. Raises UserError, which asks, for several."""
    known = read_data(profiles_dir() / "devices.toml")
    if log.memory_gib is None:
        raise UserError(
            f"the log does not say which GPUs these are; give {DEVICE_OPTION}, one of "
            f"{', '.join(known)}"
        )
    said = log.memory_gib * 2**30
    fits = [name for name, device in known.items() if _is_of(said, device["memory_bytes"])]
    if len(fits) != 1:
        choice = ", ".join(fits) or ", ".join(known)
        raise UserError(
            f"the log says GPUs of {log.memory_gib:g} GiB, which does not tell their kind; give "
            f"{DEVICE_OPTION}, one of {choice}"
        )
    return fits[0]


def _is_of(said: float, usable: int) -> bool:
    return usable <= said <= BARELY_MORE * usable


# --- the plan ---


def _plan(settings: Settings, workload: Workload, cluster: Cluster) -> Plan:
    gpus = len(cluster.gpus)
    section, model = "actor_rollout_ref.actor", "actor_rollout_ref.model"
    actor = _trainer(settings, workload, gpus, section, "fsdp_config", model)
    roles: dict[str, TrainerRole | RolloutRole] = {
        "actor": actor,
        "rollout": _rollout(settings, workload, gpus),
    }
    if workload.critic is not None:
        roles["critic"] = _trainer(settings, workload, gpus, "critic", "fsdp", "critic.model")
    if workload.reference is not None:
        roles["reference"] = _reference(settings, actor)
    calls = [call for call in PHASES.values() if call in workload.dataflow.names]
    data = {
        "name": "verl",
        "workload": workload,
        "cluster": cluster,
        "pools": {POOL: Pool(gpus=cluster.gpus)},
        "roles": roles,
        "program": tuple(Issue(call=call, blocking=True) for call in calls),
        "staleness": 0,
    }
    try:
        return Plan.model_validate(data)
    except ValidationError as error:
        raise UserError(f"as a plan of splitplan: {first_problem(error, {})}") from None


def _trainer(
    settings: Settings, workload: Workload, gpus: int, section: str, fsdp: str, model: str
) -> TrainerRole:
    shard = settings.get(f"{section}.{fsdp}.fsdp_size", int, -1)
    if shard < 1 or shard > gpus or gpus % shard:
        shard = gpus
    return TrainerRole(
        pools=(POOL,),
        shard=shard,
        replicas=gpus // shard,
        micro_batch_tokens=_micro_batch(settings, workload, section),
        recompute=settings.get(f"{model}.enable_gradient_checkpointing", bool, True),
        offload=_offload(settings, f"{section}.{fsdp}"),
    )


def _offload(settings: Settings, section: str) -> Offload:
    if settings.get(f"{section}.param_offload", bool, False):
        return "all"
    return "optimizer" if settings.get(f"{section}.optimizer_offload", bool, False) else "none"


def _micro_batch(settings: Settings, workload: Workload, section: str) -> int:
    """Tokens of a micro-batch: verl bounds them, or counts sequences."""
    if settings.get(f"{section}.use_dynamic_bsz", bool, False):
        tokens = settings.counted(f"{section}.ppo_max_token_len_per_gpu", 16384)
        return max(tokens, workload.longest)
    sequences = settings.counted(f"{section}.ppo_micro_batch_size_per_gpu", 1)
    settings.note(f"a micro-batch of {sequences} sequences counts as so many of the longest ones")
    return min(sequences * workload.longest, 2**24)


def _reference(settings: Settings, actor: TrainerRole) -> TrainerRole:
    offload = settings.get("actor_rollout_ref.ref.fsdp_config.param_offload", bool, False)
    return actor.changed(recompute=False, offload="all" if offload else "none")


def _rollout(settings: Settings, workload: Workload, gpus: int) -> RolloutRole:
    rollout = "actor_rollout_ref.rollout"
    if (engine := settings.get(f"{rollout}.name", str, "vllm")) != "vllm":
        settings.note(f"the engine {engine} counts as vllm would with the same seconds")
    size = settings.counted(f"{rollout}.tensor_model_parallel_size", 1)
    replicas = max(1, gpus // size)
    share = -(-workload.generated // replicas)
    fraction = settings.get(f"{rollout}.gpu_memory_utilization", float, 0.5)
    return RolloutRole(
        engine="vllm",
        pools=(POOL,),
        tensor_parallel=size,
        replicas=replicas,
        memory_fraction=min(1.0, max(0.01, fraction)),
        concurrency=min(share, settings.counted(f"{rollout}.max_num_seqs", 1024)),
        offload=settings.get(f"{rollout}.free_cache_engine", bool, True),
    )
