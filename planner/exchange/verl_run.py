"""A run of verl, from its configuration and its metrics.

verl's synchronous trainer has all roles on all GPUs, and every call waits for the one before it.
The facts were read from verl 0.9.1: from its v1 trainer what each timer has in it, from the files
of trainer/config what each key means, from its FSDP engine how models are sharded."""

from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pydantic import ValidationError

from planner.exchange.imported_run import STEP, ImportedRun, default_warmup
from planner.exchange.known_models import model_of
from planner.exchange.observed_lengths import SeenLengths, fitted
from planner.exchange.reading import Settings
from planner.exchange.verl_log import VerlLog
from planner.spec.cluster import Cluster, make_cluster
from planner.spec.errors import UserError
from planner.spec.files import first_problem, profiles_dir, read_data
from planner.spec.lengths import Fixed, Lognormal
from planner.spec.plan import Issue, Offload, Plan, Pool, RolloutRole, TrainerRole
from planner.spec.workload import Model, Workload

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
ADVANTAGES = {
    "gae": "gae",
    "grpo": "grpo",
    "rloo": "rloo",
    "reinforce_plus_plus": "reinforce++",
    "reinforce_plus_plus_baseline": "reinforce++-baseline",
}
KL_KINDS = {"kl": "k1", "k1": "k1", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}
AGGREGATIONS = {
    "token-mean": "token",
    "seq-mean-token-mean": "sequence",
    "seq-mean-token-sum": "constant",
    "seq-mean-token-sum-norm": "constant",
}
LOSSES = {"vanilla": "ppo", "gspo": "gspo", "cispo": "cispo"}
MODEL_OPTION, DEVICE_OPTION = "--model", "--device"
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
    workload = _workload(settings, log, told, steps[warmup:])
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
        settings.note(f"{len(log.steps) - len(whole)} steps are not whole, and left out")
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


# --- the workload ---


def _workload(
    settings: Settings, log: VerlLog, told: Told, steps: tuple[dict[str, float], ...]
) -> Workload:
    group = settings.counted("actor_rollout_ref.rollout.n", 1)
    prompts = settings.counted("data.train_batch_size")
    minibatch = settings.counted("actor_rollout_ref.actor.ppo_mini_batch_size")
    advantage = settings.get("algorithm.adv_estimator", str)
    if advantage not in ADVANTAGES:
        known = ", ".join(ADVANTAGES)
        raise UserError(f"algorithm.adv_estimator = {advantage}: only {known} can be imported")
    models = _models(settings, log, told, needs_critic=advantage == "gae")
    for kind in ("prompt", "response"):
        if f"{kind}_length/mean" not in steps[0]:
            raise UserError(f"the log has no {kind}_length/mean; it is of another version of verl")
    data: dict[str, Any] = {
        "name": settings.get("trainer.experiment_name", str, "imported"),
        "batch": prompts * group,
        "minibatch": min(minibatch, prompts) * group,
        "samples_per_prompt": group,
        "prompt": _lengths("prompt", settings, steps, prompts * group),
        "response": _lengths("response", settings, steps, prompts * group),
        "reward": _reward(settings),
        "max_staleness": 0,
        "proximal": _proximal(settings),
        "steps": max(1, settings.get("trainer.total_training_steps", int, len(log.steps)) or 1),
        "algorithm": _algorithm(settings),
        "optimizer": {"actor": _optimizer(settings, "actor_rollout_ref.actor")},
        **models,
    }
    if advantage == "gae":
        data["optimizer"]["critic"] = _optimizer(settings, "critic")
        theirs = settings.counted("critic.ppo_mini_batch_size", minibatch)
        if theirs != minibatch:
            settings.note(
                f"the critic's minibatch of {theirs} prompts is taken as the actor's {minibatch}"
            )
    try:
        return Workload.model_validate(data)
    except ValidationError as error:
        raise UserError(f"as a workload of splitplan: {first_problem(error, data)}") from None


def _models(
    settings: Settings, log: VerlLog, told: Told, needs_critic: bool
) -> dict[str, Model | None]:
    actors = [model for model in log.models if model.architecture.endswith("CausalLM")]
    path = settings.get("actor_rollout_ref.model.path", str)
    actor, where = model_of(path, actors, told.model, MODEL_OPTION)
    settings.note(f"the actor's shape is that of {where}")
    found: dict[str, Model | None] = {"actor": actor, "reference": None, "critic": None}
    in_reward = settings.get("algorithm.use_kl_in_reward", bool, False)
    if in_reward or settings.get("actor_rollout_ref.actor.use_kl_loss", bool, False):
        found["reference"] = actor
    if needs_critic:
        theirs = settings.get("critic.model.path", str, path)
        found["critic"] = actor
        if theirs != path:
            others = [model for model in log.models if model not in actors]
            found["critic"], where = model_of(theirs, others, None, MODEL_OPTION)
            settings.note(f"the critic's shape is that of {where}")
    return found


def _lengths(
    kind: str, settings: Settings, steps: tuple[dict[str, float], ...], batch: int
) -> Fixed | Lognormal:
    cut = [step.get(f"{kind}_length/clip_ratio", 0.0) for step in steps]
    means = [step[f"{kind}_length/mean"] for step in steps]
    if not all(0 < mean <= 2**24 for mean in means):
        raise UserError(f"{kind}_length/mean = {min(means):g}: no length in tokens")
    seen = SeenLengths(
        means=means,
        least=[
            step.get(f"{kind}_length/min", mean) for step, mean in zip(steps, means, strict=True)
        ],
        most=[
            step.get(f"{kind}_length/max", mean) for step, mean in zip(steps, means, strict=True)
        ],
        cut=min(0.99, max(0.0, fmean(cut))),
        limit=settings.counted(f"data.max_{kind}_length"),
        batch=batch,
    )
    return fitted(seen)


def _reward(settings: Settings) -> dict[str, Any]:
    for section in ("reward.custom_reward_function", "custom_reward_function"):
        if path := settings.get(f"{section}.path", str, ""):
            name = settings.get(f"{section}.name", str, "compute_score")
            return {"function": f"{path}:{name}", "form": "verl"}
    settings.note(
        "the reward is verl's own by data source; put your function in its place before a run"
    )
    return {"function": "reward.py:compute_score", "form": "verl"}


def _proximal(settings: Settings) -> str:
    bypass = settings.get("algorithm.rollout_correction.bypass_mode", bool, False)
    return "rollout" if bypass else "recompute"


def _algorithm(settings: Settings) -> dict[str, Any]:
    actor = "actor_rollout_ref.actor"
    advantage = ADVANTAGES[settings.get("algorithm.adv_estimator", str)]
    if advantage == "grpo" and not settings.get("algorithm.norm_adv_by_std_in_grpo", bool, True):
        advantage = "dr_grpo"
    found: dict[str, Any] = {
        "advantage": advantage,
        "loss": _known(settings, f"{actor}.policy_loss.loss_mode", LOSSES, "vanilla"),
        "aggregation": _known(settings, f"{actor}.loss_agg_mode", AGGREGATIONS, "token-mean"),
        "gamma": settings.get("algorithm.gamma", float, 1.0),
        "lam": settings.get("algorithm.lam", float, 1.0),
        "kl_coef": 0.0,
        "clip": settings.get(f"{actor}.clip_ratio_low", float, 0.2),
        "clip_high": settings.get(f"{actor}.clip_ratio_high", float, 0.2),
        "dual_clip": settings.get(f"{actor}.clip_ratio_c", float, 3.0),
        "value_clip": settings.get("critic.cliprange_value", float, 0.5),
        "importance": settings.get("algorithm.rollout_correction.rollout_is", str, "off"),
        "entropy_coef": settings.get(f"{actor}.entropy_coeff", float, 0.0),
        "temperature": settings.get("actor_rollout_ref.rollout.temperature", float, 1.0),
        "epochs": settings.counted(f"{actor}.ppo_epochs", 1),
        "critic_warmup": settings.get("trainer.critic_warmup", int, 0) if advantage == "gae" else 0,
    }
    if settings.get("algorithm.use_kl_in_reward", bool, False):
        found["kl_coef"] = settings.get("algorithm.kl_ctrl.kl_coef", float, 0.001)
        found["kl_kind"] = "k1"
    elif settings.get(f"{actor}.use_kl_loss", bool, False):
        found["kl_coef"] = settings.get(f"{actor}.kl_loss_coef", float, 0.001)
        kind = settings.get(f"{actor}.kl_loss_type", str, "low_var_kl").removesuffix("+")
        found["kl_kind"] = KL_KINDS.get(kind, "k3")
    return found


def _known(settings: Settings, path: str, names: dict[str, str], default: str) -> str:
    """Our name of a setting's value; where there is none, that of the default, with a note."""
    value = settings.get(path, str, default)
    if value not in names:
        settings.note(f"{path} = {value} is not known here, and taken as {default}")
    return names.get(value, names[default])


def _optimizer(settings: Settings, section: str) -> dict[str, Any]:
    return {
        "lr": settings.get(f"{section}.optim.lr", float, 1e-6),
        "weight_decay": settings.get(f"{section}.optim.weight_decay", float, 0.01),
        "grad_clip": settings.get(f"{section}.optim.clip_grad", float, 1.0),
    }


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
