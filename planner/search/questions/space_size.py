"""How large the space of a search is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from planner.predict.layouts import trainer_grid
from planner.search.solver.problem import Problem, problem_of
from planner.search.space.enumerate_programs import all_programs
from planner.search.space.placements import Structure, placement_count, sharing_of, structures
from planner.spec.cluster import Cluster
from planner.spec.workload import Workload

COUNTED = 1  # the greatest staleness whose programs are counted: their number grows fast


class PlacementCount(NamedTuple):
    """The structures with a number of pools, and their placements."""

    pools: int
    structures: int
    placements: int


class LayoutCount(NamedTuple):
    """The layouts of a role on all GPUs, and those that fit alone and that no other dominates."""

    role: str
    listed: int
    worth_trying: int


class ProgramCount(NamedTuple):
    """The programs of a staleness over all structures, and the most of one structure."""

    staleness: int
    programs: int
    most: int


@dataclass(frozen=True, kw_only=True)
class SpaceSize:
    """The size of a space. Programs of more staleness are `uncounted` or there are none."""

    placements: tuple[PlacementCount, ...]
    layouts: tuple[LayoutCount, ...]
    programs: tuple[ProgramCount, ...]
    uncounted: bool


def count(workload: Workload, cluster: Cluster, max_staleness: int | None = None) -> SpaceSize:
    """Count the space of `find` with these inputs. Layouts are those on GPUs of the first node's
    kind."""
    problem = problem_of(workload, cluster, (), max_staleness)
    counts = {each: placement_count(each, cluster) for each in structures(workload.roles)}
    ways = {structure: count for structure, count in counts.items() if count}
    return SpaceSize(
        placements=_placements(ways),
        layouts=tuple(_layouts(problem, role) for role in workload.roles),
        programs=tuple(
            _programs(problem, list(ways), staleness)
            for staleness in range(min(problem.max_staleness, COUNTED) + 1)
        ),
        uncounted=problem.max_staleness > COUNTED,
    )


def _placements(ways: Mapping[Structure, int]) -> tuple[PlacementCount, ...]:
    """`ways` counts the placements of each structure."""
    found = []
    for pools in sorted({len(structure) for structure in ways}):
        own = [count for structure, count in ways.items() if len(structure) == pools]
        found.append(PlacementCount(pools, len(own), sum(own)))
    return tuple(found)


def _layouts(problem: Problem, role: str) -> LayoutCount:
    kind = problem.cluster.nodes[0].device
    if role == "rollout":
        table = problem.rollout_table(kind)
        engines = len(table.slots) * len(table.offloads(shared=True))
        return LayoutCount(role, engines, engines)
    device = problem.cluster.devices[kind]
    ranks, node = problem.ranks(kind), problem.node(kind)
    listed = trainer_grid(problem.workload, role, ranks, node, device)
    return LayoutCount(role, len(listed.shard), len(problem.layouts(role, kind).memory))


def _programs(problem: Problem, listed: Sequence[Structure], staleness: int) -> ProgramCount:
    flow, counts = problem.flow, []
    for structure in listed:
        counts.append(len(all_programs(flow, sharing_of(flow, structure), staleness).items))
    return ProgramCount(staleness, sum(counts), max(counts))
