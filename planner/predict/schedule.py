"""The one rule of execution, without a clock: a plan unrolled into tasks with their predecessors.

A call starts as soon as every earlier-issued call that shares a pool with it has ended, everything
that it reads exists at the versions that the program implies, and every earlier wait is satisfied.
The simulator, the exact evaluator and the executor all consume these tasks; none derives a
dependency of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from planner.spec.dataflow import Call, Dataflow, Read
from planner.spec.errors import UserError
from planner.spec.plan import Issue, Plan, Wait


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One call of one step. `after` are the indices of all tasks that must have ended before it
    starts, `waits` those among them that a wait names. `weights_version` counts the updates in the
    weights that it uses (or makes)."""

    index: int
    call: Call
    step: int
    pools: tuple[str, ...]
    after: tuple[int, ...]
    waits: tuple[int, ...]
    weights_version: int | None
    chunk: int = 0
    attempt: int = 0


def tasks_of(plan: Plan, steps: int) -> list[Task]:
    """The tasks of `steps` steps of a plan in the order of their issue. Raises UserError for a
    program that deadlocks or exceeds the staleness that the workload allows."""
    return unroll(plan.dataflow, plan.program, plan.pools_of, steps)


def unroll(
    flow: Dataflow,
    program: Sequence[Issue | Wait],
    pools_of: Callable[[Call], tuple[str, ...]],
    steps: int,
) -> list[Task]:
    """Unroll a program: round i issues each call for step i + offset, if that is a step of the run.

    Raises UserError where a call reads what is written later (a deadlock) or what has been
    overwritten."""
    calls = {call.name: (call, pools_of(call)) for call in flow.calls}
    first_round = -max((item.offset for item in program if isinstance(item, Issue)), default=0)
    tasks: list[Task] = []
    at: dict[tuple[str, int], int] = {}  # (call, step) -> index
    newest: dict[str, int] = {}  # call -> index of its latest task
    last_on_pool: dict[str, int] = {}
    barrier: tuple[int, ...] = ()
    for round_ in range(first_round, steps):
        for item in program:
            if isinstance(item, Wait):
                barrier = _raise_barrier(barrier, item.wait, newest, tasks)
                continue
            call, pools = calls[item.call]
            step = round_ + item.offset
            if not (0 <= step < steps and call.runs_at(step)):
                continue
            sources = [_source(flow, read, call, step, at, newest, tasks) for read in call.reads]
            after = {source for source in sources if source is not None}
            after.update(last_on_pool[pool] for pool in pools if pool in last_on_pool)
            after.update(barrier)
            index = len(tasks)
            version = _weights_version(call, step, newest, tasks)
            tasks.append(
                Task(
                    index=index,
                    call=call,
                    step=step,
                    pools=pools,
                    after=tuple(sorted(after)),
                    waits=barrier,
                    weights_version=version,
                )
            )
            at[call.name, step] = newest[call.name] = index
            last_on_pool.update(dict.fromkeys(pools, index))
            if item.blocking:
                barrier = _raise_barrier(barrier, (call.name,), newest, tasks)
    return tasks


def steady_edges(
    flow: Dataflow, program: Sequence[Issue | Wait], pools_of: Callable[[Call], tuple[str, ...]]
) -> dict[tuple[str, str], int]:
    """The same rule in the steady state, monitors left out: (u, v) -> d where v of step t starts
    after u of step t - d.

    u of the same round, or of the round before if u stands behind v (r = 1), belongs to the step
    offset(v) - offset(u) + r earlier. Older instances of u bind less."""
    steady = flow.steady
    items = [item for item in program if isinstance(item, Wait) or item.call in steady.names]
    place = {
        item.call: (at, item.offset) for at, item in enumerate(items) if isinstance(item, Issue)
    }
    edges: dict[tuple[str, str], int] = {}

    def add(u: str, v: str, before: int) -> None:
        distance = place[v][1] - place[u][1] + (0 if place[u][0] < before else 1)
        edges[u, v] = min(distance, edges.get((u, v), distance))

    for call in steady.calls:
        for read in call.reads:
            if writer := steady.writer(read.data):
                if read.latest:
                    add(writer.name, call.name, place[call.name][0])
                else:
                    pair = writer.name, call.name
                    edges[pair] = min(read.lag, edges.get(pair, read.lag))
    on_pool: dict[str, list[str]] = {}
    for call in sorted(steady.calls, key=lambda call: place[call.name][0]):
        for pool in pools_of(call):
            on_pool.setdefault(pool, []).append(call.name)
    for calls in on_pool.values():
        for u, v in zip([calls[-1], *calls], calls, strict=False):
            add(u, v, place[v][0])
    for at, item in enumerate(items):
        waited = item.wait if isinstance(item, Wait) else (item.call,) if item.blocking else ()
        for u in set(waited) & set(place):
            named = place[u][1] + (
                0 if place[u][0] <= at else -1
            )  # step of u less the round of the wait
            for v, (position, offset) in place.items():
                distance = offset - named + (0 if position > at else 1)
                edges[u, v] = min(distance, edges.get((u, v), distance))
    return edges


def _raise_barrier(
    barrier: tuple[int, ...], names: tuple[str, ...], newest: dict[str, int], tasks: list[Task]
) -> tuple[int, ...]:
    """The tasks to wait for from now on. A task that was issued behind the old barrier implies
    it."""
    named = {newest[name] for name in names if name in newest}
    if any(set(barrier) <= set(tasks[index].waits) for index in named):
        return tuple(sorted(named))
    return tuple(sorted(named | set(barrier)))


def _source(
    flow: Dataflow,
    read: Read,
    call: Call,
    step: int,
    at: dict[tuple[str, int], int],
    newest: dict[str, int],
    tasks: list[Task],
) -> int | None:
    """The task that writes what is read; None for data from outside and for the initial weights."""
    writer = flow.writer(read.data)
    if writer is None:
        return None
    if read.latest:
        return newest.get(writer.name)
    wanted = step - read.lag
    if wanted >= 0 and (writer.name, wanted) not in at:
        raise UserError(
            f"program deadlocks: {call.name} of step {step} reads {read.data}, which {writer.name} "
            f"of step {wanted} "
            f"writes only later; move {writer.name} before {call.name} or lower the offset of "
            f"{call.name}"
        )
    if (
        read.data in flow.state
        and writer.name in newest
        and tasks[newest[writer.name]].step > wanted
    ):
        raise UserError(
            f"program is wrong: {call.name} of step {step} needs {read.data} of step {wanted}, but "
            f"{writer.name} of "
            f"step {tasks[newest[writer.name]].step} is issued earlier and overwrites it; move "
            f"{call.name} before it"
        )
    return at.get((writer.name, wanted))


def _weights_version(
    call: Call, step: int, newest: dict[str, int], tasks: list[Task]
) -> int | None:
    if call.kind == "generate":
        synced = newest.get("sync_weights")
        return 0 if synced is None else tasks[synced].weights_version
    if call.kind in ("train", "transfer"):
        return step + 1
    return step if call.name in ("old_logprobs", "values") else None


def staleness(tasks: Sequence[Task]) -> int:
    """The greatest number of actor updates by which sequences lag behind the weights that they
    train."""
    generated = (task for task in tasks if task.call.name == "generate")
    return max((task.step - (task.weights_version or 0) for task in generated), default=0)


def check(plan: Plan) -> None:
    """Raise UserError if the plan deadlocks, or if its staleness is not what it says or more than
    is allowed."""
    offsets = [item.offset for item in plan.program if isinstance(item, Issue)]
    most = plan.workload.max_staleness + len(
        offsets
    )  # a call is at most one step ahead of the one that it waits for
    if max(offsets) > most:
        raise UserError(
            f"plan {plan.name!r}: its program has an offset of {max(offsets)}; none above {most} "
            "is of use"
        )
    every = max(call.every for call in plan.dataflow.calls)
    found = staleness(tasks_of(plan, 2 * max(offsets) + max(4, every + 1)))
    if found > plan.workload.max_staleness:
        raise UserError(
            f"plan {plan.name!r}: its program trains on sequences {found} updates old, but the "
            "workload allows "
            f"{plan.workload.max_staleness}; lower the offset of generate or raise max_staleness"
        )
    if found != plan.staleness:
        raise UserError(
            f"plan {plan.name!r}: staleness says {plan.staleness}, but its program has {found}; "
            "correct it"
        )


def load_plan(path: Path) -> Plan:
    """Read a plan and check it as a whole. Raises UserError."""
    plan = Plan.read(path)
    try:
        check(plan)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return plan
