"""A split that is given: which roles share a pool of how many GPUs, and perhaps their layouts. What
is not given is searched: the other layouts, the nodes, and the program."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from pydantic import ValidationError

from planner.predict.memory import rollout_fraction
from planner.predict.memory_check import check_memory
from planner.search.questions.why_nothing_fits import what_binds_pools
from planner.search.solver.branch_and_bound import best_of_families
from planner.search.solver.evaluate import Candidate
from planner.search.solver.problem import Problem
from planner.search.space.placements import PlacementFamily, families
from planner.spec.errors import UserError
from planner.spec.files import first_problem
from planner.spec.plan import Plan, RolloutRole, TrainerRole
from planner.spec.wording import counted

LAYOUT_KEYS = ("shard", "replicas", "micro_batch_tokens", "recompute", "offload")
ENGINE_KEYS = ("tensor_parallel", "replicas", "concurrency", "memory_fraction", "offload")


class GivenPool(NamedTuple):
    """Roles that share so many GPUs."""

    roles: frozenset[str]
    gpus: int


def parse_pools(texts: Sequence[str], roles: Sequence[str]) -> tuple[GivenPool, ...]:
    """Pools such as `actor,critic=8` of a workload with these roles. Raises UserError unless each
    role is in one pool; the rollout may be in several.

    >>> parse_pools(["actor=4", "rollout=2"], ["actor", "rollout"])[1].gpus
    2
    """
    pools: list[GivenPool] = []
    for text in texts:
        match = re.fullmatch(r"\s*(\w+(?:\s*,\s*\w+)*)\s*=\s*(\d+)\s*", text)
        if match is None or not int(match[2]):
            raise UserError(f"--pool {text}: write roles and GPUs, such as actor,critic=8")
        named = frozenset(re.findall(r"\w+", match[1]))
        if "all" in named:
            named = frozenset(roles)
        if unknown := sorted(named - set(roles)):
            has = ", ".join(roles)
            raise UserError(f"--pool {text}: the workload has no role {unknown[0]!r}; it has {has}")
        pools.append(GivenPool(named, int(match[2])))
    _check_homes(pools, roles)
    return tuple(pools)


def _check_homes(pools: Sequence[GivenPool], roles: Sequence[str]) -> None:
    for role in roles:
        homes = sum(role in pool.roles for pool in pools)
        if not homes:
            raise UserError(
                f"{role} is in no pool; add it to one, such as --pool {role}=8, or to another pool"
            )
        if homes > 1 and role != "rollout":
            raise UserError(f"{role} is in {homes} pools; only the rollout may be in several")
    alone = [pool for pool in pools if pool.roles == {"rollout"}]
    if len(alone) > 1:
        total = sum(pool.gpus for pool in alone)
        raise UserError(f"the rollout has {len(alone)} pools of its own; make it rollout={total}")


def best_in(pools: Sequence[GivenPool], problem: Problem) -> Candidate:
    """The best layouts and program of these pools. Raises UserError where nothing fits."""
    wanted, there = sum(pool.gpus for pool in pools), len(problem.cluster.gpus)
    if wanted > there:
        raise UserError(f"the pools have {wanted} GPUs together, and the cluster has {there}")
    given = {number: pool.gpus for number, pool in enumerate(pools)}
    several_nodes = len(problem.cluster.nodes) > 1
    listed = []
    for family in families(tuple(pool.roles for pool in pools), problem.cluster):
        for within in (True, False) if several_nodes else (None,):
            if _has_room(family, given):
                listed.append(family._replace(given=given, within=within))
    if not listed:
        raise UserError("no kind of GPU of the cluster has enough of them for these pools")
    found = best_of_families(problem, listed, 1)
    if found.ended:
        raise KeyboardInterrupt
    if not found.best:
        raise UserError(f"{what_binds_pools(problem, listed[0])}; give more GPUs to that pool")
    return found.best[0]


def _has_room(family: PlacementFamily, given: dict[int, int]) -> bool:
    return all(sum(given[pool] for pool in pools) <= most for pools, most in family.limits)


def with_layouts(plan: Plan, texts: Sequence[str]) -> Plan:
    """The plan with other values for keys of layouts, such as `actor.shard=4`. What follows from
    them is changed too: replicas fill the pool, and an engine gets the memory that its slots need.
    Raises UserError, also where the plan does not fit any more."""
    given: dict[str, dict[str, str]] = {}
    for text in texts:
        match = re.fullmatch(r"\s*(\w+)\.(\w+)\s*=\s*([\w.]+)\s*", text)
        if match is None:
            raise UserError(f"--layout {text}: write ROLE.KEY=VALUE, such as actor.shard=4")
        role, key, value = match.groups()
        if role not in plan.roles:
            has = ", ".join(plan.roles)
            raise UserError(f"--layout {text}: the workload has no role {role!r}; it has {has}")
        known = ENGINE_KEYS if role == "rollout" else LAYOUT_KEYS
        if key not in known:
            raise UserError(f"--layout {text}: a layout of {role} has {', '.join(known)}")
        given.setdefault(role, {})[key] = value
    if not given:
        return plan
    roles = dict(plan.roles)
    for role, values in given.items():
        roles[role] = _changed(plan, role, values)
    try:
        plan = plan.changed(roles=roles, predicted=None)
    except ValidationError as error:
        raise UserError(f"--layout: {first_problem(error, {})}") from None
    check_memory(plan, saves=False)
    return plan


def _changed(plan: Plan, role: str, values: dict[str, str]) -> TrainerRole | RolloutRole:
    """A role's layout with these values, and with what follows from them."""
    layout = plan.roles[role]
    data = {**layout.model_dump(), **values}
    gpus = plan.gpus_of(layout.pools)
    split = "tensor_parallel" if isinstance(layout, RolloutRole) else "shard"
    size = values.get(split, "")
    if size.isdigit() and int(size) > gpus:
        raise UserError(f"--layout {role}.{split}={size}: {role} has {counted(gpus, 'GPU')}")
    if size.isdigit() and int(size) and "replicas" not in values:
        data["replicas"] = gpus // int(size)
    try:
        found = type(layout).model_validate(data)
    except ValidationError as error:
        raise UserError(f"--layout {role}: {first_problem(error, data)}") from None
    if isinstance(found, RolloutRole) and "memory_fraction" not in values:
        device, slots = plan.device_of(found.pools[0]), found.concurrency
        needed = rollout_fraction(plan.workload, found.tensor_parallel, slots, device)
        found = found.changed(memory_fraction=min(1.0, needed))
    return found
