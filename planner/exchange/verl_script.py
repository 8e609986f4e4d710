"""A launch script for verl.

The options were read from verl 0.9.1: the files of trainer/config, its v1 trainers, and the
dataclasses that check them."""

from collections.abc import Iterator

from planner.exchange.expressing import Expressed
from planner.exchange.script import Script
from planner.exchange.sharing import (
    NEVER_CLIPPED,
    data_file,
    described,
    head_of_script,
    unsaid_rewards,
)
from planner.spec.lengths import Fixed
from planner.spec.plan import TrainerRole
from planner.spec.rewards import RewardFunction
from planner.spec.wording import counted
from planner.spec.workload import Workload

ACTOR, ROLLOUT, REFERENCE = (
    "actor_rollout_ref.actor",
    "actor_rollout_ref.rollout",
    "actor_rollout_ref.ref",
)
ESTIMATORS = {
    "gae": "gae",
    "grpo": "grpo",
    "dr_grpo": "grpo",
    "rloo": "rloo",
    "reinforce++": "reinforce_plus_plus",
    "reinforce++-baseline": "reinforce_plus_plus_baseline",
}
LOSS_MODES = {"ppo": "vanilla", "gspo": "gspo", "cispo": "cispo"}
AGGREGATED = {
    "token": "token-mean",
    "sequence": "seq-mean-token-mean",
    "constant": "seq-mean-token-sum-norm",
}
KL_LOSSES = {"k1": "kl", "k2": "mse", "k3": "low_var_kl"}


def verl_script(found: Expressed, command: str) -> str:
    """The script that runs a plan as verl executes it."""
    head = head_of_script("verl", found, command)
    script = Script(head=head, command="python3 -m verl.trainer.main_ppo", separator="=")
    script.unsaid += unsaid_rewards("verl", found.plan.workload)
    _placement(script, found)
    _batch(script, found.plan.workload)
    _trainers(script, found)
    _rollout(script, found)
    _algorithm(script, found.plan.workload)
    _rewards(script, found)
    _run(script, found.plan.workload)
    script.unsaid += _unsaid(found.plan.workload)
    return script.text()


def _placement(script: Script, found: Expressed) -> None:
    nodes, gpus = found.grid_of("actor")
    script.section(f"Placement: {described(found)}")
    script.add("trainer.nnodes", nodes)
    script.add("trainer.n_gpus_per_node", gpus)
    if not found.mode.ahead:
        script.add("trainer.v1.trainer_mode", "sync", "one call after the other on these GPUs")
        return
    workload = found.plan.workload
    nodes, gpus = found.grid_of("rollout")
    mode = "trainer.v1.separate_async"
    script.add("trainer.v1.trainer_mode", "separate_async", "generation on GPUs of its own")
    script.add("actor_rollout_ref.hybrid_engine", False, "and on no others")
    script.add(f"{ROLLOUT}.nnodes", nodes)
    script.add(f"{ROLLOUT}.n_gpus_per_node", gpus)
    script.add(f"{ROLLOUT}.checkpoint_engine.backend", "nccl", "weights go from GPU to GPU")
    script.add(f"{mode}.num_warmup_batches", 1, "generation is one batch ahead")
    steps = workload.batch // workload.minibatch
    script.add(f"{mode}.parameter_sync_step", steps, "new weights after every batch of minibatches")


def _batch(script: Script, workload: Workload) -> None:
    group = workload.group
    script.section(
        f"Batch: {workload.batch} sequences, minibatches of {workload.minibatch}; verl counts "
        "prompts"
    )
    train = data_file(workload, ".parquet")
    name = script.variable("TRAIN", train, "prompts: a Parquet file in verl's form, or several")
    script.add("data.train_files", name)
    script.add("data.val_files", name, "not used: test_freq is -1")
    script.add("data.train_batch_size", workload.batch // group)
    script.add(f"{ROLLOUT}.n", group)
    script.add(f"{ACTOR}.ppo_mini_batch_size", workload.minibatch // group)
    script.add("data.max_prompt_length", workload.prompt.longest)
    script.add("data.max_response_length", workload.response.longest)
    if workload.oversamples:
        script.add("algorithm.filter_groups.enable", True, "groups with equal scores are dropped")


# --- layouts ---


def _trainers(script: Script, found: Expressed) -> None:
    workload, layouts = found.plan.workload, found.plan.trainers
    actor = layouts["actor"]
    path = workload.actor.path
    model = script.variable("MODEL", str(path or ""), "the actor: a Hugging Face directory")
    script.section(f"Actor: {_layout_text(actor)}")
    script.add("actor_rollout_ref.model.path", model)
    _sharded(script, ACTOR, "fsdp_config", "actor_rollout_ref.model", actor)
    script.add(f"{ROLLOUT}.log_prob_max_token_len_per_gpu", actor.micro_batch_tokens)
    if "reference" in layouts:
        reference = layouts["reference"]
        script.section(f"Reference: {_layout_text(reference)}")
        script.add(f"{REFERENCE}.log_prob_max_token_len_per_gpu", reference.micro_batch_tokens)
        script.add(f"{REFERENCE}.fsdp_config.fsdp_size", _fsdp_size(reference))
        offloaded = reference.offload == "all"
        script.add(f"{REFERENCE}.fsdp_config.param_offload", offloaded)
    if "critic" in layouts:
        critic = layouts["critic"]
        assert workload.critic
        default = str(workload.critic.path or "$MODEL")
        theirs = script.variable("CRITIC", default, "the critic: a Hugging Face directory")
        script.section(f"Critic: {_layout_text(critic)}")
        script.add("critic.model.path", theirs)
        script.add("critic.ppo_mini_batch_size", workload.minibatch // workload.group)
        _sharded(script, "critic", "fsdp", "critic.model", critic)
        script.add("critic.forward_max_token_len_per_gpu", critic.micro_batch_tokens)


def _sharded(script: Script, section: str, fsdp: str, model: str, layout: TrainerRole) -> None:
    """The options of a trained role's layout; verl calls a critic's FSDP by another name."""
    script.add(f"{section}.strategy", "fsdp2")
    script.add(f"{section}.{fsdp}.fsdp_size", _fsdp_size(layout), "GPUs that share the model")
    script.add(f"{section}.use_dynamic_bsz", True, "micro-batches are bounded in tokens")
    script.add(f"{section}.ppo_max_token_len_per_gpu", layout.micro_batch_tokens)
    script.add(f"{model}.use_remove_padding", True, "sequences are packed, as is predicted")
    script.add(f"{model}.enable_gradient_checkpointing", layout.recompute, "recomputation")
    script.add(f"{section}.{fsdp}.param_offload", layout.offload == "all")
    script.add(f"{section}.{fsdp}.optimizer_offload", layout.offload != "none")


def _fsdp_size(layout: TrainerRole) -> int:
    return -1 if layout.replicas == 1 else layout.shard


def _layout_text(layout: TrainerRole) -> str:
    text = f"its model over {counted(layout.shard, 'GPU')}"
    text += f", {layout.replicas} times" if layout.replicas > 1 else ""
    moved = {"none": "nothing", "optimizer": "its optimizer", "all": "all of it"}[layout.offload]
    return f"{text}; {moved} goes to the host while it idles"


def _rollout(script: Script, found: Expressed) -> None:
    workload, rollout = found.plan.workload, found.plan.rollout
    script.section(
        f"Rollout: {counted(rollout.replicas, 'engine')} of "
        f"{counted(rollout.tensor_parallel, 'GPU')}, each for {rollout.concurrency} sequences at "
        "once"
    )
    script.add(f"{ROLLOUT}.name", "vllm")
    script.add(f"{ROLLOUT}.tensor_model_parallel_size", rollout.tensor_parallel)
    script.add(f"{ROLLOUT}.max_num_seqs", rollout.concurrency)
    script.add(f"{ROLLOUT}.max_model_len", workload.longest)
    script.add(f"{ROLLOUT}.gpu_memory_utilization", rollout.memory_fraction)
    script.add(f"{ROLLOUT}.free_cache_engine", rollout.offload, "whether engines sleep while idle")
    script.add(f"{ROLLOUT}.temperature", workload.algorithm.temperature)
    script.add(f"{ROLLOUT}.top_p", workload.sampling.top_p)
    script.add(f"{ROLLOUT}.top_k", workload.sampling.top_k or -1)
    if isinstance(workload.response, Fixed):
        script.add(f"{ROLLOUT}.ignore_eos", True, "all responses have the same length")


# --- the algorithm ---


def _algorithm(script: Script, workload: Workload) -> None:
    algorithm = workload.algorithm
    script.section(f"Algorithm: {algorithm.advantage}, {algorithm.loss}")
    script.add("algorithm.adv_estimator", ESTIMATORS[algorithm.advantage])
    if algorithm.advantage == "dr_grpo":
        script.add("algorithm.norm_adv_by_std_in_grpo", False)
    script.add("algorithm.gamma", algorithm.gamma)
    script.add("algorithm.lam", algorithm.lam)
    _kl(script, workload)
    _correction(script, workload)
    script.add(f"{ACTOR}.policy_loss.loss_mode", LOSS_MODES[algorithm.loss])
    script.add(f"{ACTOR}.loss_agg_mode", AGGREGATED[algorithm.aggregation])
    high = algorithm.clip if algorithm.clip_high is None else algorithm.clip_high
    script.add(f"{ACTOR}.clip_ratio", algorithm.clip)
    script.add(f"{ACTOR}.clip_ratio_low", algorithm.clip)
    script.add(f"{ACTOR}.clip_ratio_high", high)
    dual = algorithm.dual_clip or NEVER_CLIPPED
    script.add(f"{ACTOR}.clip_ratio_c", dual, "" if algorithm.dual_clip else "never binds")
    script.add(f"{ACTOR}.entropy_coeff", algorithm.entropy_coef)
    script.add(f"{ACTOR}.ppo_epochs", algorithm.epochs)
    for role, section in (("actor", ACTOR), ("critic", "critic")):
        if role in workload.models:
            _optimizer(script, workload, role, section)
    if workload.critic is not None:
        clip = NEVER_CLIPPED if algorithm.value_clip == "off" else algorithm.value_clip
        script.add("critic.cliprange_value", clip)
        script.add("critic.ppo_epochs", algorithm.epochs)
        script.add("trainer.critic_warmup", algorithm.critic_warmup)


def _kl(script: Script, workload: Workload) -> None:
    algorithm = workload.algorithm
    in_reward = workload.reference is not None and algorithm.kl_kind == "k1"
    in_loss = workload.reference is not None and algorithm.kl_kind != "k1"
    script.add("algorithm.use_kl_in_reward", in_reward)
    script.add(f"{ACTOR}.use_kl_loss", in_loss)
    if in_reward:
        script.add("algorithm.kl_penalty", "kl")
        script.add("algorithm.kl_ctrl.kl_coef", algorithm.kl_coef)
        if algorithm.kl_target is not None:
            script.add("algorithm.kl_ctrl.type", "adaptive")
            script.add("algorithm.kl_ctrl.target_kl", algorithm.kl_target)
            script.add("algorithm.kl_ctrl.horizon", round(algorithm.kl_horizon))
    elif in_loss:
        script.add(f"{ACTOR}.kl_loss_coef", algorithm.kl_coef)
        script.add(f"{ACTOR}.kl_loss_type", KL_LOSSES[algorithm.kl_kind])


def _correction(script: Script, workload: Workload) -> None:
    """What is done about log-probs that the engine and the trainer compute differently."""
    section, algorithm = "algorithm.rollout_correction", workload.algorithm
    bypass = workload.proximal == "rollout"
    script.add(f"{section}.bypass_mode", bypass, "whether the rollout's log-probs are the old ones")
    script.add(f"{ROLLOUT}.calculate_log_probs", True)
    if algorithm.importance != "off" and not bypass:
        script.add(f"{section}.rollout_is", algorithm.importance)
        script.add(f"{section}.rollout_is_threshold", algorithm.importance_cap)


def _optimizer(script: Script, workload: Workload, role: str, section: str) -> None:
    optimizer = workload.optimizer.of(role)
    script.add(f"{section}.optim.lr", optimizer.lr)
    script.add(f"{section}.optim.betas", list(optimizer.betas))
    script.add(f"{section}.optim.weight_decay", optimizer.weight_decay)
    script.add(f"{section}.optim.clip_grad", optimizer.grad_clip)
    script.add(f"{section}.optim.lr_warmup_steps", optimizer.warmup_steps)
    cosine = optimizer.schedule == "cosine"
    script.add(f"{section}.optim.lr_scheduler_type", "cosine" if cosine else "constant")
    if cosine:
        script.add(f"{section}.optim.min_lr_ratio", optimizer.min_lr_ratio)


def _rewards(script: Script, found: Expressed) -> None:
    workload = found.plan.workload
    model = workload.models.get("reward")
    if model is not None:
        script.section("Reward model: verl has an engine score, here predicted as a forward pass")
        section = "reward.reward_model"
        path = str(model.path or "")
        script.add(f"{section}.enable", True)
        theirs = script.variable("REWARD_MODEL", path, "the reward model: a Hugging Face directory")
        script.add(f"{section}.model_path", theirs)
        script.add(f"{section}.rollout.name", "vllm")
        script.add(f"{section}.rollout.tensor_model_parallel_size", 1)
        apart = found.pool_of("reward") != found.pool_of("actor")
        script.add(f"{section}.enable_resource_pool", apart, "whether it has GPUs of its own")
        if apart:
            nodes, gpus = found.grid_of("reward")
            script.add(f"{section}.nnodes", nodes)
            script.add(f"{section}.n_gpus_per_node", gpus)
    functions = [
        one for one in workload.all_rewards if isinstance(one, RewardFunction) and one.file
    ]
    if functions:
        script.section("Reward function, which verl calls inside of generation")
        file = script.variable("REWARD", functions[0].file, "the reward function's file")
        script.add("reward.custom_reward_function.path", file)
        script.add("reward.custom_reward_function.name", functions[0].in_file or "compute_score")


def _run(script: Script, workload: Workload) -> None:
    script.section("The run")
    script.add("trainer.total_training_steps", workload.steps)
    script.add("trainer.total_epochs", 1000, "total_training_steps ends it")
    script.add("trainer.logger", "[console]", "which `plan import verl` reads")
    script.add("trainer.project_name", "splitplan")
    script.add("trainer.experiment_name", workload.name)
    script.add("trainer.val_before_train", False)
    script.add("trainer.test_freq", -1)
    script.add("trainer.save_freq", -1)


def _unsaid(workload: Workload) -> Iterator[str]:
    """What verl has no option for."""
    algorithm = workload.algorithm
    if algorithm.mask_truncated:
        yield "mask_truncated: truncated responses are trained on"
    if algorithm.missing_eos_penalty:
        yield "missing_eos_penalty: put it into the reward function"
    if algorithm.ratio_mask != "off":
        yield "ratio_mask: its bounds are another setting (algorithm.rollout_correction.rollout_rs)"
    if workload.sampling.min_p or workload.sampling.min_tokens:
        yield "sampling.min_p and min_tokens: engines sample without them"
    for role in ("actor", "critic"):
        if role in workload.models and workload.optimizer.of(role).schedule == "linear":
            yield f"optimizer.{role}.schedule = linear: the learning rate stays constant"
    if workload.evaluation or (workload.data and workload.data.evaluate_every):
        yield "evaluation: give data.val_files in verl's form and trainer.test_freq"
    if workload.oversamples:
        yield (
            f"oversampling_factor = {algorithm.oversampling_factor:g}: verl generates further "
            "batches until enough groups differ, one after the other"
        )
