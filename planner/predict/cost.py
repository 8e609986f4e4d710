"""Seconds of every call of a workload on a cluster, over seeded response-length scenarios.

Scenario s has the lengths that step s of a run with random weights has: all calls of a scenario see the same ones. An
estimate is the roofline's (`roofline.py`, `generation.py`), corrected by measured points where there are any
(`correction.py`)."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat

import numpy as np

from planner.predict.correction import Corrections, Layout, Source, host_seconds
from planner.predict.generation import engine_speed, generation_floor, generation_seconds
from planner.predict.memory import engine_weight_bytes, offloaded_bytes
from planner.predict.profile import Profile, head_of
from planner.predict.roofline import Cost, Place, Seconds, Work, infer_cost, shares, sync_cost, train_cost
from planner.spec.cluster import Cluster, Device
from planner.spec.dataflow import Call
from planner.spec.lengths import Fixed, sample
from planner.spec.plan import Plan, RolloutRole, TrainerRole
from planner.spec.workload import RewardFunction, Workload

__all__ = ["CostModel", "Estimate", "Place", "place_of"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds [S] of a call and what they are made of: `wake` before and `offload` after it, `compute`, and `transfer`,
    communication that compute does not hide. `source` tells where the figure comes from (not that of the moves)."""

    seconds: Seconds
    parts: dict[str, Seconds]
    source: Source


def place_of(plan: Plan, pools: Sequence[str]) -> Place:
    """The GPUs of some pools, node by node in the order of the ranks."""
    nodes = Counter(node for pool in pools for node, _ in plan.pools[pool].gpus)
    return Place(parts=tuple(nodes.values()), device=plan.device_of(pools[0]))


class CostModel:
    """`scenarios` is 1 where all lengths are fixed. `prompts` and `responses` [S, B] are tokens of each sequence,
    `tokens` [S] their sum. Everything is memoised: asking again is free."""

    def __init__(
        self, workload: Workload, cluster: Cluster, profiles: Sequence[Profile] = (), scenarios: int = 16
    ) -> None:
        self.workload, self.cluster = workload, cluster
        fixed = isinstance(workload.prompt, Fixed) and isinstance(workload.response, Fixed)
        self.scenarios = 1 if fixed else scenarios
        batch, seed = workload.batch, workload.seed
        self.prompts = np.stack([sample(workload.prompt, batch, seed, s, 0) for s in range(self.scenarios)])
        self.responses = np.stack([sample(workload.response, batch, seed, s, 1) for s in range(self.scenarios)])
        self.tokens = (self.prompts + self.responses).sum(axis=1)
        self._corrections = Corrections(profiles, cluster)
        self._memo: dict[Hashable, Estimate] = {}
        self._works: dict[tuple[int, int], Work] = {}
        self._generations: dict[Hashable, Seconds] = {}

    def call(self, call: Call, plan: Plan) -> Estimate:
        """Any call of a plan. An evaluation is taken to be as large as a batch."""
        if call.kind == "host":
            return self.host(call.name)
        rollout_places = [place_of(plan, (pool,)) for pool in plan.rollout.pools]
        if call.kind == "generate":
            return self.generate(plan.rollout, rollout_places)
        layout = plan.trainers[call.roles[0]]
        place = place_of(plan, layout.pools)
        if call.kind == "transfer":
            nodes = {node for pool in {*layout.pools, *plan.rollout.pools} for node, _ in plan.pools[pool].gpus}
            shared = layout.pools[0] in plan.rollout.pools
            return self.sync(layout, place, plan.rollout, rollout_places, same_node=len(nodes) == 1, shared=shared)
        return (self.train if call.kind == "train" else self.infer)(call.roles[0], layout, place)

    def infer(self, role: str, layout: TrainerRole, place: Place) -> Estimate:
        """A forward pass of a role over the batch."""
        return self._trainer("infer", role, layout, place)

    def train(self, role: str, layout: TrainerRole, place: Place) -> Estimate:
        """The update of a role: epochs of minibatches."""
        return self._trainer("train", role, layout, place)

    def _trainer(self, call: str, role: str, layout: TrainerRole, place: Place) -> Estimate:
        train, shard, device = call == "train", layout.shard, place.device
        split = shard, layout.replicas, layout.micro_batch_tokens, train and layout.recompute
        alone = self._once((call, role, split, place), lambda: self._trainer_alone(call, role, layout, place))
        shape = self.workload.models[role].shape
        moved = offloaded_bytes(shape, role, shard, layout.offload, device, train=train)
        return _with_moves(alone, self._moves(role, shard, device, moved))

    def _trainer_alone(self, call: str, role: str, layout: TrainerRole, place: Place) -> Estimate:
        """Without the moves of what is offloaded."""
        workload, shape, head = self.workload, self.workload.models[role].shape, head_of(role)
        preferred: dict[str, object] = {"micro_batch_tokens": layout.micro_batch_tokens}
        exact: dict[str, object] = {"gpus": layout.gpus, "sequences": workload.batch}
        if call == "train":
            epochs, work = workload.ppo.epochs, self._work(workload.minibatch, layout.gpus)
            cost = train_cost(shape, head, layout, place, self.cluster, work, epochs)
            preferred = {"recompute": layout.recompute, **preferred}
            exact |= {"minibatch": workload.minibatch, "epochs": epochs}
        else:
            cost = infer_cost(shape, head, layout, place, self.cluster, self._work(workload.batch, layout.gpus))
        size = np.log(self.tokens / layout.gpus)
        like = Layout(split=layout.shard, preferred=preferred, exact=exact)
        return _estimate(cost, *self._corrections.ratio(call, shape, role, place.device, size, like))

    def _work(self, minibatch: int, ranks: int) -> Work:
        key = minibatch, ranks
        if key not in self._works:
            self._works[key] = shares(self.prompts + self.responses, minibatch, ranks)
        return self._works[key]

    def generate(self, layout: RolloutRole, places: Sequence[Place]) -> Estimate:
        """The batch on the engines of all places (one per pool of the rollout)."""
        engines, tensor_parallel = tuple(self._engines(layout, places)), layout.tensor_parallel
        key = "generate", tensor_parallel, layout.concurrency, engines
        alone = self._once(key, lambda: self._generate_alone(tensor_parallel, layout.concurrency, engines))
        shape, device = self.workload.actor.shape, engines[0]
        moved = engine_weight_bytes(shape, tensor_parallel, device) if layout.offload else 0
        return _with_moves(alone, self._moves("rollout", tensor_parallel, device, moved))

    def generate_floor(self, layout: RolloutRole, places: Sequence[Place]) -> float:
        """Mean seconds that `generate` is not below, without simulating it."""
        engines = tuple(self._engines(layout, places))
        speeds = [engine_speed(self.workload.actor.shape, layout.tensor_parallel, device) for device in set(engines)]
        speeds *= len(engines) // len(speeds)
        seconds = generation_floor(self.prompts, self.responses, speeds, layout.concurrency)
        return float(self._generate_from(seconds, layout.tensor_parallel, layout.concurrency, engines).seconds.mean())

    def _generate_alone(self, tensor_parallel: int, concurrency: int, engines: tuple[Device, ...]) -> Estimate:
        """Without waking the engines and putting them to sleep."""
        seconds = self._generation(tensor_parallel, concurrency, engines)
        return self._generate_from(seconds, tensor_parallel, concurrency, engines)

    def _generate_from(
        self, seconds: Seconds, tensor_parallel: int, concurrency: int, engines: tuple[Device, ...]
    ) -> Estimate:
        """What the engines' seconds become with the call's overhead and what was measured."""
        count, batch, device = len(engines), self.workload.batch, engines[0]
        seconds = seconds + device.overhead_seconds
        like = Layout(
            split=tensor_parallel,
            preferred={"concurrency": concurrency},
            exact={"engines": count, "sequences": batch},
        )
        size = np.full(self.scenarios, np.log(batch / count))
        ratio = self._corrections.ratio("generate", self.workload.actor.shape, "rollout", device, size, like)
        return _estimate(Cost(compute=seconds, transfer=np.zeros_like(seconds)), *ratio)

    def _engines(self, layout: RolloutRole, places: Sequence[Place]) -> list[Device]:
        """The device of each engine."""
        counts = [sum(part // layout.tensor_parallel for part in place.parts) for place in places]
        held = chain.from_iterable(repeat(place.device, n) for place, n in zip(places, counts, strict=True))
        return list(held)[: layout.replicas]

    def _generation(self, tensor_parallel: int, concurrency: int, engines: tuple[Device, ...]) -> Seconds:
        share = -(-self.workload.batch // len(engines))
        if concurrency > share and (self.prompts == self.prompts[0, 0]).all():
            concurrency = share  # equal prompts are dealt evenly: further slots stay empty
        key = tensor_parallel, concurrency, engines
        if key not in self._generations:
            speeds = {
                device: engine_speed(self.workload.actor.shape, tensor_parallel, device) for device in set(engines)
            }
            self._generations[key] = generation_seconds(
                self.prompts,
                self.responses,
                [speeds[device] for device in engines],
                concurrency,
                self.workload.response.longest,
            )
        return self._generations[key]

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
        """Weights from the actor to all engines; `shared`: the actor's pool is one of the rollout's; `same_node`: all
        of these pools lie on one node."""
        split = actor.shard, actor.replicas, rollout.tensor_parallel, rollout.replicas
        separate = len(rollout_places) > shared
        alone = self._once(
            ("sync", split, actor_place, same_node, shared, separate),
            lambda: self._sync_alone(actor, actor_place, rollout, same_node, shared, separate),
        )
        shape, device, tensor_parallel = self.workload.actor.shape, actor_place.device, rollout.tensor_parallel
        weights = offloaded_bytes(shape, "actor", actor.shard, actor.offload, device, train=False)
        engine = engine_weight_bytes(shape, tensor_parallel, device) if rollout.offload else 0
        woken = _with_moves(alone, self._moves("actor", actor.shard, device, weights))
        return _with_moves(woken, self._moves("rollout", tensor_parallel, device, engine))

    def _sync_alone(
        self, actor: TrainerRole, place: Place, rollout: RolloutRole, same_node: bool, shared: bool, separate: bool
    ) -> Estimate:
        """Without waking the actor and the engines."""
        shape, tensor_parallel = self.workload.actor.shape, rollout.tensor_parallel
        seconds = sync_cost(
            shape, actor, place, self.cluster, tensor_parallel, same_node=same_node, shared=shared, separate=separate
        )
        like = Layout(
            split=actor.shard,
            preferred={"shared": not separate, "tensor_parallel": tensor_parallel},
            exact={"gpus": actor.gpus, "engines": rollout.replicas},
        )
        size = np.full(self.scenarios, np.log(actor.gpus + rollout.replicas * tensor_parallel))
        ratio = self._corrections.ratio("transfer", shape, "actor", place.device, size, like)
        return _estimate(Cost(compute=np.zeros(self.scenarios), transfer=np.full(self.scenarios, seconds)), *ratio)

    def host(self, name: str) -> Estimate:
        """A call on the controller: a reward function, or the advantages."""
        return self._once(("host", name), lambda: self._host_estimate(name))

    def _host_estimate(self, name: str) -> Estimate:
        workload, reward = self.workload, self.workload.reward
        seconds = host_seconds(self.tokens)
        device = self.cluster.device_of(self.cluster.gpus[0])
        size = np.full(self.scenarios, np.log(workload.batch))
        like = Layout(split=1, exact={"sequences": workload.batch})
        ratio, source = self._corrections.ratio("host", workload.actor.shape, name, device, size, like)
        if source == "roofline":
            source = "host"
            if name == "score" and isinstance(reward, RewardFunction):
                seconds = seconds + reward.seconds_per_sequence * workload.batch
        return _estimate(Cost(compute=seconds, transfer=np.zeros_like(seconds)), ratio, source)

    def _moves(self, role: str, split: int, device: Device, count: int) -> dict[str, float]:
        """Seconds of bringing `count` bytes per GPU to the device and back."""
        if not count:
            return {}
        shape, size, like = self.workload.model_of(role).shape, np.zeros(1), Layout(split=split)
        ratios = {name: self._corrections.ratio(name, shape, role, device, size, like) for name in ("wake", "offload")}
        return {name: float(ratio[0]) * count / device.host_bandwidth for name, (ratio, _) in ratios.items()}

    def _once(self, key: Hashable, make: Callable[[], Estimate]) -> Estimate:
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]


def _estimate(cost: Cost, ratio: Seconds, source: Source) -> Estimate:
    parts = {"compute": cost.compute * ratio, "transfer": cost.transfer * ratio}
    seconds = parts["compute"] + parts["transfer"]
    return Estimate(seconds=seconds, parts={name: part for name, part in parts.items() if part.any()}, source=source)


def _with_moves(estimate: Estimate, moves: dict[str, float]) -> Estimate:
    """With the seconds of `wake` and `offload` added."""
    if not moves:
        return estimate
    parts = dict(estimate.parts)
    for name, seconds in moves.items():
        parts[name] = parts.get(name, 0.0) + np.full_like(estimate.seconds, seconds)
    return Estimate(seconds=estimate.seconds + sum(moves.values()), parts=parts, source=estimate.source)
