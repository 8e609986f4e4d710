"""The best plan among those whose generation streams.

How long a stream takes from a batch's submission to its end depends on how fast batches come. So
the branch and bound, for which a call's seconds depend on its layout alone, is asked the question
the other way round: which plan is the fastest, if generation takes no less than it would at a
period of p seconds or below (`LeastLatencies`)? Call the answer f(p). A plan that takes p seconds
a step or less takes no less than f(p). So no plan is below the smaller of p and f(p), and as f
falls where p rises, the best bound is where they meet. It is found by some searches at several p.

What a plan really takes is simulated (`planner.predict.streamed`): of the best plan of each of
these searches. The fastest one is the result, and what it takes above the bound is the gap.
"""

import contextlib
import copy
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from planner.predict.costs.latencies import ASSURED, Arrivals, LeastLatencies
from planner.predict.memory import rollout_fraction
from planner.predict.objective import with_mean
from planner.search.solver.best_program import Program, cycles_of
from planner.search.solver.branch_and_bound import IsOver, SolverResult, solve
from planner.search.solver.evaluate import Candidate
from planner.search.solver.problem import Problem
from planner.search.solver.write_plan import assemble
from planner.search.space.pins import Restrict
from planner.search.space.placements import PlacementFamily, sharing_of
from planner.spec.dataflow import Dataflow
from planner.spec.errors import UserError
from planner.spec.plan import Issue

LONG = 1e9  # seconds of a period: no step is as long
NEAR_ENOUGH = 0.005  # how near to where f(p) and p meet is near enough
MOST_SEARCHES = 10
EDGE = 0.02  # of what is left between two periods: the next one is no nearer to either
DRAWN_OUT = (1.05, 1.1, 1.2)  # times what is simulated: what generation is taken to take
AS_FAST = 1.001  # times the seconds of a plan that is staler, or has more slots
FEWER_BATCHES = (1.0, 0.75)  # for which engines may have slots

# The best plans, so many of them, of a problem that streams or that has boundaries. A plan that is
# known already has to be beaten.
SolveOnce = Callable[[Problem, int, Candidate | None], SolverResult]


def solve_as_allowed(
    problem: Problem,
    keep: int,
    restrict: Restrict | None = None,
    is_over: IsOver = lambda evaluated: False,
) -> SolverResult:
    """The best plans with boundaries or with weights in flight, as the workload says, of the whole
    space. Arguments as of `branch_and_bound.solve`. Raises UserError as `solve_either` does."""

    def solve_once(asked: Problem, count: int, known: Candidate | None) -> SolverResult:
        allowed = _alone(restrict) if asked.streams else restrict
        return solve(asked, count, allowed, is_over, known)

    return solve_either(problem, keep, solve_once)


def solve_either(problem: Problem, keep: int, solve_once: SolveOnce) -> SolverResult:
    """The best plans with boundaries or with weights in flight, as the workload says, of the space
    that `solve_once` searches. Where the workload allows both, the best of either sort is among
    several that are kept. Raises UserError for an objective that is not known of streams."""
    sync = problem.workload.sync
    if sync == "boundary" or not problem.max_staleness:
        return solve_once(problem, keep, None)
    if problem.objective.name == "p95":
        raise UserError(
            f"sync = {sync!r}: a stream has no 95th percentile over the scenarios, which are in it "
            "at once; leave out --objective p95"
        )
    streams = _Searches(problem, keep, solve_once).run()
    if sync == "in_flight":
        return streams
    boundary = solve_once(problem, keep, None)
    either = sorted((*boundary.best, *streams.best), key=lambda candidate: candidate.seconds)
    others = [candidate for candidate in either if candidate.streams != either[0].streams]
    best = either[:keep]
    if keep > 1 and others and others[0] not in best:
        best[-1] = others[0]
    return SolverResult(
        best=tuple(best),
        bound=min((found.bound for found in (boundary, streams) if found.best), default=0.0),
        evaluated=boundary.evaluated + streams.evaluated,
        proven=max(boundary.proven, streams.proven),
        ended=boundary.ended or streams.ended,
    )


def _alone(restrict: Restrict | None) -> Restrict:
    """The placements of a family, as restricted, in which generation is alone on its pool."""

    def met(family: PlacementFamily) -> PlacementFamily | None:
        if any(family.structure[pool] != {"rollout"} for pool in family.generating):
            return None
        return family if restrict is None else restrict(family)

    return met


class _Searches:
    """Searches at several periods, for the best plan that streams, and good other ones, of a
    problem whose plans have boundaries; none if nothing fits. `bound` is what no plan that streams
    is below, `simulated` are the candidates with the seconds that they take, by what they decide;
    `below` and `above` are periods with f(p) - p, where that is positive and where it is
    negative."""

    def __init__(self, problem: Problem, keep: int, solve_once: SolveOnce) -> None:
        self.problem, self.keep, self.solve_once = problem, keep, solve_once
        self.bound, self.evaluated, self.proven, self.ended = 0.0, 0, 0.0, False
        self.simulated: dict[object, Candidate] = {}
        self.found: list[Candidate] = []  # the best of each search
        self.streaming: Problem | None = None  # the last one that was solved
        self.below: tuple[float, float] | None = None
        self.above: tuple[float, float] | None = None

    def run(self) -> SolverResult:
        try:
            self._raise_bound()
            self._look_for_plans()
        except KeyboardInterrupt:
            self.ended = True
        fastest = sorted(self.simulated.values(), key=lambda candidate: candidate.seconds)
        best = [self._refined(candidate) for candidate in fastest[:1]] + fastest[1 : self.keep]
        # With fewer slots than those that were searched, a plan may be a little faster than that.
        bound = min(self.bound, *(candidate.seconds for candidate in best[:1]), LONG)
        return SolverResult(tuple(best), bound, self.evaluated, self.proven, self.ended)

    def _raise_bound(self) -> None:
        """Search at periods ever nearer to where f(p) and p meet."""
        period = LONG
        for _ in range(MOST_SEARCHES):
            self._search(period)
            if self.ended or not self.bound or (self.simulated and self._meet):
                return
            period = self._next()

    def _look_for_plans(self) -> None:
        """Search for plans that leave generation more time than it takes at least: their trainers
        seldom wait for a batch that takes longer than others."""
        for share in DRAWN_OUT:
            if self.ended or not self.simulated or self._least <= self.bound * (1 + NEAR_ENOUGH):
                return
            found = self._solve(self.bound, share)
            if not found.best or found.best[0].seconds > self._least:
                return
            self._simulate(found.best[0])

    def _solve(self, period: float, share: float) -> SolverResult:
        """The best plan if generation takes this share of what it would at a period."""
        self.streaming = streaming(self.problem, period, self.streaming, share)
        found = self.solve_once(self.streaming, 1, self._known())
        self.evaluated += found.evaluated
        self.proven, self.ended = found.proven, found.ended
        self.found += found.best
        return found

    def _search(self, period: float) -> None:
        """Find f(period), and simulate the plan that takes so long."""
        found = self._solve(period, ASSURED)
        if not found.best:
            return
        self.bound = max(self.bound, min(period, found.bound))
        if found.bound >= period:
            self.below = period, found.bound - period
        elif period < LONG:
            self.above = period, found.bound - period
        if period < LONG:
            self._simulate(found.best[0])

    def _known(self) -> Candidate | None:
        """The fastest of what other searches have found, at the costs of this one."""
        at_its_costs = [self._at_its_costs(candidate) for candidate in self.found]
        return min(at_its_costs, key=lambda candidate: candidate.seconds, default=None)

    def _at_its_costs(self, candidate: Candidate) -> Candidate:
        """A candidate with the seconds that it takes by the costs of the search."""
        problem = self.streaming
        assert problem
        plan = assemble(candidate, "candidate", problem)
        durations = np.zeros((len(problem.calls), problem.model.scenarios))
        for row, seconds in problem.host_seconds.items():
            durations[row] = seconds
        for call in problem.flow.calls:
            if call.roles and not call.streams:
                durations[problem.row[call.name]] = problem.model.call(call, plan).seconds
        node, _ = plan.pools[plan.rollout.pools[0]].gpus[0]
        table = problem.rollout_table(problem.cluster.nodes[node].device)
        generation = table.simulated(table.row_of(candidate.rollout))
        problem.fill_in_generation(durations, generation)
        sharing = sharing_of(problem.flow, candidate.structure)
        cycles = cycles_of(problem.flow, sharing, candidate.program.items)
        periods = cycles.periods(with_mean(durations))
        return candidate._replace(seconds=float(problem.objective.of_bounds(periods)))

    @property
    def _least(self) -> float:
        """The seconds of the fastest candidate."""
        return min(candidate.seconds for candidate in self.simulated.values())

    @property
    def _meet(self) -> bool:
        """Whether further searches would raise the bound by nothing that matters."""
        highest = min(self._least, self.above[0] if self.above else LONG)
        return highest <= self.bound * (1 + NEAR_ENOUGH)

    def _next(self) -> float:
        """The period at which f(p) and p may meet, by a line between two that they do not meet
        at."""
        if self.below is None:
            return self.bound * (1 + NEAR_ENOUGH)
        if self.above is None:
            return self._least
        (low, excess), (high, missing) = self.below, self.above
        share = excess / (excess - missing) if excess else 0.0
        return low + (high - low) * min(max(share, EDGE), 1 - EDGE)

    # --- what candidates take ---

    def _simulate(self, candidate: Candidate) -> None:
        """Simulate a candidate at the staleness that is allowed."""
        key = candidate.pools, candidate.rollout, *candidate.trainers.items()
        if key not in self.simulated:
            most = self.problem.max_staleness
            self.simulated[key] = self._timed(candidate, most)

    def _timed(self, candidate: Candidate, staleness: int) -> Candidate:
        """The candidate at a staleness, with the seconds that it then takes."""
        program = staler(candidate.program, staleness, self.problem.flow)
        stale = candidate._replace(program=program, streams=True)
        plan = assemble(stale, "candidate", self.problem)
        return stale._replace(seconds=float(self.problem.model.streamed(plan).steps.mean()))

    def _refined(self, candidate: Candidate) -> Candidate:
        """The candidate with the slots with which it is the fastest, and the least staleness at
        which it is as fast."""
        for batches in FEWER_BATCHES:
            fewer = self._timed(self._with_slots(candidate, batches), candidate.program.staleness)
            if fewer.seconds * AS_FAST <= candidate.seconds:
                candidate = fewer
        return self._fresher(candidate)

    def _with_slots(self, candidate: Candidate, batches: float) -> Candidate:
        """The candidate with engines that have slots for their share of so many batches. Where
        batches come in bunches, the first then ends earlier than if all began at once."""
        rollout, workload = candidate.rollout, self.problem.workload
        share = math.ceil(batches * workload.generated / rollout.replicas)
        slots = min(rollout.concurrency, share)
        pools = zip(candidate.structure, candidate.pools, strict=True)
        gpu = next(gpus[0] for roles, gpus in pools if roles == {"rollout"})
        device = self.problem.cluster.device_of(gpu)
        fraction = rollout_fraction(workload, rollout.tensor_parallel, slots, device)
        fewer = rollout.changed(concurrency=slots, memory_fraction=fraction)
        return candidate._replace(rollout=fewer)

    def _fresher(self, candidate: Candidate) -> Candidate:
        """The candidate with the least staleness at which it is as fast."""
        for staleness in range(1, candidate.program.staleness):
            with contextlib.suppress(UserError):  # the other calls may be too far ahead for that
                fresh = self._timed(candidate, staleness)
                if fresh.seconds <= candidate.seconds * AS_FAST:
                    return fresh
        return candidate


def streaming(
    problem: Problem, period: float, other: Problem | None = None, counted: float = ASSURED
) -> Problem:
    """The problem of plans that stream and take so many seconds a step, or less. Of simulated
    latencies a share is `counted`. Layouts, and latencies that are known, are taken from that of
    another period, if there is one."""
    model = copy.copy(problem.model)
    arrivals = Arrivals(period, problem.max_staleness + 1, problem.least_sync, counted)
    known = None
    if other is not None:
        assert isinstance(other.model.rollouts, LeastLatencies)
        known = other.model.rollouts.known
    model.rollouts = LeastLatencies(model.streams, arrivals, known)
    return replace(
        problem,
        model=model,
        flow=problem.flow.streamed,
        streams=True,
        rollout_tables={
            kind: table.with_model(model)
            for kind, table in (other.rollout_tables if other else {}).items()
        },
    )


def staler(program: Program, staleness: int, flow: Dataflow) -> Program:
    """The program of a plan that streams, with generation submitted as many steps earlier (or
    later) as give it this staleness. No other call is moved by that: generation takes no turns."""
    earlier, generates = staleness - program.staleness, flow.generates.name

    def moved(item: Issue) -> Issue:
        return item.changed(offset=item.offset + earlier) if item.call == generates else item

    items = tuple(moved(item) if isinstance(item, Issue) else item for item in program.items)
    return Program(items, staleness)
