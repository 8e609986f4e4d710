"""A placement: which GPUs each pool has, and which layouts each role may have on its pool."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from planner.predict.cost import Place
from planner.search.solver.layout_table import LayoutTable
from planner.search.solver.problem import Problem, sync_path
from planner.search.solver.rollout_table import RolloutTable
from planner.search.space.arrays import Array, Indices
from planner.search.space.placements import NodePart, PlacementFamily, pack, sharing_of


class Placement:
    """One placement of a family on the cluster's nodes, with the layouts of each role on its pool.

    An `ideal` placement is as if every pool filled nodes of its own and hosts had any memory. No
    real placement of these sizes or smaller ones is better than it."""

    def __init__(
        self, problem: Problem, family: PlacementFamily, sizes: Sequence[int], ideal: bool = False
    ) -> None:
        self.problem, self.family, self.ideal = problem, family, ideal
        self.structure, self.kinds, self.sizes = family.structure, family.kinds, tuple(sizes)
        self.generating = family.generating
        self.pool_of = {role: family.pool_of(role) for role in problem.trained_or_inferred}
        self.sharing = sharing_of(problem.flow, self.structure)
        self.packing: tuple[tuple[NodePart, ...], ...] = ()
        if not ideal:
            self.packing = pack(sizes, problem.cluster, self.kinds)
        self.places = tuple(self._place(i) for i in range(len(self.structure)))
        self.layouts = {role: self._layouts(role) for role in self.pool_of}

    def _place(self, pool: int) -> Place:
        kind = self.kinds[pool]
        if self.ideal:
            parts = _filled(self.sizes[pool], self.problem.node(kind))
        else:
            parts = tuple(part.gpus for part in self.packing[pool])
        return Place(parts=parts, device=self.problem.device(kind))

    def _layouts(self, role: str) -> LayoutTable:
        pool = self.pool_of[role]
        layouts = self.problem.layouts_at(role, self.kinds[pool], self.places[pool])
        layouts = layouts.of_ranks(self.family.ranks, self.sizes[pool])
        layouts = layouts.of_offloads(self.family.offloads.get(role))
        if role != "actor":
            return layouts
        path = sync_path(self.family)
        hand_over = self.problem.hand_over(path, same_node=self.same_node)
        layouts = layouts.of_shards(self.family.within, self.problem.node(self.kinds[pool]))
        return layouts.with_sync(self.problem.gathers(path), hand_over)

    # --- where weights are handed over ---

    @cached_property
    def same_node(self) -> bool:
        """Whether the actor's pool and all of the rollout's lie on one node."""
        if self.ideal:
            return self._could_be_on_one_node
        return len({part.node for pool in self._handing for part in self.packing[pool]}) == 1

    @property
    def _handing(self) -> set[int]:
        """The pools between which weights are handed over."""
        return {self.pool_of["actor"], *self.generating}

    @property
    def _could_be_on_one_node(self) -> bool:
        """Whether an empty node has room for the pools between which weights are handed over."""
        kinds = {self.kinds[pool] for pool in self._handing}
        if len(kinds) > 1:
            return False
        (kind,) = kinds
        return sum(self.sizes[pool] for pool in self._handing) <= self.problem.node(kind)

    @property
    def is_filled(self) -> bool:
        """Whether no smaller pools could be better, as far as nodes matter: each pool lies on whole
        nodes of its kind's largest size, with its remainder on one more; and weights are handed
        over within a node if one has room for that. (Hosts with little memory are the other reason
        why smaller pools may be better: see `Evaluation.filled`.)"""
        for kind, place in zip(self.kinds, self.places, strict=True):
            node = self.problem.node(kind)
            if any(part != node for part in place.parts[:-1]):
                return False
        return self.same_node or not self._could_be_on_one_node

    # --- what a pool holds ---

    @property
    def engine_parts(self) -> list[tuple[int, ...]]:
        """GPUs per node of the generating pools, for whole engines. An ideal pool counts as one
        node: on the largest nodes, engines may leave more GPUs over than on smaller ones."""
        if self.ideal:
            return [(self.sizes[pool],) for pool in self.generating]
        return [self.places[pool].parts for pool in self.generating]

    @property
    def rollout_rows(self) -> Indices:
        """The rows of the rollout table that may be had here. A framework that has all ranks of a
        pool compute has its engines on all GPUs of theirs."""
        table, parts = self.rollout_table, self.engine_parts
        rows = table.rows_on(parts, self.shared)
        widths = np.array(table.sizes, dtype=np.int64)[table.size[rows]]
        widest = self.family.widest_engine or max(table.sizes)
        fits = widths <= widest
        if self.family.ranks != "any":
            engines = np.zeros_like(widths)
            for part in (part for pool in parts for part in pool):
                engines += part // widths
                fits &= part % widths == 0
            fits &= table.count[rows] == np.searchsorted(table.counts, engines, "right") - 1
        return rows[fits]

    @property
    def rollout_table(self) -> RolloutTable:
        return self.problem.rollout_table(self.kinds[self.generating[0]])

    @property
    def shared(self) -> bool:
        """Whether engines share GPUs with other roles."""
        return any(self.held(pool) for pool in self.generating)

    @property
    def offloads(self) -> tuple[bool, ...]:
        """Whether engines may sleep. Those of a framework that has all ranks of a pool compute
        always do so where they share GPUs."""
        listed = self.rollout_table.offloads(self.shared)
        return listed if self.family.ranks == "any" else listed[-1:]

    def held(self, pool: int) -> list[str]:
        """The trained and inference roles of a pool."""
        return [role for role, own in self.pool_of.items() if own == pool]

    def beside(self, role: str, asleep: bool) -> LayoutTable:
        """The layouts of a role where engines sleep, or where they do not."""
        sleeps = asleep and self.pool_of[role] in self.generating
        return self._beside_sleeping[role] if sleeps else self.layouts[role]

    @cached_property
    def _beside_sleeping(self) -> dict[str, LayoutTable]:
        return {role: layouts.beside_sleeping() for role, layouts in self.layouts.items()}

    def allowed(self, pool: int) -> int:
        """Bytes of each GPU of a pool that layouts may take together."""
        roles = bool(self.held(pool))
        return self.problem.allowed(roles, pool in self.generating, self.kinds[pool])

    def engine_on(self, pool: int, engine: Array) -> Array:
        """Bytes [3] of an engine on each GPU of a pool: none if the rollout is not on it."""
        return engine if pool in self.generating else np.zeros(3)


def _filled(gpus: int, node: int) -> tuple[int, ...]:
    """GPUs per node of nodes that are filled one after the other.

    >>> _filled(20, 8)
    (8, 8, 4)
    """
    whole, rest = divmod(gpus, node)
    return (node,) * whole + ((rest,) if rest else ())
