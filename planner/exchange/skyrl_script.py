"""A launch script for SkyRL.

The options were read from its 0.3.0: the dataclasses of train/config, the checks of train/utils,
its trainers, and the example examples/train/async of its repository."""

from collections.abc import Iterator

from planner.exchange.expressing import Expressed
from planner.exchange.script import Script
from planner.exchange.sharing import (
    NEVER_CLIPPED,
    data_file,
    described,
    head_of_script,
    reward_server,
    unsaid_rewards,
)
from planner.spec.lengths import Fixed
from planner.spec.wording import counted
from planner.spec.workload import Workload

SKYRL_SECTIONS = {"actor": "policy", "critic": "critic", "reference": "ref"}
ENGINE = "generator.inference_engine"
SAMPLED = "generator.sampling_params"
ALGORITHM = "trainer.algorithm"
SKYRL_ESTIMATORS = {
    "gae": "gae",
    "grpo": "grpo",
    "dr_grpo": "grpo",
    "rloo": "rloo",
    "reinforce++": "reinforce++",
}
REDUCTIONS = {
    "token": "token_mean",
    "sequence": "sequence_mean",
    "constant": "seq_mean_token_sum_norm",
}
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def skyrl_script(found: Expressed, command: str) -> str:
    """The script that runs a plan as SkyRL executes it."""
    workload, head = found.plan.workload, head_of_script("skyrl", found, command)
    program = "python3 -m skyrl.train.entrypoints.main_base"
    if found.mode.ahead:
        program = "python3 -m examples.train.async.main_async"
        head.append(
            "Generation one step ahead is an example of SkyRL's repository: run this in a checkout "
            "of skyrl-v0.3.0."
        )
    script = Script(head=head, command=program, separator="=")
    script.unsaid += unsaid_rewards("skyrl", workload)
    script.unsaid += reward_server("skyrl", found)
    script.unsaid += _unsaid(workload)
    _placement(script, found)
    _layouts(script, found)
    _rollout(script, found)
    _batch(script, workload)
    _algorithm(script, workload)
    _optimizers(script, workload)
    _run(script, workload)
    return script.text()


def _placement(script: Script, found: Expressed) -> None:
    script.section(f"Placement: {described(found)}")
    actor = found.pool_of("actor")
    together = actor in found.plan.rollout.pools
    script.add("trainer.placement.colocate_all", together, "engines on the GPUs of all roles")
    if "reference" in found.plan.trainers:
        shares = found.pool_of("reference") == actor
        why = "policy and reference take turns" if shares else "each on GPUs of its own"
        script.add("trainer.placement.colocate_policy_ref", shares, why)
    for role, name in SKYRL_SECTIONS.items():
        if role in found.plan.trainers:
            nodes, gpus = found.grid_of(role)
            script.add(f"trainer.placement.{name}_num_nodes", nodes)
            script.add(f"trainer.placement.{name}_num_gpus_per_node", gpus)


def _layouts(script: Script, found: Expressed) -> None:
    layouts = found.plan.trainers
    script.section("Layouts: micro-batches and recomputation are the same for all roles")
    script.add("trainer.strategy", "fsdp")
    tokens = layouts["actor"].micro_batch_tokens
    script.add("trainer.max_tokens_per_microbatch", tokens, "of a GPU")
    script.add("trainer.remove_microbatch_padding", True, "sequences are packed, as is predicted")
    recompute = layouts["actor"].recompute
    script.add("trainer.gradient_checkpointing", recompute, "recomputation")
    for role, name in SKYRL_SECTIONS.items():
        if role in layouts:
            layout = layouts[role]
            size = -1 if layout.replicas == 1 else layout.shard
            why = f"{role}: its model over {counted(layout.shard, 'GPU')}"
            script.add(f"trainer.{name}.fsdp_config.fsdp_size", size, why)


def _rollout(script: Script, found: Expressed) -> None:
    rollout, workload = found.plan.rollout, found.plan.workload
    size = counted(rollout.tensor_parallel, "GPU")
    script.section(
        f"Rollout: {counted(rollout.replicas, 'engine')} of {size}, each for "
        f"{rollout.concurrency} sequences at once"
    )
    script.add(f"{ENGINE}.backend", "vllm")
    script.add(f"{ENGINE}.num_engines", rollout.replicas)
    script.add(f"{ENGINE}.tensor_parallel_size", rollout.tensor_parallel)
    script.add(f"{ENGINE}.max_num_seqs", rollout.concurrency)
    script.add(f"{ENGINE}.gpu_memory_utilization", rollout.memory_fraction)
    script.add(f"{ENGINE}.engine_init_kwargs.max_model_len", workload.longest)
    script.add(f"{ENGINE}.weight_sync_backend", "nccl", "CUDA IPC on shared GPUs")
    script.add(f"{SAMPLED}.max_generate_length", workload.response.longest)
    script.add(f"{SAMPLED}.temperature", workload.algorithm.temperature)
    script.add(f"{SAMPLED}.top_p", workload.sampling.top_p)
    script.add(f"{SAMPLED}.top_k", workload.sampling.top_k or -1)
    script.add(f"{SAMPLED}.min_p", workload.sampling.min_p)
    script.add(f"{SAMPLED}.logprobs", 1, "of the tokens that were drawn")
    if workload.sampling.min_tokens:
        more = f"{SAMPLED}.additional_kwargs.min_tokens"
        script.add(more, workload.sampling.min_tokens)
    if isinstance(workload.response, Fixed):
        more = f"{SAMPLED}.additional_kwargs.ignore_eos"
        script.add(more, True, "all responses have the same length")


def _batch(script: Script, workload: Workload) -> None:
    group = workload.group
    script.section(
        f"Batch: {workload.batch} sequences, minibatches of {workload.minibatch}; SkyRL counts "
        "prompts"
    )
    path = data_file(workload, ".parquet", ".json", ".jsonl")
    train = script.variable("TRAIN", path, "prompts: a file in SkyRL's form, or a data set's name")
    script.add("data.train_data", f"[{train}]")
    script.add("data.val_data", "[]", "eval_interval is -1")
    script.add("trainer.train_batch_size", workload.batch // group)
    script.add("generator.n_samples_per_prompt", group)
    script.add("trainer.policy_mini_batch_size", workload.minibatch // group)
    script.add("trainer.critic_mini_batch_size", workload.minibatch // group)
    script.add("trainer.update_epochs_per_batch", workload.algorithm.epochs)
    script.add("trainer.max_prompt_length", workload.prompt.longest)
    if workload.oversamples:
        kind = f"{ALGORITHM}.dynamic_sampling.type"
        script.add(kind, "filter", "groups with equal scores are dropped")


# --- the algorithm ---


def _algorithm(script: Script, workload: Workload) -> None:
    algorithm = workload.algorithm
    script.section(f"Algorithm: {algorithm.advantage}, {algorithm.loss}")
    script.add(f"{ALGORITHM}.advantage_estimator", SKYRL_ESTIMATORS[algorithm.advantage])
    script.add(f"{ALGORITHM}.grpo_norm_by_std", algorithm.advantage != "dr_grpo")
    normal = algorithm.whitens and algorithm.needs_group
    script.add(f"{ALGORITHM}.advantage_batch_normalize", normal)
    script.add(f"{ALGORITHM}.gamma", algorithm.gamma)
    script.add(f"{ALGORITHM}.lambd", algorithm.lam)
    _loss(script, workload)
    _kl(script, workload)
    _correction(script, workload)
    script.add(f"{ALGORITHM}.use_entropy_loss", bool(algorithm.entropy_coef))
    script.add(f"{ALGORITHM}.entropy_loss_coef", algorithm.entropy_coef)
    masks = algorithm.mask_truncated
    script.add("generator.apply_overlong_filtering", masks, "truncated responses are masked")
    if workload.critic is not None:
        clip = NEVER_CLIPPED if algorithm.value_clip == "off" else algorithm.value_clip
        script.add(f"{ALGORITHM}.value_clip", clip)


def _loss(script: Script, workload: Workload) -> None:
    algorithm = workload.algorithm
    plain = "dual_clip" if algorithm.dual_clip else "regular"
    name = plain if algorithm.loss == "ppo" else algorithm.loss
    high = algorithm.clip if algorithm.clip_high is None else algorithm.clip_high
    script.add(f"{ALGORITHM}.policy_loss_type", name)
    script.add(f"{ALGORITHM}.loss_reduction", REDUCTIONS[algorithm.aggregation])
    if algorithm.aggregation == "constant":
        script.add(f"{ALGORITHM}.max_seq_len", workload.response.longest)
    if algorithm.loss == "cispo":
        script.add(f"{ALGORITHM}.cispo.cispo_eps_clip_low", algorithm.clip)
        script.add(f"{ALGORITHM}.cispo.cispo_eps_clip_high", high)
    else:
        script.add(f"{ALGORITHM}.eps_clip_low", algorithm.clip)
        script.add(f"{ALGORITHM}.eps_clip_high", high)
    if algorithm.dual_clip:
        script.add(f"{ALGORITHM}.clip_ratio_c", algorithm.dual_clip)


def _kl(script: Script, workload: Workload) -> None:
    algorithm = workload.algorithm
    there = workload.reference is not None
    in_reward = there and algorithm.kl_kind == "k1"
    script.add(f"{ALGORITHM}.use_kl_in_reward", in_reward)
    script.add(f"{ALGORITHM}.use_kl_loss", there and not in_reward)
    if there:
        script.add(f"{ALGORITHM}.kl_estimator_type", algorithm.kl_kind)
        script.add(f"{ALGORITHM}.kl_loss_coef", algorithm.kl_coef)
    if in_reward and algorithm.kl_target is not None:
        script.add(f"{ALGORITHM}.kl_ctrl.type", "adaptive")
        script.add(f"{ALGORITHM}.kl_ctrl.kl_target", algorithm.kl_target)
        script.add(f"{ALGORITHM}.kl_ctrl.horizon", round(algorithm.kl_horizon))


def _correction(script: Script, workload: Workload) -> None:
    """What is done about log-probs that the engine and the trainer compute differently."""
    section, algorithm = f"{ALGORITHM}.off_policy_correction", workload.algorithm
    low, high = algorithm.ratio_mask_low, algorithm.ratio_mask_high
    if algorithm.importance != "off":
        kind = algorithm.importance
        script.add(f"{section}.tis_ratio_type", kind, "weights against the rollout's log-probs")
        script.add(f"{section}.{kind}_tis_ratio_clip_high", algorithm.importance_cap)
    if algorithm.ratio_mask == "token":
        script.add(f"{section}.token_mask_is_threshold_low", low)
        script.add(f"{section}.token_mask_is_threshold_high", high)
    elif algorithm.ratio_mask != "off":
        product = algorithm.ratio_mask == "sequence"
        short = "product" if product else "geo"
        script.add(f"{section}.sequence_mask_metric", "product" if product else "geometric")
        script.add(f"{section}.{short}_mask_low", low)
        script.add(f"{section}.{short}_mask_high", high)


def _optimizers(script: Script, workload: Workload) -> None:
    script.section("Models and their optimizers")
    path = str(workload.actor.path or "")
    model = script.variable("MODEL", path, "the actor: a Hugging Face directory")
    script.add("trainer.policy.model.path", model)
    if workload.reference is not None:
        same = workload.reference.path == workload.actor.path
        script.add("trainer.ref.model.path", model if same else str(workload.reference.path))
    if workload.critic is not None:
        default = str(workload.critic.path or "$MODEL")
        theirs = script.variable("CRITIC", default, "the critic: a Hugging Face directory")
        script.add("trainer.critic.model.path", theirs)
    updates = workload.batch // workload.minibatch * workload.algorithm.epochs
    for role in ("actor", "critic"):
        if role in workload.models:
            optimizer = workload.optimizer.of(role)
            section = f"trainer.{SKYRL_SECTIONS[role]}.optimizer_config"
            script.add(f"{section}.lr", optimizer.lr)
            script.add(f"{section}.adam_betas", list(optimizer.betas))
            script.add(f"{section}.weight_decay", optimizer.weight_decay)
            script.add(f"{section}.max_grad_norm", optimizer.grad_clip)
            script.add(f"{section}.scheduler", SCHEDULES[optimizer.schedule])
            warmup = optimizer.warmup_steps * updates
            script.add(f"{section}.num_warmup_steps", warmup, "of minibatches")


def _run(script: Script, workload: Workload) -> None:
    script.section("The environment, which computes rewards, and the run")
    env = script.variable("ENV", "", "an environment of skyrl-gym, such as gsm8k")
    script.add("environment.env_class", env)
    script.add("trainer.max_training_steps", workload.steps)
    script.add("trainer.epochs", 1000, "max_training_steps ends it")
    script.add("trainer.seed", workload.seed)
    script.add("trainer.logger", "console")
    script.add("trainer.project_name", "splitplan")
    script.add("trainer.run_name", workload.name)
    script.add("trainer.resume_mode", "none")
    script.add("trainer.eval_before_train", False)
    script.add("trainer.eval_interval", -1)
    script.add("trainer.ckpt_interval", -1)


def _unsaid(workload: Workload) -> Iterator[str]:
    """What SkyRL has no option for."""
    algorithm = workload.algorithm
    if algorithm.whiten is False and not algorithm.needs_group:
        yield f"whiten = false: SkyRL whitens the advantages of {algorithm.advantage}"
    for name in ("missing_eos_penalty", "critic_warmup"):
        if getattr(algorithm, name):
            yield name
    for role in ("actor", "critic"):
        if role not in workload.models:
            continue
        optimizer = workload.optimizer.of(role)
        if optimizer.min_lr_ratio or optimizer.decay_steps:
            yield f"optimizer.{role}: the learning rate falls to 0 at the end of the run"
        if optimizer.eps != 1e-8:
            yield f"optimizer.{role}.eps: it is 1e-8"
    if workload.evaluation or (workload.data and workload.data.evaluate_every):
        yield "evaluation: give data.val_data in SkyRL's form and trainer.eval_interval"
    if workload.oversamples:
        yield (
            f"oversampling_factor = {algorithm.oversampling_factor:g}: SkyRL generates further "
            "batches until enough groups differ, one after the other"
        )
