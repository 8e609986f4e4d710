"""What the bounds of each family of placements need, as columns over all families."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from planner.search.solver.best_program import Program, cycles_of, rates
from planner.search.solver.choices import bound_rates
from planner.search.solver.problem import Problem, sync_path
from planner.search.solver.role_tables import CallSets
from planner.search.space.arrays import Array, Kinds, Mask, Pools, Sizes
from planner.search.space.placements import PlacementFamily, Structure, sharing_of


class FamilyTable(NamedTuple):
    """n families as columns, padded to P pools and R rows of rates.

    `pools` [n, P]: the number of each pool in the pool tables. `home` [n, C]: the pool, within the
    family, of the role that runs each call set. `generates` and `acts` [n, P]: whether a pool has
    the rollout, and whether it has the actor. `kind` [n]: the number of the kind of GPU that
    generates. `node` [n]: how many GPUs may hand weights over within a node of that kind, 0 if the
    actor is on another kind. `hand_over` [n, 2]: the seconds of that within a node, and between
    nodes. `rates` [n, R, C]: what no program of the family is below."""

    pools: Pools
    home: Pools
    generates: Mask
    acts: Mask
    kind: Kinds
    node: Sizes
    hand_over: Array
    rates: Array


class _Description(NamedTuple):
    """One family's entries in the columns of the same names; the same for all families with this
    structure and these kinds."""

    home: list[int]
    generates: list[bool]
    acts: list[bool]
    kind: int
    node: int
    hand_over: list[float]


def family_table(
    problem: Problem,
    families: Sequence[PlacementFamily],
    programs: Sequence[Program] | None,
    call_sets: CallSets,
    pools: Sequence[list[int]],
) -> FamilyTable:
    """Describe the families, each with any program or with only its own of `programs`. `pools` are
    the numbers of each family's pools in the pool tables."""
    most = max(len(family.structure) for family in families)
    known: dict[tuple[Structure, tuple[str, ...]], _Description] = {}
    roles = [_role_of(problem, calls) for calls in call_sets.listed]
    padded, described = [], []
    for family, numbers in zip(families, pools, strict=True):
        key = family.structure, family.kinds
        if key not in known:
            known[key] = _describe(problem, family, roles, most)
        described.append(known[key])
        padding = [0] * (most - len(numbers))
        padded.append(numbers + padding)
    return FamilyTable(
        pools=np.array(padded),
        home=np.array([family.home for family in described]),
        generates=np.array([family.generates for family in described]),
        acts=np.array([family.acts for family in described]),
        kind=np.array([family.kind for family in described]),
        node=np.array([family.node for family in described]),
        hand_over=np.array([family.hand_over for family in described]),
        rates=call_sets.rates(_rates(problem, families, programs)),
    )


def _describe(
    problem: Problem, family: PlacementFamily, roles: Sequence[str | None], most: int
) -> _Description:
    """Describe a family, with room for `most` pools; `roles` are those of the call sets."""
    path = sync_path(family)
    actor = family.pool_of("actor")
    return _Description(
        home=[family.pool_of(role) if role else 0 for role in roles],
        generates=[pool in family.generating for pool in range(most)],
        acts=[pool == actor for pool in range(most)],
        kind=list(problem.gpus).index(path.rollout),
        node=problem.node(path.rollout) if path.rollout == path.actor else 0,
        hand_over=[problem.hand_over(path, same_node=same_node) for same_node in (True, False)],
    )


def _role_of(problem: Problem, calls: tuple[str, ...]) -> str | None:
    """The role that runs the calls of a set (of a sync the one that sends); None on the host."""
    roles = problem.flow[calls[0]].roles
    return roles[0] if roles else None


def _rates(
    problem: Problem, families: Sequence[PlacementFamily], programs: Sequence[Program] | None
) -> Array:
    """Rates [families, rows, calls] that no program of a family is below, or those of its only one;
    padded with rows of zeros, which bound nothing."""
    flow = problem.flow
    of_structure: dict[Structure, Array] = {}
    listed = []
    for number, family in enumerate(families):
        structure = family.structure
        sharing = sharing_of(flow, structure)
        if programs is not None:
            listed.append(rates(cycles_of(flow, sharing, programs[number].items)))
            continue
        if structure not in of_structure:
            of_structure[structure] = bound_rates(flow, sharing, problem.max_staleness)
        listed.append(of_structure[structure])
    most = max(len(rows) for rows in listed)
    padded = np.zeros((len(listed), most, len(problem.calls)))
    for number, rows in enumerate(listed):
        padded[number, : len(rows)] = rows
    return padded
