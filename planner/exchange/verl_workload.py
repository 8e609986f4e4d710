"""The workload of a run of verl: its batch, lengths, models and algorithm, in our words."""

from statistics import fmean
from typing import Any

from pydantic import ValidationError

from planner.exchange.known_models import model_of
from planner.exchange.observed_lengths import SeenLengths, fitted
from planner.exchange.reading import Settings
from planner.exchange.verl_log import VerlLog
from planner.spec.errors import UserError
from planner.spec.files import first_problem
from planner.spec.lengths import Fixed, Lognormal
from planner.spec.workload import Model, Workload

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
MODEL_OPTION = "--model"


def workload_of(
    settings: Settings, log: VerlLog, model: str | None, steps: tuple[dict[str, float], ...]
) -> Workload:
    """The workload of a run, from its settings and from the lengths and models that its log says.
    `model` is where the user says that the actor is. Raises UserError."""
    group = settings.counted("actor_rollout_ref.rollout.n", 1)
    prompts = settings.counted("data.train_batch_size")
    minibatch = settings.counted("actor_rollout_ref.actor.ppo_mini_batch_size")
    advantage = settings.get("algorithm.adv_estimator", str)
    if advantage not in ADVANTAGES:
        known = ", ".join(ADVANTAGES)
        raise UserError(f"algorithm.adv_estimator = {advantage}: only {known} can be imported")
    models = _models(settings, log, model, needs_critic=advantage == "gae")
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
    settings: Settings, log: VerlLog, model: str | None, needs_critic: bool
) -> dict[str, Model | None]:
    actors = [model for model in log.models if model.architecture.endswith("CausalLM")]
    path = settings.get("actor_rollout_ref.model.path", str)
    actor, where = model_of(path, actors, model, MODEL_OPTION)
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
    of_steps = list(zip(steps, means, strict=True))
    seen = SeenLengths(
        named=f"{kind}_length",
        means=means,
        least=[step.get(f"{kind}_length/min", mean) for step, mean in of_steps],
        most=[step.get(f"{kind}_length/max", mean) for step, mean in of_steps],
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
