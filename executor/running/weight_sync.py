"""`sync_weights` on GPUs: the actor's weights to every vLLM engine, by the way that reaches it."""

from collections.abc import Sequence

from executor.fleet.worker import Rank, Record, ask
from executor.rollout.vllm.engine import Channel
from executor.training.weights import Described, in_chunks
from planner.spec.plan import Gpu, Plan


def channels(plan: Plan, engines: Sequence[tuple[Gpu, ...]]) -> list[Channel]:
    """How each engine, given its GPUs, gets its weights. vLLM on GPUs: from the actor's ranks on
    the same GPUs through CUDA IPC, else from the actor's first rank over NCCL, which cannot join
    two processes of one GPU. All others: from Ray's object store."""
    if plan.rollout.engine != "vllm" or plan.device_of(plan.rollout.pools[0]).kind == "cpu":
        return ["store"] * len(engines)
    layout = plan.trainers["actor"]
    actor = set(plan.pools[layout.pools[0]].gpus[: layout.gpus])
    return ["ipc" if actor.issuperset(gpus) else "nccl" for gpus in engines]


class WeightSync:
    """The ways from the actor's ranks to the engines, opened once. A rollout that spans the actor's
    pool and another one gets its weights in two turns, because each way needs the shards
    gathered."""

    def __init__(
        self, plan: Plan, actors: list[Rank], engines: list[Rank], ways: Sequence[Channel]
    ) -> None:
        self.actors, self.engines, self.ways = actors, list(engines), ways
        self.tensor_parallel = plan.rollout.tensor_parallel
        self.weights: list[Described] = ask(actors[:1], "describe_weights").results[0]
        self.chunks = in_chunks(self.weights)
        if self.elsewhere:
            self._form_group()
        if self.beside:
            windows = ask(actors, "open_window", self.chunks).results
            self.handles = {gpu: handle for window in windows for gpu, handle in window.items()}

    @property
    def beside(self) -> list[Rank]:
        return [engine for engine, way in zip(self.engines, self.ways, strict=True) if way == "ipc"]

    @property
    def elsewhere(self) -> list[Rank]:
        return [
            engine for engine, way in zip(self.engines, self.ways, strict=True) if way == "nccl"
        ]

    def replace(self, number: int, engine: Rank) -> None:
        """Another process in the place of an engine that died. The group over NCCL is formed anew
        without that one, as soon as the other engines in it have done what they are doing; windows
        can be opened by whoever comes."""
        self.engines[number] = engine
        if self.ways[number] == "nccl":
            self._form_group()

    def _form_group(self) -> None:
        """The sender is rank 0; each engine has as many ranks as GPUs."""
        host, port = ask(self.actors[:1], "rendezvous").results[0]
        world = 1 + self.tensor_parallel * len(self.elsewhere)
        first = [0, *range(1, world, self.tensor_parallel)]
        members = [self.actors[0], *self.elsewhere]
        ask(members, "join_group", host, port, world, each=[(rank,) for rank in first])

    def __call__(self, version: int) -> list[Record]:
        """Install the actor's weights of this version in all engines."""
        records: list[Record] = []
        if self.elsewhere:
            members = [*self.actors, *self.elsewhere]
            records += ask(members, "broadcast_weights", version, self.weights).records
        if self.beside:
            members = [*self.actors, *self.beside]
            records += ask(members, "begin_weights", version).records
            for chunk in self.chunks:
                records += ask(self.actors, "fill_window", chunk).records
                records += ask(self.beside, "read_window", chunk, self.handles).records
            records += ask(members, "end_weights").records
        return records
