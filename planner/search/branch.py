"""Best-first search: placements in the order of their bounds, until no bound is below the best plan found."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from planner.search.bound import Bounds
from planner.search.evaluate import SAME, Candidate, evaluate
from planner.search.options import Problem
from planner.search.pins import Allows
from planner.search.space import sizes, structures


class Found(NamedTuple):
    """The best candidates of different placements, the best first; the bound that no plan of the space is below; and
    how many placements (structures with pool sizes) the space holds."""

    best: tuple[Candidate, ...]
    bound: float
    placements: int


def search(problem: Problem, keep: int, allowed: Allows | None = None) -> Found:
    """The `keep` best placements (of those that are `allowed`), each with its best layouts and program. Empty if
    nothing fits.

    Placements are taken in the order of their bounds, first with a few natural programs; those that reach neither
    their floor nor exceed the incumbent get every program afterwards."""
    listed = structures(problem.workload.roles)
    together, _ = evaluate(problem, (frozenset(problem.workload.roles),), (len(problem.cluster.gpus),), every=False)
    bounds = Bounds(problem, together.seconds if together else np.inf)
    nodes = [
        (float(bound), number, tuple(int(n) for n in counts))
        for number, structure in enumerate(listed)
        for every in [sizes(len(problem.cluster.gpus), len(structure))]
        for counts_of in [every if allowed is None else every[allowed(structure, every)]]
        for bound, counts in zip(bounds.of(structure, counts_of), counts_of, strict=True)
    ]
    placements, nodes = len(nodes), sorted(node for node in nodes if np.isfinite(node[0]))
    best: list[Candidate] = []
    unsettled: list[tuple[int, tuple[int, ...]]] = []
    bound = np.inf
    for bound, number, counts in nodes:
        if len(best) == keep and bound >= best[-1].seconds * (1 - SAME):
            break
        candidate, settled = evaluate(problem, listed[number], counts, _limit(best, keep), every=False)
        _insert(best, candidate, keep)
        if not settled:
            unsettled.append((number, counts))
    for number, counts in unsettled:
        candidate, _ = evaluate(problem, listed[number], counts, _limit(best, keep), every=True)
        _insert(best, candidate, keep)
    lowest = best[0].seconds if best else 0.0
    return Found(tuple(best), lowest, placements)


def _limit(best: Sequence[Candidate], keep: int) -> float:
    return best[-1].seconds if len(best) == keep else np.inf


def _insert(best: list[Candidate], candidate: Candidate | None, keep: int) -> None:
    """Keep the list sorted; of equal times the earlier (simpler) placement comes first. One entry per placement."""
    if candidate is None:
        return
    same = [i for i, c in enumerate(best) if (c.structure, c.pools) == (candidate.structure, candidate.pools)]
    if same and best[same[0]].seconds <= candidate.seconds:
        return
    for i in same:
        del best[i]
    at = next((i for i, c in enumerate(best) if candidate.seconds < c.seconds * (1 - SAME)), len(best))
    best.insert(at, candidate)
    del best[keep:]
