"""Which plan is best, and the proof: `find` is the whole search, `baseline` one of the splits that
people use today."""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from statistics import median

from planner import __version__
from planner.predict.cost import SCENARIOS
from planner.predict.objective import ObjectiveName
from planner.predict.profile import Profile
from planner.search.questions.baselines import NAMES, best_of
from planner.search.questions.why_nothing_fits import nothing_fits
from planner.search.solver.best_program import SAME
from planner.search.solver.branch_and_bound import solve
from planner.search.solver.evaluate import Candidate
from planner.search.solver.problem import Problem, problem_of
from planner.search.solver.write_plan import assemble, complete, trimmed
from planner.search.space.pins import parse_pins, restriction
from planner.search.space.placements import placement_count, structures
from planner.spec.cluster import Cluster
from planner.spec.errors import UserError
from planner.spec.plan import Plan, Proof, Provenance
from planner.spec.workload import Workload

SPACE = (
    "staleness 0..{k}, one round per step; all role partitions, rollout on any union, all pool "
    "sizes; "
    "canonical packing, listed layouts"
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


def find(
    workload: Workload,
    cluster: Cluster,
    *,
    profiles: Sequence[Profile] = (),
    profile_hashes: dict[str, str] | None = None,
    max_staleness: int | None = None,
    keep: int = 4,
    pins: Sequence[str] = (),
    objective: ObjectiveName = "mean",
    time_limit: float | None = None,
    scenarios: int = SCENARIOS,
    command: str = "",
) -> Result:
    """The best plan by the objective (see `Objective`) over at most so many length
    `scenarios`, runners-up and the baselines, which no pin binds. The search ends after
    `time_limit` seconds, or on Ctrl-C, with the best plan so far, which may be a baseline: these
    are found besides, but for what a Ctrl-C leaves out. Raises UserError if nothing fits or none
    was found in that time."""
    start = time.perf_counter()
    problem = problem_of(workload, cluster, profiles, max_staleness, objective, scenarios)
    pinned = parse_pins(pins, workload.roles, cluster)
    deadline = start + time_limit if time_limit is not None else inf
    found = solve(problem, keep, restriction(pinned) if pinned else None, deadline)
    if found.ended and not found.best:
        raise UserError("the search was ended before it found any plan; give it more time")
    if not found.best:
        raise UserError(nothing_fits(problem, pins))
    seconds = found.proven - start
    gap = found.best[0].seconds > found.bound * (1 + SAME)
    proof = Proof(
        status="time_limit" if found.ended else "gap" if gap else "optimal",
        objective=objective,
        scenarios=problem.model.scenarios,
        space=SPACE.format(k=problem.max_staleness) + "".join(f", {pin.text}" for pin in pinned),
    )
    provenance = Provenance(
        version=__version__, seed=workload.seed, command=command, profiles=profile_hashes or {}
    )
    named, best = _baselines(problem), found.best
    fastest = min(
        (c for c in named.values() if isinstance(c, Candidate)),
        key=lambda c: c.seconds,
        default=best[0],
    )
    if found.ended and not pinned and fastest.seconds < best[0].seconds:
        best = (fastest, *best)[:keep]
    plans = [
        assemble(c, "best" if i == 0 else f"runner-up-{i}", problem) for i, c in enumerate(best)
    ]
    plans = plans if pinned else [trimmed(plan) for plan in plans]
    plans = [complete(plan, provenance, problem, proof, found.bound, seconds) for plan in plans]
    baselines: dict[str, Plan | str] = {}
    for name, c in named.items():
        if isinstance(c, str):
            baselines[name] = c
        else:
            baselines[name] = complete(
                assemble(c, name, problem), provenance, problem, None, found.bound, 0.0
            )
    return Result(
        best=plans[0],
        runners_up=tuple(plans[1:]),
        baselines=baselines,
        placements=sum(
            placement_count(structure, cluster) for structure in structures(workload.roles)
        ),
        evaluated=found.evaluated,
        seconds=seconds,
    )


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


def baseline(
    name: str,
    workload: Workload,
    cluster: Cluster,
    *,
    profiles: Sequence[Profile] = (),
    profile_hashes: dict[str, str] | None = None,
    pins: Sequence[str] = (),
    command: str = "",
) -> Plan:
    """One of the named splits with its best layouts, as a plan that can be executed; pins may say
    what sizes its pools have. Raises UserError."""
    problem = problem_of(workload, cluster, profiles, None)
    plan = assemble(best_of(name, problem, pins), name, problem)
    provenance = Provenance(
        version=__version__, seed=workload.seed, command=command, profiles=profile_hashes or {}
    )
    return complete(plan, provenance, problem, None, 0.0, 0.0)


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
