"""The engines that can be run, by the name that a plan gives them."""

from collections.abc import Callable
from dataclasses import dataclass

from executor.rollout.engine import EngineWorker
from executor.rollout.transformers_engine import TransformersWorker
from executor.rollout.vllm.worker import VllmWorker, made_for
from planner.spec.engines import EngineName
from planner.spec.plan import Plan


@dataclass(frozen=True, kw_only=True)
class EngineKind:
    """`worker` is the class of its processes. `made_for(plan)` is all that such a process cannot
    change once it has started; without it a process may serve any plan. With `from_gpus` weights
    come straight from the trainers' GPUs, where there are GPUs. With `starts_empty` it has no
    weights until they are sent."""

    worker: type[EngineWorker]
    made_for: Callable[[Plan], str] | None = None
    from_gpus: bool = False
    starts_empty: bool = False

    def fits(self, plan: Plan) -> str:
        """The settings that a process has to be made for to serve a plan."""
        return self.made_for(plan) if self.made_for is not None else ""


ENGINE_KINDS: dict[EngineName, EngineKind] = {
    "transformers": EngineKind(worker=TransformersWorker),
    "vllm": EngineKind(worker=VllmWorker, made_for=made_for, from_gpus=True, starts_empty=True),
}


def kind_of(plan: Plan) -> EngineKind:
    return ENGINE_KINDS[plan.rollout.engine]
