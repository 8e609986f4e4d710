"""Which plan is best, and the proof: `find` is the whole search, `baseline` one of the splits that
people use today."""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from statistics import median
from typing import Literal

from planner import __version__
from planner.predict.profile import Profile
from planner.search.options import DEFAULTS, SearchOptions
from planner.search.questions.baselines import NAMES, best_of
from planner.search.questions.frameworks import (
    as_executed,
    is_held_back,
    nothing_for,
    splits_of,
    workload_for,
)
from planner.search.questions.why_nothing_fits import nothing_fits
from planner.search.solver.best_program import SAME
from planner.search.solver.branch_and_bound import (
    IsOver,
    SolverResult,
    best_of_families,
)
from planner.search.solver.evaluate import Candidate
from planner.search.solver.problem import Problem, problem_of
from planner.search.solver.stream_search import solve_as_allowed, solve_either
from planner.search.solver.write_plan import assemble, complete, trimmed
from planner.search.space.pins import Pin, Restrict, parse_pins, restriction
from planner.search.space.placements import PlacementFamily, placement_count, structures
from planner.spec.cluster import Cluster
from planner.spec.errors import UserError
from planner.spec.frameworks import VERSIONS, FrameworkName
from planner.spec.plan import Plan, Proof, Provenance
from planner.spec.wording import counted
from planner.spec.workload import Workload

SPACE = (
    "staleness 0..{k}, one round per step; all role partitions, rollout on any union, all pool "
    "sizes; canonical packing, listed layouts"
)
SPACE_OF_FRAMEWORK = (
    "what {name} {version} can execute: the pools that it makes, within a node or of whole nodes, "
    "its order of calls, and its layouts on all GPUs of a pool"
)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a search found, how many `placements` the space has (whatever is pinned) and how many
    were `evaluated`, and the seconds until the best plan was proven. A baseline that cannot be is
    there with the reason instead of a plan."""

    best: Plan
    runners_up: tuple[Plan, ...]
    baselines: dict[str, Plan | str]
    placements: int
    evaluated: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Solved:
    """The candidates of a solved problem, `best` first, and the baselines (or why one cannot be).
    No plan takes fewer seconds a step than `bound`; `status` says whether that proves the best one.
    `seconds` were spent until it was proven, and `evaluated` counts the placements that were
    looked at."""

    problem: Problem
    pins: tuple[Pin, ...]
    best: tuple[Candidate, ...]
    baselines: dict[str, Candidate | str]
    bound: float
    status: Literal["optimal", "gap", "time_limit"]
    evaluated: int
    seconds: float
    framework: FrameworkName | None = None


def find(
    workload: Workload,
    cluster: Cluster,
    options: SearchOptions = DEFAULTS,
    *,
    profiles: Sequence[Profile] = (),
    provenance: Provenance | None = None,
) -> Result:
    """The best plan, its runners-up and the baselines, at the costs that the profiles (else the
    roofline) give. Ctrl-C ends the search as the time limit does, with the best plan so far, which
    may be a baseline; a second Ctrl-C leaves out the baselines that are still missing. Raises
    UserError if nothing fits, or if no plan was found in time.

    >>> workload = load_workload(profiles_dir() / "workloads" / "7b.toml")
    >>> predicted = find(workload, make_cluster(gpus=16)).best.predicted
    >>> f"{predicted.step_seconds:.1f} s per step, {predicted.proof.status}"
    '38.8 s per step, optimal'
    """
    start = time.perf_counter()
    deadline = inf if options.time_limit is None else start + options.time_limit
    if options.framework is not None:
        workload = workload_for(options.framework, workload)
    problem = problem_of(
        workload, cluster, profiles, options.max_staleness, options.objective, options.scenarios
    )
    solution = solved(problem, options, start, lambda _: time.perf_counter() > deadline)
    return write_up(solution, provenance or _provenance(workload))


def solved(problem: Problem, options: SearchOptions, start: float, is_over: IsOver) -> Solved:
    """Solve a problem. Time is counted from `start` on (of `time.perf_counter`). If the search was
    over before the proof, a baseline that is faster than the best plan takes its place. Raises
    UserError as `find` does."""
    pins = parse_pins(options.pins, problem.workload.roles, problem.cluster)
    keep = options.runners_up + 1
    restrict = restriction(pins) if pins else None
    if options.framework is None:
        found = solve_as_allowed(problem, keep, restrict, is_over)
    else:
        found = _solve_for(options.framework, problem, keep, restrict, is_over)
    if not found.best and found.ended:
        raise UserError("the search was ended before it found any plan; give it more time")
    if not found.best and problem.workload.sync == "in_flight":
        gpus = counted(len(problem.cluster.gpus), "GPU")
        raise UserError(
            "nothing fits with sync = 'in_flight', for which generation needs GPUs of its own "
            f"beside those of all other roles, here of {gpus}; set sync to 'any' or 'boundary'"
        )
    if not found.best and options.framework is not None:
        raise UserError(nothing_for(options.framework, problem, options.pins))
    if not found.best:
        raise UserError(nothing_fits(problem, options.pins))
    best, baselines = found.best, _baselines(problem)
    status: Literal["optimal", "gap", "time_limit"] = "optimal"
    if found.ended:
        status = "time_limit"
        if not pins and options.framework is None:  # which bind no baseline
            best = _with_fastest(best, baselines)[:keep]
    elif best[0].seconds > found.bound * (1 + SAME):
        status = "gap"
    return Solved(
        problem=problem,
        pins=pins,
        best=best,
        baselines=baselines,
        bound=found.bound,
        status=status,
        evaluated=found.evaluated,
        seconds=found.proven - start,
        framework=options.framework,
    )


def _solve_for(
    framework: FrameworkName,
    problem: Problem,
    keep: int,
    restrict: Restrict | None,
    is_over: IsOver,
) -> SolverResult:
    """Solve for the splits alone that a framework can execute."""

    def solve_once(asked: Problem, count: int, known: Candidate | None) -> SolverResult:
        listed, programs = [], []
        for family, program in splits_of(framework, asked):
            if restrict is None or _meets(family, restrict):
                listed.append(family)
                programs.append(program)
        return best_of_families(asked, listed, count, programs, is_over, known)

    return solve_either(problem, keep, solve_once)


def _meets(family: PlacementFamily, restrict: Restrict) -> bool:
    """Whether a family with all sizes given meets pins."""
    met = restrict(family)
    if met is None or any(family.given[pool] != size for pool, size in met.given.items()):
        return False
    return met.rollout in (None, sum(family.given[pool] for pool in family.generating))


def _baselines(problem: Problem) -> dict[str, Candidate | str]:
    """Each baseline's best, or why it cannot be; up to a Ctrl-C."""
    found: dict[str, Candidate | str] = {}
    with contextlib.suppress(KeyboardInterrupt):
        for name in NAMES:
            try:
                found[name] = best_of(name, problem)
            except UserError as error:
                found[name] = str(error)
    return found


def _with_fastest(
    best: tuple[Candidate, ...], baselines: dict[str, Candidate | str]
) -> tuple[Candidate, ...]:
    """The best candidates after the fastest baseline, if that is faster than all of them."""
    candidates = [each for each in baselines.values() if isinstance(each, Candidate)]
    fastest = min((*best[:1], *candidates), key=lambda candidate: candidate.seconds)
    return best if fastest is best[0] else (fastest, *best)


def write_up(solution: Solved, provenance: Provenance) -> Result:
    """Write the candidates of a solution out as plans with their predictions."""
    problem = solution.problem
    searched = SPACE.format(k=problem.max_staleness)
    if solution.framework:
        version = VERSIONS[solution.framework]
        searched = SPACE_OF_FRAMEWORK.format(name=solution.framework, version=version)
    space = [searched, *(pin.text for pin in solution.pins)]
    if solution.framework and is_held_back(solution.framework, problem):
        space.append("nothing generated ahead, as sync = 'boundary' has no weights in flight")
    if problem.workload.sync != "boundary":
        space.append(f"sync {problem.workload.sync}")
    proof = Proof(
        status=solution.status,
        objective=problem.objective.name,
        scenarios=problem.model.scenarios,
        space=", ".join(space),
    )
    plans = []
    for number, candidate in enumerate(solution.best):
        name = f"runner-up-{number}" if number else "best"
        plan = assemble(candidate, name, problem)
        if solution.framework:
            plan = as_executed(solution.framework, plan)
        elif not solution.pins:  # a pin says how many GPUs there are, used or not
            plan = trimmed(plan)
        plans.append(complete(plan, provenance, problem, proof, solution.bound, solution.seconds))
    baselines: dict[str, Plan | str] = {}
    for name, found in solution.baselines.items():
        if isinstance(found, Candidate):
            plan = assemble(found, name, problem)
            baselines[name] = complete(plan, provenance, problem, None, solution.bound, 0.0)
        else:
            baselines[name] = found
    listed = structures(problem.workload.roles)
    return Result(
        best=plans[0],
        runners_up=tuple(plans[1:]),
        baselines=baselines,
        placements=sum(placement_count(structure, problem.cluster) for structure in listed),
        evaluated=solution.evaluated,
        seconds=solution.seconds,
    )


def baseline(
    name: str,
    workload: Workload,
    cluster: Cluster,
    *,
    profiles: Sequence[Profile] = (),
    pins: Sequence[str] = (),
    provenance: Provenance | None = None,
) -> Plan:
    """One of the named splits with its best layouts, as a plan that can be executed; pins may say
    what sizes its pools have. Raises UserError."""
    problem = problem_of(workload, cluster, profiles, None)
    plan = assemble(best_of(name, problem, pins), name, problem)
    return complete(plan, provenance or _provenance(workload), problem, None, 0.0, 0.0)


def _provenance(workload: Workload) -> Provenance:
    """The provenance of a plan that no command line asked for."""
    return Provenance(version=__version__, seed=workload.seed)


def tied(best: Plan, others: Sequence[Plan], profiles: Sequence[Profile]) -> tuple[str, ...]:
    """The names of the plans whose margin is smaller than the profiles' own error: the median of
    their points' spreads, relative to the seconds. Without profiles only equal times are ties."""
    spreads = [
        point.spread / point.seconds
        for profile in profiles
        for point in profile.points
        if point.repeats > 1
    ]
    error = max(SAME, median(spreads)) if spreads else SAME
    assert best.predicted
    most = best.predicted.step_seconds * (1 + error)
    return tuple(
        plan.name for plan in others if plan.predicted and plan.predicted.step_seconds <= most
    )
