"""Step time against GPUs, dollars and staleness: the best plan of each combination."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from planner.predict.profile import Profile
from planner.search.questions.why_nothing_fits import what_binds
from planner.search.solver.best_program import SAME
from planner.search.solver.evaluate import Candidate
from planner.search.solver.problem import Problem, problem_of
from planner.search.solver.stream_search import solve_as_allowed
from planner.search.solver.write_plan import assemble
from planner.spec.cluster import Cluster
from planner.spec.plan import Plan
from planner.spec.wording import counted
from planner.spec.workload import Workload


class ParetoPoint(NamedTuple):
    """The best plan on some GPUs with at most some staleness: its mean step time in seconds, tokens
    per second and US dollars per step (all GPUs of the cluster are paid for). `best`: none has no
    more GPUs, no more staleness and no longer a step."""

    gpus: int
    max_staleness: int
    plan: Plan
    seconds: float
    tokens_per_second: float
    dollars: float
    best: bool


def pareto_points(
    workload: Workload,
    clusters: Sequence[Cluster],
    staleness: Iterable[int],
    profiles: Sequence[Profile] = (),
) -> tuple[tuple[ParetoPoint, ...], tuple[str, ...]]:
    """A point for each cluster and staleness, and the reasons for the clusters on which nothing
    fits."""
    points: list[ParetoPoint] = []
    reasons: list[str] = []
    limits = list(staleness)
    for cluster in clusters:
        for limit in limits:
            problem = problem_of(workload, cluster, profiles, limit)
            found = solve_as_allowed(problem, 1).best
            if not found:
                where = f"{workload.name} on {counted(len(cluster.gpus), 'GPU')}"
                reasons.append(f"no plan fits {where}: {what_binds(problem)}")
                break  # more staleness needs no less memory
            points.append(_point(found[0], problem, limit))
    marked = tuple(point._replace(best=not _beaten(point, points)) for point in points)
    return marked, tuple(reasons)


def _point(found: Candidate, problem: Problem, limit: int) -> ParetoPoint:
    gpus = problem.cluster.gpus
    price_per_hour = sum(problem.cluster.device_of(gpu).price_per_hour for gpu in gpus)
    tokens = float(problem.model.tokens.mean())
    return ParetoPoint(
        gpus=len(gpus),
        max_staleness=limit,
        plan=assemble(found, f"{len(gpus)}-gpus-{limit}-stale", problem),
        seconds=found.seconds,
        tokens_per_second=tokens / found.seconds,
        dollars=price_per_hour / 3600 * found.seconds,
        best=False,
    )


def _beaten(point: ParetoPoint, points: Sequence[ParetoPoint]) -> bool:
    """Whether another point is as good in everything and better in something."""
    near = (1 + SAME) * point.seconds
    others = [p for p in points if p.gpus <= point.gpus and p.max_staleness <= point.max_staleness]
    return any(p.seconds <= near and p[:2] != point[:2] for p in others)
