"""The best plan under other conditions, and whether the decision would be another."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from planner.predict.profile import Profile, check_profiles
from planner.search.questions.ladder import pools_of
from planner.search.questions.variants import (
    resized,
    with_models,
    with_network,
    with_response,
    with_tail,
)
from planner.search.questions.why_nothing_fits import what_binds
from planner.search.solver.best_program import SAME
from planner.search.solver.problem import problem_of, scenarios_of
from planner.search.solver.stream_search import solve_as_allowed
from planner.search.solver.write_plan import assemble
from planner.search.space.placements import PlacementFamily
from planner.spec.cluster import Cluster
from planner.spec.errors import UserError
from planner.spec.limits import MOST_GPUS, MOST_STALENESS
from planner.spec.plan import Plan
from planner.spec.wording import counted
from planner.spec.workload import Workload

LONGER, TAIL, SLOWER = 2.0, 1.5, 0.25


class Condition(NamedTuple):
    """A change in words, and the workload and the cluster with it."""

    what: str
    workload: Workload
    cluster: Cluster


class Replanned(NamedTuple):
    """The best plan under a condition, its step time in seconds and tokens per second; and the step
    time of the best plan with the roles on pools as in the plan that was given, with new sizes,
    layouts and program (None where nothing fits so)."""

    what: str
    plan: Plan
    seconds: float
    tokens_per_second: float
    kept: float | None

    @property
    def flips(self) -> bool:
        """Whether the decision flips: another structure is faster, or the plan's fits no more."""
        return self.kept is None or self.kept > self.seconds * (1 + SAME)


class Refused(NamedTuple):
    """A condition under which nothing fits, and why."""

    what: str
    reason: str


def conditions(plan: Plan, gpus: Sequence[int], others: Sequence[Workload]) -> Iterator[Condition]:
    """The plan's own condition first; then each change alone. `gpus` replaces the usual numbers of
    GPUs."""
    workload, cluster = plan.workload, plan.cluster
    yield Condition("as it is", workload, cluster)
    for count in gpus or _usual_gpus(cluster):
        yield Condition(counted(count, "GPU"), workload, resized(cluster, count))
    yield Condition(f"responses {LONGER:g}× as long", with_response(workload, LONGER), cluster)
    if (tail := with_tail(workload, TAIL)) is not None:
        yield Condition(f"a longer tail (sigma × {TAIL:g})", tail, cluster)
    if len(cluster.nodes) > 1:
        yield Condition(
            f"links between nodes × {SLOWER:g}", workload, with_network(cluster, SLOWER)
        )
    for other in others:
        yield Condition(f"models of {other.name}", with_models(workload, other), cluster)
    if workload.max_staleness < MOST_STALENESS:
        staler = workload.changed(max_staleness=workload.max_staleness + 1)
        yield Condition(f"staleness up to {staler.max_staleness}", staler, cluster)


def _usual_gpus(cluster: Cluster) -> list[int]:
    """Half, one node less, one node more, double."""
    there, node = len(cluster.gpus), cluster.nodes[-1].gpus
    counts = {there // 2, there - node, there + cluster.nodes[0].gpus, 2 * there}
    return sorted(count for count in counts if 0 < count <= MOST_GPUS and count != there)


def what_if(plan: Plan, condition: Condition, profiles: Sequence[Profile] = ()) -> Replanned:
    """Plan again under a condition; profiles that say nothing about it are left out. Raises
    UserError if nothing fits."""
    fitting = [profile for profile in profiles if _fits(profile, condition)]
    problem = problem_of(
        condition.workload, condition.cluster, fitting, None, scenarios=scenarios_of(plan)
    )
    found = solve_as_allowed(problem, 1)
    if not found.best:
        raise UserError(f"nothing fits: {what_binds(problem)}")
    best = found.best[0]
    own = frozenset(pools_of(plan)[0])

    def as_in_plan(family: PlacementFamily) -> PlacementFamily | None:
        return family if frozenset(family.structure) == own else None

    kept = (
        [best]
        if frozenset(best.structure) == own
        else solve_as_allowed(problem, 1, as_in_plan).best
    )
    if kept and kept[0].seconds <= best.seconds * (1 + SAME):
        best = kept[0]  # as good as any other
    tokens = float(problem.model.tokens.mean())
    name = "best" if condition.what == "as it is" else condition.what
    return Replanned(
        what=condition.what,
        plan=assemble(best, name, problem),
        seconds=best.seconds,
        tokens_per_second=tokens / best.seconds,
        kept=kept[0].seconds if kept else None,
    )


def _fits(profile: Profile, condition: Condition) -> bool:
    try:
        check_profiles([profile], condition.workload, condition.cluster)
    except UserError:
        return False
    return True
