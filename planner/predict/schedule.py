"""The one rule of execution, without a clock: a plan unrolled into tasks with their predecessors.

A call starts as soon as every earlier-issued call that shares a pool with it has ended, everything
that it reads exists at the versions that the program implies, and every earlier wait is satisfied.
Generation that streams takes no turns on its pools, so it counts in the first of these for nobody.
What reads and pools ask for stands in `edges.py`; waits, which only a program has, are added here.
The simulator, the exact evaluator and the executor all consume tasks or event graphs from here.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from planner.predict.edges import Need, PoolsOf, Turn, needs, steps_behind
from planner.spec.dataflow import Call, Dataflow
from planner.spec.errors import UserError
from planner.spec.plan import Issue, Plan, Wait
from planner.spec.settings import forget_evaluation, keep_costs, set_in
from planner.spec.wording import counted
from planner.spec.workload_file import find_files, with_evaluation_counted


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One call of one step. `after` are the indices of all tasks that must have ended before it
    starts, `waits` those among them that a wait names. `weights_version` counts the updates in the
    weights that it uses (or makes); of generation that streams in the first that it uses, as more
    are installed before it ends."""

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
    flow: Dataflow, program: Sequence[Issue | Wait], pools_of: PoolsOf, steps: int
) -> list[Task]:
    """Unroll a program: round i issues each call for step i + offset, if that is a step of the run.

    For example, two steps of `generate` (offset 1, on pool r) and of `train` (offset 0, on pool t),
    which reads what `generate` writes:

        round  index  task             after
        -1     0      generate of 0    nothing
         0     1      generate of 1    0 (its pool)
         0     2      train of 0       0 (its data)
         1     3      train of 1       1 (its data), 2 (its pool)

    Raises UserError where a call reads what is written later (a deadlock) or what has been
    overwritten."""
    calls = {call.name: (call, pools_of(call)) for call in flow.calls}
    needed = needs(flow, pools_of)
    first_round = -max((item.offset for item in program if isinstance(item, Issue)), default=0)
    issued = _Issued()
    barrier: tuple[int, ...] = ()
    for round_ in range(first_round, steps):
        for item in program:
            if isinstance(item, Wait):
                barrier = issued.behind(item.wait, barrier)
                continue
            call, pools = calls[item.call]
            step = round_ + item.offset
            if not (0 <= step < steps and call.runs_at(step)):
                continue
            after = set(barrier)
            for need in needed[call.name]:
                _check_version(flow, need, call, step, issued)
                before = issued.of(need, step)
                if before is not None:
                    after.add(before)
            issued.add(
                Task(
                    index=len(issued.tasks),
                    call=call,
                    step=step,
                    pools=pools,
                    after=tuple(sorted(after)),
                    waits=barrier,
                    weights_version=_weights_version(flow, call, step, issued),
                )
            )
            if item.blocking:
                barrier = issued.behind((call.name,), barrier)
    return issued.tasks


@dataclass(kw_only=True)
class _Issued:
    """The tasks that have been issued so far."""

    tasks: list[Task] = field(default_factory=list)
    at: dict[tuple[str, int], int] = field(default_factory=dict)  # call and step -> index
    newest: dict[str, int] = field(default_factory=dict)  # call -> index of its latest task

    def add(self, task: Task) -> None:
        self.tasks.append(task)
        self.at[task.call.name, task.step] = task.index
        self.newest[task.call.name] = task.index

    def of(self, need: Need, step: int) -> int | None:
        """The index of the task that a call of `step` needs. There is none for initial weights and
        for a pool that nobody had before."""
        if need.lag is not None:
            return self.at.get((need.by[0], step - need.lag))
        return max((self.newest[name] for name in need.by if name in self.newest), default=None)

    def behind(self, names: Sequence[str], barrier: tuple[int, ...]) -> tuple[int, ...]:
        """The tasks to wait for behind a wait on the latest tasks of these names, where one waited
        for those of `barrier` before. A task that was issued behind the old barrier implies it."""
        named = {self.newest[name] for name in names if name in self.newest}
        if any(set(barrier) <= set(self.tasks[index].waits) for index in named):
            return tuple(sorted(named))
        return tuple(sorted(named | set(barrier)))


def _check_version(flow: Dataflow, need: Need, call: Call, step: int, issued: _Issued) -> None:
    """Raise UserError where a call needs a datum that is not there yet or no more."""
    if need.lag is None:
        return
    (writer,), wanted = need.by, step - need.lag
    if wanted >= 0 and (writer, wanted) not in issued.at:
        raise UserError(
            f"program deadlocks: {call.name} of step {step} reads {need.what}, which {writer} "
            f"of step {wanted} writes only later; move {writer} before {call.name} or lower the "
            f"offset of {call.name}"
        )
    if need.what in flow.state and writer in issued.newest:
        newest = issued.tasks[issued.newest[writer]]
        if newest.step > wanted:
            raise UserError(
                f"program is wrong: {call.name} of step {step} needs {need.what} of step {wanted}, "
                f"but {writer} of step {newest.step} is issued earlier and overwrites it; move "
                f"{call.name} before it"
            )


def _weights_version(flow: Dataflow, call: Call, step: int, issued: _Issued) -> int | None:
    """How many updates are in the weights that a call makes or else reads; None if it does neither
    (a reference model's never change)."""
    if flow.state & set(call.writes):
        return step + 1
    for read in call.reads:
        if read.data not in flow.state:
            continue
        if not read.latest:
            return step + 1 - read.lag
        writer = flow.writer(read.data)
        if writer is None or writer.name not in issued.newest:
            return 0
        return issued.tasks[issued.newest[writer.name]].weights_version
    return None


def steady_edges(
    flow: Dataflow, program: Sequence[Issue | Wait], pools_of: PoolsOf
) -> dict[tuple[str, str], int]:
    """The same rule in the steady state, monitors left out: (u, v) -> d where v of step t starts
    after u of step t - d. Older instances of u bind less.

    In the example of `unroll` the edges are

        generate -> train     0    its data
        generate -> generate  1    its pool
        train -> train        1    its pool
    """
    steady = flow.steady
    items = [item for item in program if isinstance(item, Wait) or item.call in steady.names]
    turns: dict[str, Turn[int]] = {}
    for at, item in enumerate(items):
        if isinstance(item, Issue):
            turns[item.call] = Turn(2 * at, item.offset)
    edges: dict[tuple[str, str], int] = {}

    def add(u: str, v: str, distance: int) -> None:
        edges[u, v] = min(distance, edges.get((u, v), distance))

    for v, needed in needs(steady, pools_of).items():
        for need in needed:
            if need.lag is not None:
                add(need.by[0], v, need.lag)
            else:
                u = _issued_last(need.by, v, turns)
                add(u, v, steps_behind(turns[u], turns[v]))
    for at, item in enumerate(items):
        waited = item.wait if isinstance(item, Wait) else (item.call,) if item.blocking else ()
        wait = Turn(2 * at + 1, 0)  # just behind the item, for the step that the round is of
        for u in set(waited) & set(turns):
            for v in turns:
                add(u, v, steps_behind(turns[u], wait) + steps_behind(wait, turns[v]))
    return edges


def _issued_last(names: Sequence[str], call: str, turns: dict[str, Turn[int]]) -> str:
    """Which of some calls is issued last before a call: the last before it in the round, or else
    the last of the round before."""
    place = turns[call].place
    earlier = [name for name in names if turns[name].place < place]
    return max(earlier or names, key=lambda name: turns[name].place)


def staleness(tasks: Sequence[Task]) -> int:
    """The greatest number of actor updates by which sequences lag behind the weights that they
    train."""
    generated = (task for task in tasks if task.call.kind == "generate" and not task.call.monitor)
    return max((task.step - (task.weights_version or 0) for task in generated), default=0)


def check(plan: Plan) -> None:
    """Raise UserError if the plan deadlocks, or if its staleness is not what it says or more than
    is allowed."""
    offsets = [item.offset for item in plan.program if isinstance(item, Issue)]
    # A call is at most one step ahead of the one that it waits for.
    most = plan.workload.max_staleness + len(offsets)
    if max(offsets) > most:
        raise UserError(
            f"plan {plan.name!r}: its program has an offset of {max(offsets)}; offsets above "
            f"{most} have no effect"
        )
    every = max(call.every for call in plan.dataflow.calls)
    found = staleness(tasks_of(plan, 2 * max(offsets) + max(4, every + 1)))
    if found > plan.workload.max_staleness:
        raise UserError(
            f"plan {plan.name!r}: its program trains on sequences {counted(found, 'update')} old, "
            f"but the workload allows {plan.workload.max_staleness}; lower the offset of "
            f"{plan.dataflow.generates.name} or raise max_staleness"
        )
    if found != plan.staleness:
        raise UserError(
            f"plan {plan.name!r}: staleness says {plan.staleness}, but its program has {found}; "
            "correct it"
        )


def load_plan(path: Path, settings: Sequence[str] = ()) -> Plan:
    """Read a plan, with other settings of its workload, and check it as a whole. Raises
    UserError."""
    return with_settings(Plan.read(path), settings, path)


def with_settings(plan: Plan, settings: Sequence[str], path: Path) -> Plan:
    """A plan from a file whose workload has other settings, checked as a whole. What was predicted
    is left out where it no longer holds. Raises UserError."""
    if settings:
        data = json.loads(plan.to_json())
        forget_evaluation(data["workload"], settings)
        set_in(data["workload"], settings)
        find_files(data["workload"], path.resolve().parent, path)
        if not keep_costs(settings):
            data["predicted"] = None
        plan = Plan.parse(data, path)
        plan = plan.changed(workload=with_evaluation_counted(plan.workload))
    try:
        check(plan)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return plan
