"""How a job learns: its algorithm, and the optimizers of its trained roles. The formulas and their
sources are in `executor/training/`."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from planner.spec.files import Spec, Steps
from planner.spec.limits import MOST_STEPS

Advantage = Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++-baseline"]
Loss = Literal["ppo", "gspo", "cispo"]
Aggregation = Literal["token", "sequence", "constant"]
Schedule = Literal["constant", "linear", "cosine"]
KLKind = Literal["k1", "k2", "k3"]
Weighting = Literal["off", "token", "sequence"]
Masking = Literal["off", "token", "sequence", "geometric"]

OF_A_CRITIC = ("gae",)  # advantages that need one; the others have no use for it
OF_A_GROUP = ("grpo", "dr_grpo", "rloo", "reinforce++-baseline")  # they compare its samples
WHITENED = ("gae", "reinforce++", "reinforce++-baseline")  # over the batch, by their authors
MOST_OVERSAMPLING = 16.0

Share = Annotated[float, Field(ge=0, le=1)]
Epochs = Annotated[int, Field(gt=0, le=1000)]
SomeSteps = Annotated[int, Field(ge=0, le=MOST_STEPS)]


class Algorithm(Spec):
    """How advantages and losses are computed."""

    advantage: Advantage = "gae"
    loss: Loss = "ppo"
    aggregation: Aggregation = "token"
    gamma: Share = 1.0
    lam: Share = 0.95
    kl_coef: NonNegativeFloat = 0.05
    kl_kind: KLKind = "k1"
    kl_target: PositiveFloat | None = None  # kl_coef adapts itself to it
    kl_horizon: PositiveFloat = 10_000.0  # sequences
    clip: PositiveFloat = 0.2
    clip_high: PositiveFloat | None = None  # None: as clip
    value_clip: PositiveFloat | Literal["off"] = 0.2
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    # What the rollout sampled under other probabilities than the trainer's: truncated weights, and
    # masks where the ratio of the two lies outside of the bounds.
    importance: Weighting = "token"
    importance_cap: PositiveFloat = 2.0
    ratio_mask: Masking = "off"
    ratio_mask_low: NonNegativeFloat = 0.5
    ratio_mask_high: PositiveFloat = 2.0
    mask_truncated: bool = False
    # Dynamic sampling: so many times the batch is generated, and groups whose samples all have the
    # same score give way to others.
    oversampling_factor: Annotated[float, Field(ge=1, le=MOST_OVERSAMPLING)] = 1.0
    entropy_coef: NonNegativeFloat = 0.0
    temperature: PositiveFloat = 1.0
    missing_eos_penalty: NonNegativeFloat = 0.0
    whiten: bool | None = None  # None: as the advantage's authors do
    epochs: Epochs = 1
    critic_warmup: SomeSteps = 0  # steps in which the critic alone is updated

    @model_validator(mode="after")
    def _consistent(self) -> "Algorithm":
        if self.kl_target is not None and self.kl_kind != "k1":
            raise ValueError(
                f"kl_target adapts the penalty in the reward, and kl_kind = {self.kl_kind!r} is a "
                'loss; set kl_kind = "k1" or leave out kl_target'
            )
        if self.ratio_mask_low >= self.ratio_mask_high:
            raise ValueError(
                f"ratio_mask_low = {self.ratio_mask_low:g} is not below ratio_mask_high = "
                f"{self.ratio_mask_high:g}; change one of them"
            )
        if self.dual_clip is not None and self.loss == "cispo":
            raise ValueError(
                "dual_clip bounds an objective that loss = 'cispo' has not; leave it out"
            )
        if self.critic_warmup and not self.needs_critic:
            raise ValueError(
                f"critic_warmup is for a critic, which advantage = {self.advantage!r} has not; "
                "leave it out"
            )
        return self

    @property
    def needs_critic(self) -> bool:
        return self.advantage in OF_A_CRITIC

    @property
    def needs_group(self) -> bool:
        return self.advantage in OF_A_GROUP

    @property
    def whitens(self) -> bool:
        """Whether advantages are whitened over the batch."""
        return self.advantage in WHITENED if self.whiten is None else self.whiten


class Optimizer(Spec):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) of one role, and its learning rate over
    the steps of a run."""

    lr: PositiveFloat = 1e-6
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    grad_clip: PositiveFloat = 1.0
    warmup_steps: SomeSteps = 0
    schedule: Schedule = "constant"
    decay_steps: Steps | None = None  # None: the workload's steps
    min_lr_ratio: Share = 0.0  # of lr, where the decay ends


class CriticOptimizer(Optimizer):
    lr: PositiveFloat = 5e-6


class Optimizers(Spec):
    """The optimizer of each role that trains."""

    actor: Optimizer = Optimizer()
    critic: CriticOptimizer = CriticOptimizer()

    def of(self, role: str) -> Optimizer:
        return self.critic if role == "critic" else self.actor


# Keys of `[ppo]`, as earlier files have it, that are the optimizers' now: of which roles, and their
# names there.
_OPTIMIZERS = {
    "actor_lr": (("actor",), "lr"),
    "critic_lr": (("critic",), "lr"),
    "weight_decay": (("actor", "critic"), "weight_decay"),
    "grad_clip": (("actor", "critic"), "grad_clip"),
}


def bring_up_to_date(data: dict[str, Any]) -> None:
    """Rewrite a workload of an earlier version, whose settings stood under `ppo`, as one of this.
    It is done in place, so that what is wrong is named by the keys that are read. Raises ValueError
    for a key that stands in both places."""
    if not isinstance(old := data.get("ppo"), dict):
        return
    del data["ppo"]
    if data.get("advantage") == "gae":
        del data["advantage"]  # where it stood, without a choice
    for key, value in old.items():
        roles, name = _OPTIMIZERS.get(key, ((), key))
        for path in [["optimizer", role] for role in roles] or [["algorithm"]]:
            section = data
            for part in path:
                found = section.get(part, {})
                if not isinstance(found, dict):
                    return  # which is said where it is read
                section[part] = section = dict(found)
            if name in section:
                raise ValueError(f"ppo.{key} stands under {'.'.join(path)} too; keep one of them")
            section[name] = value
