"""The step time that something has to be below, and what rules it out: rates and cuts."""

import numpy as np

from planner.predict.objective import Objective
from planner.search.solver.best_program import SAME, Cut, Program, cycles_of, rates
from planner.search.solver.problem import Problem
from planner.search.space.arrays import Array, Indices
from planner.search.space.placements import Sharing

Cuts = tuple[Cut, ...]  # of the programs of one sharing of pools, the latest last
REMEMBERED_CUTS = 6  # of one sharing


def with_cut(cuts: Cuts, cut: Cut) -> Cuts:
    """The cuts and one more, without the oldest if they are too many."""
    return (*cuts, cut)[-REMEMBERED_CUTS:]


class Threshold:
    """What a plan at one placement has to beat, and what is known about the programs there.

    A plan is better only if its step takes less than `seconds`. No program takes less than `rates`
    [rows, calls] say, at any durations, nor than any of the `cuts`. While layouts are tried, the
    threshold falls with each better plan and the cuts become more."""

    def __init__(self, limit: float, rates: Array, cuts: Cuts, objective: Objective) -> None:
        self.seconds = limit * (1 - SAME)
        self.rates, self.cuts, self.objective = rates, cuts, objective

    def lower_to(self, seconds: float) -> None:
        """Let plans from now on have to beat one that takes `seconds`."""
        self.seconds = min(self.seconds, seconds * (1 - SAME))

    def learn(self, cut: Cut) -> None:
        self.cuts = with_cut(self.cuts, cut)

    def bound_by_rates(self, durations: Array) -> Array:
        """Seconds [n] that no program is below at durations [n, calls, S + 1], by the rates."""
        return self.objective.of_bounds((self.rates @ durations).max(axis=1))

    def bound(self, durations: Array) -> Array:
        """Seconds [n] that no program is below at durations [n, calls, S + 1]."""
        bound = self.bound_by_rates(durations)
        for cut in self.cuts:
            bound = np.maximum(bound, cut.bound(durations, self.objective.of_bounds))
        return bound

    def admits_means(self, means: Array) -> Indices:
        """Which [n] of some mean durations [n, calls] may still lead below the threshold. All of
        them where means say nothing about the objective."""
        fits = np.arange(len(means))
        if not self.objective.linear:
            return fits
        fits = np.flatnonzero((means @ self.rates.T).max(axis=1) < self.seconds)
        for cut in self.cuts:
            fits = fits[np.flatnonzero(cut.least(means[fits]) < self.seconds)]
        return fits


def threshold_for(
    problem: Problem, sharing: Sharing, limit: float, fixed: Program | None, cuts: Cuts
) -> Threshold:
    """The threshold for plans whose calls share pools like this: with any program, or with a
    `fixed` one, whose own cycles then say all that is known."""
    if fixed is None:
        return Threshold(limit, problem.choices(sharing).floor, cuts, problem.objective)
    own = rates(cycles_of(problem.flow, sharing, fixed.items))
    return Threshold(limit, own, (), problem.objective)
