"""The ladder: the way from a baseline to a plan, one decision at a time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from planner.predict.cost import CostModel
from planner.predict.cycle import plan_cycles
from planner.predict.objective import Objective
from planner.search.questions.baselines import best_of
from planner.search.solver.best_program import SAME
from planner.search.solver.evaluate import Candidate, evaluate_structure
from planner.search.solver.problem import Problem
from planner.search.solver.write_plan import assemble
from planner.search.space.placements import Structure, structures
from planner.spec.errors import UserError
from planner.spec.plan import Issue, Plan, Wait
from planner.spec.workload import ROLES

Entry = TypeVar("Entry")

STREAMED = "let weights arrive in flight"
STARTS = ("split", "colocated")  # the first of them that fits


class Rung(NamedTuple):
    """A decision in words, the plan after it, and the plan's mean step time in seconds."""

    what: str
    plan: Plan
    seconds: float


class State(NamedTuple):
    """A placement and the staleness that its program may have."""

    structure: Structure
    counts: tuple[int, ...]
    staleness: int


def seconds_of(plan: Plan, model: CostModel) -> NDArray[np.float64]:
    """Durations [calls, S] of a plan's calls in the steady state."""
    drawn = [model.call(call, plan).seconds for call in plan.dataflow.steady.calls]
    return np.stack([np.broadcast_to(seconds, (model.scenarios,)) for seconds in drawn])


def step_of(plan: Plan, model: CostModel) -> float:
    """A plan's mean step time in seconds, as `forecast.predict` has it."""
    if plan.streams:
        return float(model.streamed(plan).steps.mean())
    periods = plan_cycles(plan).periods(seconds_of(plan, model))
    return float(Objective("mean", model.least_period).of(periods))


def ladder(plan: Plan, problem: Problem) -> tuple[Rung, ...]:
    """Rungs from a baseline to `plan`, which is the last; only that one if no baseline fits.

    First the baseline's waits go; then its calls are ordered and its layouts chosen again. From
    there on each rung is one move of a role, one pool merged or split off, one more step of
    staleness, or the plan's pool sizes: each time the decision that leads to the shortest step, of
    those that lead towards the plan. A move keeps the pools' sizes; a merged pool has both, a new
    one the plan's or else half of where it comes from. Every rung has the best layouts and order of
    its calls. Weights in flight, where generation streams, are the last decision."""
    what = STREAMED if plan.streams else "the plan's own layouts and order"
    own = Rung(what, plan, step_of(plan, problem.model))
    known = {_key(structure) for structure in structures(problem.workload.roles)}
    target = _state_of(plan)
    strict = replace(problem, max_staleness=0)
    rungs = list(_without_waits(strict))
    if not rungs or _key(target.structure) not in known:
        return (own,)
    state = _aligned(_state_of(rungs[-1].plan), target)
    rungs += _improved("order the calls and choose the layouts anew", state, strict)
    left = distances(problem.workload.roles, target.structure)
    while state != target:
        step = _next_rung(problem, state, target, left)
        if step is None:  # what lies between does not fit
            break
        rung, state = step
        rungs.append(rung)
    if state != target:
        return (*rungs, own._replace(what="move the roles to the plan's pools"))
    if not plan.streams and abs(rungs[-1].seconds - own.seconds) <= SAME * own.seconds:
        return (*rungs[:-1], own._replace(what=rungs[-1].what))
    return (*rungs, own)


def _next_rung(
    problem: Problem, state: State, target: State, left: dict[object, int]
) -> tuple[Rung, State] | None:
    """The decision towards the target that leads to the shortest step, and where it leads; None if
    nothing that could be decided fits."""
    found: list[tuple[str, State, Candidate]] = []
    for what, after in _decisions(state, target, left):
        allowed = replace(problem, max_staleness=after.staleness)
        candidate = evaluate_structure(allowed, after.structure, after.counts)
        if candidate is not None:
            found.append((what, after, candidate))
    if not found:
        return None
    what, after, candidate = min(found, key=lambda option: option[2].seconds)
    return _rung(what, candidate, replace(problem, max_staleness=after.staleness)), after


def _without_waits(problem: Problem) -> Iterator[Rung]:
    """The baseline, and the baseline without its waits."""
    for name in STARTS:
        try:
            candidate = best_of(name, problem)
        except UserError:
            continue
        plan = assemble(candidate, name, problem)
        yield Rung(name, plan, candidate.seconds)
        issues = [item for item in plan.program if isinstance(item, Issue)]
        free = tuple(issue.changed(blocking=False) for issue in issues)
        plan = plan.changed(name="rung", program=free)
        yield Rung("drop the waits", plan, step_of(plan, problem.model))
        return


def waits_of(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Each wait of a plan in words, and the plan without it."""
    for at, item in enumerate(plan.program):
        before, after = plan.program[:at], plan.program[at + 1 :]
        if isinstance(item, Wait):
            yield f"wait for {', '.join(item.wait)}", plan.changed(program=(*before, *after))
        elif item.blocking:
            free = item.changed(blocking=False)
            yield f"wait for {item.call}", plan.changed(program=(*before, free, *after))


def _rung(what: str, candidate: Candidate, problem: Problem) -> Rung:
    return Rung(what, assemble(candidate, "rung", problem), candidate.seconds)


def _improved(what: str, state: State, problem: Problem) -> list[Rung]:
    candidate = evaluate_structure(problem, state.structure, state.counts)
    return [_rung(what, candidate, problem)] if candidate else []


def pools_of(plan: Plan) -> tuple[Structure, tuple[int, ...]]:
    """The roles and the number of GPUs of each pool of a plan that has roles."""
    found = [
        (
            frozenset(role for role, layout in plan.roles.items() if pool in layout.pools),
            len(plan.pools[pool].gpus),
        )
        for pool in plan.pools
    ]
    kept = [(roles, count) for roles, count in found if roles]
    return tuple(roles for roles, _ in kept), tuple(count for _, count in kept)


def _state_of(plan: Plan) -> State:
    return State(*pools_of(plan), plan.staleness)


def _aligned(state: State, target: State) -> State:
    """The state with its pools in the target's order, if they are the same pools."""
    if _key(state.structure) != _key(target.structure):
        return state
    counts = dict(zip(state.structure, state.counts, strict=True))
    return State(
        target.structure, tuple(counts[roles] for roles in target.structure), state.staleness
    )


def _decisions(state: State, target: State, left: dict[object, int]) -> Iterator[tuple[str, State]]:
    """What could be decided next, and where that leads. `left` counts the moves from a structure to
    the plan's."""
    if state.staleness < target.staleness:
        yield "allow one step of staleness", state._replace(staleness=state.staleness + 1)
    here = left[_key(state.structure)]
    wanted = dict(zip(target.structure, target.counts, strict=True))
    for what, structure, counts in moves(state.structure, state.counts, wanted):
        if left.get(_key(structure), here) == here - 1:
            yield what, _aligned(State(structure, counts, state.staleness), target)
    if here == 0 and state.counts != target.counts:
        yield f"resize the pools to {_sized(target)}", target._replace(staleness=state.staleness)


def _sized(state: State) -> str:
    pools = zip(state.structure, state.counts, strict=True)
    return ", ".join(f"{count} ({_name(roles)})" for roles, count in pools)


def _name(roles: frozenset[str]) -> str:
    return "+".join(role for role in ROLES if role in roles)


def _key(structure: Structure) -> object:
    return frozenset(structure)


def distances(roles: Sequence[str], target: Structure) -> dict[object, int]:
    """The fewest moves from each structure to the target's."""
    graph = nx.DiGraph()
    for structure in structures(roles):
        for _, after, _ in moves(structure, (8,) * len(structure), {}):
            graph.add_edge(_key(structure), _key(after))
    graph.add_node(_key(target))
    return dict(nx.single_target_shortest_path_length(graph, _key(target)))


def moves(
    structure: Structure, counts: tuple[int, ...], wanted: Mapping[frozenset[str], int]
) -> Iterator[tuple[str, Structure, tuple[int, ...]]]:
    """Every structure that is one move away, in words and with its pool sizes; `wanted` are sizes
    of new pools. The rollout has at most one pool of its own; a pool that would lose its last role
    is merged instead."""
    for what, after, sizes in _moves(structure, counts, wanted):
        if len(set(after)) == len(after):
            yield what, after, sizes


def _moves(
    structure: Structure, counts: tuple[int, ...], wanted: Mapping[frozenset[str], int]
) -> Iterator[tuple[str, Structure, tuple[int, ...]]]:
    for i, pool in enumerate(structure):
        for role in sorted(pool, key=ROLES.index):
            rest = pool - {role}
            if not rest:
                continue
            if counts[i] > 1:
                new = min(wanted.get(frozenset({role}), counts[i] // 2), counts[i] - 1)
                made = (*_set(structure, i, rest), frozenset({role}))
                yield (
                    f"give the {role} a pool of its own",
                    made,
                    (*_set(counts, i, counts[i] - new), new),
                )
            for j, other in enumerate(structure):
                if role not in other:
                    to = _set(_set(structure, i, rest), j, other | {role})
                    yield f"move the {role} to the pool of {_name(other)}", to, counts
            if role == "rollout" and sum("rollout" in each for each in structure) > 1:
                yield (
                    f"generate no longer on the pool of {_name(rest)}",
                    _set(structure, i, rest),
                    counts,
                )
        if "rollout" not in pool:
            yield (
                f"generate on the pool of {_name(pool)} too",
                _set(structure, i, pool | {"rollout"}),
                counts,
            )
        for j in range(i + 1, len(structure)):
            merged = _set(structure, i, pool | structure[j])
            sizes = _set(counts, i, counts[i] + counts[j])
            what = f"merge the pools of {_name(pool)} and {_name(structure[j])}"
            yield what, merged[:j] + merged[j + 1 :], sizes[:j] + sizes[j + 1 :]


def _set(values: tuple[Entry, ...], at: int, value: Entry) -> tuple[Entry, ...]:
    return (*values[:at], value, *values[at + 1 :])
