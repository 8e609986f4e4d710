"""A configuration for AReaL.

The options were read from its 1.0.4: the dataclasses of api/cli_args, the checks and the loop of
its RL trainer, its schedulers, and the losses of its actor."""

from collections.abc import Iterator
from math import ceil

from planner.exchange.configuration import Configuration
from planner.exchange.expressing import Expressed
from planner.exchange.sharing import (
    NEVER_CLIPPED,
    data_file,
    described,
    head_of_script,
    reward_server,
    unsaid_rewards,
)
from planner.spec.lengths import Fixed
from planner.spec.rewards import Overlong
from planner.spec.wording import counted, gigabytes
from planner.spec.workload import Workload

AREAL_SECTIONS = {
    "actor": "actor",
    "critic": "critic",
    "reference": "ref",
}  # in the order of creation
NORMALIZED = {  # rewards, by advantage: levels of mean and deviation, and whether one is left out
    "grpo": ("group", "group", False),
    "dr_grpo": ("group", None, False),
    "rloo": ("group", None, True),
    "reinforce++-baseline": ("group", None, False),
}
BF16_BYTES = 2


def areal_config(found: Expressed, command: str) -> str:
    """The configuration with which AReaL runs a plan as it executes it."""
    workload = found.plan.workload
    head = head_of_script("areal", found, command)
    head.append(
        "Run it with a training script of yours, such as examples/math/gsm8k_rl.py of AReaL's "
        "repository, which gives PPOTrainer the prompts and the reward function: "
        "python3 train.py --config THIS_FILE. MODEL and TRAIN are taken from the environment."
    )
    config = Configuration(head=head)
    config.unsaid += unsaid_rewards("areal", workload)
    config.unsaid += reward_server("areal", found)
    config.unsaid += _unsaid(found)
    _job(config, found)
    _rollout(config, found)
    for role in AREAL_SECTIONS:
        if role in found.plan.trainers:
            _engine(config, found, role)
    _actor(config, workload)
    if workload.critic is not None:
        clip = workload.algorithm.value_clip
        config.add("critic.is_critic", True)
        config.add("critic.ppo_n_minibatches", workload.batch // workload.minibatch)
        config.add("critic.eps_clip", NEVER_CLIPPED if clip == "off" else clip, "of values")
    _run(config, found)
    return config.text()


def _job(config: Configuration, found: Expressed) -> None:
    workload = found.plan.workload
    name = workload.name.replace("_", "-").replace("/", "-")
    roles = [layout for role, layout in found.plan.roles.items() if role != "reward"]
    own = {pool for layout in roles for pool in layout.pools}
    nodes = {node for pool in own for node, _ in found.plan.pools[pool].gpus}
    cluster = found.plan.cluster
    config.add("experiment_name", name)
    config.add("trial_name", "splitplan")
    config.add("seed", workload.seed)
    config.add("total_train_epochs", 1000, "total_train_steps ends it")
    config.add("total_train_steps", workload.steps)
    config.add("tokenizer_path", "${actor.path}")
    moves = any(layout.offload == "all" for layout in found.plan.trainers.values())
    config.add("enable_offload", moves, "whether any role may leave its GPUs")
    config.add("cluster.n_nodes", len(nodes))
    config.add("cluster.n_gpus_per_node", max(cluster.nodes[node].gpus for node in nodes))
    root = config.variable("FILEROOT", "/tmp/areal")
    config.add("cluster.fileroot", root, "seen by all nodes" if len(nodes) > 1 else "")
    config.add("scheduler.type", "local" if len(nodes) == 1 else "ray")
    config.note("train_dataset", "Prompts: AReaL counts them, not sequences")
    path = config.variable("TRAIN", data_file(workload, ".parquet", ".jsonl", ".json"))
    config.add("train_dataset.path", path)
    config.add("train_dataset.type", "rl")
    config.add("train_dataset.batch_size", workload.batch // workload.group)
    config.add("train_dataset.max_length", workload.prompt.longest, "longer prompts are left out")
    config.note("gconfig", "Sampling")
    config.add("gconfig.n_samples", workload.group)
    config.add("gconfig.max_new_tokens", workload.response.longest)
    config.add("gconfig.min_new_tokens", workload.sampling.min_tokens)
    config.add("gconfig.max_tokens", workload.longest)
    config.add("gconfig.temperature", workload.algorithm.temperature)
    config.add("gconfig.top_p", workload.sampling.top_p)
    if workload.sampling.top_k:
        config.add("gconfig.top_k", workload.sampling.top_k)
    if isinstance(workload.response, Fixed):
        config.add("gconfig.ignore_eos", True, "all responses have the same length")


def _rollout(config: Configuration, found: Expressed) -> None:
    plan, rollout = found.plan, found.plan.rollout
    slots, ahead = rollout.replicas * rollout.concurrency, plan.staleness
    config.note("rollout", f"Placement: {described(found)}")
    parallel = f"vllm:d{rollout.replicas}t{rollout.tensor_parallel}"
    size = counted(rollout.tensor_parallel, "GPU")
    config.add("rollout.backend", parallel, f"{counted(rollout.replicas, 'engine')} of {size}")
    _named(config, "rollout")
    config.add("rollout.fileroot", "${cluster.fileroot}")
    config.add("rollout.tokenizer_path", "${tokenizer_path}")
    config.add("rollout.consumer_batch_size", "${train_dataset.batch_size}")
    prompts = ceil(slots / plan.workload.group)
    config.add("rollout.max_concurrent_rollouts", prompts, f"prompts: {slots} sequences at once")
    why = f"generation is up to {counted(ahead, 'update')} ahead" if ahead else "nothing is stale"
    config.add("rollout.max_head_offpolicyness", ahead, why)
    if found.pool_of("actor") in rollout.pools:
        config.add("rollout.scheduling_strategy.type", "colocation", "engines sleep in turn")
        config.add("rollout.scheduling_strategy.target", "actor")
    config.add("rollout.scheduling_spec", "${actor.scheduling_spec}")
    config.add("vllm.model", "${actor.path}")
    config.add("vllm.seed", "${seed}")
    config.add("vllm.dtype", "${actor.dtype}")
    config.add("vllm.max_num_seqs", rollout.concurrency, "sequences of an engine at once")
    config.add("vllm.max_model_len", plan.workload.longest)
    config.add("vllm.gpu_memory_utilization", rollout.memory_fraction)
    config.add("vllm.enable_sleep_mode", rollout.offload, "whether engines sleep while idle")


def _engine(config: Configuration, found: Expressed, role: str) -> None:
    """The section of a role that trains or infers."""
    layout, section = found.plan.trainers[role], AREAL_SECTIONS[role]
    config.note(section, f"{role}: its model over {counted(layout.shard, 'GPU')}")
    config.add(f"{section}.backend", f"fsdp:d{layout.gpus}")
    _named(config, section)
    model = found.plan.workload.model_of(role)
    if role == "actor":
        config.add("actor.path", config.variable("MODEL", str(model.path or "")))
    elif role == "critic":
        path = str(model.path or "${actor.path}")
        config.add("critic.path", config.variable("CRITIC", path))
    else:
        same = model.path == found.plan.workload.actor.path
        config.add("ref.path", "${actor.path}" if same else str(model.path))
    config.add(f"{section}.dtype", "bfloat16")
    config.add(f"{section}.disable_dropout", True)
    config.add(f"{section}.gradient_checkpointing", layout.recompute, "recomputation")
    tokens = layout.micro_batch_tokens
    config.add(f"{section}.mb_spec.max_tokens_per_mb", tokens, "bounds micro-batches")
    moves = layout.offload == "all"
    config.add(f"{section}.offload", moves, "whether it leaves for the host while it idles")
    there = [other for other in AREAL_SECTIONS if other in found.plan.trainers]
    host = next(other for other in there if found.pool_of(other) == found.pool_of(role))
    if host == role:
        config.add(f"{section}.scheduling_strategy.type", "separation", "GPUs of its own")
    else:
        config.add(f"{section}.scheduling_strategy.type", "colocation", "a process beside it")
        config.add(f"{section}.scheduling_strategy.target", AREAL_SECTIONS[host])
    if role == "actor":
        shares = found.pool_of("actor") in found.plan.rollout.pools
        way = "disk" if shares else "xccl"
        why = "AReaL takes no other way on shared GPUs" if shares else "from GPU to GPU"
        config.add("actor.weight_update_mode", way, why)
        program = "python3 -m areal.infra.rpc.rpc_server"
        spec = {"gpu": 1, "cpu": 4, "mem": 32, "port_count": 2, "cmd": program}
        config.add("actor.scheduling_spec", [spec])
    else:
        config.add(f"{section}.scheduling_spec", "${actor.scheduling_spec}")
    if role == "reference":
        config.add("ref.optimizer", None)
    else:
        _optimizer(config, found.plan.workload, role)


def _named(config: Configuration, section: str) -> None:
    config.add(f"{section}.experiment_name", "${experiment_name}")
    config.add(f"{section}.trial_name", "${trial_name}")


def _optimizer(config: Configuration, workload: Workload, role: str) -> None:
    optimizer, section = workload.optimizer.of(role), f"{AREAL_SECTIONS[role]}.optimizer"
    first, second = optimizer.betas
    config.add(f"{section}.type", "adam")
    config.add(f"{section}.lr", optimizer.lr)
    config.add(f"{section}.beta1", first)
    config.add(f"{section}.beta2", second)
    config.add(f"{section}.eps", optimizer.eps)
    config.add(f"{section}.weight_decay", optimizer.weight_decay)
    config.add(f"{section}.gradient_clipping", optimizer.grad_clip)
    config.add(f"{section}.lr_scheduler_type", optimizer.schedule)
    config.add(f"{section}.min_lr_ratio", optimizer.min_lr_ratio)
    share = min(1.0, optimizer.warmup_steps / workload.steps)
    config.add(f"{section}.warmup_steps_proportion", share)


# --- the algorithm ---


def _actor(config: Configuration, workload: Workload) -> None:
    algorithm = workload.algorithm
    minibatches = workload.batch // workload.minibatch
    config.note("actor.ppo_n_minibatches", f"Algorithm: {algorithm.advantage}, {algorithm.loss}")
    config.add("actor.ppo_n_minibatches", minibatches, f"of {workload.minibatch} sequences")
    config.add("actor.temperature", "${gconfig.temperature}")
    config.add("actor.max_new_tokens", "${gconfig.max_new_tokens}")
    config.add("actor.eps_clip", algorithm.clip)
    config.add("actor.eps_clip_higher", algorithm.clip_high)
    config.add("actor.c_clip", algorithm.dual_clip)
    level = "sequence" if algorithm.loss == "gspo" else "token"
    config.add("actor.importance_sampling_level", level)
    critic, plain = algorithm.needs_critic, algorithm.advantage == "reinforce++"
    config.add("actor.discount", algorithm.gamma if critic or plain else 1.0)
    config.add("actor.gae_lambda", algorithm.lam if critic else 1.0)
    config.add("actor.kl_ctl", algorithm.kl_coef if workload.reference is not None else 0.0)
    config.add("actor.kl_estimator", algorithm.kl_kind)
    config.add("actor.reward_clip", NEVER_CLIPPED, "never binds")
    _normalized(config, workload)
    _correction(config, workload)
    for reward in workload.all_rewards:
        if isinstance(reward, Overlong):
            config.add("actor.overlong_reward_penalty", True)
            config.add("actor.overlong_tokens", reward.overlong_buffer)
            config.add("actor.overlong_penalty_factor", reward.weight)


def _normalized(config: Configuration, workload: Workload) -> None:
    algorithm = workload.algorithm
    config.add("actor.reward_norm", None)
    if algorithm.advantage in NORMALIZED:
        mean, deviation, leave_out = NORMALIZED[algorithm.advantage]
        config.add("actor.reward_norm", {})
        config.add("actor.reward_norm.mean_level", mean)
        config.add("actor.reward_norm.std_level", deviation)
        config.add("actor.reward_norm.mean_leave1out", leave_out)
        config.add("actor.reward_norm.group_size", workload.group)
    config.add("actor.adv_norm", None)
    if algorithm.whitens:
        config.add("actor.adv_norm", {})
        config.add("actor.adv_norm.mean_level", "batch", "advantages are whitened")
        config.add("actor.adv_norm.std_level", "batch")


def _correction(config: Configuration, workload: Workload) -> None:
    """What is done about log-probs that the engine and the trainer compute differently."""
    algorithm = workload.algorithm
    recompute = workload.proximal == "recompute"
    weighs = recompute and algorithm.importance != "off"
    config.add("actor.recompute_logprob", recompute, "the trainer computes old log-probs")
    config.add("actor.use_decoupled_loss", weighs, "importance weights against the rollout's")
    if weighs and algorithm.importance_cap > 1:
        section = "actor.rejection_sampling"
        config.add(f"{section}.level", algorithm.importance)
        config.add(f"{section}.metric", "ratio")
        config.add(f"{section}.action", "clamp", "weights are truncated")
        config.add(f"{section}.agg", "sum" if algorithm.importance == "sequence" else "mean")
        config.add(f"{section}.upper", algorithm.importance_cap)


def _run(config: Configuration, found: Expressed) -> None:
    config.note("saver", "Nothing is saved or evaluated: set freq_steps")
    for section in ("saver", "evaluator", "recover", "stats_logger"):
        _named(config, section)
        config.add(f"{section}.fileroot", "${cluster.fileroot}")
    config.add("recover.mode", "disabled")


def _unsaid(found: Expressed) -> Iterator[str]:
    """What AReaL has no option for."""
    workload, algorithm = found.plan.workload, found.plan.workload.algorithm
    if found.pool_of("actor") in found.plan.rollout.pools:
        size = gigabytes(BF16_BYTES * workload.actor.shape.parameters())
        yield (
            f"weights that go to engines on the same GPUs without a file: AReaL writes {size} and "
            "each engine reads them, every step. The prediction has that only from a profile of "
            "such runs"
        )
    if workload.reference is not None and algorithm.kl_kind != "k1":
        yield f"kl_kind = {algorithm.kl_kind} in the loss: AReaL takes it off the rewards"
    if workload.reference is not None and not algorithm.kl_coef:
        yield "a reference model with kl_coef = 0: AReaL leaves it out"
    if algorithm.kl_target is not None:
        yield "kl_target: the coefficient stays as it is"
    if algorithm.loss == "cispo":
        yield "loss = cispo: it is PPO's"
    if algorithm.aggregation != "token":
        yield f"aggregation = {algorithm.aggregation}: tokens are averaged"
    if algorithm.importance != "off" and algorithm.importance_cap <= 1:
        yield "importance_cap of 1 or less: weights are not truncated"
    if algorithm.entropy_coef:
        yield "entropy_coef: there is no such term"
    for name in ("mask_truncated", "missing_eos_penalty", "critic_warmup"):
        if getattr(algorithm, name):
            yield name
    if algorithm.ratio_mask != "off":
        yield "ratio_mask: actor.rejection_sampling can mask, but then does not truncate weights"
    if workload.sampling.min_p:
        yield "sampling.min_p: engines sample without it"
    if workload.evaluation or (workload.data and workload.data.evaluate_every):
        yield "evaluation: give valid_dataset and evaluator.freq_steps"
    if workload.oversamples:
        yield (
            f"oversampling_factor = {algorithm.oversampling_factor:g}: give train() a "
            "dynamic_filter_fn that drops groups with equal scores; AReaL then generates until "
            "enough are left"
        )
