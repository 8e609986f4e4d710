"""A placement: which GPUs each pool has, and the layouts of each role on its pool."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from planner.predict.cost import Place
from planner.search.solver.problem import Array, Problem
from planner.search.solver.rollout_table import RolloutTable
from planner.search.space.placements import NodePart, PlacementFamily, pack, sharing_of


class Placement:
    """A placement on real nodes, with the layouts of each role on its pool; or an `ideal` one, as
    if every pool filled nodes of its own and hosts had any memory, which no placement of these
    sizes or smaller ones is better than."""

    def __init__(
        self, problem: Problem, family: PlacementFamily, counts: Sequence[int], ideal: bool = False
    ) -> None:
        self.problem, self.structure, self.kinds = problem, family.structure, family.kinds
        self.counts, self.ideal = tuple(counts), ideal
        self.packing: tuple[tuple[NodePart, ...], ...] = ()
        if ideal:
            parts = [
                _filled(count, problem.node(kind))
                for count, kind in zip(counts, self.kinds, strict=True)
            ]
        else:
            self.packing = pack(counts, problem.cluster, family.kinds)
            parts = [tuple(count for _, _, count in pool) for pool in self.packing]
        self.places = tuple(
            Place(parts=found, device=problem.device(kind))
            for found, kind in zip(parts, self.kinds, strict=True)
        )
        roles = [role for role in problem.workload.roles if role != "rollout"]
        self.pool_of = {
            role: next(i for i, pool in enumerate(self.structure) if role in pool) for role in roles
        }
        self.generating = family.generating
        self.layouts = {
            role: problem.layouts_at(role, self.kinds[i], self.places[i])
            for role, i in self.pool_of.items()
        }
        node = problem.node(self.kinds[self.pool_of["actor"]])
        gathers, handed = (
            problem.gathers(family),
            problem.hand_over(family, same_node=self.same_node),
        )
        self.layouts["actor"] = (
            self.layouts["actor"].of_shards(family.within, node).with_sync(gathers, handed)
        )
        self.sharing = sharing_of(problem.flow, self.structure)
        self.hosts_bind = (
            False  # whether hosts have too little memory for layouts that may be the best
        )

    @cached_property
    def same_node(self) -> bool:
        """Whether weights are handed over within a node."""
        if self.ideal:
            return self._fits_a_node
        return len({node for i in self._handing for node, *_ in self.packing[i]}) == 1

    @property
    def _handing(self) -> set[int]:
        """The pools between which weights are handed over."""
        return {self.pool_of["actor"], *self.generating}

    @property
    def _fits_a_node(self) -> bool:
        """Whether a node has room for these pools, if nothing else is on it."""
        kinds = {self.kinds[i] for i in self._handing}
        return len(kinds) == 1 and sum(self.counts[i] for i in self._handing) <= self.problem.node(
            *kinds
        )

    @property
    def engine_parts(self) -> list[tuple[int, ...]]:
        """GPUs per node of the generating pools, for whole engines; an ideal pool lies on one node,
        since the largest need not be the one of which engines leave the fewest GPUs over."""
        return [(self.counts[i],) if self.ideal else self.places[i].parts for i in self.generating]

    @property
    def engines(self) -> RolloutTable:
        return self.problem.rollout_table(self.kinds[self.generating[0]])

    @property
    def shared(self) -> bool:
        """Whether engines share GPUs with other roles."""
        return any(self.held(i) for i in self.generating)

    @property
    def filled(self) -> bool:
        """Whether no smaller pools could be better: each lies on whole nodes of its kind's largest
        size, and what is left of it on one; weights are handed over within a node if one has room
        for that; and hosts do not bind, as far as layouts have been looked at."""
        nodes = [self.problem.node(kind) for kind in self.kinds]
        whole = all(
            part == node
            for place, node in zip(self.places, nodes, strict=True)
            for part in place.parts[:-1]
        )
        return whole and (self.same_node or not self._fits_a_node) and not self.hosts_bind

    def held(self, pool: int) -> list[str]:
        """The trained and inference roles of a pool."""
        return [role for role, i in self.pool_of.items() if i == pool]

    def allowed(self, pool: int) -> int:
        return self.problem.allowed(
            bool(self.held(pool)), pool in self.generating, self.kinds[pool]
        )

    def engine(self, pool: int, engine: Array) -> Array:
        """Bytes [3] of the engine on a GPU of a pool."""
        return engine if pool in self.generating else np.zeros(3)


def _filled(gpus: int, node: int) -> tuple[int, ...]:
    """GPUs per node of nodes that are filled one after the other."""
    return (node,) * (gpus // node) + ((gpus % node,) if gpus % node else ())
