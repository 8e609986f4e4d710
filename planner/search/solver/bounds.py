"""Lower bounds on the step time of many placements at once, and of boxes of pool sizes.

A bound takes for each call the least seconds that any layout of its role allows on a pool of that
size, in each length scenario (`PoolTables`, `RolloutTable`), and puts them into the rates that no
program can beat. So does a second bound with the least mean seconds of each call
(`Objective.of_bounds`).

A role may leave GPUs of its pool idle, so these seconds never rise with the pool's size: what holds
for the largest sizes of a box holds for all of it.
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np

from planner.predict.objective import with_mean
from planner.search.solver.best_program import Cut, Program, best_program
from planner.search.solver.family_table import family_table
from planner.search.solver.pool_tables import PoolTables, pool_keys
from planner.search.solver.problem import Problem
from planner.search.solver.role_tables import CallSets
from planner.search.solver.rollout_table import ALONE
from planner.search.solver.threshold import Cuts
from planner.search.space.arrays import Array, Families, Levels, Mask, Sizes
from planner.search.space.placements import PlacementFamily, sharing_of
from planner.search.space.size_boxes import BOXES_AT_ONCE, NEVER, Boxes

SLACKS = (1.01, 1.03, 1.1, 1.25, 1.5)  # times its floor, which generation may turn out to take


class Bounds:
    """Bounds on the placements of some families, all of them on the same cluster. Families are
    numbered by their place in the list. If there are `programs`, each family has only its own.

    Bounds rise whenever a simulation replaces a floor in one of the rollout tables, whether it was
    run by `sharpen` or by the evaluation of a placement."""

    def __init__(
        self,
        problem: Problem,
        families: Sequence[PlacementFamily],
        programs: Sequence[Program] | None = None,
    ) -> None:
        self.problem, self.families = problem, families
        self.call_sets = CallSets(problem)
        self.rollout = [problem.rollout_table(kind) for kind in problem.gpus]
        sync, listed = problem.calls[problem.sync], self.call_sets.listed
        self._synced = [column for column, calls in enumerate(listed) if sync in calls]
        keys = [pool_keys(problem, family) for family in families]
        self.pools = PoolTables(problem, self.call_sets, chain.from_iterable(keys))
        pools = [self.pools.numbers(of_family) for of_family in keys]
        self.table = family_table(problem, families, programs, self.call_sets, pools)

    # --- bounds ---

    def of(self, boxes: Boxes) -> Array:
        """Seconds [n] that no program is below on any sizes of a box.

        For example two pools on four GPUs: the actor alone, and the rollout. A box has sizes from
        (1, 1) to (3, 3). No placement has both largest sizes, but no actor is faster than on 3
        GPUs, and no generation is either; so the bound is that of (3, 3). Only the seconds of
        handing over the weights are those of the smallest sizes: fewer GPUs may lie on one node."""
        return self._bound(self._least(boxes), self.table.rates[boxes.number])

    def by_cuts(self, boxes: Boxes, cuts: Cuts) -> Array:
        """Seconds [n] that no program is below on any sizes of boxes of one family, by the cuts of
        its programs."""
        count, in_sets = len(boxes.number), self._in_sets(cuts)
        found = np.zeros(count)
        if not cuts:
            return found
        for first in range(0, count, BOXES_AT_ONCE):
            some = np.arange(first, min(first + BOXES_AT_ONCE, count))
            part = boxes.take(some)
            rates = self.table.rates[part.number]
            found[some] = self._bound(self._least(part), rates, in_sets)
        return found

    def _in_sets(self, cuts: Cuts) -> Cuts:
        """Cuts with rates of call sets instead of calls."""
        return tuple(Cut(self.call_sets.rates(cut.rates)) for cut in cuts)

    def _bound(self, seconds: Array, rates: Array, cuts: Cuts = ()) -> Array:
        """Seconds [n] that no program with these rates [n, R, C] and cuts is below at least seconds
        [n, C, S + 1]."""
        objective = self.problem.objective.of_bounds
        bound = objective((rates @ seconds).max(axis=1))
        for cut in cuts:
            bound = np.maximum(bound, cut.bound(seconds, objective))
        return np.asarray(np.minimum(bound, NEVER))

    def cut(self, box: Boxes, limit: float) -> Cut:
        """Look for a program of one box that is below `limit` seconds at the least durations, and
        return the cut that this leaves behind: it bounds all programs of the family's structure."""
        family = self.families[int(box.number[0])]
        sharing = sharing_of(self.problem.flow, family.structure)
        durations = self._least(box)[0, : len(self.problem.calls)]
        choices, objective = self.problem.choices(sharing), self.problem.objective.of_bounds
        return best_program(choices, durations, objective, limit).cut

    def sharpen(self, box: Boxes, limit: float, cuts: Cuts, queues: bool = True) -> bool:
        """Simulate generation on the largest sizes of one box, where that may raise its bound to
        `limit` seconds; engines with a queue too if there may be `queues`, which take longer.
        Return whether it told more."""
        largest = box._replace(low=box.high)
        seconds, rates = self._least(largest), self.table.rates[box.number]
        in_sets = self._in_sets(cuts)
        for times in SLACKS:
            longer = seconds.copy()
            self.problem.fill_in_generation(longer, times * seconds[:, self.problem.generate])
            if self._bound(longer, rates, in_sets)[0] >= limit:
                table = self.rollout[int(self.table.kind[box.number[0]])]
                return table.sharpen(*self._engine_pools(largest), times, queues)
        return False

    # --- the least seconds ---

    def _least(self, boxes: Boxes) -> Array:
        """The least seconds [n, C, S + 1] of each call set."""
        at = np.arange(len(boxes.number))[:, None]
        home = self.table.home[boxes.number]
        pools = self.table.pools[boxes.number][at, home]
        seconds = self.pools.least(pools, boxes.high[at, home])
        for row, on_host in self.problem.host_seconds.items():
            seconds[:, row] = with_mean(on_host)
        self.problem.fill_in_generation(seconds, self._generation(boxes))
        handed = self._handed(boxes.number, boxes.low)
        seconds[:, self._synced] += handed[:, None, None]
        return np.asarray(np.minimum(seconds, NEVER))

    def _generation(self, boxes: Boxes) -> Array:
        """The least seconds [n, S + 1] of generation."""
        pools, room = self._engine_pools(boxes)
        found = np.full((len(boxes.number), self.pools.seconds.shape[-1]), NEVER)
        kinds = self.table.kind[boxes.number]
        for kind, table in enumerate(self.rollout):
            own = np.flatnonzero(kinds == kind)
            found[own] = table.least_on(pools[own], room[own])
        return found

    def _engine_pools(self, boxes: Boxes) -> tuple[Sizes, Levels]:
        """The largest sizes [n, P] of the generating pools, -1 for others, and the level of memory
        [n] that the roles of each of them leave."""
        generates = self.table.generates[boxes.number]
        room = self.pools.room_on(self.table.pools[boxes.number], boxes.high)
        least_room = np.where(generates, room, ALONE).min(axis=1)
        return np.where(generates, boxes.high, -1), least_room

    def _handed(self, number: Families, sizes: Sizes) -> Array:
        """Seconds [n] of handing over the weights: between nodes if the pools that do so have more
        GPUs together than a node."""
        table = self.table
        handing = table.generates[number] | table.acts[number]
        gpus = np.where(handing, sizes, 0).sum(axis=1)
        within, between = table.hand_over[number].T
        return np.asarray(np.where(gpus > table.node[number], between, within))

    # --- sizes ---

    def may_share_a_node(self, boxes: Boxes) -> Mask:
        """Whether the smallest sizes of a box [n] hand weights over within a node, and the largest
        have to between nodes. Then larger sizes are not better in everything."""
        smallest = self._handed(boxes.number, boxes.low)
        largest = self._handed(boxes.number, boxes.high)
        return np.asarray((smallest < largest) & (boxes.low != boxes.high).any(axis=1))

    def snapped(self, boxes: Boxes) -> Sizes:
        """The smallest sizes [n, P] that allow trained and inference roles the same layouts as the
        largest of a box."""
        return self.pools.snapped(self.table.pools[boxes.number], boxes.high)

    def smallest(self, boxes: Boxes, limit: Array) -> Sizes:
        """The least size [n, P] of each pool whose own load allows a step below `limit` [n]
        seconds, if generation has the largest sizes of its pools (and is no load if it streams).
        More GPUs than there are if no size does."""
        number = boxes.number
        left = np.repeat(limit[:, None], boxes.high.shape[1], axis=1)
        if self.problem.objective.linear:  # else it could not be subtracted
            generation = self._generation(boxes)[:, -1:]
            handed = self._handed(number, boxes.low)[:, None]
            if not self.problem.streams:
                left = left - np.where(self.table.generates[number], generation, 0.0)
            left = left - np.where(self.table.acts[number], handed, 0.0)
        return self.pools.smallest(self.table.pools[number], left)
