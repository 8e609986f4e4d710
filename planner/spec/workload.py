"""The question: the models, the batch, the lengths and the algorithm of one training job."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, Tag, model_validator

from planner.spec.algorithm import Algorithm, Optimizers, bring_up_to_date
from planner.spec.data import (
    Data,
    EvaluationSet,
    Sampler,
    Sampling,
    check_evaluation,
    check_sampling,
)
from planner.spec.dataflow import Dataflow, ppo, reinforce
from planner.spec.files import Count, File, Seed, Spec, Steps, Tokens, by_keys
from planner.spec.lengths import Lengths
from planner.spec.limits import MOST_STALENESS
from planner.spec.rewards import (
    HostReward,
    Overlong,
    RewardFunction,
    RewardServer,
    Weighed,
)

MODEL_ROLES = ("actor", "critic", "reference", "reward")
MOST_PARAMETERS = 10**15
ROLES = ("actor", "rollout", "critic", "reference", "reward")
TENSOR_PARALLEL = (1, 2, 4, 8)  # GPUs that an engine may have
TRAINED = ("actor", "critic")  # the others of MODEL_ROLES only infer
Head = Literal["lm", "scalar"]


class Shape(Spec):
    """The shape of a decoder-only transformer with grouped-query attention and a gated MLP."""

    hidden: Count
    layers: Annotated[int, Field(gt=0, le=10_000)]
    heads: Count
    kv_heads: Count
    intermediate: Count
    vocab: Tokens
    head_dim: Count = 0  # 0: hidden / heads
    tied_embeddings: bool = False

    @model_validator(mode="before")
    @classmethod
    def _default_head_dim(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("head_dim"):
            return data
        try:
            head_dim = int(data["hidden"]) // int(data["heads"])
        except (KeyError, TypeError, ValueError, ArithmeticError):
            return data  # no such numbers, as the error of these keys says
        return {**data, "head_dim": head_dim}

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads = {self.heads} is not a multiple of kv_heads = {self.kv_heads}"
            )
        if (parameters := self.parameters()) > MOST_PARAMETERS:
            raise ValueError(
                f"{parameters:.2g} parameters are too many; at most {MOST_PARAMETERS:.0g} can be "
                "planned for"
            )
        return self

    def splits_into(self, gpus: int) -> bool:
        """Whether an engine can divide the heads among GPUs: query heads evenly, key heads
        evenly or each on as many GPUs as any other."""
        even_keys = self.kv_heads % gpus == 0 or gpus % self.kv_heads == 0
        return self.heads % gpus == 0 and even_keys

    @property
    def block_parameters(self) -> int:
        """Parameters of one layer's matrices and norms."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def embedding_parameters(self) -> int:
        return self.vocab * self.hidden

    def parameters(self, head: Head = "lm") -> int:
        """The number of all parameters. A critic or a reward model has a scalar head instead of the
        vocabulary's."""
        if head == "scalar":
            output = self.hidden
        elif self.tied_embeddings:
            output = 0
        else:
            output = self.embedding_parameters
        layers, last_norm = self.layers * self.block_parameters, self.hidden
        return layers + self.embedding_parameters + last_norm + output


def head_of(role: str) -> Head:
    """The head of a role's model: a critic and a reward model have a scalar one instead of the
    vocabulary's."""
    return "scalar" if role in ("critic", "reward") else "lm"


class Model(Spec):
    """A model: a Hugging Face directory (`path`), or random weights of a `shape`."""

    shape: Shape
    path: Path | None = None
    random_weights: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) != self.random_weights:
            raise ValueError("give either a path or random_weights = true")
        return self


class RewardModel(Model, Weighed):
    """A sequence classifier with one output, which scores a sequence at its last token. One with
    another tokenizer than the actor's reads the text, by its own tokenizer and chat template."""

    @model_validator(mode="before")
    @classmethod
    def _of_a_model(cls, data: Any) -> Any:
        """A model in any other role can be a reward model too."""
        return dict(data) if isinstance(data, Model) else data

    @property
    def default_name(self) -> str:
        return self.path.name if self.path is not None else "reward model"


Reward = Annotated[
    Annotated[RewardFunction, Tag("RewardFunction")]
    | Annotated[RewardServer, Tag("RewardServer")]
    | Annotated[Overlong, Tag("Overlong")]
    | Annotated[RewardModel, Tag("RewardModel")],
    by_keys(
        {"function": "RewardFunction", "url": "RewardServer", "overlong_buffer": "Overlong"},
        "RewardModel",
    ),
]


class Workload(File):
    """One job. Lengths are tokens; `batch` and `minibatch` are sequences (over all workers), of
    which each prompt has `samples_per_prompt`, its group."""

    SCHEMA: ClassVar[str] = "splitplan/workload/1"

    name: str
    batch: Count
    minibatch: Count
    prompt: Lengths
    response: Lengths
    actor: Model
    critic: Model | None = None
    reference: Model | None = None
    reward: Annotated[Reward | None, Field(exclude_if=lambda reward: reward is None)] = None
    rewards: Annotated[tuple[Reward, ...], Field(exclude_if=lambda rewards: not rewards)] = ()
    algorithm: Algorithm = Algorithm()
    optimizer: Optimizers = Optimizers()
    data: Data | None = None
    # Left out of files where they are not set, so that those of earlier versions stay as they were.
    sampling: Sampling = Field(default=Sampling(), exclude_if=lambda value: value == Sampling())
    evaluation: tuple[EvaluationSet, ...] = Field(default=(), exclude_if=lambda value: not value)
    proximal: Literal["recompute", "rollout"] = "recompute"
    max_staleness: Annotated[int, Field(ge=0, le=MOST_STALENESS)] = 1
    # Of the rollout's engines, one of TENSOR_PARALLEL; None where it is to be searched.
    tensor_parallel: Literal[1, 2, 4, 8] | None = None
    steps: Steps = 100
    seed: Seed = 0
    samples_per_prompt: Count = 1
    sync: Literal["boundary", "in_flight", "any"] = "boundary"
    kv: Literal["keep", "recompute"] = Field(  # what becomes of KV caches when weights arrive
        default="keep", exclude_if=lambda kv: kv == "keep"
    )

    @model_validator(mode="before")
    @classmethod
    def _default_advantage(cls, data: Any) -> Any:
        """A job with a critic uses it, unless it says otherwise."""
        if not isinstance(data, dict):
            return data
        bring_up_to_date(data)
        algorithm = data.get("algorithm", {})
        if not isinstance(algorithm, dict) or "advantage" in algorithm:
            return data
        advantage = "reinforce++" if data.get("critic") is None else "gae"
        return {**data, "algorithm": {**algorithm, "advantage": advantage}}

    @model_validator(mode="before")
    @classmethod
    def _one_temperature(cls, data: Any) -> Any:
        sampling = data.get("sampling") if isinstance(data, dict) else None
        if isinstance(sampling, dict) and "temperature" in sampling:
            raise ValueError(
                "sampling.temperature: write it as algorithm.temperature, which the losses use too"
            )
        return data

    @model_validator(mode="after")
    def _data_is_used(self) -> Self:
        check_evaluation(self.data, self.evaluation)
        weighted = self.proximal == "recompute" and self.algorithm.importance != "off"
        check_sampling(self.sampling, self.response.longest, weighted=weighted)
        return self

    @model_validator(mode="after")
    def _sizes_divide(self) -> Self:
        for name, size in (("minibatch", self.minibatch), ("samples_per_prompt", self.group)):
            if self.batch % size:
                raise ValueError(
                    f"batch = {self.batch} is not a multiple of {name} = {size}; change one of them"
                )
        if self.minibatch % self.group:
            raise ValueError(
                f"minibatch = {self.minibatch} is not a multiple of samples_per_prompt = "
                f"{self.group}, and the samples of a prompt stay together; change one of them"
            )
        wanted = self.batch * self.algorithm.oversampling_factor
        if abs(wanted - self.generated) > 1e-6 * wanted:
            raise ValueError(
                f"oversampling_factor = {self.algorithm.oversampling_factor:g} asks for "
                f"{wanted:g} sequences, which are no whole number of groups of {self.group}; with "
                f"{self.generated / self.batch:g} there are {self.generated}"
            )
        return self

    @model_validator(mode="after")
    def _advantage_has_what_it_needs(self) -> Self:
        algorithm, named = self.algorithm, f"advantage = {self.algorithm.advantage!r}"
        if algorithm.needs_critic and self.critic is None:
            raise ValueError(
                f"{named} needs a critic; add [critic], or choose an advantage that needs none, "
                "such as grpo or reinforce++"
            )
        if not algorithm.needs_critic and self.critic is not None:
            raise ValueError(f"{named} has no use for a critic; remove [critic], or choose gae")
        if algorithm.needs_group and self.group == 1:
            raise ValueError(
                f"{named} compares the samples of a prompt; set samples_per_prompt to 2 or more"
            )
        if algorithm.oversampling_factor > 1 and self.group == 1:
            raise ValueError(
                "oversampling_factor drops groups whose samples have the same score; set "
                "samples_per_prompt to 2 or more"
            )
        if algorithm.kl_target is not None and self.reference is None:
            raise ValueError("kl_target needs a reference; add [reference], or leave it out")
        if algorithm.kl_target is not None and self.proximal != "recompute":
            raise ValueError(
                "kl_target follows the KL of one step after the other, which proximal = "
                f"{self.proximal!r} does not wait for; set proximal = 'recompute'"
            )
        return self

    @model_validator(mode="after")
    def _engines_divide(self) -> Self:
        wanted, shape = self.tensor_parallel or 1, self.actor.shape
        if not shape.splits_into(wanted):
            works = [str(gpus) for gpus in TENSOR_PARALLEL if shape.splits_into(gpus)]
            raise ValueError(
                f"tensor_parallel = {wanted}: as many GPUs cannot divide the actor's {shape.heads} "
                f"heads with {shape.kv_heads} of keys; set it to {' or '.join(works)}, or leave "
                "it out"
            )
        _check_rewards(self)
        return self

    @model_validator(mode="after")
    def _something_is_in_flight(self) -> Self:
        if self.sync == "in_flight" and not self.max_staleness:
            raise ValueError(
                "sync = 'in_flight' with max_staleness = 0: nothing is in flight when weights "
                "arrive; set max_staleness to 1 or more, or sync to 'boundary'"
            )
        if self.sync == "boundary" and self.kv != "keep":
            raise ValueError(
                f"kv = {self.kv!r} is about weights that arrive in flight; set sync to 'in_flight' "
                "or 'any', or leave kv out"
            )
        return self

    @property
    def group(self) -> int:
        """The samples of a prompt."""
        return self.samples_per_prompt

    @property
    def generated(self) -> int:
        """Sequences that a step generates and scores: the batch, and with an oversampling factor
        more, in whole groups."""
        return round(self.batch * self.algorithm.oversampling_factor / self.group) * self.group

    @property
    def most_in_flight(self) -> int:
        """Sequences that may be generated at a time: those of a step, and where generation may
        stream those of as many steps more as sequences may be stale."""
        steps = 1 if self.sync == "boundary" else self.max_staleness + 1
        return steps * self.generated

    @property
    def oversamples(self) -> bool:
        return self.generated > self.batch

    def inferred_by(self, role: str) -> int:
        """Sequences of a forward pass of a role: those of the batch, or, to score them, all that
        are generated."""
        return self.generated if role == "reward" else self.batch

    @property
    def all_rewards(self) -> tuple[Reward, ...]:
        """The rewards, be they one or several."""
        return self.rewards if self.reward is None else (self.reward,)

    @property
    def host_rewards(self) -> tuple[HostReward, ...]:
        """The rewards that processes on the host give."""
        return tuple(reward for reward in self.all_rewards if isinstance(reward, HostReward))

    @property
    def models(self) -> dict[str, Model]:
        """The models by role, without the rollout (which has the actor's)."""
        found = {role: getattr(self, role) for role in MODEL_ROLES if role != "reward"}
        found["reward"] = next(
            (reward for reward in self.all_rewards if isinstance(reward, RewardModel)), None
        )
        return {role: model for role, model in found.items() if isinstance(model, Model)}

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that need GPUs, in a fixed order."""
        return tuple(role for role in ROLES if role == "rollout" or role in self.models)

    @property
    def dataflow(self) -> Dataflow:
        """The calls of one step. Each kind of algorithm is a function that makes them."""
        return ppo(self) if self.algorithm.needs_critic else reinforce(self)

    @property
    def sampler(self) -> Sampler:
        """How responses to train on are sampled."""
        return Sampler(temperature=self.algorithm.temperature, **self.sampling.model_dump())

    def model_of(self, role: str) -> Model:
        return self.models["actor" if role == "rollout" else role]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that can occur."""
        return self.prompt.longest + self.response.longest


def _check_rewards(workload: Workload) -> None:
    """Raise ValueError for rewards that do not add up to one number per response."""
    if (workload.reward is None) == (not workload.rewards):
        what = "is missing" if workload.reward is None else "stands beside rewards"
        raise ValueError(f"reward {what}; give one [reward], or several [[rewards]]")
    rewards = workload.all_rewards
    if all(isinstance(reward, Overlong) for reward in rewards):
        raise ValueError("rewards: a penalty on length alone rewards nothing; add what does")
    if sum(isinstance(reward, RewardModel) for reward in rewards) > 1:
        raise ValueError("rewards: one model can be placed on GPUs; put others behind a url")
    if not sum(reward.weight for reward in rewards):
        raise ValueError("rewards: the weights sum to nothing; change one of them")
    labels = [reward.label for reward in rewards]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(
                f"rewards: {labels.count(label)} are called {label!r}; give them names"
            )
    for reward in rewards:
        longest = workload.response.longest
        if isinstance(reward, Overlong) and reward.overlong_buffer > longest:
            raise ValueError(
                f"rewards: overlong_buffer = {reward.overlong_buffer} is more than the "
                f"{longest} tokens of the longest response; lower it"
            )
