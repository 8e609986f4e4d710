"""The best program for given durations: one round per step, no waits, staleness at most k.

A wait only adds predecessors, so for a fixed program and durations that do not depend on overlap it
never shortens a schedule; hence the programs searched have none. A program decides which of two
calls u and v on one pool has its turn first: v of step t comes after u of step t - m and before u
of step t - m + 1. The data between calls and the staleness leave a few m to choose from, often one
(`choices.py`). Choices that allow a schedule of some period are a program: its calls in the order
of their starts within a round (Hanen and Munier 1995 treat such cyclic problems).

`best_program` branches on these m. The period of the choices made so far, the maximum cycle ratio
of their event graph, bounds all programs that make them. The cycles that ruled the branches out do
so for other durations too: `Cut`.
"""

import heapq
from collections.abc import Callable, Iterator
from functools import cache
from itertools import count
from typing import NamedTuple

import numpy as np

from planner.predict.cycle import Cycles, longest_cycle, program_cycles, tightened
from planner.predict.edges import Turn, steps_behind
from planner.search.solver.choices import Choices, choose, closed, exclusive_rows, ways_of
from planner.search.space.arrays import Array
from planner.search.space.placements import Sharing
from planner.spec.dataflow import Dataflow
from planner.spec.plan import Issue, Wait

Items = tuple[Issue | Wait, ...]
Pair = tuple[int, int]
# seconds [...] of periods [..., S + 1] in each scenario and at the mean
OfPeriods = Callable[[Array], Array]

SAME = 1e-9  # relative difference below which two step times are taken as equal


class Program(NamedTuple):
    """A program of staleness k."""

    items: Items
    staleness: int


class Cut(NamedTuple):
    """A bound on all programs, which a search for the best one leaves behind for other durations.

    `rates` [leaves, rows, calls]: each program is in one of the leaves, and its period is no less
    than any of that leaf's rows times the durations. So the least over the leaves of the greatest
    over the rows bounds every program.

    For example there are two leaves, the programs that run `values` before `score` and those that
    run it after. A row of the first has 1 for `generate`, `values` and `score` and 0 for all
    others: in these programs a step takes at least those three together."""

    rates: Array

    def bound(self, seconds: Array, objective: OfPeriods) -> Array:
        """Seconds [n] that no program is below at durations [n, calls, S + 1]."""
        leaves, rows, calls = self.rates.shape
        periods = (self.rates.reshape(-1, calls) @ seconds).reshape(len(seconds), leaves, rows, -1)
        return np.asarray(objective(periods.max(axis=2)).min(axis=1))

    def least(self, means: Array) -> Array:
        """The least period [n] of any program at durations [n, calls]."""
        leaves, rows, calls = self.rates.shape
        periods = (means @ self.rates.reshape(-1, calls).T).reshape(len(means), leaves, rows)
        return np.asarray(periods.max(axis=2).min(axis=1))


class ProgramResult(NamedTuple):
    """The best program below the limit, if any, its seconds (else the limit), and the cut that
    proves it."""

    program: Program | None
    seconds: float
    cut: Cut


def best_program(
    choices: Choices,
    seconds: Array,
    objective: OfPeriods,
    limit: float = np.inf,
    any_below: bool = False,
) -> ProgramResult:
    """The program with the least `objective` of its periods at durations [calls, S + 1], those in
    each scenario and at the mean; none if that is not below `limit`. With `any_below` the first one
    found, and without a cut that proves it.

    For example `generate` takes 6 s on pool r, `train` 4 s on pool t, and the transfer of weights
    1 s on both; weights may be one update old. The load of pool r says that a step takes 7 s at
    least. If calls start as early as their data allow, then with this period the transfer runs
    from second 3 to 4 of a round, while `generate` runs from 0 to 6: they overlap. There are two
    choices. Either the transfer comes after `generate` of its own step and before the next one: the
    three calls follow one another, 11 s. Or it comes after `generate` of the next step: it then
    starts at second 6 of the round and nothing overlaps. That is a program of 7 s, which the load
    of r proves best."""
    found: Program | None = None
    best, order, leaves = limit, count(), list[Array]()
    left = [(0.0, next(order), choices.lags, choices.floor)]
    while left:
        bound, _, lags, rows = heapq.heappop(left)
        if bound < best * (1 - SAME):
            rows, periods, paths = tightened(lags, rows, seconds)
            bound = float(objective(periods))
        if bound >= best * (1 - SAME):
            leaves.append(rows)
            continue
        starts, period = paths[-1][choices.generates], float(periods[-1])
        pair = _forced(choices, lags, seconds[:, -1], best)
        if pair is None:
            pair = _overlapping(choices, lags, starts, seconds[:, -1], period)
        if pair is None:  # a schedule, at the mean durations
            chosen = _chosen(choices, lags, starts, period)
            _, periods, _ = tightened(chosen, rows, seconds)
            value = float(objective(periods))
            if value < best * (1 - SAME):
                best, found = value, _program(choices, starts, period)
                if any_below:
                    return ProgramResult(found, best, Cut(choices.floor[None]))
            if value <= bound * (1 + SAME):
                leaves.append(rows)
                continue
            pair = _binding(choices, lags, chosen, rows, periods, seconds)
        for child, more in _branches(choices, lags, rows, pair):
            heapq.heappush(left, (bound, -next(order), child, more))
    return ProgramResult(found, best, Cut(_padded(leaves)))


def _branches(
    choices: Choices, lags: Array, rows: Array, pair: Pair
) -> Iterator[tuple[Array, Array]]:
    """The lags with each value of a pair's m, and the rows of rates that no program with it is
    below."""
    for m in ways_of(pair, closed(lags)):
        child = lags.copy()
        choose(child, pair, m)
        more = exclusive_rows(closed(child), choices.shared)
        known = np.asarray((more[:, None] <= rows).all(axis=2)).any(axis=1)
        yield child, np.concatenate([rows, more[~known]])


def _padded(leaves: list[Array]) -> Array:
    """[leaves, rows, calls] with the most rows of any leaf; a row of zeros bounds nothing."""
    table = np.zeros((len(leaves), max(map(len, leaves)), leaves[0].shape[1]))
    for at, rows in enumerate(leaves):
        table[at, : len(rows)] = rows
    return table


# --- which pair to branch on ---


def _is_free(lags: Array, pair: Pair) -> bool:
    """Whether the m of a pair has not been chosen yet."""
    u, v = pair
    return bool(lags[u, v] + lags[v, u] > 1)


def _forced(choices: Choices, lags: Array, seconds: Array, limit: float) -> Pair | None:
    """A free pair with at most one way to a period below the limit at durations [calls], if there
    is one."""
    if not np.isfinite(limit) or not choices.pairs:
        return None
    paths = seconds[:, None] - limit * lags
    for via in range(len(lags)):
        np.maximum(paths, paths[:, via, None] + paths[None, via, :], out=paths)
    u, v = np.array(choices.pairs).T
    least = np.ceil((seconds[u] + paths[v, u]) / limit - 1e-9)
    most = np.floor(1 - (seconds[v] + paths[u, v]) / limit + 1e-9)
    tight = np.flatnonzero((least >= most) & (lags[u, v] + lags[v, u] > 1))
    if not len(tight):
        return None
    tightest = (most - least)[tight].argmin()
    return choices.pairs[tight[tightest]]


def _overlapping(
    choices: Choices, lags: Array, starts: Array, seconds: Array, period: float
) -> Pair | None:
    """The pair whose calls overlap most if every call starts as early as `lags` allow; None if none
    do."""
    worst, most = None, 1e-9 * period
    for u, v in choices.pairs:
        after = (starts[v] - starts[u]) % period
        overlap = min(max(seconds[u] - after, after - period + seconds[v]), seconds[u], seconds[v])
        if overlap > most and _is_free(lags, (u, v)):
            worst, most = (u, v), overlap
    return worst


def _chosen(choices: Choices, lags: Array, starts: Array, period: float) -> Array:
    """The lags with every choice made as a schedule has it."""
    chosen = lags.copy()
    for u, v in choices.pairs:
        choose(chosen, (u, v), np.ceil((starts[u] - starts[v]) / period - 1e-9))
    return chosen


def _binding(
    choices: Choices, lags: Array, chosen: Array, rows: Array, periods: Array, seconds: Array
) -> Pair:
    """A pair that has been chosen on a cycle that binds in the scenario where the choices cost
    most, and is free in `lags`."""
    free = [pair for pair in choices.pairs if _is_free(lags, pair)]
    bound = (rows @ seconds).max(axis=0)
    for scenario in np.argsort(-(periods / bound), kind="stable").tolist():
        durations, period = seconds[:, scenario].tolist(), float(periods[scenario]) * (1 - 1e-7)
        cycle, _ = longest_cycle(chosen, durations, period)
        edges = {*zip(cycle, [*cycle[1:], cycle[0]], strict=True)}
        for u, v in free:
            there = (u, v) in edges and chosen[u, v] < lags[u, v]
            back = (v, u) in edges and chosen[v, u] < lags[v, u]
            if there or back:
                return u, v
    return free[0]


def _program(choices: Choices, starts: Array, period: float) -> Program:
    """The program of a schedule: the calls by their starts within a round.

    For example with a period of 10 s, `generate` at 0, `train` at 12 and the transfer at 18 s give
    offsets 1, 0 and 0 and the order `generate`, `train`, transfer: train starts 2 s into a round,
    of the step before the one that is generated. The weights that generation uses are those of the
    transfer that is issued last before it, here two steps before: staleness 1."""
    step = np.floor(starts / period + 1e-9)
    within = np.round((starts - step * period) / period, 9)
    order = np.lexsort((np.arange(len(starts)), within)).tolist()
    offset = (step.max() - step).astype(int).tolist()
    items = tuple(Issue(call=choices.calls[at], offset=offset[at]) for at in order)
    generate, install = (
        Turn(order.index(call), offset[call]) for call in (choices.generates, choices.installs)
    )
    return Program(items, steps_behind(install, generate) - 1)


# --- programs that are given ---


@cache
def cycles_of(flow: Dataflow, sharing: Sharing, items: Items) -> Cycles:
    """The cycles of a program's event graph over all calls of the flow."""
    pools = dict(sharing)
    return program_cycles(flow, items, lambda call: pools[call.name])


def rates(found: Cycles) -> Array:
    """[cycles, calls]: seconds per step that a second of each call adds on each cycle."""
    return found.counts / found.distance[:, None]
