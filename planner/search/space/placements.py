"""The space of placements: which roles share a pool, on which kind of GPU it lies, how many GPUs it
has and on which nodes."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from math import comb, prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.spec.cluster import Cluster
from planner.spec.dataflow import Dataflow
from planner.spec.plan import Gpu

Sharing = tuple[tuple[str, tuple[str, ...]], ...]  # call -> names of the pools that it occupies
Structure = tuple[frozenset[str], ...]  # the roles of each pool; the rollout may be on several


def structures(roles: Sequence[str]) -> tuple[Structure, ...]:
    """Every set partition of the trained and inference roles into pools, with the rollout on any
    non-empty union of those pools and at most one pool of its own. Fewest pools first, in a fixed
    order."""
    placed = [role for role in roles if role != "rollout"]
    found = [structure for pools in _partitions(placed) for structure in _with_rollout(pools)]
    return tuple(
        sorted(
            found,
            key=lambda s: (len(s), sum("rollout" in pool for pool in s), [sorted(p) for p in s]),
        )
    )


def _partitions(roles: Sequence[str]) -> Iterator[tuple[frozenset[str], ...]]:
    if not roles:
        yield ()
        return
    first, rest = roles[0], roles[1:]
    for pools in _partitions(rest):
        yield (frozenset({first}), *pools)
        for i, pool in enumerate(pools):
            yield (*pools[:i], pool | {first}, *pools[i + 1 :])


def _with_rollout(pools: tuple[frozenset[str], ...]) -> Iterator[Structure]:
    for own in (False, True):
        for count in range(0 if own else 1, len(pools) + 1):
            for chosen in combinations(range(len(pools)), count):
                shared = tuple(
                    pool | {"rollout"} if i in chosen else pool for i, pool in enumerate(pools)
                )
                yield (*shared, frozenset({"rollout"})) if own else shared


class PlacementFamily(NamedTuple):
    """All placements of a structure whose pools have given `kinds` of GPU and whose sizes meet some
    limits.

    `limits`: some pools (their indices) have together no more GPUs than a number. `given`: pools
    that have exactly a number of GPUs. `rollout`: the number of GPUs that the rollout's pools have
    together, if it is not None. `within`: whether the actor's shards lie within a node (None:
    either way); a weight sync is quick if they do, an update often if they do not."""

    structure: Structure
    kinds: tuple[str, ...]
    limits: tuple[tuple[tuple[int, ...], int], ...]
    given: Mapping[int, int] = {}
    rollout: int | None = None
    within: bool | None = None

    @property
    def generating(self) -> tuple[int, ...]:
        """The pools of the rollout."""
        return tuple(i for i, roles in enumerate(self.structure) if "rollout" in roles)

    def pool_of(self, role: str) -> int:
        """The first pool of a role; the only one of a role that trains or infers."""
        return next(i for i, roles in enumerate(self.structure) if role in roles)


def families(structure: Structure, cluster: Cluster) -> Iterator[PlacementFamily]:
    """A structure on every choice of kinds that the cluster has enough GPUs for, one for each pool.
    A pool is of one kind, and so are all pools of the rollout: its engines are alike."""
    there = gpus_of_kinds(cluster)
    for kinds in product(there, repeat=len(structure)):
        limits = tuple(
            (tuple(i for i, own in enumerate(kinds) if own == kind), there[kind]) for kind in there
        )
        generates = {
            kind for kind, roles in zip(kinds, structure, strict=True) if "rollout" in roles
        }
        if len(generates) == 1 and all(len(pools) <= most for pools, most in limits):
            yield PlacementFamily(structure, kinds, tuple(limit for limit in limits if limit[0]))


def placement_count(structure: Structure, cluster: Cluster) -> int:
    """How many placements a structure has: n pools of one kind have any sizes that add up to no
    more than there is."""
    return sum(
        prod(comb(most, len(pools)) for pools, most in a.limits)
        for a in families(structure, cluster)
    )


def gpus_of_kinds(cluster: Cluster) -> dict[str, int]:
    """How many GPUs of each kind there are, in the order of the nodes."""
    there: Counter[str] = Counter()
    for node in cluster.nodes:
        there[node.device] += node.gpus
    return dict(there)


def sizes(gpus: int, pools: int) -> NDArray[np.int64]:
    """All ways [n, pools] to give every pool at least one GPU and use each GPU of the cluster."""
    if gpus < pools:
        return np.empty((0, pools), dtype=np.int64)
    chosen = list(combinations(range(1, gpus), pools - 1))
    cuts = np.array(chosen, dtype=np.int64).reshape(len(chosen), pools - 1)
    edges = np.concatenate(
        [np.zeros((len(cuts), 1), np.int64), cuts, np.full((len(cuts), 1), gpus)], axis=1
    )
    return np.diff(edges, axis=1)


class NodePart(NamedTuple):
    """A pool's GPUs on one node: `gpus` of them, from index `first` on."""

    node: int
    first: int
    gpus: int


def pack(
    counts: Sequence[int], cluster: Cluster, kinds: Sequence[str] = ()
) -> tuple[tuple[NodePart, ...], ...]:
    """Pack pools of these sizes onto the nodes of their kinds (any nodes if no kinds are given).

    Larger pools come first. A pool goes to the fullest node that holds it whole; a pool that fits
    no node takes the emptiest nodes one after the other, and what is left of it goes again to the
    fullest node that holds that. The result is the same every time. A pool's parts come in the
    order of its ranks: the node with most of its GPUs first.

    >>> cluster = make_cluster(16)  # two nodes of 8
    >>> [[part.gpus for part in pool] for pool in pack((4, 12), cluster)]
    [[4], [8, 4]]
    """
    used = [0] * len(cluster.nodes)
    packed: dict[int, tuple[NodePart, ...]] = {}
    largest_first = sorted(range(len(counts)), key=lambda pool: (-counts[pool], pool))
    for pool in largest_first:
        kind = kinds[pool] if kinds else None
        parts = _parts_of(counts[pool], _free(cluster, used, kind), used)
        packed[pool] = tuple(sorted(parts, key=lambda part: (-part.gpus, part.node)))
    return tuple(packed[pool] for pool in range(len(counts)))


def _free(cluster: Cluster, used: Sequence[int], kind: str | None) -> list[tuple[int, int]]:
    """Free GPUs and number of each node of a kind, the emptiest node first."""
    free = []
    for node, spec in enumerate(cluster.nodes):
        if kind is None or spec.device == kind:
            free.append((spec.gpus - used[node], node))
    return sorted(free, key=lambda entry: (-entry[0], entry[1]))


def _parts_of(wanted: int, free: Sequence[tuple[int, int]], used: list[int]) -> list[NodePart]:
    """Take `wanted` GPUs from the `free` ones, and count them as `used`."""
    parts = []
    for at, (most, node) in enumerate(free):
        if not wanted:
            break
        assert most, "more GPUs asked for than the cluster has"
        if most >= wanted:  # the rest fits one node: the fullest that holds it
            node = min(entry for entry in free[at:] if entry[0] >= wanted)[1]
        count = min(wanted, most)
        parts.append(NodePart(node, used[node], count))
        used[node] += count
        wanted -= count
    assert not wanted, "more GPUs asked for than the cluster has"
    return parts


def gpus_of(parts: Sequence[NodePart]) -> tuple[Gpu, ...]:
    """The GPUs of a pool, in the order of its ranks."""
    return tuple((part.node, part.first + i) for part in parts for i in range(part.gpus))


def sharing_of(flow: Dataflow, structure: Sequence[frozenset[str]]) -> Sharing:
    """Which pools (p0, p1, ...) each call occupies if the pools have these roles."""
    return tuple(
        (call.name, tuple(f"p{i}" for i, roles in enumerate(structure) if roles & set(call.roles)))
        for call in flow.calls
    )
