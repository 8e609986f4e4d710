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
JUST_REWARD, JUST_ROLLOUT = frozenset({"reward"}), frozenset({"rollout"})


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
    every, reward = frozenset(roles), JUST_REWARD & frozenset(roles)
    serial = serial_program(flow, ahead=False)
    yield Mode((every,), serial, ahead=False)
    if reward:
        yield Mode((every - reward, reward), serial, ahead=False)
    apart = _pools(every - JUST_ROLLOUT - reward, JUST_ROLLOUT, reward)
    yield Mode(apart, serial_program(flow, ahead=True), ahead=True)


def _of_openrlhf(roles: Sequence[str], flow: Dataflow) -> Iterator[Mode]:
    every = frozenset(roles)
    yield Mode((every,), serial_program(flow, ahead=False), ahead=False)
    for pools in _openrlhf_splits(every):
        apart = (*pools, JUST_ROLLOUT)
        if len(pools) == 1:  # engines are apart from all others only if they are ahead
            yield Mode(apart, serial_program(flow, ahead=True), ahead=True)
            continue
        for ahead in (False, True):
            yield Mode(apart, _grouped_program(flow, ahead), ahead)


def _openrlhf_splits(every: frozenset[str]) -> list[Structure]:
    """The pools of the roles that train or infer, where engines have their own: few pools first."""
    acting = every & {"actor", "reference"}
    judging = every & {"critic", "reward"}
    each_acting, each_judging = _each_alone(acting), _each_alone(judging)
    splits = {
        (every - JUST_ROLLOUT,),
        _pools(acting, judging),
        (acting, *each_judging),
        (*each_acting, *_pools(judging)),
        (*each_acting, *each_judging),
    }
    return sorted(splits, key=lambda pools: (len(pools), str(sorted(map(sorted, pools)))))


def _each_alone(roles: frozenset[str]) -> Structure:
    return tuple(frozenset({role}) for role in sorted(roles))


def _of_areal(roles: Sequence[str], flow: Dataflow) -> Iterator[Mode]:
    every, reward = frozenset(roles), JUST_REWARD & frozenset(roles)
    serial = serial_program(flow, ahead=False)
    free: dict[str, Sequence[Offload]] = dict.fromkeys(every - JUST_ROLLOUT, AS_A_WHOLE)
    free |= dict.fromkeys(reward, RESIDENT)
    asleep = {**free, "actor": ASLEEP}
    for pools in _partitions([role for role in roles if role not in JUST_ROLLOUT | reward]):
        with_engines = [pool | JUST_ROLLOUT if "actor" in pool else pool for pool in pools]
        beside_actor = _pools(*with_engines, reward)
        yield Mode(beside_actor, serial, ahead=False, offloads=asleep, widest_engine=1)
        yield Mode(_pools(*pools, JUST_ROLLOUT, reward), serial, ahead=False, offloads=free)
    apart = _pools(every - JUST_ROLLOUT - reward, JUST_ROLLOUT, reward)
    yield Mode(apart, streaming_program(flow), ahead=True, streams=True, offloads=free)


def _of_skyrl(roles: Sequence[str], flow: Dataflow) -> Iterator[Mode]:
    every, reward = frozenset(roles), JUST_REWARD & frozenset(roles)
    actor, critic, reference = (every & {role} for role in ("actor", "critic", "reference"))
    serial = serial_program(flow, ahead=False)
    together = _pools(every - reward, reward)
    yield Mode(together, serial, ahead=False, offloads=_taking_turns(together))
    splits = {_pools(actor | reference, critic), _pools(actor, reference, critic)}
    for pools in sorted(splits, key=len):
        apart = _pools(*pools, JUST_ROLLOUT, reward)
        turns = _taking_turns(apart)
        yield Mode(apart, serial, ahead=False, offloads=turns)
        yield Mode(apart, serial_program(flow, ahead=True), ahead=True, offloads=turns)


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
    between = [Issue(call=name, blocking=True) for name in _between(flow)]
    return _with_generation(flow, between, ahead)


def _grouped_program(flow: Dataflow, ahead: bool) -> Program:
    """All forward passes are asked for at once, and all updates; the controller waits for both."""
    infer = tuple(call.name for call in flow.calls if call.kind == "infer" or call.scores)
    updates = tuple(call.name for call in flow.calls if call.kind == "train")
    rest = [name for name in _between(flow) if name not in (*infer, *updates)]
    between: list[Issue | Wait] = [
        *(Issue(call=name) for name in infer),
        Wait(wait=infer),
        *(Issue(call=name, blocking=True) for name in rest),
        *(Issue(call=name) for name in updates),
        Wait(wait=updates),
    ]
    return _with_generation(flow, between, ahead)


def _with_generation(flow: Dataflow, between: Sequence[Issue | Wait], ahead: bool) -> Program:
    """Generation before what is between, or beside it, and new weights at the end."""
    generates = flow.generates.name
    first = Issue(call=generates, offset=int(ahead), blocking=not ahead)
    waits = [Wait(wait=(generates,))] if ahead else []
    last = Issue(call=flow.installs.name, blocking=True)
    return Program((first, *between, *waits, last), int(ahead))


def _between(flow: Dataflow) -> list[str]:
    """The calls between generation and new weights."""
    ends = flow.generates.name, flow.installs.name
    return [name for name in flow.names if name not in ends]


def streaming_program(flow: Dataflow) -> Program:
    """Generation of the next step streams beside the other calls, which take turns on their GPUs
    in their order."""
    rest = [*_between(flow), flow.installs.name]
    first = Issue(call=flow.generates.name, offset=1)
    return Program((first, *(Issue(call=name) for name in rest)), 1)
