"""Step time against GPUs, dollars and staleness: the best plan of each combination."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from planner.predict.profile import Profile
from planner.search.questions.why_nothing_fits import what_binds
from planner.search.solver.best_program import SAME
from planner.search.solver.branch_and_bound import solve
from planner.search.solver.problem import problem_of
from planner.search.solver.write_plan import assemble
from planner.spec.cluster import Cluster
from planner.spec.plan import Plan
from planner.spec.workload import Workload


class Point(NamedTuple):
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
) -> tuple[tuple[Point, ...], tuple[str, ...]]:
    """A point for each cluster and staleness, and the reasons for the clusters on which nothing
    fits."""
    points: list[Point] = []
    reasons: list[str] = []
    limits = list(staleness)
    for cluster in clusters:
        for limit in limits:
            problem = problem_of(workload, cluster, profiles, limit)
            found = solve(problem, 1).best
            if not found:
                gpus = f"{len(cluster.gpus)} GPU{'s' * (len(cluster.gpus) != 1)}"
                reasons.append(f"no plan fits {workload.name} on {gpus}: {what_binds(problem)}")
                break  # more staleness needs no less memory
            name = f"{len(cluster.gpus)}-gpus-{limit}-stale"
            step, tokens = found[0].seconds, float(problem.model.tokens.mean())
            price = sum(cluster.device_of(gpu).price_per_hour for gpu in cluster.gpus) / 3600
            plan = assemble(found[0], name, problem)
            points.append(
                Point(len(cluster.gpus), limit, plan, step, tokens / step, price * step, False)
            )
    return tuple(point._replace(best=not _beaten(point, points)) for point in points), tuple(
        reasons
    )


def _beaten(point: Point, points: Sequence[Point]) -> bool:
    """Whether another point is as good in everything and better in something."""
    near = (1 + SAME) * point.seconds
    others = [p for p in points if p.gpus <= point.gpus and p.max_staleness <= point.max_staleness]
    return any(p.seconds <= near and p[:2] != point[:2] for p in others)
