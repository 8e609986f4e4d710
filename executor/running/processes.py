"""The processes of a real run: trainers and engines on the GPUs of a plan, and the reward
function's."""

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import ray

from executor.data.reward import RewardWorker, import_hangs
from executor.fleet import pools
from executor.fleet.worker import Asked, Rank, Record, Worker, WorkerError, ask, begin, within
from executor.rollout.engine import EngineWorker
from executor.rollout.vllm.engine import Channel
from executor.rollout.vllm.worker import VllmWorker, made_for
from executor.running.run_directory import log
from executor.running.supervise import Deadlines
from executor.running.weight_sync import WeightSync, channels
from executor.training.shards import Saved
from executor.training.trainer import Trainer
from planner.spec.plan import Gpu, Plan
from planner.spec.workload import RewardFunction

LEAVING_SECONDS = 30.0


class Processes:
    """Started and ready when constructed: one trainer per GPU of a pool that trains or infers, one
    engine per tensor-parallel group of the rollout's pools, and one process for a reward function.

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
        vllm = plan.rollout.engine == "vllm"
        self._engine_class, self._made_for = (
            (VllmWorker, made_for(plan)) if vllm else (EngineWorker, "")
        )
        self._own = fleet is None
        self._closed, self._lock = False, threading.Lock()
        self.fleet = fleet or fleet_for([plan])
        self.trainers: dict[str, list[Rank]] = {}
        self.engines: list[Rank] = []
        self.judge: list[Rank] = []
        self._version = 0  # of the weights that the engines have
        self._installed: tuple[list[ray.ObjectRef], int] | None = (
            None  # what engines have from the object store
        )
        try:
            with within(self.deadlines.of_start):
                self._start()
                self._set_up()
        except BaseException:
            self.close()
            raise

    def of(self, role: str) -> list[Rank]:
        """The ranks that a training or inference role runs on."""
        layout = self.plan.trainers[role]
        return self.trainers[layout.pools[0]][: layout.gpus]

    @property
    def training(self) -> list[Rank]:
        """The ranks of all pools."""
        return [rank for ranks in self.trainers.values() for rank in ranks]

    def sync_weights(self, version: int) -> list[Record]:
        """Install the actor's weights of this version in all engines."""
        self._version = version
        if self.sync is not None:
            return self.sync(version)
        gathered = ask(self.of("actor"), "gather", "actor", version)
        weights = gathered.results[0]  # a reference, from rank 0
        installed = ask(self.engines, "install", [weights], version, revive=self.revive)
        self._installed = [weights], version
        return gathered.records + installed.records

    def revive(self, number: int) -> Rank:
        """Start an engine again that died, with the weights that it had. They lie in the object
        store; those that come from GPU to GPU are sent anew, as long as the trainers have no
        others. Raises WorkerError if they have."""
        pool, gpus = self.plan.engine_gpus()[number]
        name = self.engines[number].name
        log.warning("%s died; it is started again", name)
        with within(self.deadlines.of_start, anew=True):
            if self.sync is None:
                (engine,) = pools.connect(
                    [self._again(self._engine_class, gpus, name, self._made_for)]
                )
                ask([engine], "start", self.plan, pool)
                if self._installed is not None:
                    ask([engine], "install", *self._installed)
            else:
                engine = self._revive_on_gpus(number, pool, gpus, name, self.sync)
        self.engines[number] = engine
        return engine

    def _revive_on_gpus(
        self, number: int, pool: str, gpus: tuple[Gpu, ...], name: str, sync: WeightSync
    ) -> Rank:
        (held,) = ask(self.of("actor")[:1], "version_of", "actor").results
        if held != self._version:
            raise WorkerError(
                f"{name} died, and its weights {self._version} have become {held} in the trainers "
                "since"
            )
        (engine,) = pools.connect([self._again(self._engine_class, gpus, name, self._made_for)])
        ask([engine], "start", self.plan, pool, sync.ways[number])
        sync.replace(number, engine)
        sync(held)
        return engine

    def restart_judge(self) -> None:
        """A fresh process for the reward function, in the place of one that hangs or died."""
        assert isinstance(self.plan.workload.reward, RewardFunction)
        self.judge[:] = pools.connect([self._again(RewardWorker, (), self.judge[0].name)])
        self._load_reward(self.plan.workload.reward)

    def _again(
        self, worker: Callable[[], Worker], gpus: tuple[Gpu, ...], name: str, kind: str = ""
    ) -> Rank:
        """A fresh process, unless all are being ended: a call that this interrupts sees its
        processes die."""
        with self._lock:
            if self._closed:
                raise WorkerError(f"{name} was ended")
            return replace(self.fleet.again(worker, gpus, kind), name=name)

    def _start(self) -> None:
        """All at once, for most of their start is loading libraries."""
        for pool in dict.fromkeys(layout.pools[0] for layout in self.plan.trainers.values()):
            ranks = [self.fleet.process(Trainer, (gpu,)) for gpu in self.plan.pools[pool].gpus]
            self.trainers[pool] = [
                replace(r, name=f"trainer {i} of pool {pool}") for i, r in enumerate(ranks)
            ]
        places = self.plan.engine_gpus()
        keep = [(gpus, self._made_for) for _, gpus in places]
        self.fleet.retire(
            VllmWorker, [gpu for pool in self.plan.pools.values() for gpu in pool.gpus], keep
        )
        for number, (pool, gpus) in enumerate(places):
            engine = self.fleet.process(self._engine_class, gpus, self._made_for)
            self.engines.append(replace(engine, name=f"engine {number} in pool {pool}"))
        if isinstance(self.plan.workload.reward, RewardFunction):
            self.judge.append(
                replace(self.fleet.process(RewardWorker, ()), name="the reward function's process")
            )

    def _set_up(self) -> None:
        """Clocks, then the groups, then the models. Engines start while the trainers load and
        compile; but those that sleep in a run have no room beside the trainers while they are
        awake, and start when the trainers have done."""
        plan = self.plan
        for home in (*self.trainers.values(), self.engines, self.judge):
            home[:] = pools.connect(home)
        ways = channels(plan, [gpus for _, gpus in plan.engine_gpus()])
        engines = begin(self.engines, "load") if plan.rollout.offload else self._begin_engines(ways)
        self._set_up_trainers()
        if plan.rollout.offload:
            engines.wait()
            engines = self._begin_engines(ways)
        self.eos: list[int] = engines.wait().results[0]
        self.sync = (
            WeightSync(plan, self.of("actor"), self.engines, ways) if "store" not in ways else None
        )
        if self._engine_class is VllmWorker or self._saved is not None:
            self.sync_weights(self._saved.roles["actor"].version if self._saved else 0)
        if isinstance(plan.workload.reward, RewardFunction):
            self._load_reward(plan.workload.reward)

    def _begin_engines(self, ways: Sequence[Channel]) -> Asked:
        vllm, places = (
            self._engine_class is VllmWorker,
            zip(self.plan.engine_gpus(), ways, strict=True),
        )
        each = [(pool, way) if vllm else (pool,) for (pool, _), way in places]
        return begin(self.engines, "start", self.plan, each=each)

    def _set_up_trainers(self) -> None:
        trainers = [(pool, i) for pool, ranks in self.trainers.items() for i in range(len(ranks))]
        ask(self.training, "configure", self.plan, each=trainers)
        address = {
            pool: ask(ranks[:1], "listen").results[0] for pool, ranks in self.trainers.items()
        }
        ask(
            self.training,
            "join",
            self.deadlines.of_collective,
            each=[address[pool] for pool, _ in trainers],
        )
        ask(self.training, "load", self._saved)
        ask(self.training, "warm_up")

    def _load_reward(self, reward: RewardFunction) -> None:
        try:
            ask(self.judge, "load", reward, timeout=reward.timeout_seconds)
        except TimeoutError:
            raise import_hangs(reward) from None

    def close(self) -> None:
        """End all of them at once, whatever they are doing. Those of a fleet that stays open stay
        too, but the trainers drop their models and leave their groups, which must not wait until
        one of them is used again or ended."""
        with self._lock:
            self._closed = True
        if self._own:
            self.fleet.close()
        else:
            with contextlib.suppress(
                WorkerError, TimeoutError
            ):  # they did not do what they were asked before either
                ask(self.training, "leave", timeout=LEAVING_SECONDS)


def fleet_for(plans: list[Plan]) -> pools.Fleet:
    """A fleet on the GPUs of all of these plans. Raises UserError."""
    gpus = dict.fromkeys(gpu for plan in plans for pool in plan.pools.values() for gpu in pool.gpus)
    kinds = {node: plans[0].cluster.nodes[node].device for node, _ in gpus}
    return pools.Fleet(tuple(gpus), pools.resource_of(plans[0]), kinds)
