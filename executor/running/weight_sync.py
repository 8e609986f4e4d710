"""`sync_weights` on GPUs: the actor's weights to every vLLM engine, by the way that reaches it."""

from collections.abc import Sequence
from typing import Any

from executor.fleet.asking import Rank, ask, to_each
from executor.fleet.worker import Record
from executor.rollout.engine import Channel
from executor.rollout.engines import kind_of
from executor.rollout.vllm.worker import VllmWorker
from executor.training.trainer import Trainer
from executor.training.weights import Described, in_chunks
from planner.spec.plan import Gpu, Plan


def channels(plan: Plan, engines: Sequence[tuple[Gpu, ...]]) -> list[Channel]:
    """How each engine, given its GPUs, gets its weights. vLLM on GPUs: from the actor's ranks on
    the same GPUs through CUDA IPC, else from the actor's first rank over NCCL, which cannot join
    two processes of one GPU. All others: from Ray's object store."""
    if not kind_of(plan).from_gpus or plan.device_of(plan.rollout.pools[0]).kind == "cpu":
        return ["store"] * len(engines)
    layout = plan.trainers["actor"]
    actor = set(plan.pools[layout.pools[0]].gpus[: layout.gpus])
    return ["ipc" if actor.issuperset(gpus) else "nccl" for gpus in engines]


class WeightSync:
    """The ways from the actor's ranks to the engines, opened once. A rollout that spans the actor's
    pool and another one gets its weights in two turns, because each way needs the shards
    gathered."""

    def __init__(
        self,
        plan: Plan,
        actors: Sequence[Rank[Trainer]],
        engines: Sequence[Rank[VllmWorker]],
        ways: Sequence[Channel],
    ) -> None:
        self.actors, self.engines, self.ways = actors, list(engines), ways
        self._absent = frozenset[int]()
        self.tensor_parallel = plan.rollout.tensor_parallel
        (self.weights,) = ask(to_each(actors[:1], Trainer.describe_weights)).results
        self.chunks: list[list[Described]] = in_chunks(self.weights)
        if self.elsewhere:
            self._form_group()
        if self.beside:
            windows = ask(to_each(actors, Trainer.open_window, self.chunks)).results
            self.handles: dict[str, Any] = {
                gpu: handle for window in windows for gpu, handle in window.items()
            }

    @property
    def beside(self) -> list[Rank[VllmWorker]]:
        return self._reached_by("ipc")

    @property
    def elsewhere(self) -> list[Rank[VllmWorker]]:
        return self._reached_by("nccl")

    def _reached_by(self, channel: Channel) -> list[Rank[VllmWorker]]:
        ways = enumerate(zip(self.engines, self.ways, strict=True))
        return [e for at, (e, way) in ways if way == channel and at not in self._absent]

    def replace(self, number: int, engine: Rank[VllmWorker]) -> None:
        """Another process in the place of an engine that died; weights come to it with the next
        ones."""
        self.engines[number] = engine

    def _form_group(self) -> None:
        """The sender is rank 0; each engine has as many ranks as GPUs. Those that do something else
        join when they have done it."""
        self._members, sender = self.elsewhere, self.actors[0]
        (host, port), *_ = ask([sender.order(Trainer.rendezvous)]).results
        world = 1 + self.tensor_parallel * len(self.elsewhere)
        firsts = range(1, world, self.tensor_parallel)
        leads = sender.order(Trainer.lead_group, host, port, world)
        joins = [
            engine.order(VllmWorker.join_group, host, port, world, first)
            for engine, first in zip(self.elsewhere, firsts, strict=True)
        ]
        ask([leads, *joins])

    def __call__(self, version: int, absent: frozenset[int] = frozenset()) -> list[Record]:
        """Install the actor's weights of this version in all engines but the absent ones. If others
        than before are in the group over NCCL, it is formed again; windows can be opened by
        whoever comes."""
        self._absent = absent
        records: list[Record] = []
        if self.elsewhere:
            if self.elsewhere != self._members:
                self._form_group()
            records += self._over_nccl(version)
        if self.beside:
            records += self._through_windows(version)
        return records

    def _over_nccl(self, version: int) -> list[Record]:
        sends = to_each(self.actors, Trainer.send_weights, version)
        receives = to_each(self.elsewhere, VllmWorker.receive_weights, version, self.weights)
        return ask([*sends, *receives]).records

    def _through_windows(self, version: int) -> list[Record]:
        """A chunk at a time: all actors fill their windows, then the engines read them."""
        actors, engines = self.actors, self.beside
        begin_sending = to_each(actors, Trainer.begin_sending, version)
        begin_receiving = to_each(engines, VllmWorker.begin_receiving, version)
        records = ask([*begin_sending, *begin_receiving]).records
        for chunk in self.chunks:
            records += ask(to_each(actors, Trainer.fill_window, chunk)).records
            records += ask(to_each(engines, VllmWorker.read_window, chunk, self.handles)).records
        end_sending = to_each(actors, Trainer.end_sending)
        end_receiving = to_each(engines, VllmWorker.end_receiving)
        return records + ask([*end_sending, *end_receiving]).records
