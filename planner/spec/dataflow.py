"""The calls of one training step and the data between them; weights are data like any other.

What else there is to know of a call follows from what it reads and writes, so it is not said twice:
which call installs weights (`Dataflow.installs`), which update ends a step (`ends_step`), how many
updates the weights have that a call uses (`schedule`), how far a call may lag behind the others
(`enumerate_programs`).
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # a workload has a dataflow
    from planner.spec.workload import Workload

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
    it runs on the steps n-1, 2n-1, ... only. A call that `scores` rates sequences; as a host call
    it runs the workload's reward function, and takes its time. What goes on `since_generation` has
    its seconds counted from the end of that, however late it is issued. A `monitor` watches the
    training: no other call reads what it writes, and it does not count in the steady state that a
    search optimises. A call that `streams` takes no turns on its pools: those of several steps run
    at once, and what else runs there does not wait for them."""

    name: str
    roles: tuple[str, ...]
    kind: Kind
    reads: tuple[Read, ...]
    writes: tuple[str, ...]
    every: int = 1
    scores: bool = False
    since_generation: bool = False
    monitor: bool = False
    streams: bool = False

    def runs_at(self, step: int) -> bool:
        return step % self.every == self.every - 1


@dataclass(frozen=True, kw_only=True)
class Dataflow:
    """The calls of a step, in an order in which they could run one after the other.

    One call that is no monitor generates. It reads the latest weights, which a transfer installs
    from those of the update that ends the step. All other calls but monitors lie on a way from
    generation to that transfer, or lead there by the weights of the next step. State, which is read
    with a lag, belongs to a role: whatever reads or overwrites it is a call of that role."""

    calls: tuple[Call, ...]

    def __hash__(self) -> int:
        """The hash of the names alone: a search looks flows up often, and hashing all that calls
        read takes long."""
        return hash(self.names)

    def __getitem__(self, name: str) -> Call:
        return next(call for call in self.calls if call.name == name)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(call.name for call in self.calls)

    def writer(self, data: str) -> Call | None:
        """The call that writes a datum; None for what comes from outside (prompts)."""
        return next((call for call in self.calls if data in call.writes), None)

    @cached_property
    def steady(self) -> "Dataflow":
        """The calls of every step: all but the monitors."""
        return Dataflow(calls=tuple(call for call in self.calls if not call.monitor))

    @cached_property
    def streamed(self) -> "Dataflow":
        """The same calls where generation streams."""
        streams = replace(self.generates, streams=True)
        calls = (streams if call.name == streams.name else call for call in self.calls)
        return Dataflow(calls=tuple(calls))

    @cached_property
    def state(self) -> frozenset[str]:
        """Data that a later step overwrites (weights); all else is made again each step."""
        reads = [read for call in self.calls for read in call.reads]
        return frozenset(read.data for read in reads if read.lag or read.latest)

    @cached_property
    def generates(self) -> Call:
        """The call that makes the sequences to train on."""
        return next(call for call in self.steady.calls if call.kind == "generate")

    @cached_property
    def installs(self) -> Call:
        """The transfer that gives generation its weights: it writes what is read at its latest."""
        read = next(read for read in self.generates.reads if read.latest)
        return self._writer_of(read)

    @cached_property
    def ends_step(self) -> Call:
        """The update whose weights are installed. A step ends when it does."""
        return self._writer_of(self.installs.reads[0])

    def _writer_of(self, read: Read) -> Call:
        writer = self.writer(read.data)
        assert writer is not None, f"no call writes {read.data}"
        return writer


def ppo(workload: "Workload") -> Dataflow:
    """One step of PPO, whose critic says what was to be expected of a sequence."""
    return _without(_calls(workload), _unused(workload))


def reinforce(workload: "Workload") -> Dataflow:
    """One step without a critic: what was to be expected is told by the other samples of the prompt
    or of the batch (GRPO, Dr. GRPO, RLOO, REINFORCE++)."""
    return _without(_calls(workload), _unused(workload) | {"values", "update_critic"})


def _unused(workload: "Workload") -> set[str]:
    """Calls that a workload has no use for."""
    unused = {
        "score_on_host": not ("reward" in workload.roles and workload.host_rewards),
        "select": not workload.oversamples,
        "ref_logprobs": workload.reference is None,
        "old_logprobs": workload.proximal != "recompute",
        "evaluate": not (workload.data and workload.data.evaluate_every),
    }
    return {name for name, leave in unused.items() if leave}


SEQUENCES = Read(data="sequences")
# What each update makes of the weights of the one before.
ACTOR_WEIGHTS = Read(data="actor_weights", lag=1)
CRITIC_WEIGHTS = Read(data="critic_weights", lag=1)


def _calls(workload: "Workload") -> tuple[Call, ...]:
    """Every call that a step may have."""
    # What is trained on: all that was generated, or the groups that were selected from it.
    batch = Read(data="selected") if workload.oversamples else SEQUENCES
    return (
        _generate(),
        *_scoring(workload),
        *_inference(batch),
        _advantages(),
        *_updates(workload, batch),
        *_with_new_weights(workload),
    )


def _generate() -> Call:
    return Call(
        name="generate",
        roles=("rollout",),
        kind="generate",
        reads=(Read(data="prompts"), Read(data="rollout_weights", latest=True)),
        writes=("sequences", "log_probs"),
    )


def _scoring(workload: "Workload") -> tuple[Call, ...]:
    """What rates all that was generated, and what selects from it."""
    model_scores = "reward" in workload.roles  # otherwise the host alone does
    # Processes score what has ended by themselves; a reward without them begins with its call.
    rewards = workload.host_rewards
    by_processes = bool(rewards) and all(reward.processes is not None for reward in rewards)
    return (
        Call(
            name="score",
            roles=("reward",) if model_scores else (),
            kind="infer" if model_scores else "host",
            reads=(SEQUENCES,),
            writes=("rewards",),
            scores=True,
            since_generation=by_processes and not model_scores,
        ),
        Call(
            name="score_on_host",
            roles=(),
            kind="host",
            reads=(SEQUENCES,),
            writes=("host_rewards",),
            scores=True,
            since_generation=by_processes,
        ),
        Call(
            name="select",  # the groups whose samples differ in their scores
            roles=(),
            kind="host",
            reads=(SEQUENCES, Read(data="rewards"), Read(data="host_rewards")),
            writes=("selected",),
        ),
    )


def _inference(batch: Read) -> tuple[Call, ...]:
    """What models make of a batch without learning from it."""
    return (
        Call(
            name="ref_logprobs",
            roles=("reference",),
            kind="infer",
            reads=(batch,),
            writes=("ref_log_probs",),
        ),
        Call(
            name="old_logprobs",
            roles=("actor",),
            kind="infer",
            reads=(batch, ACTOR_WEIGHTS),
            writes=("proximal_log_probs",),
        ),
        Call(
            name="values",
            roles=("critic",),
            kind="infer",
            reads=(batch, CRITIC_WEIGHTS),
            writes=("values",),
        ),
    )


def _advantages() -> Call:
    return Call(
        name="advantages",
        roles=(),
        kind="host",
        reads=(
            Read(data="rewards"),
            Read(data="selected"),
            Read(data="host_rewards"),
            Read(data="log_probs"),
            Read(data="ref_log_probs"),
            Read(data="proximal_log_probs"),
            Read(data="values"),
        ),
        writes=("advantages", "returns"),
    )


def _updates(workload: "Workload", batch: Read) -> tuple[Call, ...]:
    recompute = workload.proximal == "recompute"
    return (
        Call(
            name="update_critic",
            roles=("critic",),
            kind="train",
            reads=(batch, Read(data="values"), Read(data="returns"), CRITIC_WEIGHTS),
            writes=("critic_weights",),
        ),
        Call(
            name="update_actor",
            roles=("actor",),
            kind="train",
            reads=(
                batch,
                Read(data="advantages"),
                Read(data="proximal_log_probs" if recompute else "log_probs"),
                ACTOR_WEIGHTS,
            ),
            writes=("actor_weights",),
        ),
    )


def _with_new_weights(workload: "Workload") -> tuple[Call, ...]:
    evaluate_every = workload.data.evaluate_every if workload.data else 0
    return (
        Call(
            name="sync_weights",
            roles=("actor", "rollout"),
            kind="transfer",
            reads=(Read(data="actor_weights"),),
            writes=("rollout_weights",),
        ),
        Call(
            name="evaluate",  # what the last weights make of held-out prompts
            roles=("rollout",),
            kind="generate",
            reads=(Read(data="rollout_weights"),),
            writes=("metrics",),
            every=max(1, evaluate_every),
            monitor=True,
        ),
    )


def _without(calls: tuple[Call, ...], names: set[str]) -> Dataflow:
    """The other calls, which do not read what only those of these names write."""
    missing = {data for call in calls if call.name in names for data in call.writes}
    kept = []
    for call in calls:
        if call.name not in names:
            reads = tuple(read for read in call.reads if read.data not in missing)
            kept.append(replace(call, reads=reads))
    return Dataflow(calls=tuple(kept))
