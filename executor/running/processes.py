"""The processes of a real run: trainers and engines on the GPUs of a plan, and the reward
function's."""

import contextlib
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import ray

from executor.fleet import pools
from executor.fleet.asking import Order, Pending, Rank, ask, begin, to_each, within
from executor.fleet.worker import Record, Worker, WorkerError
from executor.rollout.engine import Channel, EngineWorker
from executor.rollout.engines import ENGINE_KINDS, kind_of
from executor.rollout.tray import Tray
from executor.rollout.vllm.worker import VllmWorker
from executor.running.judges import Judges, judges_of
from executor.running.run_directory import log
from executor.running.starting import StartTimes
from executor.running.supervise import COLLECTIVE_SECONDS, Deadlines
from executor.running.weight_sync import WeightSync, channels
from executor.training.shards import Saved
from executor.training.trainer import Trainer
from planner.spec.plan import Gpu, Plan
from planner.spec.rewards import HostReward

LEAVING_SECONDS = 30.0
W = TypeVar("W", bound=Worker)


class Processes:
    """Started and ready when constructed: one trainer per GPU of a pool that trains or infers, one
    engine per tensor-parallel group of the rollout's pools, and the processes of reward functions.

    A fleet that is given stays open at the end. Raises Overdue if they have not started by the
    deadline."""

    def __init__(
        self,
        plan: Plan,
        fleet: pools.Fleet | None = None,
        deadlines: Deadlines | None = None,
        saved: Saved | None = None,
    ) -> None:
        self.plan, self._saved = plan, saved
        self.deadlines = deadlines or Deadlines(plan=plan)
        self._engine_kind = kind_of(plan)
        self._own, self.times = fleet is None, StartTimes()
        self._closed, self._lock = False, threading.Lock()
        self.fleet = fleet or fleet_for([plan])
        self.trainers: dict[str, list[Rank[Trainer]]] = {}
        self.engines: list[Rank[EngineWorker]] = []
        self.judges: dict[int, Judges] = {}  # of each reward of the host, by its number
        self.tray: Rank[Tray] | None = None  # for sequences that are scored as they finish
        self._version = 0  # of the weights that the engines have
        # What engines have from the object store: a reference to weights, and their version.
        self._installed: tuple[list[ray.ObjectRef[Any]], int] | None = None
        try:
            with within(self.deadlines.of_start):
                self._start()
                self._set_up()
        except BaseException:
            self.close()
            raise

    def of(self, role: str) -> list[Rank[Trainer]]:
        """The ranks that a training or inference role runs on."""
        layout = self.plan.trainers[role]
        return self.trainers[layout.pools[0]][: layout.gpus]

    @property
    def training(self) -> list[Rank[Trainer]]:
        """The ranks of all pools."""
        return [rank for ranks in self.trainers.values() for rank in ranks]

    def without(self, absent: frozenset[int]) -> list[Rank[EngineWorker]]:
        """The engines but for those of these numbers, whose processes are being started again."""
        return [engine for at, engine in enumerate(self.engines) if at not in absent]

    def sync_weights(self, version: int, absent: frozenset[int] = frozenset()) -> list[Record]:
        """Install the actor's weights of this version in all engines that are there."""
        self._version = version
        if self.sync is not None:
            return self.sync(version, absent)
        gathered = ask(to_each(self.of("actor"), Trainer.gather, "actor", version))
        weights = gathered.results[0]
        assert weights is not None, "rank 0 puts them into the object store"
        install = to_each(self.without(absent), EngineWorker.install, [weights], version)
        installed = ask(install, revive=self.revive)
        self._installed = [weights], version
        return gathered.records + installed.records

    def revive(self, dead: Rank[EngineWorker]) -> Rank[EngineWorker]:
        """Start an engine again that died, with the weights that it had. Raises WorkerError if they
        cannot be had any more."""
        number = [engine.name for engine in self.engines].index(dead.name)
        engine = self.start_again(number)
        if not self.put(number, engine):
            raise WorkerError(
                f"{dead.name} died, and the trainers have newer weights than its {self._version}"
            )
        return engine

    def start_again(self, number: int) -> Rank[EngineWorker]:
        """Another process for an engine that died, which has no weights of the trainers yet."""
        name = self.engines[number].name
        log.warning("%s died; it is started again", name)
        pool, gpus = self.plan.engine_gpus()[number]
        way: Channel = "store" if self.sync is None else self.sync.ways[number]
        with within(self.deadlines.of_start, anew=True):
            return self._started_again(name, pool, gpus, way)

    def put(
        self,
        number: int,
        engine: Rank[EngineWorker],
        *,
        alone: bool = True,
        absent: frozenset[int] = frozenset(),
    ) -> bool:
        """Put an engine in the place of one that died, and give it the weights that this one had;
        whether it has them now.

        Weights of the object store still lie there. Weights that went from GPU to GPU would have to
        be sent to all engines again. That is done only if no other engine is left (`alone`), and
        only as long as the trainers have no newer ones. `absent` are engines that are being started
        too."""
        self.engines[number] = engine
        with within(self.deadlines.of_start, anew=True):
            if self.sync is None:
                self._install_again(engine)
                return True
            self.sync.replace(number, cast(Rank[VllmWorker], engine))
            return alone and self._send_again(self.sync, absent)

    def _install_again(self, engine: Rank[EngineWorker]) -> None:
        """Give an engine the weights that lie in the object store, if any have been installed."""
        if self._installed is not None:
            ask([engine.order(EngineWorker.install, *self._installed)])

    def _send_again(self, sync: WeightSync, absent: frozenset[int]) -> bool:
        """Send all engines that are there the weights that they had; whether the trainers still
        have them."""
        (held,) = ask(to_each(self.of("actor")[:1], Trainer.version_of, "actor")).results
        if held != self._version:
            return False
        sync(self._version, absent)
        return True

    def _started_again(
        self, name: str, pool: str, gpus: tuple[Gpu, ...], way: Channel
    ) -> Rank[EngineWorker]:
        kind = self._engine_kind
        fresh = self._again(kind.worker, gpus, name, kind.fits(self.plan))
        (engine,) = pools.connect([fresh])
        ask([engine.order(EngineWorker.start, self.plan, pool, way)])
        return engine

    def _again(
        self, worker: type[W], gpus: tuple[Gpu, ...], name: str, made_for: str = ""
    ) -> Rank[W]:
        """A fresh process, unless all are being ended: a call that this interrupts sees its
        processes die."""
        with self._lock:
            if self._closed:
                raise WorkerError(f"{name} was ended")
            return replace(self.fleet.again(worker, gpus, made_for), name=name)

    def _start(self) -> None:
        """All at once, for most of their start is loading libraries."""
        for pool in dict.fromkeys(layout.pools[0] for layout in self.plan.trainers.values()):
            ranks = [self.fleet.process(Trainer, (gpu,)) for gpu in self.plan.pools[pool].gpus]
            self.trainers[pool] = [
                replace(r, name=f"trainer {i} of pool {pool}") for i, r in enumerate(ranks)
            ]
        retire_engines(self.fleet, self.plan, [self.plan])
        kind, made_for = self._engine_kind, self._engine_kind.fits(self.plan)
        for number, (pool, gpus) in enumerate(self.plan.engine_gpus()):
            engine = self.fleet.process(kind.worker, gpus, made_for)
            self.engines.append(replace(engine, name=f"engine {number} in pool {pool}"))
        for at, reward in enumerate(self.plan.workload.all_rewards):
            if isinstance(reward, HostReward):
                self.judges[at] = judges_of(self.fleet, reward, at)
        if any(reward.processes for reward in self.plan.workload.host_rewards):
            self.tray = self.fleet.process(Tray, ())

    def _set_up(self) -> None:
        """Clocks, then the groups, then the models. Engines start while the trainers load and
        compile; but those that sleep in a run have no room next to the trainers while they are
        awake, and start when the trainers have done."""
        plan = self.plan
        for ranks in self.trainers.values():
            ranks[:] = pools.connect(ranks)
        self.engines = pools.connect(self.engines)
        self.times.passed("processes")
        ways = channels(plan, [gpus for _, gpus in plan.engine_gpus()])
        if plan.rollout.offload:
            imported = begin(to_each(self.engines, EngineWorker.import_library))
            self._set_up_trainers()
            imported.wait()
            starting = self._begin_engines(ways)
        else:
            starting = self._begin_engines(ways)
            self._set_up_trainers()
        self.eos = starting.wait().results[0]
        self.times.passed("engines")
        self.sync: WeightSync | None = None
        if "store" not in ways:
            engines = cast(list[Rank[VllmWorker]], self.engines)
            self.sync = WeightSync(plan, self.of("actor"), engines, ways)
        if self._engine_kind.starts_empty or self._saved is not None:
            self.sync_weights(self._saved.roles["actor"].version if self._saved else 0)
        self.times.passed("first weights")
        for judges in self.judges.values():
            judges.set_up()
        self.times.passed("rewards")

    def _begin_engines(self, ways: Sequence[Channel]) -> Pending[list[int]]:
        places = zip(self.engines, self.plan.engine_gpus(), ways, strict=True)
        return begin(
            [
                engine.order(EngineWorker.start, self.plan, pool, way)
                for engine, (pool, _), way in places
            ]
        )

    def _set_up_trainers(self) -> None:
        configure: list[Order[None]] = []
        for pool, ranks in self.trainers.items():
            for number, rank in enumerate(ranks):
                configure.append(rank.order(Trainer.configure, self.plan, pool, number))
        ask(configure)
        join: list[Order[None]] = []
        for ranks in self.trainers.values():
            ((host, port),) = ask([ranks[0].order(Trainer.listen)]).results
            join += to_each(ranks, Trainer.join, COLLECTIVE_SECONDS, host, port)
        ask(join)
        ask(to_each(self.training, Trainer.load_models, self._saved))
        self.times.passed("loading")
        ask(to_each(self.training, Trainer.warm_up))
        self.times.passed("compiling")

    def close(self) -> None:
        """End all of them at once, whatever they are doing. Those of a fleet that stays open stay
        too, but the trainers drop their models and leave their groups, which must not wait until
        one of them is used again or ended."""
        with self._lock:
            self._closed = True
        for judges in self.judges.values():
            judges.close()
        if self._own:
            self.fleet.close()
        else:
            with contextlib.suppress(
                WorkerError, TimeoutError
            ):  # they did not do what they were asked before either
                ask(to_each(self.training, Trainer.leave), timeout=LEAVING_SECONDS)


def retire_engines(fleet: pools.Fleet, plan: Plan, plans: Sequence[Plan]) -> None:
    """End the engines on the GPUs of `plans` that are made for other plans than this one: they hold
    memory even when nobody asks them."""
    gpus = [gpu for other in plans for pool in other.pools.values() for gpu in pool.gpus]
    used, fits = kind_of(plan), kind_of(plan).fits(plan)
    for kind in ENGINE_KINDS.values():
        if kind.made_for is not None:
            keep = [(places, fits) for _, places in plan.engine_gpus()] if kind is used else []
            fleet.retire(kind.worker, gpus, keep)


def fleet_for(plans: list[Plan]) -> pools.Fleet:
    """A fleet on the GPUs of all of these plans. Raises UserError."""
    gpus = dict.fromkeys(gpu for plan in plans for pool in plan.pools.values() for gpu in pool.gpus)
    kinds = {node: plans[0].cluster.nodes[node].device for node, _ in gpus}
    return pools.Fleet(tuple(gpus), pools.resource_of(plans[0]), kinds)
