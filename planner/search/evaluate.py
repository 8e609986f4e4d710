"""One placement: the best layouts of its roles, jointly under memory, and the best program."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from planner.predict.cost import Place
from planner.predict.memory import RoleMemory, batch_bytes
from planner.search.bound import sharing_of
from planner.search.options import Array, Choice, Engines, Problem, bytes_of, together
from planner.search.programs import Program, Sharing, bound_rates, plain_programs, programs_below, rates
from planner.search.space import Structure, pack, parts_of
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


class Site(NamedTuple):
    """A placement on real nodes."""

    structure: Structure
    gpus: tuple[tuple[Gpu, ...], ...]
    places: tuple[Place, ...]
    held: tuple[tuple[str, ...], ...]  # trained and inference roles of each pool
    generating: tuple[int, ...]
    actor: int

    @property
    def same_node(self) -> bool:
        return len({node for i in {self.actor, *self.generating} for node, _ in self.gpus[i]}) == 1


def _site(problem: Problem, structure: Structure, counts: Sequence[int]) -> Site:
    gpus = pack(counts, problem.cluster)
    return Site(
        structure=structure,
        gpus=gpus,
        places=tuple(Place(parts=parts_of(pool), device=problem.cluster.device_of(pool[0])) for pool in gpus),
        held=tuple(tuple(r for r in problem.workload.roles if r in roles and r != "rollout") for roles in structure),
        generating=tuple(i for i, roles in enumerate(structure) if "rollout" in roles),
        actor=next(i for i, roles in enumerate(structure) if "actor" in roles),
    )


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
    site, sharing = _site(problem, structure, counts), sharing_of(problem, structure)
    floor = rates(fixed) if fixed else bound_rates(problem.flow, sharing, problem.max_staleness)
    best: Candidate | None = None
    settled = True
    places = [site.places[i] for i in site.generating]
    floors = [
        (problem.model.generate_floor(layout, places), layout, memory) for layout, memory in problem.rollouts(places)
    ]
    for seconds_floor, layout, memory in sorted(floors, key=lambda entry: entry[0]):
        engines = _engines(problem, site, layout, memory, seconds_floor, floor, _below(limit, best))
        if engines is None:
            continue
        lightest = _lightest(problem, site, engines)
        for picks in ([lightest] if lightest else [], None):  # first one that is surely good, then what may be better
            if picks is None:
                picks = _promising(problem, site, engines, floor, _below(limit, best))
            if not picks:
                continue
            seconds = _seconds(problem, site, engines, picks)
            least = seconds.min(axis=1).mean(axis=1)
            for program in _programs(problem, sharing, least, _below(limit, best), every, fixed):
                periods = program.cycles.periods(seconds).mean(axis=1)
                n = int(periods.argmin())
                if periods[n] < _below(limit, best):
                    best = _candidate(float(periods[n]), site, engines, picks[n], program)
            settled &= every or fixed is not None or bool((floor @ least).max() >= _below(limit, best))
    return best, settled


def _engines(
    problem: Problem,
    site: Site,
    layout: RolloutRole,
    memory: RoleMemory,
    seconds_floor: float,
    floor: Array,
    threshold: float,
) -> Engines | None:
    """The engines of a rollout layout, unless even with the least seconds of all else no step below the threshold is
    possible. Generation is simulated only where its own floor does not rule the layout out."""
    least = _least(problem, site, memory, seconds_floor)
    if least is None or (floor @ least).max() >= threshold:
        return None
    engines = problem.engines(layout, memory, [site.places[i] for i in site.generating])
    least[problem.calls.index("generate")] = engines.seconds.mean()
    return engines if (floor @ least).max() < threshold else None


def _least(problem: Problem, site: Site, engine: RoleMemory, generate: float) -> Array | None:
    """Mean seconds [calls] that no layouts of the other roles undercut beside this engine; None if nothing fits."""
    least = dict.fromkeys(problem.calls, 0.0)
    for i, (held, place) in enumerate(zip(site.held, site.places, strict=True)):
        found = problem.least(held, place, engine if i in site.generating else None)
        if found is None:
            return None
        least |= found
    least |= {
        call.name: float(problem.model.host(call.name).seconds.mean()) for call in problem.flow.calls if not call.roles
    }
    least["generate"] = generate
    return np.array([least[call] for call in problem.calls])


def _below(limit: float, best: Candidate | None) -> float:
    """What a step time must be below to count as better."""
    return min(limit, best.seconds if best else np.inf) * (1 - SAME)


def _programs(
    problem: Problem, sharing: Sharing, least: Array, threshold: float, every: bool, fixed: Program | None
) -> list[Program]:
    """Programs that could be faster than `threshold` if each call took its least seconds, the freshest data first."""
    if fixed:
        return [fixed]
    found: list[Program] = []
    for k in range(problem.max_staleness + 1):
        if every and np.isfinite(threshold):
            found += programs_below(problem.flow, sharing, k, least, threshold)
        else:
            plain = plain_programs(problem.flow, sharing, k)
            found += [program for program in plain if program.cycles.periods(least) < threshold]
    return found


Picks = list[tuple[Choice, ...]]  # a layout of each trained and inference role, pool by pool


def _lightest(problem: Problem, site: Site, engines: Engines) -> tuple[Choice, ...] | None:
    """On each pool the joint layouts with the least load; None if some pool has none that fit."""
    picked: tuple[Choice, ...] = ()
    for i, (held, place) in enumerate(zip(site.held, site.places, strict=True)):
        found = problem.lightest(held, place, engines.memory if i in site.generating else None)
        if found is None:
            return None
        picked += found
    return picked if _hosts_hold(problem, site, engines, [picked])[0] else None


def _promising(problem: Problem, site: Site, engines: Engines, floor: Array, threshold: float) -> Picks:
    """All combinations of layouts that fit and whose bound `floor` [rows, calls] is below the threshold.

    Roles are added one by one, the busiest pool's first; those to come count with their least seconds and bytes."""
    row = {call: i for i, call in enumerate(problem.calls)}
    steps = [(i, role) for i, held in enumerate(site.held) for role in held]
    choices = {role: problem.choices(role, site.places[i]) for i, role in steps}
    synced = [_sync(problem, site, engines, choice).mean() for choice in choices["actor"]]
    least = _least(problem, site, engines.memory, float(engines.seconds.mean()))
    if least is None:
        return []
    least[row["sync_weights"]] = min(synced)
    busy = [sum(least[row[call]] for role in held for call in problem.calls_of(role)) for held in site.held]
    steps.sort(key=lambda step: -busy[step[0]])
    smallest = {
        role: np.array([bytes_of(c.memory) for c in listed], float).min(axis=0) for role, listed in choices.items()
    }
    engine = np.array(bytes_of(engines.memory), dtype=float)
    means = least[None, :]
    indices = np.zeros((1, 0), dtype=np.int64)
    memory = np.stack([engine if i in site.generating else np.zeros(3) for i in range(len(site.places))])[None]
    for number, (i, role) in enumerate(steps):
        added = np.array([bytes_of(choice.memory) for choice in choices[role]], dtype=float)
        old, new = (grid.ravel() for grid in np.mgrid[: len(means), : len(added)])
        means, memory = means[old], memory[old]
        for at, name in enumerate(problem.calls_of(role)):
            means[:, row[name]] = np.array([choice.seconds[at].mean() for choice in choices[role]])[new]
        if role == "actor":
            means[:, row["sync_weights"]] = np.array(synced)[new]
        memory[:, i] = together(memory[:, i], added[new])
        most = memory[:, i]
        for _, later in (step for step in steps[number + 1 :] if step[0] == i):
            most = together(most, smallest[later])
        has_engine = engines.memory if i in site.generating else None
        allowed = problem.allowed(site.held[i], site.places[i], has_engine)
        kept = (most[:, 0] + most[:, 1] <= allowed) & ((means @ floor.T).max(axis=1) < threshold)
        means, memory, indices = means[kept], memory[kept], np.column_stack([indices[old], new])[kept]
    order = [steps.index((i, role)) for i, held in enumerate(site.held) for role in held]
    roles = [role for held in site.held for role in held]
    picks = [tuple(choices[role][pick[at]] for at, role in zip(order, roles, strict=True)) for pick in indices.tolist()]
    return [pick for pick, holds in zip(picks, _hosts_hold(problem, site, engines, picks), strict=True) if holds]


def _sync(problem: Problem, site: Site, engines: Engines, actor: Choice) -> Array:
    """Seconds [S] of a weight sync."""
    places = [site.places[i] for i in site.generating]
    return problem.model.sync(
        actor.layout,
        site.places[site.actor],
        engines.layout,
        places,
        same_node=site.same_node,
        shared=site.actor in site.generating,
    ).seconds


def _seconds(problem: Problem, site: Site, engines: Engines, picks: Picks) -> Array:
    """Durations [calls, n, S] of every call for each pick."""
    row = {call: i for i, call in enumerate(problem.calls)}
    seconds = np.zeros((len(row), len(picks), problem.model.scenarios))
    seconds[row["generate"]] = engines.seconds
    for call in problem.flow.calls:
        if not call.roles:
            seconds[row[call.name]] = problem.model.host(call.name).seconds
    for at, role in enumerate(role for held in site.held for role in held):
        for number, name in enumerate(problem.calls_of(role)):
            seconds[row[name]] = [pick[at].seconds[number] for pick in picks]
        if role == "actor":
            seconds[row["sync_weights"]] = [_sync(problem, site, engines, pick[at]) for pick in picks]
    return seconds


def _candidate(seconds: float, site: Site, engines: Engines, pick: tuple[Choice, ...], program: Program) -> Candidate:
    homes = [(f"p{i}", role) for i, held in enumerate(site.held) for role in held]
    trainers = {
        role: choice.layout.model_copy(update={"pools": (pool,)})
        for (pool, role), choice in zip(homes, pick, strict=True)
    }
    rollout = engines.layout.model_copy(update={"pools": tuple(f"p{i}" for i in site.generating)})
    return Candidate(seconds, site.structure, site.gpus, trainers, rollout, program)


def _hosts_hold(problem: Problem, site: Site, engines: Engines, picks: Picks) -> list[bool]:
    """Whether every node's host memory holds what the pools offload and the batches in flight, for each pick."""
    found = []
    for pick in picks:
        held = dict.fromkeys(range(len(problem.cluster.nodes)), 0.0)
        held[0] = batch_bytes(problem.workload, problem.max_staleness)
        pinned = iter(choice.memory.host for choice in pick)
        for i, gpus in enumerate(site.gpus):
            per_gpu = sum(next(pinned) for _ in site.held[i]) + engines.memory.host * (i in site.generating)
            for node, _ in gpus:
                held[node] += per_gpu
        found.append(all(held[node] <= spec.host_memory_bytes for node, spec in enumerate(problem.cluster.nodes)))
    return found
