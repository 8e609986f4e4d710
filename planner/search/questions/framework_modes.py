"""The ways in which another framework can run a job: the roles of each pool, the order in which it
issues calls, and what it can do with layouts.

verl 0.9.1 has one pool for all roles that train or infer. Its synchronous trainer generates there
too, and waits for every call; its trainer `separate_async` generates on a pool of its own, one step
ahead. A reward model may have a pool of its own, and has to beside the second.

OpenRLHF 0.11.2 has all roles on the same GPUs, or actor and reference on some, critic and reward
model on others, or each on its own; its engines are then on further ones. It asks for all forward
passes at once, and for both updates at once, except where all roles share GPUs. Models are sharded
by ZeRO-3 over all GPUs of their role.

AReaL 1.0.4 gives a role GPUs of its own, or all of those of another role, and waits for every call
of a role that trains or infers. Engines lie on the actor's GPUs, one on each, or on their own.
There they may be ahead; weights then arrive in the middle of sequences, whose keys and values are
computed anew. Models are sharded by FSDP over all GPUs of their role, and go to the host with their
optimizer or not at all.

SkyRL 0.3.0 has all roles and the engines on the same GPUs, or the engines on others, the critic on
others again, and the reference there where the actor is or on its own. What shares GPUs takes turns
there, all of it in the host meanwhile. Its trainer waits for every call; an example of its
repository generates one step ahead. Its asynchronous trainer has losses of its own only.

Neither AReaL nor SkyRL has a reward model. One is a server beside it, on GPUs of its own, which the
reward function asks."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from planner.search.solver.best_program import Program
from planner.search.space.placements import Ranks, Structure
from planner.spec.dataflow import Dataflow
from planner.spec.frameworks import FrameworkName
from planner.spec.plan import Issue, Offload, Wait

RANKS: dict[FrameworkName, Ranks] = {
    "verl": "all",
    "openrlhf": "one group",
    "areal": "one group",
    "skyrl": "all",
}
AS_A_WHOLE: tuple[Offload, ...] = ("none", "all")  # a role goes to the host as a whole, or stays
ASLEEP: tuple[Offload, ...] = ("all",)
RESIDENT: tuple[Offload, ...] = ("none",)


class Mode(NamedTuple):
    """A way in which a framework runs: the roles of each pool, the program, whether generation is
    ahead, and whether it streams then. `offloads`: of roles that are not free in it, what may go to
    the host while they idle. `widest_engine`: the most GPUs that an engine may have."""

    structure: Structure
    program: Program
    ahead: bool
    streams: bool = False
    offloads: Mapping[str, Sequence[Offload]] = {}
    widest_engine: int | None = None


def modes_of(framework: FrameworkName, roles: Sequence[str], flow: Dataflow) -> Iterator[Mode]:
    """The ways in which a framework can run a workload with these roles."""
    if framework == "verl":
        yield from _of_verl(roles, flow)
    elif framework == "openrlhf":
        yield from _of_openrlhf(roles, flow)
    elif framework == "areal":
        yield from _of_areal(roles, flow)
    else:
        yield from _of_skyrl(roles, flow)


def _of_verl(roles: Sequence[str], flow: Dataflow) -> Iterator[Mode]:
    every = frozenset(roles)
    reward, rollout = frozenset({"reward"}) & every, frozenset({"rollout"})
    serial = serial_program(flow, ahead=False)
    yield Mode((every,), serial, False)
    if reward:
        yield Mode((every - reward, reward), serial, False)
    yield Mode(_pools(every - rollout - reward, rollout, reward), serial_program(flow, True), True)


def _of_openrlhf(roles: Sequence[str], flow: Dataflow) -> Iterator[Mode]:
    every = frozenset(roles)
    rollout = frozenset({"rollout"})
    yield Mode((every,), serial_program(flow, ahead=False), False)
    actor, critic = frozenset({"actor", "reference"}), frozenset({"critic", "reward"})
    alone = [frozenset({role}) for role in roles if role != "rollout"]
    both = (actor & every, critic & every)
    splits = {
        (every - rollout,),
        _pools(*both),
        (both[0], *(frozenset({role}) for role in roles if role in critic)),
        (*(frozenset({role}) for role in roles if role in actor), *_pools(*both[1:])),
        tuple(alone),
    }
    for pools in sorted(splits, key=lambda pools: (len(pools), str(sorted(map(sorted, pools))))):
        if len(pools) == 1:  # engines are apart from all others only if they are ahead
            yield Mode((*pools, rollout), serial_program(flow, ahead=True), True)
            continue
        for ahead in (False, True):
            yield Mode((*pools, rollout), _grouped_program(flow, ahead), ahead)


def _of_areal(roles: Sequence[str], flow: Dataflow) -> Iterator[Mode]:
    every = frozenset(roles)
    reward, rollout = frozenset({"reward"}) & every, frozenset({"rollout"})
    serial = serial_program(flow, ahead=False)
    free: dict[str, Sequence[Offload]] = dict.fromkeys(every - rollout, AS_A_WHOLE)
    free |= dict.fromkeys(reward, RESIDENT)
    asleep = {**free, "actor": ASLEEP}
    for pools in _partitions([role for role in roles if role not in rollout | reward]):
        with_engines = [pool | rollout if "actor" in pool else pool for pool in pools]
        yield Mode(_pools(*with_engines, reward), serial, False, False, asleep, 1)
        yield Mode(_pools(*pools, rollout, reward), serial, False, offloads=free)
    apart = _pools(every - rollout - reward, rollout, reward)
    yield Mode(apart, streaming_program(flow), True, True, offloads=free)


def _of_skyrl(roles: Sequence[str], flow: Dataflow) -> Iterator[Mode]:
    every = frozenset(roles)
    reward, rollout = frozenset({"reward"}) & every, frozenset({"rollout"})
    reference, critic = frozenset({"reference"}) & every, frozenset({"critic"}) & every
    actor, serial = frozenset({"actor"}), serial_program(flow, ahead=False)
    together = _pools(every - reward, reward)
    yield Mode(together, serial, False, offloads=_taking_turns(together))
    splits = {_pools(actor | reference, critic), _pools(actor, reference, critic)}
    for pools in sorted(splits, key=len):
        apart = _pools(*pools, rollout, reward)
        turns = _taking_turns(apart)
        yield Mode(apart, serial, False, offloads=turns)
        yield Mode(apart, serial_program(flow, ahead=True), True, offloads=turns)


def _pools(*pools: frozenset[str]) -> Structure:
    """The pools that have roles."""
    return tuple(pool for pool in pools if pool)


def _partitions(roles: Sequence[str]) -> Iterator[Structure]:
    """Every partition of roles into pools: the last role alone, or in any pool of the others."""
    if not roles:
        yield ()
        return
    *others, last = roles
    for pools in _partitions(others):
        for i, pool in enumerate(pools):
            yield (*pools[:i], pool | {last}, *pools[i + 1 :])
        yield (*pools, frozenset({last}))


def _taking_turns(pools: Structure) -> dict[str, Sequence[Offload]]:
    """Roles that share GPUs leave them to each other; those that do not stay."""
    found: dict[str, Sequence[Offload]] = {}
    for pool in pools:
        found |= dict.fromkeys(pool - {"rollout"}, ASLEEP if len(pool) > 1 else RESIDENT)
    return found


# --- programs ---


def serial_program(flow: Dataflow, ahead: bool) -> Program:
    """Every call waits for the one before it; `ahead`: but generation, which is of the next step
    and ends before new weights come."""
    generates, installs = flow.generates.name, flow.installs.name
    between = [name for name in flow.names if name not in (generates, installs)]
    items: list[Issue | Wait] = [Issue(call=generates, offset=int(ahead), blocking=not ahead)]
    items += [Issue(call=name, blocking=True) for name in between]
    items += [Wait(wait=(generates,))] if ahead else []
    return Program((*items, Issue(call=installs, blocking=True)), int(ahead))


def _grouped_program(flow: Dataflow, ahead: bool) -> Program:
    """All forward passes are asked for at once, and all updates; the controller waits for both."""
    generates, installs = flow.generates.name, flow.installs.name
    infer = tuple(call.name for call in flow.calls if call.kind == "infer" or call.scores)
    updates = tuple(call.name for call in flow.calls if call.kind == "train")
    rest = set(flow.names) - {generates, installs, *infer, *updates}
    items: list[Issue | Wait] = [Issue(call=generates, offset=int(ahead), blocking=not ahead)]
    items += [*(Issue(call=name) for name in infer), Wait(wait=infer)]
    items += [Issue(call=name, blocking=True) for name in flow.names if name in rest]
    items += [*(Issue(call=name) for name in updates), Wait(wait=updates)]
    items += [Wait(wait=(generates,))] if ahead else []
    return Program((*items, Issue(call=installs, blocking=True)), int(ahead))


def streaming_program(flow: Dataflow) -> Program:
    """Generation of the next step streams beside the other calls, which take turns on their GPUs
    in their order."""
    generates, installs = flow.generates.name, flow.installs.name
    between = [name for name in flow.names if name not in (generates, installs)]
    items = [Issue(call=generates, offset=1), *(Issue(call=name) for name in (*between, installs))]
    return Program(tuple(items), 1)
