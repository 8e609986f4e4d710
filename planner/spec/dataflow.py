"""The calls of one training step and the data between them; weights are data like any other."""

from dataclasses import dataclass
from typing import Literal

import networkx as nx

from planner.spec.workload import RewardFunction, Workload

Kind = Literal["generate", "infer", "train", "transfer", "host"]


@dataclass(frozen=True, kw_only=True)
class Read:
    """What a call reads: the datum of its own step less `lag`, or, with `latest`, whatever was last
    written before the call in the program (the rollout's weights)."""

    data: str
    lag: int = 0
    latest: bool = False


@dataclass(frozen=True, kw_only=True)
class Call:
    """One operation of a step on the pools of its roles; a host call has no roles. With `every` = n
    it runs on the steps n-1, 2n-1, ... only. A `monitor` call watches the training: no other call
    reads what it writes, and it does not count in the steady state that a search optimises."""

    name: str
    roles: tuple[str, ...]
    kind: Kind
    reads: tuple[Read, ...]
    writes: tuple[str, ...]
    every: int = 1
    monitor: bool = False

    def runs_at(self, step: int) -> bool:
        return step % self.every == self.every - 1


@dataclass(frozen=True, kw_only=True)
class Dataflow:
    calls: tuple[Call, ...]

    def __hash__(self) -> int:
        """Of the names alone: a search looks flows up often, and hashing all that calls read takes
        long."""
        return hash(self.names)

    def __getitem__(self, name: str) -> Call:
        return next(call for call in self.calls if call.name == name)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(call.name for call in self.calls)

    def writer(self, data: str) -> Call | None:
        """The call that writes a datum; None for what comes from outside (prompts)."""
        return next((call for call in self.calls if data in call.writes), None)

    @property
    def steady(self) -> "Dataflow":
        """Without the monitors: the calls of every step."""
        return Dataflow(calls=tuple(call for call in self.calls if not call.monitor))

    @property
    def state(self) -> frozenset[str]:
        """Data that a later step overwrites (weights); all else is made anew each step."""
        reads = [read for call in self.calls for read in call.reads]
        return frozenset(read.data for read in reads if read.lag or read.latest)

    def graph(self) -> nx.MultiDiGraph:
        """Calls as nodes; an edge per datum from its writer to each reader, with `data`, `lag` and
        `latest`."""
        graph = nx.MultiDiGraph()
        graph.add_nodes_from(self.names)
        for call in self.calls:
            for read in call.reads:
                if writer := self.writer(read.data):
                    graph.add_edge(
                        writer.name, call.name, data=read.data, lag=read.lag, latest=read.latest
                    )
        return graph


def ppo(workload: Workload) -> Dataflow:
    """One PPO step for the roles that the workload has."""
    sequences = Read(data="sequences")
    calls = [
        Call(
            name="generate",
            roles=("rollout",),
            kind="generate",
            reads=(Read(data="prompts"), Read(data="rollout_weights", latest=True)),
            writes=("sequences", "log_probs"),
        )
    ]
    on_host = isinstance(workload.reward, RewardFunction)
    calls.append(
        Call(
            name="score",
            roles=() if on_host else ("reward",),
            kind="host" if on_host else "infer",
            reads=(sequences,),
            writes=("rewards",),
        )
    )
    inputs = [Read(data="rewards"), Read(data="log_probs")]
    if workload.reference:
        calls.append(
            Call(
                name="ref_logprobs",
                roles=("reference",),
                kind="infer",
                reads=(sequences,),
                writes=("ref_log_probs",),
            )
        )
        inputs.append(Read(data="ref_log_probs"))
    reads: tuple[Read, ...]
    if workload.proximal == "recompute":
        reads = (sequences, Read(data="actor_weights", lag=1))
        calls.append(
            Call(
                name="old_logprobs",
                roles=("actor",),
                kind="infer",
                reads=reads,
                writes=("proximal_log_probs",),
            )
        )
        inputs.append(Read(data="proximal_log_probs"))
    if workload.critic:
        reads = (sequences, Read(data="critic_weights", lag=1))
        calls.append(
            Call(name="values", roles=("critic",), kind="infer", reads=reads, writes=("values",))
        )
        inputs.append(Read(data="values"))
    calls.append(
        Call(
            name="advantages",
            roles=(),
            kind="host",
            reads=tuple(inputs),
            writes=("advantages", "returns"),
        )
    )
    if workload.critic:
        reads = (
            sequences,
            Read(data="values"),
            Read(data="returns"),
            Read(data="critic_weights", lag=1),
        )
        calls.append(
            Call(
                name="update_critic",
                roles=("critic",),
                kind="train",
                reads=reads,
                writes=("critic_weights",),
            )
        )
    proximal = "proximal_log_probs" if workload.proximal == "recompute" else "log_probs"
    reads = (
        sequences,
        Read(data="advantages"),
        Read(data=proximal),
        Read(data="actor_weights", lag=1),
    )
    calls.append(
        Call(
            name="update_actor",
            roles=("actor",),
            kind="train",
            reads=reads,
            writes=("actor_weights",),
        )
    )
    calls.append(
        Call(
            name="sync_weights",
            roles=("actor", "rollout"),
            kind="transfer",
            reads=(Read(data="actor_weights"),),
            writes=("rollout_weights",),
        )
    )
    if workload.data and workload.data.evaluate_every:
        calls.append(_evaluate(workload.data.evaluate_every))
    return Dataflow(calls=tuple(calls))


def _evaluate(every: int) -> Call:
    """What the last weights make of held-out prompts, every so many steps."""
    return Call(
        name="evaluate",
        roles=("rollout",),
        kind="generate",
        reads=(Read(data="rollout_weights"),),
        writes=("metrics",),
        every=every,
        monitor=True,
    )
