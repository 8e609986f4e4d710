"""How large the space of a search is."""

from dataclasses import dataclass

from planner.predict.cost import Place
from planner.predict.layouts import trainer_grid
from planner.search.solver.problem import problem_of
from planner.search.space.enumerate_programs import all_programs
from planner.search.space.placements import placement_count, sharing_of, structures
from planner.spec.cluster import Cluster
from planner.spec.workload import Workload

COUNTED = (
    1  # the greatest staleness whose programs are listed to be counted: there are ever more of them
)


@dataclass(frozen=True, kw_only=True)
class Space:
    """`placements`: pools, structures, placements. `layouts`: role, listed on all GPUs, and those
    that fit alone and that no other dominates. `programs`: staleness, all, and the most of one
    structure; more is `uncounted` or not."""

    placements: tuple[tuple[int, int, int], ...]
    layouts: tuple[tuple[str, int, int], ...]
    programs: tuple[tuple[int, int, int], ...]
    uncounted: bool


def count(workload: Workload, cluster: Cluster, max_staleness: int | None = None) -> Space:
    """Count the space of `find` with these inputs. Layouts are those on GPUs of the first node's
    kind."""
    problem = problem_of(workload, cluster, (), max_staleness)
    listed, gpus = structures(workload.roles), len(cluster.gpus)
    ways = {s: placement_count(s, cluster) for s in listed}
    possible = [s for s in listed if ways[s]]
    kind = cluster.nodes[0].device
    place = Place(parts=(gpus,), device=cluster.devices[kind])
    layouts = []
    for role in workload.roles:
        if role == "rollout":
            table = problem.rollout_table(kind)
            engines = len(table.slots) * len(table.offloads(shared=True))
            layouts.append((role, engines, engines))
        else:
            every = trainer_grid(
                workload, role, problem.ranks(kind), problem.node(kind), place.device
            )
            layouts.append((role, len(every.shard), len(problem.layouts(role, kind).memory)))
    programs = []
    for k in range(min(problem.max_staleness, COUNTED) + 1):
        counts = [
            len(all_programs(problem.flow, sharing_of(problem.flow, s), k).items) for s in possible
        ]
        programs.append((k, sum(counts), max(counts)))
    return Space(
        placements=tuple(
            (n, sum(len(s) == n for s in possible), sum(ways[s] for s in possible if len(s) == n))
            for n in sorted({len(s) for s in possible})
        ),
        layouts=tuple(layouts),
        programs=tuple(programs),
        uncounted=problem.max_staleness > COUNTED,
    )
