"""The least seconds of each trained or inference role by itself: by its calls, by the number of its
GPUs and by the memory that it may take.

Three numberings meet in these tables. A *call set* is one call, or several calls of one role. A
*step* stands for the pool sizes between two numbers of GPUs at which layouts change. A *level* is a
32nd of a GPU's memory, rounded up.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from planner.predict.objective import with_mean
from planner.search.solver.problem import Problem
from planner.search.solver.rollout_table import LEVELS, level_of
from planner.search.space.arrays import Array, Kinds, Levels, Sizes, SizeStepNumbers
from planner.search.space.size_boxes import NEVER


class SizeSteps:
    """The steps of each kind of GPU: on how many GPUs roles may compute, in rising order. Between
    two of these numbers a larger pool is no better for any trained or inference role.

    If roles may compute on 1, 2, 4 and 8 GPUs, a pool of 5 has step 2, which begins at 4."""

    def __init__(self, problem: Problem) -> None:
        most = max(problem.gpus.values())
        listed = [problem.ranks(kind) for kind in problem.gpus]
        self.counts = np.array([len(ranks) for ranks in listed])
        self.steps = int(self.counts.max()) + 1  # one more, which no pool is large enough for
        self._first = np.full((len(listed), self.steps), most + 1)
        self._step = np.zeros((len(listed), most + 1), dtype=np.int64)
        for kind, ranks in enumerate(listed):
            self._first[kind, : len(ranks)] = ranks
            self._step[kind] = np.searchsorted(ranks, np.arange(most + 1), "right") - 1

    def of(self, kind: Kinds, sizes: Sizes) -> SizeStepNumbers:
        """The steps of pools of these sizes; -1 of a pool without GPUs."""
        return np.asarray(self._step[kind, sizes])

    def first(self, kind: Kinds | int, step: SizeStepNumbers) -> Sizes:
        """The smallest sizes of these steps; more GPUs than there are after the last step."""
        return np.asarray(self._first[kind, step])


class CallSets:
    """Every call by itself, and every set of two and more calls of one role. Only the sets know
    that one layout has to serve all calls of a role: what is the fastest for an update may be slow
    for an inference."""

    def __init__(self, problem: Problem) -> None:
        self._of_role = {
            role: _subsets(problem.calls_of(role)) for role in problem.trained_or_inferred
        }
        several = [some for sets in self._of_role.values() for some in sets if len(some) > 1]
        self.listed = [*((call,) for call in problem.calls), *several]
        self._column = {calls: column for column, calls in enumerate(self.listed)}

    def of_role(self, role: str) -> list[tuple[str, ...]]:
        """All sets of the calls of a role."""
        return self._of_role[role]

    def columns_of_role(self, role: str) -> list[int]:
        return [self._column[calls] for calls in self._of_role[role]]

    def column(self, calls: tuple[str, ...]) -> int:
        return self._column[calls]

    def rates(self, rates: Array) -> Array:
        """Rates [..., sets] that add up to these rates [..., calls].

        The calls of a role are taken together as far as they count alike. If a row counts an update
        fully (1) and an inference half (1/2), half of both together and half of the update alone
        are counted: 1 u + 1/2 i = 1/2 (u + i) + 1/2 u. Each of the two terms has a table of its
        own, and the bound of (u + i) is larger than the sum of the bounds of u and i."""
        found = np.zeros((*rates.shape[:-1], len(self.listed)))
        found[..., : rates.shape[-1]] = rates
        largest_first = sorted(enumerate(self.listed), key=lambda entry: -len(entry[1]))
        for column, calls in largest_first:
            if len(calls) > 1:
                own = [self._column[call,] for call in calls]
                alike = found[..., own].min(axis=-1)
                found[..., column] = alike
                found[..., own] -= alike[..., None]
        return found


class ActorKey(NamedTuple):
    """What the actor's table depends on in addition to the kind of its pool: whether its shards lie
    `within` a node, and the seconds of a sync per second of gathering (`Problem.gathers`)."""

    within: bool | None
    gathers: float


class RoleTable(NamedTuple):
    """The least seconds [sets of the role's calls, steps, levels, S + 1] of the layouts of a role
    that need at most a level of memory while they run (`running`), and of those that need at most a
    level while they idle (`idle`); and the least resident bytes and the least surplus [steps, 2] of
    any layout. Beside engines all of this is as where they sleep: no plan needs more there."""

    running: Array
    idle: Array
    memory: Array


class RoleTables:
    """The table of each role on each kind of GPU, made when it is first asked for."""

    def __init__(self, problem: Problem, call_sets: CallSets) -> None:
        self._problem, self._call_sets = problem, call_sets
        self._tables: dict[tuple[str, str, ActorKey | None, bool], RoleTable] = {}

    def of(self, role: str, kind: str, actor: ActorKey | None, engine: bool) -> RoleTable:
        """The table of a role on pools of a kind, beside an `engine` or not; for the actor also by
        an `actor` key."""
        key = role, kind, actor, engine
        if key not in self._tables:
            self._tables[key] = self._made(role, kind, actor, engine)
        return self._tables[key]

    def _made(self, role: str, kind: str, actor: ActorKey | None, engine: bool) -> RoleTable:
        problem = self._problem
        counts, device = problem.ranks(kind), problem.device(kind)
        layouts = problem.layouts(role, kind)
        if actor:
            layouts = layouts.of_shards(actor.within, problem.node(kind))
            layouts = layouts.with_sync(actor.gathers)
        if engine:
            layouts = layouts.beside_sleeping()
        step = np.searchsorted(counts, layouts.grid.gpus)
        calls = problem.calls_of(role)
        of_sets = [
            sum(layouts.seconds[calls.index(call)] for call in some)
            for some in self._call_sets.of_role(role)
        ]
        seconds = with_mean(np.stack(of_sets))
        resident, surplus = layouts.memory[:, 0], layouts.memory[:, 1]
        memory = np.full((len(counts), 2), NEVER)
        np.minimum.at(memory, step, layouts.memory[:, :2])
        return RoleTable(
            running=_least(seconds, step, level_of(resident + surplus, device), len(counts)),
            idle=_least(seconds, step, level_of(resident, device), len(counts)),
            memory=np.minimum.accumulate(memory, axis=0),
        )


def _subsets(calls: Sequence[str]) -> list[tuple[str, ...]]:
    """All non-empty sets of the calls of a role."""
    return [some for size in range(1, len(calls) + 1) for some in combinations(calls, size)]


def _least(seconds: Array, step: SizeStepNumbers, level: Levels, steps: int) -> Array:
    """The least seconds [sets, steps, levels, S + 1] among the layouts, with seconds [sets, n,
    S + 1], of at most a step and at most a level."""
    sets, _, columns = seconds.shape
    found = np.full((sets, steps * (LEVELS + 1), columns), NEVER)
    cell = step * (LEVELS + 1) + level
    order = np.argsort(cell, kind="stable")
    cells, first = np.unique(cell[order], return_index=True)
    if len(cells):
        found[:, cells] = np.minimum.reduceat(seconds[:, order], first, axis=1)
    table = found.reshape(sets, steps, LEVELS + 1, columns)
    np.minimum.accumulate(table, axis=1, out=table)
    np.minimum.accumulate(table, axis=2, out=table)
    return table
