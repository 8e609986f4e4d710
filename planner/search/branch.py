"""Best-first search: placements in the order of their bounds, until no bound is below the best plan found."""

import heapq
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from planner.predict.cost import Place
from planner.predict.memory import batch_bytes, rollout_memory
from planner.search.bound import Bounds, sharing_of
from planner.search.options import Problem
from planner.search.programs import Program, all_programs, bound_rates, plain_programs
from planner.search.space import Structure, pack, parts_of, sizes, structures
from planner.spec.plan import Gpu, RolloutRole, TrainerRole

SAME = 1e-9  # relative difference below which two step times are taken as equal


class Candidate(NamedTuple):
    """A placement with layouts and program, and its step time in seconds (the mean over the length scenarios)."""

    seconds: float
    structure: Structure
    pools: tuple[tuple[Gpu, ...], ...]
    trainers: dict[str, TrainerRole]
    rollout: RolloutRole
    program: Program


class Found(NamedTuple):
    """The best candidates of different placements, the best first; the bound that no plan of the space is below; and
    how many placements (structures with pool sizes) the space holds."""

    best: tuple[Candidate, ...]
    bound: float
    placements: int


def search(problem: Problem, keep: int) -> Found:
    """The `keep` best placements, each with its best layouts and program. Empty if nothing fits.

    Placements are taken in the order of their bounds, first with a few natural programs; those that reach neither
    their floor nor exceed the incumbent get every program afterwards."""
    bounds = Bounds(problem)
    nodes = [
        (float(bound), number, tuple(int(n) for n in counts))
        for number, structure in enumerate(all_structures := structures(problem.workload.roles))
        for counts_of in [sizes(len(problem.cluster.gpus), len(structure))]
        for bound, counts in zip(bounds.of(structure, counts_of), counts_of, strict=True)
    ]
    placements, nodes = len(nodes), sorted(node for node in nodes if node[0] < 1e29)
    best: list[Candidate] = []
    unsettled: list[tuple[int, tuple[int, ...]]] = []
    bound = np.inf
    for bound, number, counts in nodes:
        if len(best) == keep and bound >= best[-1].seconds * (1 - SAME):
            break
        candidate, settled = evaluate(problem, all_structures[number], counts, _limit(best, keep), every=False)
        _insert(best, candidate, keep)
        if not settled:
            unsettled.append((number, counts))
    for number, counts in unsettled:
        candidate, _ = evaluate(problem, all_structures[number], counts, _limit(best, keep), every=True)
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


def evaluate(
    problem: Problem,
    structure: Structure,
    counts: Sequence[int],
    limit: float = np.inf,
    every: bool = True,
    fixed: Program | None = None,
) -> tuple[Candidate | None, bool]:
    """The best layouts and program of one placement (or the best layouts for a `fixed` program), and whether that is
    settled: no program could make it faster and below `limit`. None if nothing fits or nothing is below `limit`."""
    gpus = pack(counts, problem.cluster)
    sharing = sharing_of(problem, structure)
    best: Candidate | None = None
    lowest_floor = np.inf
    for rollout, trainers, seconds in _layouts(problem, structure, gpus):
        for k in (fixed.staleness,) if fixed else range(problem.max_staleness + 1):
            floor = np.einsum("rc,cns->rns", bound_rates(problem.flow, sharing, k), seconds).max(axis=0).mean(axis=1)
            lowest_floor = min(lowest_floor, float(floor.min()))
            threshold = min(limit, best.seconds if best else np.inf) * (1 - SAME)
            if not fixed and floor.min() >= threshold:
                continue
            listed = all_programs if every else plain_programs
            for program in (fixed,) if fixed else listed(problem.flow, sharing, k):
                periods = program.cycles.periods(seconds).mean(axis=1)
                at = int(periods.argmin())
                if periods[at] < min(limit, best.seconds if best else np.inf) * (1 - SAME):
                    best = Candidate(float(periods[at]), structure, gpus, trainers[at], rollout, program)
    reached = min(limit, best.seconds if best else np.inf)
    return best, bool(fixed) or every or lowest_floor >= reached * (1 - SAME)


def _layouts(
    problem: Problem, structure: Structure, gpus: tuple[tuple[Gpu, ...], ...]
) -> Iterator[tuple[RolloutRole, list[dict[str, TrainerRole]], np.ndarray]]:
    """For each rollout layout all joint layouts of the other roles that fit: their durations [calls, n, S]."""
    names = tuple(f"p{i}" for i in range(len(structure)))
    places = [Place(parts=parts_of(pool), device=problem.cluster.device_of(pool[0])) for pool in gpus]
    generating = [i for i, roles in enumerate(structure) if "rollout" in roles]
    actor = next(i for i, roles in enumerate(structure) if "actor" in roles)
    same_node = len({node for i in {actor, *generating} for node, _ in gpus[i]}) == 1
    rollout_places = [places[i] for i in generating]
    for rollout in problem.rollouts(rollout_places):
        rollout = rollout.model_copy(update={"pools": tuple(names[i] for i in generating)})
        engine = rollout_memory(problem.workload, rollout, places[generating[0]].device)
        options = []
        for i, roles in enumerate(structure):
            held = tuple(role for role in problem.workload.roles if role in roles and role != "rollout")
            options.append((held, problem.options(held, places[i], engine if i in generating else None)))
        picks = [
            pick
            for pick in product(*(range(len(found.layouts)) for _, found in options))
            if _hosts_hold(problem, gpus, [found.host[n] for n, (_, found) in zip(pick, options, strict=True)])
        ]
        if not picks:
            continue
        seconds = np.zeros((len(problem.calls), len(picks), problem.model.scenarios))
        trainers: list[dict[str, TrainerRole]] = [{} for _ in picks]
        for i, (held, found) in enumerate(options):
            rows = [pick[i] for pick in picks]
            for call, drawn in zip(found.calls, found.seconds[rows].transpose(1, 0, 2), strict=True):
                seconds[problem.calls.index(call)] = drawn
            for row, chosen in zip(rows, trainers, strict=True):
                for role, layout in zip(held, found.layouts[row], strict=True):
                    chosen[role] = layout.model_copy(update={"pools": (names[i],)})
        seconds[problem.calls.index("generate")] = problem.model.generate(rollout, rollout_places).seconds
        for name in problem.calls:
            if not problem.flow[name].roles:
                seconds[problem.calls.index(name)] = problem.model.host(name).seconds
        for n, chosen in enumerate(trainers):
            seconds[problem.calls.index("sync_weights"), n] = problem.model.sync(
                chosen["actor"], places[actor], rollout, rollout_places, same_node=same_node, shared=actor in generating
            ).seconds
        yield rollout, trainers, seconds


def _hosts_hold(problem: Problem, gpus: tuple[tuple[Gpu, ...], ...], pinned: Sequence[float]) -> bool:
    """Whether every node's host memory holds what its pools offload [bytes per GPU] and the batches in flight."""
    held = dict.fromkeys(range(len(problem.cluster.nodes)), 0.0)
    held[0] = batch_bytes(problem.workload, problem.max_staleness)
    for pool, size in zip(gpus, pinned, strict=True):
        for node, _ in pool:
            held[node] += size
    return all(size <= problem.cluster.nodes[node].host_memory_bytes for node, size in held.items())
