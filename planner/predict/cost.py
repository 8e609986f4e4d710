"""Seconds of every call of a workload on a cluster, over seeded response-length scenarios.

Scenario s has the lengths that step s of a run with random weights has: all calls of a scenario see
the same ones. An estimate is the roofline's (`roofline.py`, `generation.py`), corrected by measured
points where there are any (`correction.py`)."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.predict.correction import Corrections, Layout, Source, host_seconds, way_of
from planner.predict.generation import Batch, Simulation, Speed, engine_speed
from planner.predict.layouts import tensor_parallels
from planner.predict.memory import engine_weight_bytes, offloaded_bytes
from planner.predict.profile import Profile, head_of
from planner.predict.roofline import (
    Cost,
    Place,
    Seconds,
    Split,
    Work,
    dealt,
    infer_cost,
    longest_first,
    split_of,
    sync_cost,
    train_cost,
)
from planner.spec.cluster import Cluster, Device
from planner.spec.dataflow import Call
from planner.spec.lengths import Fixed, sample
from planner.spec.plan import Plan, RolloutRole, TrainerRole
from planner.spec.workload import RewardFunction, Workload

__all__ = ["SCENARIOS", "CostModel", "Estimate", "Place", "place_of"]

Engines = tuple[tuple[Device, int], ...]  # how many on which device, in the order of the engines
SCENARIOS = 16  # of response lengths, unless a batch alone is large
SEQUENCES, FEWEST_SCENARIOS = (
    2**16,
    4,
)  # in all scenarios together: those of a large batch differ little


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds [S] of a call and what they are made of: `wake` before and `offload` after it,
    `compute`, and `transfer`, communication that compute does not hide. `source` tells where the
    figure comes from (not that of the moves)."""

    seconds: Seconds
    parts: dict[str, Seconds]
    source: Source


def place_of(plan: Plan, pools: Sequence[str]) -> Place:
    """The GPUs of some pools, node by node in the order of the ranks."""
    nodes = Counter(node for pool in pools for node, _ in plan.pools[pool].gpus)
    return Place(parts=tuple(nodes.values()), device=plan.device_of(pools[0]))


class CostModel:
    """`scenarios` is 1 where all lengths are fixed. `prompts` and `responses` [S, B] are tokens of
    each sequence, `tokens` [S] their sum; `lengths` gives the first two instead of drawing them.
    Everything is memoised: asking again is free."""

    def __init__(
        self,
        workload: Workload,
        cluster: Cluster,
        profiles: Sequence[Profile] = (),
        scenarios: int = SCENARIOS,
        lengths: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
    ) -> None:
        self.workload, self.cluster = workload, cluster
        self.prompts, self.responses = lengths or _drawn(workload, scenarios)
        self.scenarios = len(self.prompts)
        self.tokens = (self.prompts + self.responses).sum(axis=1)
        self._corrections = Corrections(profiles, cluster)
        self._memo: dict[Hashable, Estimate] = {}
        self._rows: dict[int, NDArray[np.int32]] = {}
        self._works: dict[tuple[int, int], Work] = {}
        self.batch = Batch(self.prompts, self.responses)
        self.generations: dict[tuple[int, int, Engines], Simulation] = {}
        self._floors: dict[Hashable, Seconds] = {}

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
            nodes = {
                node
                for pool in {*layout.pools, *plan.rollout.pools}
                for node, _ in plan.pools[pool].gpus
            }
            shared = layout.pools[0] in plan.rollout.pools
            return self.sync(
                layout,
                place,
                plan.rollout,
                rollout_places,
                same_node=len(nodes) == 1,
                shared=shared,
            )
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
        alone = self._once(
            (call, role, split, place), lambda: self._trainer_alone(call, role, layout, place)
        )
        shape = self.workload.models[role].shape
        moved = offloaded_bytes(shape, role, shard, layout.offload, device, train=train)
        return _with_moves(alone, self._moves(role, _ranks(shard, layout.gpus), device, moved))

    def _trainer_alone(self, call: str, role: str, layout: TrainerRole, place: Place) -> Estimate:
        """Without the moves of what is offloaded."""
        workload, shape, head = self.workload, self.workload.models[role].shape, head_of(role)
        split = split_of(layout, place)
        if call == "train":
            epochs, work = workload.ppo.epochs, self._work(workload.minibatch, layout.gpus)
            cost = train_cost(shape, head, split, place.device, self.cluster, work, epochs)
        else:
            work = self._work(workload.batch, layout.gpus)
            cost = infer_cost(shape, head, split, place.device, self.cluster, work)
        size = np.log(self.tokens / layout.gpus)
        return _estimate(
            cost,
            *self._corrections.ratio(
                call, shape, role, place.device, size, self._like(call, split)
            ),
        )

    def _like(self, call: str, split: Split) -> Layout:
        """What points should have in common with a `train` or `infer` call, or many at once."""
        workload, train = self.workload, call == "train"
        preferred = {
            "micro_batch_tokens": split.micro_batch_tokens,
            "gpus": split.shard * split.replicas,
        }
        exact = {"minibatch": workload.minibatch, "epochs": workload.ppo.epochs} if train else {}
        return Layout(
            split=split.shard,
            preferred={"recompute": split.recompute, **preferred} if train else preferred,
            exact={"sequences": workload.batch, **exact},
        )

    def _work(self, minibatch: int, ranks: int) -> Work:
        key = minibatch, ranks
        if minibatch not in self._rows:
            self._rows[minibatch] = longest_first(self.prompts + self.responses, minibatch)
        if key not in self._works:
            self._works[key] = dealt(self._rows[minibatch], ranks)
        return self._works[key]

    def trainer_seconds(self, kind: str, role: str, split: Split, device: Device) -> Seconds:
        """Seconds [n, S] of a `train` or `infer` call of a role in many layouts at once, without
        the moves of what is offloaded."""
        workload, shape, head = self.workload, self.workload.models[role].shape, head_of(role)
        train, epochs = kind == "train", workload.ppo.epochs
        minibatch, gpus = (
            workload.minibatch if train else workload.batch,
            split.shard * split.replicas,
        )
        if not len(gpus):
            return np.zeros((0, self.scenarios))
        counts, which = np.unique(gpus, return_inverse=True)
        works = [self._work(minibatch, int(count)) for count in counts]
        work = Work(
            tokens=np.stack([work.tokens for work in works])[which],
            squares=np.stack([work.squares for work in works])[which],
        )
        if train:
            cost = train_cost(shape, head, split, device, self.cluster, work, epochs)
        else:
            cost = infer_cost(shape, head, split, device, self.cluster, work)
        sizes = np.log(self.tokens / gpus[:, None])
        seconds = cost.compute + cost.transfer
        return seconds * self._corrections.ratios(
            kind, shape, role, device, sizes, self._like(kind, split)
        )

    def move_seconds(
        self, role: str, split: Split, moved: NDArray[np.int64], device: Device
    ) -> Seconds:
        """Seconds [n] of bringing `moved` bytes per GPU to the device and back, in many layouts at
        once."""
        shape, like = (
            self.workload.model_of(role).shape,
            _ranks(split.shard, split.shard * split.replicas),
        )
        size = np.zeros((len(moved), 1))
        ratios = [
            self._corrections.ratios(way, shape, role, device, size, like)
            for way in ("wake", "offload")
        ]
        return np.asarray((ratios[0] + ratios[1])[:, 0] * moved / device.host_bandwidth)

    def sync_ratio(self, device: Device, *, shared: bool, separate: bool) -> float:
        """What weight syncs that go this way take, as a multiple of the roofline's."""
        way = way_of(shared=shared, separate=separate)
        return self._corrections.of_transfers(self.workload.actor.shape, "actor", device, way)[0]

    def generate(self, layout: RolloutRole, places: Sequence[Place]) -> Estimate:
        """The batch on the engines of all places (one per pool of the rollout)."""
        engines, tensor_parallel = self.engines(layout, places), layout.tensor_parallel

        def simulated() -> Estimate:
            run = self.generation(tensor_parallel, layout.concurrency, engines)
            while not run.done:
                run.advance()
            return self._generated(run.seconds, tensor_parallel, layout.concurrency, engines)

        alone = self._once(("generate", tensor_parallel, layout.concurrency, engines), simulated)
        return _with_moves(
            alone, self._engine_moves(tensor_parallel, layout.offload, engines[0][0])
        )

    def engines(self, layout: RolloutRole, places: Sequence[Place]) -> Engines:
        """How many engines there are on which device, in the order of the places."""
        found, left = list[tuple[Device, int]](), layout.replicas
        for place in places:
            count = min(left, sum(part // layout.tensor_parallel for part in place.parts))
            if found and found[-1][0] == place.device:
                found[-1] = place.device, found[-1][1] + count
            else:
                found.append((place.device, count))
            left -= count
        return tuple((device, count) for device, count in found if count)

    def generation(self, tensor_parallel: int, concurrency: int, engines: Engines) -> Simulation:
        """The simulation of some engines: floors until it has been run."""
        count = sum(number for _, number in engines)
        share = -(-self.workload.batch // count)
        if concurrency > share and self.batch.even:
            concurrency = share  # equal prompts are dealt evenly: further slots stay empty
        key = tensor_parallel, concurrency, engines
        if key not in self.generations:
            shape, limit = self.workload.actor.shape, self.workload.response.longest
            listed, floor = list[Speed](), None
            for device, number in engines:
                listed += [engine_speed(shape, tensor_parallel, device)] * number
            if len(engines) == 1:
                floor = self.floors(
                    tensor_parallel, np.array([concurrency]), np.array([count]), engines[0][0]
                )[0]
            self.generations[key] = Simulation(self.batch, listed, concurrency, limit, floor)
        return self.generations[key]

    def engine_moves(self, tensor_parallel: int, offload: bool, device: Device) -> float:
        """Seconds of waking engines and putting them to sleep, if they do."""
        return sum(self._engine_moves(tensor_parallel, offload, device).values())

    def _engine_moves(
        self, tensor_parallel: int, offload: bool, device: Device
    ) -> dict[str, float]:
        moved = (
            engine_weight_bytes(self.workload.actor.shape, tensor_parallel, device)
            if offload
            else 0
        )
        return self._moves("rollout", Layout(split=tensor_parallel), device, moved)

    def _generated(
        self, seconds: Seconds, tensor_parallel: int, concurrency: int, engines: Engines
    ) -> Estimate:
        """What the engines' seconds become with the call's overhead and what was measured."""
        batch, device, count = (
            self.workload.batch,
            engines[0][0],
            sum(number for _, number in engines),
        )
        seconds = seconds + device.overhead_seconds
        like = Layout(
            split=tensor_parallel,
            preferred={"concurrency": concurrency},
            exact={"engines": count, "sequences": batch},
        )
        size = np.full(self.scenarios, np.log(batch / count))
        ratio = self._corrections.ratio(
            "generate", self.workload.actor.shape, "rollout", device, size, like
        )
        return _estimate(Cost(compute=seconds, transfer=np.zeros_like(seconds)), *ratio)

    def floors(
        self,
        tensor_parallel: int,
        concurrency: NDArray[np.int64],
        engines: NDArray[np.int64],
        device: Device,
    ) -> Seconds:
        """Seconds [n, S] that the simulation of so many engines, each with so many slots, is not
        below."""
        key = tensor_parallel, device
        speed = engine_speed(self.workload.actor.shape, tensor_parallel, device)
        found = self.batch.floors(speed, engines, concurrency)
        if self.batch.even:
            for at in np.flatnonzero(engines * concurrency >= self.workload.batch).tolist():
                found[at] = np.maximum(found[at], self._wave_floor(int(engines[at]), key))
        return found

    def _wave_floor(self, engines: int, key: tuple[int, Device]) -> Seconds:
        """Of all engine sizes of a device at once: they share most of the work."""
        shape, (tensor_parallel, device) = self.workload.actor.shape, key
        if (engines, *key) not in self._floors:
            splits = tensor_parallels(self.workload, device)
            splits += [] if tensor_parallel in splits else [tensor_parallel]
            found = self.batch.wave_floors(
                [engine_speed(shape, split, device) for split in splits], engines
            )
            for split, seconds in zip(splits, found, strict=True):
                self._floors[engines, split, device] = seconds
        return self._floors[engines, *key]

    def generate_least(
        self,
        seconds: Seconds,
        tensor_parallel: int,
        concurrency: NDArray[np.int64],
        engines: NDArray[np.int64],
        device: Device,
    ) -> Seconds:
        """Seconds [n, S] of `generate` whose simulation takes `seconds` [n, S], if its engines do
        not sleep."""
        seconds = seconds + device.overhead_seconds
        like = Layout(
            split=tensor_parallel,
            preferred={"concurrency": concurrency},
            exact={"engines": engines, "sequences": self.workload.batch},
        )
        sizes = np.broadcast_to(np.log(self.workload.batch / engines)[:, None], seconds.shape)
        shape = self.workload.actor.shape
        return seconds * self._corrections.ratios("generate", shape, "rollout", device, sizes, like)

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
        split = actor.shard, actor.replicas, rollout.tensor_parallel, rollout.replicas
        separate = len(rollout_places) > shared
        alone = self._once(
            ("sync", split, actor_place, same_node, shared, separate),
            lambda: self._sync_alone(actor, actor_place, rollout, same_node, shared, separate),
        )
        shape, device, tensor_parallel = (
            self.workload.actor.shape,
            actor_place.device,
            rollout.tensor_parallel,
        )
        weights = offloaded_bytes(shape, "actor", actor.shard, actor.offload, device, train=False)
        engine = engine_weight_bytes(shape, tensor_parallel, device) if rollout.offload else 0
        woken = _with_moves(
            alone, self._moves("actor", _ranks(actor.shard, actor.gpus), device, weights)
        )
        return _with_moves(
            woken, self._moves("rollout", Layout(split=tensor_parallel), device, engine)
        )

    def _sync_alone(
        self,
        actor: TrainerRole,
        place: Place,
        rollout: RolloutRole,
        same_node: bool,
        shared: bool,
        separate: bool,
    ) -> Estimate:
        """Without waking the actor and the engines."""
        shape, tensor_parallel = self.workload.actor.shape, rollout.tensor_parallel
        seconds = sync_cost(
            shape,
            split_of(actor, place),
            place.device,
            self.cluster,
            tensor_parallel,
            same_node=same_node,
            shared=shared,
            separate=separate,
        )
        way = way_of(shared=shared, separate=separate)
        ratio, points = self._corrections.of_transfers(shape, "actor", place.device, way)
        layout = actor.shard, actor.gpus, tensor_parallel, rollout.replicas
        exact = any(
            (point.shard, point.gpus, point.tensor_parallel, point.engines) == layout
            for point in points
        )
        source: Source = "measured" if exact else "interpolated" if points else "roofline"
        transfer = np.full(self.scenarios, seconds)
        return _estimate(
            Cost(compute=np.zeros_like(transfer), transfer=transfer),
            np.full_like(transfer, ratio),
            source,
        )

    def host(self, name: str) -> Estimate:
        """A call on the controller: a reward function, or the advantages."""
        return self._once(("host", name), lambda: self._host_estimate(name))

    def _host_estimate(self, name: str) -> Estimate:
        workload, reward = self.workload, self.workload.reward
        seconds = host_seconds(self.tokens)
        device = self.cluster.device_of(self.cluster.gpus[0])
        size = np.full(self.scenarios, np.log(workload.batch))
        like = Layout(split=1, exact={"sequences": workload.batch})
        ratio, source = self._corrections.ratio(
            "host", workload.actor.shape, name, device, size, like
        )
        if source == "roofline":
            source = "host"
            if name == "score" and isinstance(reward, RewardFunction):
                seconds = seconds + reward.seconds_per_sequence * workload.batch
        return _estimate(Cost(compute=seconds, transfer=np.zeros_like(seconds)), ratio, source)

    def _moves(self, role: str, like: Layout, device: Device, count: int) -> dict[str, float]:
        """Seconds of bringing `count` bytes per GPU to the device and back."""
        if not count:
            return {}
        shape, size = self.workload.model_of(role).shape, np.zeros(1)
        ratios = {
            name: self._corrections.ratio(name, shape, role, device, size, like)
            for name in ("wake", "offload")
        }
        return {
            name: float(ratio[0]) * count / device.host_bandwidth
            for name, (ratio, _) in ratios.items()
        }

    def _once(self, key: Hashable, make: Callable[[], Estimate]) -> Estimate:
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]


def _drawn(workload: Workload, scenarios: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Prompts and responses [S, B] of the scenarios; scenario s depends on the seed and s alone."""
    batch, seed = workload.batch, workload.seed
    fixed = isinstance(workload.prompt, Fixed) and isinstance(workload.response, Fixed)
    count = range(1 if fixed else min(scenarios, max(FEWEST_SCENARIOS, SEQUENCES // batch)))
    prompts = np.stack([sample(workload.prompt, batch, seed, s, 0) for s in count])
    return prompts, np.stack([sample(workload.response, batch, seed, s, 1) for s in count])


def _estimate(cost: Cost, ratio: Seconds, source: Source) -> Estimate:
    parts = {"compute": cost.compute * ratio, "transfer": cost.transfer * ratio}
    seconds = parts["compute"] + parts["transfer"]
    return Estimate(
        seconds=seconds,
        parts={name: part for name, part in parts.items() if part.any()},
        source=source,
    )


def _ranks(shard: Any, gpus: Any) -> Layout:
    """What moves with a trainer's ranks. Those of a host share its memory, so points of as many
    come first."""
    return Layout(split=shard, preferred={"gpus": gpus})


def _with_moves(estimate: Estimate, moves: dict[str, float]) -> Estimate:
    """With the seconds of `wake` and `offload` added."""
    if not moves:
        return estimate
    parts = dict(estimate.parts)
    for name, seconds in moves.items():
        parts[name] = parts.get(name, 0.0) + np.full_like(estimate.seconds, seconds)
    return Estimate(
        seconds=estimate.seconds + sum(moves.values()), parts=parts, source=estimate.source
    )
