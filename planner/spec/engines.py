"""The engines that a rollout may run on, as far as plans depend on them. How they are run is in
`executor/rollout/engines.py`: an engine has one row here and one row there."""

from dataclasses import dataclass
from typing import Literal

EngineName = Literal["vllm", "transformers"]


@dataclass(frozen=True, kw_only=True)
class EngineTraits:
    """`chosen_for` is the kind of device for which the planner chooses this engine. An engine that
    `reserves` takes its whole `memory_fraction` when it starts, any other takes what it needs while
    it runs. One that `preempts` sets sequences aside when its memory is full, and goes on with them
    later. One that `spans_gpus` may have several GPUs. `package` is what has to be installed, by
    the `extra` of ours."""

    chosen_for: Literal["cuda", "cpu"]
    reserves: bool
    preempts: bool
    spans_gpus: bool
    package: str
    extra: str


ENGINES: dict[EngineName, EngineTraits] = {
    "vllm": EngineTraits(
        chosen_for="cuda",
        reserves=True,
        preempts=True,
        spans_gpus=True,
        package="vllm",
        extra="vllm",
    ),
    "transformers": EngineTraits(
        chosen_for="cpu",
        reserves=False,
        preempts=False,
        spans_gpus=False,
        package="transformers",
        extra="execute",
    ),
}


def engine_for(kind: Literal["cuda", "cpu"]) -> EngineName:
    """The engine that the planner chooses for a kind of device."""
    return next(name for name, traits in ENGINES.items() if traits.chosen_for == kind)
