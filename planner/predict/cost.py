"""Seconds of every call of a workload on a cluster, over seeded response-length scenarios.

Scenario s has the lengths that step s of a run with random weights has: all calls of a scenario see
the same ones. An estimate is the roofline's (`roofline.py`, `generation.py`), corrected by measured
points where there are any (`correction.py`). The search asks `trainers`, `rollouts` and `syncs` for
many layouts at once; the methods here are about one layout, a column of length one.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import numpy as np

from planner.predict.columns import Grid, Integers, Seconds
from planner.predict.correction import Corrections, Ratios
from planner.predict.costs.estimates import Estimate, Estimates
from planner.predict.costs.lengths import SampledLengths
from planner.predict.costs.rollouts import RolloutCosts, engines_of
from planner.predict.costs.scoring import Scoring
from planner.predict.costs.streams import StreamCosts
from planner.predict.costs.syncs import SyncCosts
from planner.predict.costs.trainers import TrainerCosts
from planner.predict.likeness import TrainerCall, like_host
from planner.predict.memory import kv_room, moved_bytes
from planner.predict.profile import Profile
from planner.predict.roofline import Cost, Place, host_seconds, sharding_of
from planner.predict.stream_run import EngineStream
from planner.predict.streamed import Streamed, streamed
from planner.spec.cluster import Cluster
from planner.spec.dataflow import Call
from planner.spec.plan import Plan, RolloutRole, TrainerRole
from planner.spec.workload import Workload

__all__ = ["SCENARIOS", "CostModel", "Estimate", "Place", "place_of"]

SCENARIOS = 16  # of response lengths, unless a batch alone is large


def place_of(plan: Plan, pools: Sequence[str]) -> Place:
    """The GPUs of some pools, node by node in the order of the ranks."""
    nodes = Counter(node for pool in pools for node, _ in plan.pools[pool].gpus)
    return Place(parts=tuple(nodes.values()), device=plan.device_of(pools[0]))


class CostModel:
    """`scenarios` is 1 where all lengths are fixed. `prompts` and `responses` [S, B] are tokens of
    each sequence of the batch, `tokens` [S] their sum; `lengths` gives the first two instead of
    drawing them.
    Every estimate is remembered: asking again is free."""

    def __init__(
        self,
        workload: Workload,
        cluster: Cluster,
        profiles: Sequence[Profile] = (),
        scenarios: int = SCENARIOS,
        lengths: tuple[Integers, Integers] | None = None,
    ) -> None:
        drawn = SampledLengths(*lengths) if lengths else SampledLengths.drawn(workload, scenarios)
        self.workload, self.cluster = workload, cluster
        batch = drawn.sequences.shape[1]
        self.prompts, self.responses = drawn.prompts[:, :batch], drawn.responses[:, :batch]
        self.tokens, self._generated = drawn.tokens, drawn.generated.sum(axis=1)
        self.scenarios = drawn.scenarios
        self._corrections = Corrections(profiles, cluster)
        self.trainers = TrainerCosts(workload, cluster, drawn, self._corrections)
        self.rollouts = RolloutCosts(workload, drawn, self._corrections)
        self.streams = StreamCosts(workload, drawn, self._corrections)
        self.scoring = Scoring(workload.host_rewards, drawn.responses)
        self.syncs = SyncCosts(workload, cluster, drawn.scenarios, self._corrections)
        self._known: dict[Hashable, Estimate] = {}
        self._streamed: dict[Hashable, Streamed] = {}

    def call(self, call: Call, plan: Plan) -> Estimate:
        """Any call of a plan. An evaluation generates as many batches as its responses make, or one
        where fewer are known of: the longest ones take as long. Beside a stream it is taken to have
        the engines for itself."""
        if call.streams:
            return self.streamed(plan).generate
        if call.kind == "host":
            generates = plan.dataflow.generates
            beside = self.scores_beside(call)
            return self.host(call.name, self.call(generates, plan).seconds if beside else None)
        rollout_places = [place_of(plan, (pool,)) for pool in plan.rollout.pools]
        if call.kind == "generate":
            generated = self.generate(plan.rollout, rollout_places)
            return generated.repeated(self._evaluated()) if call.monitor else generated
        role = call.roles[0]
        layout = plan.trainers[role]
        place = place_of(plan, layout.pools)
        if call.kind == "transfer":
            pools = {*layout.pools, *plan.rollout.pools}
            nodes = {node for pool in pools for node, _ in plan.pools[pool].gpus}
            return self.sync(
                layout,
                place,
                plan.rollout,
                rollout_places,
                same_node=len(nodes) == 1,
                shared=layout.pools[0] in plan.rollout.pools,
            )
        return (self.train if call.kind == "train" else self.infer)(role, layout, place)

    def streamed(self, plan: Plan) -> Streamed:
        """What a plan takes whose generation streams."""
        key = plan.program, plan.staleness, *plan.pools.items(), *plan.roles.items()
        if key not in self._streamed:
            self._streamed[key] = streamed(plan, self)
        return self._streamed[key]

    def stream_of(self, plan: Plan) -> EngineStream:
        """The engines of a plan, with nothing in flight."""
        layout = plan.rollout
        return self.streams.stream(layout, [place_of(plan, (pool,)) for pool in layout.pools])

    def _evaluated(self) -> float:
        """The batches that an evaluation generates."""
        data = self.workload.data
        known = data.evaluation_responses if data else None
        return max(1.0, (known or 0) / self.workload.generated)

    def infer(self, role: str, layout: TrainerRole, place: Place) -> Estimate:
        """A forward pass of a role over the batch."""
        return self._trainer("infer", role, layout, place)

    def train(self, role: str, layout: TrainerRole, place: Place) -> Estimate:
        """The update of a role: epochs of minibatches."""
        return self._trainer("train", role, layout, place)

    def _trainer(self, call: TrainerCall, role: str, layout: TrainerRole, place: Place) -> Estimate:
        def estimate() -> Estimate:
            grid, device = Grid.of(layout), place.device
            sharding, shape = sharding_of(grid, place), self.workload.models[role].shape
            alone = self.trainers.calls(call, role, sharding, device).only()
            moved = moved_bytes(shape, role, grid, device, train=call == "train")
            if not moved.any():
                return alone
            return alone.with_moves(self.trainers.moves(role, sharding, moved, device))

        split = layout.shard, layout.replicas, layout.micro_batch_tokens, layout.recompute
        return self._once((call, role, split, layout.offload, place), estimate)

    def generate(self, layout: RolloutRole, places: Sequence[Place]) -> Estimate:
        """The batch on the engines of all places (one per pool of the rollout)."""
        engines, tensor_parallel = engines_of(layout, places), layout.tensor_parallel
        device, count = engines[0][0], sum(number for _, number in engines)
        room = kv_room(self.workload, layout, device)

        def estimate() -> Estimate:
            run = self.rollouts.run(tensor_parallel, layout.concurrency, engines, room)
            while not run.done:
                run.advance()
            slots = np.array([layout.concurrency])
            alone = self.rollouts.calls(
                run.seconds[None], tensor_parallel, slots, np.array([count]), device
            ).only()
            if not layout.offload:
                return alone
            return alone.with_moves(self.rollouts.moves(tensor_parallel, device))

        key = ("generate", tensor_parallel, layout.concurrency, layout.offload, engines, room)
        return self._once(key, estimate)

    def sync(
        self,
        actor: TrainerRole,
        actor_place: Place,
        rollout: RolloutRole,
        rollout_places: Sequence[Place],
        *,
        same_node: bool,
        shared: bool,
    ) -> Estimate:
        """Weights from the actor to all engines; `shared`: the actor's pool is one of the
        rollout's; `same_node`: all of these pools lie on one node."""
        separate = len(rollout_places) > int(shared)
        engines = rollout.tensor_parallel, rollout.replicas

        def estimate() -> Estimate:
            grid, device = Grid.of(actor), actor_place.device
            sharding = sharding_of(grid, actor_place)
            found = self.syncs.call(
                sharding, device, *engines, same_node=same_node, shared=shared, separate=separate
            ).only()
            shape = self.workload.actor.shape
            moved = moved_bytes(shape, "actor", grid, device, train=False)
            if moved.any():
                found = found.with_moves(self.trainers.moves("actor", sharding, moved, device))
            if rollout.offload:
                found = found.with_moves(self.rollouts.moves(rollout.tensor_parallel, device))
            return found

        way = actor_place, same_node, shared, separate
        key = ("sync", actor.shard, actor.replicas, actor.offload, *engines, rollout.offload, *way)
        return self._once(key, estimate)

    def scores_beside(self, call: Call) -> bool:
        """Whether a call scores what generation, which it follows, has not let it score before."""
        return call.scores and call.kind == "host" and self.scoring.beside

    @property
    def least_period(self) -> float:
        """Seconds that a step takes at least, whatever the plan: those in which the processes of
        the slowest reward score its batch."""
        scoring = [call for call in self.workload.dataflow.calls if call.scores and not call.roles]
        whole = [float(self.host(call.name).seconds.min()) for call in scoring]
        return max([self.scoring.busy, *whole], default=0.0)

    def host(self, name: str, generation: Seconds | None = None) -> Estimate:
        """A call on the controller: scoring on the host, or the advantages. What is scored beside
        generation takes less after it the longer `generation` [S] took."""
        if generation is None:
            return self._once(("host", name), lambda: self._host(name))
        alone = self._once(("host", name), lambda: self._host(name))
        seconds = alone.seconds + self.scoring.after(generation)
        return replace(alone, seconds=seconds, parts={"compute": seconds})

    def _host(self, name: str) -> Estimate:
        """A host call without what is scored beside generation."""
        call = self.workload.dataflow[name]
        # The calls before the batch is selected are about all that is generated.
        generated = call.scores or "selected" in call.writes
        sequences = self.workload.generated if generated else self.workload.batch
        seconds = host_seconds(self._generated if generated else self.tokens)
        sizes = np.full((1, self.scenarios), np.log(sequences))
        ratios = self._corrections.ratios(like_host(name, sequences=sequences), sizes)
        if self.scores_beside(call):  # what was measured had another generation before it
            ratios = Ratios(np.ones_like(sizes), np.array(["host"]))
        elif ratios.sources[0] == "roofline":
            ratios = ratios._replace(sources=np.array(["host"]))
            if call.scores:
                seconds = seconds + self.scoring.after(np.zeros(self.scenarios))
        cost = Cost(compute=seconds[None], transfer=np.zeros((1, self.scenarios)))
        return Estimates.corrected(cost, ratios).only()

    def _once(self, key: Hashable, estimate: Callable[[], Estimate]) -> Estimate:
        if key not in self._known:
            self._known[key] = estimate()
        return self._known[key]
