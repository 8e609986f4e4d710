"""Who comes before whom: the one place where reads and pools become dependencies.

A call of step t has three kinds of needs. It needs each datum that it reads, at the version of
step t - lag. It needs the latest version of some data, whichever step that is of. And it needs its
pools, which it takes over from the call that had them last. The first is known from the dataflow
alone; the other two are known once a program says which call is issued last before which
(`steps_behind`). An example, with the call `a` on pool p, and `b` on pools p and q:

    call   reads                    needs on (p, q)
    a      (nothing)                p: of a or b, whichever is issued last before it
    b      A, which a writes        A: of a, lag 0
                                    p: of a or b, whichever is issued last before it
                                    q: of b, issued last before it

A call that streams neither takes a pool over nor hands it on. Where `generate` streams, the data
alone say when it starts (once the sync that is issued last before it has ended) and who waits for
its end. `sync_weights` does not wait for it but interrupts it, and those of several steps run side
by side. `sync_weights` and `evaluate` still take turns on its pools: so an evaluation has the same
weights from start to end.

`schedule` turns needs into tasks and into the event graph of a program, `enumerate_programs` into
the event graphs of many programs, and `choices` into what all programs have in common. Waits,
which belong to a program and not to a dataflow, are added by `schedule`.
"""

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from planner.spec.dataflow import Call, Dataflow

PoolsOf = Callable[[Call], tuple[str, ...]]
Number = TypeVar("Number", int, NDArray[np.int64])


class Need(NamedTuple):
    """A call starts after a call of `by` has ended: after the one of `lag` steps before its own,
    or, where `lag` is None, after the one that is issued last before it. `what` names the datum or
    the pool that is needed."""

    what: str
    by: tuple[str, ...]
    lag: int | None = None


class Turn(NamedTuple, Generic[Number]):
    """Where a program has a call: its place in the round and its offset, each a number or, for many
    programs at once, an array of numbers."""

    place: Number
    offset: Number


Needs = dict[str, tuple[Need, ...]]  # by call


def needs(flow: Dataflow, pools_of: PoolsOf) -> Needs:
    """All that each call of a dataflow needs: its data first, then its pools."""
    data, pools = data_needs(flow), pool_needs(flow, pools_of)
    return {call: (*data[call], *pools[call]) for call in flow.names}


def data_needs(flow: Dataflow) -> Needs:
    """What each call needs of what it reads. Data from outside, such as prompts, are there."""
    found: Needs = {}
    for call in flow.calls:
        wanted = []
        for read in call.reads:
            writer = flow.writer(read.data)
            if writer is not None:
                lag = None if read.latest else read.lag
                wanted.append(Need(read.data, (writer.name,), lag))
        found[call.name] = tuple(wanted)
    return found


def pool_needs(flow: Dataflow, pools_of: PoolsOf) -> Needs:
    """What each call needs of its pools: the call on the pool that was issued last before it, which
    may be itself, of the step before. A call that streams needs none, and none needs it."""
    taken = {call.name: () if call.streams else pools_of(call) for call in flow.calls}
    users: dict[str, tuple[str, ...]] = {}
    for name, pools in taken.items():
        for pool in pools:
            users[pool] = (*users.get(pool, ()), name)
    return {name: tuple(Need(pool, users[pool]) for pool in pools) for name, pools in taken.items()}


def before_overwriting(flow: Dataflow) -> Needs:
    """Which calls must have been issued before a call that overwrites what they read. A call that
    reads the state of step t - lag has its turn before the writer of step t - lag + 1, so that
    writer needs it 1 - lag steps before. For example `sync_weights`, which reads the actor's
    weights with lag 0, is issued before `update_actor` of the next step (lag 1)."""
    found: dict[str, list[Need]] = {call: [] for call in flow.names}
    for reader, wanted in data_needs(flow).items():
        for need in wanted:
            writer = need.by[0]
            if need.lag is not None and need.what in flow.state and reader != writer:
                found[writer].append(Need(need.what, (reader,), 1 - need.lag))
    return {call: tuple(wanted) for call, wanted in found.items()}


def steps_behind(first: Turn[Number], second: Turn[Number]) -> Number:
    """The lag that `Need` leaves open: the second of two calls, of step t, comes after the first of
    step t - lag, the one that is issued last before it.

    Round i issues each call for step i + offset. A first call that stands earlier in the round is
    of step i + its offset; one that stands later (or is the same call) was issued last by round
    i - 1, for one step less. For example, where `generate` (place 0, offset 1) and `train` (place
    1, offset 0) share a pool, `train` comes after `generate` of the step after its own (lag -1),
    and `generate` after `train` of two steps before (lag 2)."""
    return second.offset - first.offset + (first.place >= second.place)
