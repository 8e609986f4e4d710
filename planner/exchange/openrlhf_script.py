"""A launch script for OpenRLHF.

The options were read from its 0.11.2: the parser of `train_ppo_ray`, the checks behind it, and the
trainers."""

from collections.abc import Iterator

from planner.exchange.expressing import Expressed
from planner.exchange.script import Script
from planner.exchange.sharing import data_file, described, head_of_script, unsaid_rewards
from planner.spec.rewards import Overlong, RewardFunction, RewardServer
from planner.spec.wording import counted
from planner.spec.workload import Workload

THEIR_NAMES = {"actor": "actor", "reference": "ref", "critic": "critic", "reward": "reward"}
ESTIMATES = {
    "gae": "gae",
    "grpo": "group_norm",
    "dr_grpo": "dr_grpo",
    "rloo": "rloo",
    "reinforce++": "reinforce",
    "reinforce++-baseline": "reinforce_baseline",
}


def openrlhf_script(found: Expressed, command: str) -> str:
    """The script that runs a plan as OpenRLHF executes it."""
    head = head_of_script("openrlhf", found, command)
    program = "python3 -m openrlhf.cli.train_ppo_ray"
    script = Script(head=head, command=program, separator=" ")
    workload = found.plan.workload
    script.unsaid += unsaid_rewards("openrlhf", workload)
    _placement(script, found)
    _layouts(script, found)
    _rollout(script, found)
    _batch(script, workload)
    _algorithm(script, workload)
    _models(script, workload)
    script.unsaid += _unsaid(found)
    return script.text()


def _placement(script: Script, found: Expressed) -> None:
    script.section(f"Placement: {described(found)}")
    for role in found.plan.trainers:
        nodes, gpus = found.grid_of(role)
        script.add(f"--{THEIR_NAMES[role]}.num_nodes", nodes)
        script.add(f"--{THEIR_NAMES[role]}.num_gpus_per_node", gpus)
    homes = {role: found.pool_of(role) for role in found.plan.trainers}
    if len(set(homes.values())) == 1:
        script.add("--train.colocate_all", why="all roles on the same GPUs")
    else:
        if homes.get("reference") == homes["actor"]:
            script.add("--train.colocate_actor_ref")
        if "critic" in homes and homes.get("reward") == homes["critic"]:
            script.add("--train.colocate_critic_reward")
    if found.mode.ahead:
        script.add("--train.async_enable", why="generation is one batch ahead")
        script.add("--train.async_queue_size", 1)


def _layouts(script: Script, found: Expressed) -> None:
    layouts = found.plan.trainers
    tokens = layouts["actor"].micro_batch_tokens
    script.section("Layouts: each model over all GPUs of its role")
    script.add("--ds.zero_stage", 3)
    script.add("--ds.packing_samples", why="sequences are packed, as is predicted")
    script.add("--train.dynamic_batch_enable", why="micro-batches are bounded in tokens")
    script.add("--train.max_tokens_per_gpu", tokens)
    script.add("--rollout.max_tokens_per_gpu", tokens)
    if layouts["actor"].recompute:
        script.add("--actor.gradient_checkpointing_enable", why="recomputation, of both updates")
    for role in ("reference", "reward"):
        if role in layouts and layouts[role].offload == "all":
            script.add(
                f"--{THEIR_NAMES[role]}.offload", why="its weights go to the host while it idles"
            )
    if _sleeps(found):
        script.add("--ds.enable_sleep", why="what trains goes to the host while it idles")


def _sleeps(found: Expressed) -> bool:
    trained = [
        found.plan.trainers[role] for role in ("actor", "critic") if role in found.plan.roles
    ]
    return any(layout.offload != "none" for layout in trained)


def _rollout(script: Script, found: Expressed) -> None:
    rollout = found.plan.rollout
    size = counted(rollout.tensor_parallel, "GPU")
    script.section(f"Rollout: {counted(rollout.replicas, 'engine')} of {size}")
    script.add("--vllm.num_engines", rollout.replicas)
    script.add("--vllm.tensor_parallel_size", rollout.tensor_parallel)
    script.add("--vllm.gpu_memory_utilization", rollout.memory_fraction)
    if rollout.offload:
        script.add("--vllm.enable_sleep", why="engines sleep while idle")


def _batch(script: Script, workload: Workload) -> None:
    group = workload.group
    script.section(
        f"Batch: {workload.batch} sequences, minibatches of {workload.minibatch}; the rollout "
        "counts prompts"
    )
    script.add("--rollout.batch_size", workload.batch // group)
    script.add("--rollout.n_samples_per_prompt", group)
    script.add("--train.batch_size", workload.minibatch)
    script.add("--train.max_epochs", workload.algorithm.epochs)
    script.add("--data.max_len", workload.longest)
    script.add("--rollout.max_new_tokens", workload.response.longest)
    script.add("--rollout.temperature", workload.algorithm.temperature)
    script.add("--rollout.top_p", workload.sampling.top_p)


def _algorithm(script: Script, workload: Workload) -> None:
    algorithm = workload.algorithm
    script.section(f"Algorithm: {algorithm.advantage}, {algorithm.loss}")
    script.add("--algo.advantage.estimator", ESTIMATES[algorithm.advantage])
    script.add("--algo.advantage.gamma", algorithm.gamma)
    script.add("--algo.advantage.lambd", algorithm.lam)
    coefficient = algorithm.kl_coef if workload.reference is not None else 0.0
    script.add("--algo.kl.init_coef", coefficient, "" if coefficient else "no reference model")
    script.add("--algo.kl.estimator", algorithm.kl_kind)
    if algorithm.kl_kind != "k1":
        script.add("--algo.kl.use_loss")
    if algorithm.kl_target is not None:
        script.add("--algo.kl.target", algorithm.kl_target)
        script.add("--algo.kl.horizon", round(algorithm.kl_horizon))
    script.add("--actor.policy_loss_type", "gspo" if algorithm.loss == "gspo" else "ppo")
    by_sequence = algorithm.aggregation == "sequence"
    script.add("--actor.loss_agg_mode", "seq-mean-token-mean" if by_sequence else "token-mean")
    high = algorithm.clip if algorithm.clip_high is None else algorithm.clip_high
    script.lines.append(f"  --actor.eps_clip_low_high {algorithm.clip:g} {high:g}")
    if algorithm.dual_clip:
        script.add("--actor.dual_clip", algorithm.dual_clip)
    if algorithm.entropy_coef:
        script.add("--actor.entropy_coef", algorithm.entropy_coef)
    for role in ("actor", "critic"):
        if role in workload.models:
            optimizer = workload.optimizer.of(role)
            script.add(f"--{role}.adam.lr", optimizer.lr)
            first, second = optimizer.betas
            script.lines.append(f"  --{role}.adam.betas {first:g} {second:g}")
            script.add(f"--{role}.adam.weight_decay", optimizer.weight_decay)
            script.add(f"--{role}.max_norm", optimizer.grad_clip)
            if optimizer.schedule == "constant":
                script.add(f"--{role}.lr_scheduler", "constant_with_warmup")
                share = min(1.0, optimizer.warmup_steps / workload.steps)
                script.add(f"--{role}.lr_warmup_ratio", share)
    if workload.critic is not None and algorithm.value_clip != "off":
        script.add("--critic.value_clip", algorithm.value_clip)


def _models(script: Script, workload: Workload) -> None:
    script.section("Models, rewards and prompts")
    path = str(workload.actor.path or "")
    model = script.variable("MODEL", path, "the actor: a Hugging Face directory")
    script.add("--actor.model_name_or_path", model)
    if workload.critic is not None:
        default = str(workload.critic.path or "$MODEL")
        theirs = script.variable("CRITIC", default, "the critic: a Hugging Face directory")
        script.add("--critic.model_name_or_path", theirs)
    reward = workload.models.get("reward")
    if reward is not None:
        path = str(reward.path or "")
        theirs = script.variable("REWARD_MODEL", path, "the reward model: a Hugging Face directory")
        script.add("--reward.model_name_or_path", theirs)
    else:
        file = script.variable("REWARD", _reward(workload), "a reward function's file, or a server")
        script.add("--reward.remote_url", file)
    prompts = data_file(workload, ".jsonl", ".json")
    name = script.variable("TRAIN", prompts, "prompts: JSON lines, or a data set of the hub")
    script.add("--data.prompt_dataset", name)


def _reward(workload: Workload) -> str:
    for reward in workload.all_rewards:
        if isinstance(reward, RewardFunction) and reward.file:
            return reward.file
        if isinstance(reward, RewardServer):
            return reward.url
    return ""


def _unsaid(found: Expressed) -> Iterator[str]:
    """What OpenRLHF has no option for."""
    workload, algorithm = found.plan.workload, found.plan.workload.algorithm
    if _sleeps(found) and len(found.plan.pools) > 2:
        yield "what trains can leave the GPU only if both updates run one after the other"
    yield (
        f"how many sequences an engine has at once ({found.plan.rollout.concurrency}), and how "
        "many steps are run: --train.num_episodes counts passes over the prompts"
    )
    if algorithm.loss == "cispo":
        yield "loss = cispo: it is PPO's"
    if algorithm.aggregation == "constant":
        yield "aggregation = constant: tokens are averaged"
    if algorithm.importance != "off" and workload.proximal == "recompute":
        yield (
            "importance weights: --algo.advantage.is_correction_level and its threshold are other "
            "settings"
        )
    if algorithm.ratio_mask != "off" or algorithm.mask_truncated or algorithm.missing_eos_penalty:
        yield "ratio_mask, mask_truncated and missing_eos_penalty"
    if algorithm.critic_warmup:
        yield f"critic_warmup = {algorithm.critic_warmup}: see --critic.freezing_steps"
    if workload.proximal == "rollout":
        yield "proximal = rollout: log-probs are computed again"
    if workload.sampling.top_k or workload.sampling.min_p or workload.sampling.min_tokens:
        yield "sampling: top_k, min_p and min_tokens"
    for role in ("actor", "critic"):
        if role in workload.models and workload.optimizer.of(role).schedule != "constant":
            yield f"optimizer.{role}.schedule: the default of --{role}.lr_scheduler stays"
    if workload.oversamples:
        yield "oversampling_factor: see --algo.dynamic_filtering_enable"
    if any(isinstance(reward, Overlong) for reward in workload.all_rewards):
        yield "the penalty on length: see --reward.overlong_buffer_len"
