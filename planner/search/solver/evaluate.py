"""One placement: the best layouts of its roles, jointly under memory, and the best program."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from planner.predict.objective import with_mean
from planner.search.solver.best_program import SAME, Program, best_program
from planner.search.solver.choices import choices_of
from planner.search.solver.layout_combinations import (
    LayoutCombinations,
    durations_of,
    hosts_hold,
    kept_layouts,
    lightest,
    promising,
)
from planner.search.solver.placement import Placement
from planner.search.solver.problem import Problem
from planner.search.solver.rollout_options import RolloutOption, any_below, worth_trying
from planner.search.solver.threshold import Cuts, threshold_for
from planner.search.space.arrays import Array, Indices
from planner.search.space.placements import (
    PlacementFamily,
    Structure,
    families,
    gpus_of,
)
from planner.spec.plan import Gpu, RolloutRole, TrainerRole

MUCH_LEFT = 0.98  # of a threshold: a bound below it leaves much to be gained
PROGRAMS_AT_ONCE = 64  # combinations of layouts whose programs are bounded together
QUICK_PROGRAMS = 3  # combinations of layouts that a quick plan finds programs for


class Candidate(NamedTuple):
    """A placement with layouts and a program, and its step time in seconds (the objective over the
    length scenarios); and whether generation streams in it."""

    seconds: float
    structure: Structure
    pools: tuple[tuple[Gpu, ...], ...]
    trainers: dict[str, TrainerRole]
    rollout: RolloutRole
    program: Program
    streams: bool = False


class Trial(NamedTuple):
    """A placement to look at: the sizes of a family's pools. Only plans below `limit` seconds are
    of interest, with any program, or with a `fixed` one. `cuts` are what is known of the programs
    so far."""

    problem: Problem
    family: PlacementFamily
    sizes: Sequence[int]
    limit: float = np.inf
    fixed: Program | None = None
    cuts: Cuts = ()


class Evaluation(NamedTuple):
    """The best candidate of a placement, None if nothing fits or is below the limit; whether the
    placement is `filled`, so that no smaller pools could be better; and the cuts of its programs:
    those of the trial and those that were learned."""

    best: Candidate | None
    filled: bool
    cuts: Cuts


class Verdict(NamedTuple):
    """Whether no placement of a trial's sizes or smaller ones is below its limit, and the cuts:
    those of the trial and those that were learned."""

    ruled_out: bool
    cuts: Cuts


def evaluate(trial: Trial) -> Evaluation:
    """Find the best layouts and program of a placement (or the best layouts for a fixed
    program)."""
    evaluator = _Evaluator(trial, Placement(trial.problem, trial.family, trial.sizes))
    evaluator.run()
    filled = evaluator.placement.is_filled and not evaluator.hosts_bind
    return Evaluation(evaluator.freshest(), filled, evaluator.threshold.cuts)


def evaluate_structure(
    problem: Problem, structure: Structure, sizes: Sequence[int]
) -> Candidate | None:
    """Find the best layouts and program of a structure with pools of these sizes, on the first
    kinds of GPU that have room for them; None if nothing fits."""
    for family in families(structure, problem.cluster):
        if all(sum(sizes[pool] for pool in pools) <= most for pools, most in family.limits):
            return evaluate(Trial(problem, family, sizes)).best
    return None


def guess(trial: Trial) -> Evaluation:
    """Find a good plan of a placement quickly: on all GPUs that a role can use, with the few
    layouts of the rollout that seem the fastest. Does not tell whether the placement is filled."""
    placement = Placement(trial.problem, trial.family, trial.sizes)
    for role, layouts in placement.layouts.items():
        used = layouts.grid.gpus
        placement.layouts[role] = layouts.take(np.flatnonzero(used == used.max(initial=0)))
    evaluator = _Evaluator(trial, placement)
    evaluator.run(quick=True)
    return Evaluation(evaluator.freshest(), False, evaluator.threshold.cuts)


def ruled_out_by_roles(trial: Trial) -> Verdict:
    """Tell whether a look at the layouts of each role alone rules a placement out, and with it all
    smaller ones."""
    ideal = Placement(trial.problem, trial.family, trial.sizes, ideal=True)
    threshold = threshold_for(trial.problem, ideal.sharing, trial.limit, trial.fixed, trial.cuts)
    return Verdict(not any_below(ideal, threshold), trial.cuts)


def ruled_out_by_ideal(trial: Trial) -> Verdict:
    """Tell whether the ideal placement of these sizes has no plan below the limit, which rules out
    all real ones of these sizes or smaller ones."""
    ideal = Placement(trial.problem, trial.family, trial.sizes, ideal=True)
    evaluator = _Evaluator(trial, ideal)
    evaluator.run(only_one=True)
    return Verdict(evaluator.best is None, evaluator.threshold.cuts)


class _Evaluator:
    """The search for the best layouts and program of one placement: the threshold that they have to
    beat, the best so far with its durations [calls, S + 1], and whether some layouts were left out
    because hosts have too little memory."""

    def __init__(self, trial: Trial, placement: Placement) -> None:
        self.placement, self.problem, self.fixed = placement, trial.problem, trial.fixed
        self.threshold = threshold_for(
            trial.problem, placement.sharing, trial.limit, trial.fixed, trial.cuts
        )
        self.best: Candidate | None = None
        self.durations: Array = np.zeros(0)
        self.hosts_bind = False

    def run(self, quick: bool = False, only_one: bool = False) -> None:
        """Try all layouts that may lead below the threshold; `quick`: a few of them; `only_one`: up
        to the first plan."""
        for option in worth_trying(self.placement, self.threshold, quick):
            bound = float(self.threshold.bound(with_mean(option.least)[None])[0])
            much_left = bound < MUCH_LEFT * self.threshold.seconds
            if much_left:  # first what is surely good, to lower the threshold
                self._try_lightest(option, quick)
                if only_one and self.best:
                    return
            if not (much_left and quick):  # then all that may be better, unless it is too much
                self._try_promising(option, quick)
                if only_one and self.best:
                    return

    def _try_lightest(self, option: RolloutOption, quick: bool) -> None:
        kept = kept_layouts(self.placement, option, self.threshold)
        if all(len(layouts.memory) for layouts in kept.values()):
            self._try(lightest(self.placement, option, kept), quick)

    def _try_promising(self, option: RolloutOption, quick: bool) -> None:
        kept = kept_layouts(self.placement, option, self.threshold)
        if all(len(layouts.memory) for layouts in kept.values()):
            self._try(promising(self.placement, option, kept, self.threshold), quick)

    def _try(self, combinations: LayoutCombinations, quick: bool) -> None:
        """Look for a better plan among some combinations of layouts."""
        if not self.placement.ideal and len(combinations):
            held = hosts_hold(self.placement, combinations)
            self.hosts_bind |= len(held) < len(combinations)
            combinations = combinations.take(held)
        if not len(combinations):
            return
        seconds = durations_of(self.placement, combinations)  # [calls, n, S]
        durations = with_mean(seconds.swapaxes(0, 1))  # [n, calls, S + 1]
        if self.fixed:
            self._try_fixed(combinations, durations, self.fixed)
        else:
            self._try_programs(combinations, durations, quick)

    def _try_fixed(
        self, combinations: LayoutCombinations, durations: Array, fixed: Program
    ) -> None:
        """Take the combination with which a given program is the fastest, if it is better. The
        program's own rates are exact."""
        seconds = self.threshold.bound_by_rates(durations)
        n = int(seconds.argmin())
        if seconds[n] < self.threshold.seconds:
            self._improve(float(seconds[n]), combinations, n, fixed, durations[n])

    def _try_programs(
        self, combinations: LayoutCombinations, durations: Array, quick: bool
    ) -> None:
        """Find the best program for the combination with the lowest bound, again and again, until
        no bound is below the threshold.

        Bounds by rates are cheap and known for all combinations; those by cuts are made for the few
        with the lowest ones, as they get their turn."""
        bound = self.threshold.bound_by_rates(durations)
        looks = 0
        while bound.min() < self.threshold.seconds and not (quick and looks >= QUICK_PROGRAMS):
            looks += 1
            least = bound.min()
            near = _lowest(bound)
            bound[near] = self.threshold.bound(durations[near])
            ties = near[bound[near] <= bound[near].min() * (1 + SAME)]
            n = combinations.simplest(ties)
            if bound[n] > least * (1 + SAME):
                continue  # the cuts have raised it: another combination may be lower now
            found = best_program(
                self.problem.choices(self.placement.sharing),
                durations[n],
                self.problem.objective.of_bounds,
                self.threshold.seconds,
            )
            self.threshold.learn(found.cut)
            if found.program:
                self._improve(found.seconds, combinations, n, found.program, durations[n])
            bound[n] = np.inf

    def _improve(
        self,
        seconds: float,
        combinations: LayoutCombinations,
        n: int,
        program: Program,
        durations: Array,
    ) -> None:
        """Take combination `n` with a program, at its durations [calls, S + 1], as the best so
        far."""
        placement = self.placement
        self.threshold.lower_to(seconds)
        self.durations = durations
        self.best = Candidate(
            seconds,
            placement.structure,
            tuple(gpus_of(parts) for parts in placement.packing),
            combinations.trainers(n, placement.pool_of),
            combinations.rollout.layout,
            program,
        )

    def freshest(self) -> Candidate | None:
        """The best candidate, with the least stale of the programs that are as fast."""
        if self.best is None or self.fixed:
            return self.best
        as_fast = self.best.seconds * (1 + 2 * SAME)
        for staleness in range(self.best.program.staleness):
            found = best_program(
                choices_of(self.problem.flow, self.placement.sharing, staleness),
                self.durations,
                self.problem.objective.of_bounds,
                as_fast,
                any_below=True,
            )
            if found.program:
                return self.best._replace(program=found.program)
        return self.best


def _lowest(bound: Array) -> Indices:
    """The indices of the lowest bounds, some of them if there are many, in rising order."""
    if len(bound) <= PROGRAMS_AT_ONCE:
        return np.arange(len(bound))
    return np.sort(np.argpartition(bound, PROGRAMS_AT_ONCE)[:PROGRAMS_AT_ONCE])
