"""The process of a vLLM engine, as the executor asks it."""

import os
from collections.abc import Sequence
from typing import Any

from executor.fleet.worker import Record
from executor.rollout.engine import Channel, EngineWorker
from executor.rollout.vllm.engine import VllmEngine, load_library
from executor.training.weights import Described
from planner.spec.plan import Plan
from planner.spec.tokenizers import stop_strings, stop_tokens


def made_for(plan: Plan) -> str:
    """All that an engine cannot change once it has started."""
    rollout = plan.rollout.model_dump_json(exclude={"pools", "replicas"})
    actor = plan.workload.actor.model_dump_json()
    stops = stop_tokens(plan.workload) + stop_strings(plan.workload)
    return f"{rollout} {actor} {plan.workload.longest} {stops} {plan.workload.group > 1}"


class VllmWorker(EngineWorker):
    """The process of a vLLM engine, on all of its GPUs or on a core."""

    engine: VllmEngine

    def call(self, method: str, *args: Any, **kwargs: Any) -> tuple[Any, Record]:
        """Call a method as any process does. The process ends when one of its GPUs' processes does,
        and the engine is started again as a whole."""
        try:
            return super().call(method, *args, **kwargs)
        except Exception:
            if hasattr(self, "engine") and self.engine.failed:
                os._exit(1)
            raise

    def synchronize(self) -> None:
        """vLLM returns when it has done."""

    def forget_peak(self) -> None:
        self._peak = {}
        if hasattr(self, "engine"):
            self.engine.forget_peak()

    def peak(self) -> dict[str, int]:
        return self._peak or (self.engine.peak() if hasattr(self, "engine") else {})

    def import_library(self) -> None:
        load_library()

    def start(self, plan: Plan, pool: str, channel: Channel) -> list[int]:
        """Become an engine of a plan, without weights yet; the tokens that end a response. An
        engine that was started before must fit the plan: one process holds one engine."""
        if not hasattr(self, "engine"):
            self.engine, self.made_for = VllmEngine(plan), made_for(plan)
        self.engine.abandon()  # what a run before left
        assert self.made_for == made_for(plan), "this process has an engine of another kind"
        if channel != "store":
            self.engine.leave_group()
        # Then there is a transfer between any two generations.
        self.engine.drop_weights = plan.staleness == 0 and "evaluate" not in plan.dataflow.names
        self.offload, self.version = (
            plan.rollout.offload and channel != "store",
            -1,
        )  # on a CPU there is no sleep
        self._sleep()
        return self.engine.eos

    # --- weights from trainers on GPUs; their end is in `trainer.py` ---

    def join_group(self, host: str, port: int, world: int, rank: int) -> None:
        """Join the NCCL group of a trainer (`Trainer.lead_group`), with ranks from `rank` on."""
        self.engine.join_group(host, port, rank, world)

    def receive_weights(self, version: int, weights: Sequence[Described]) -> None:
        """Take over what the group's sender broadcasts (`Trainer.send_weights`)."""
        self.begin_receiving(version)
        with self.part("transfer"):
            self.engine.receive(weights)
        self.end_receiving()

    def begin_receiving(self, version: int) -> None:
        """Prepare for the weights of this version, before the first of the chunks that they come
        in."""
        if self.offload:
            with self.part("wake"):
                self.engine.wake("weights")
        self.coming = version

    def read_window(self, chunk: Sequence[Described], handles: dict[str, Any]) -> None:
        """Take over a chunk that the trainers have filled in (`Trainer.fill_window`)."""
        with self.part("transfer"):
            self.engine.read(chunk, handles)

    def end_receiving(self) -> None:
        """Take the weights over after the last chunk."""
        self.version = self.coming
