"""The space of placements: which roles share a pool, on which kind of GPU it lies, how many GPUs it
has and on which nodes."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from math import comb, prod
from typing import Literal, NamedTuple

import numpy as np

from planner.search.space.arrays import Sizes
from planner.spec.cluster import Cluster
from planner.spec.dataflow import Dataflow
from planner.spec.plan import Gpu, Offload

Sharing = tuple[tuple[str, tuple[str, ...]], ...]  # call -> names of the pools that it occupies
Ranks = Literal["any", "all", "one group"]
Structure = tuple[frozenset[str], ...]  # the roles of each pool; the rollout may be on several


def structures(roles: Sequence[str]) -> tuple[Structure, ...]:
    """Every set partition of the trained and inference roles into pools, with the rollout on any
    non-empty union of those pools and at most one pool of its own. Fewest pools first, in a fixed
    order."""
    others = [role for role in roles if role != "rollout"]
    found = [structure for pools in _partitions(others) for structure in _with_rollout(pools)]
    return tuple(sorted(found, key=_order))


def _order(structure: Structure) -> tuple[int, int, list[list[str]]]:
    """Fewer pools first, then fewer pools of the rollout, then by name."""
    of_rollout = sum("rollout" in pool for pool in structure)
    return len(structure), of_rollout, [sorted(pool) for pool in structure]


def _partitions(roles: Sequence[str]) -> Iterator[Structure]:
    """Every set partition: the first role alone or in any pool of a partition of the others."""
    if not roles:
        yield ()
        return
    first, rest = roles[0], roles[1:]
    for pools in _partitions(rest):
        yield (frozenset({first}), *pools)
        for i, pool in enumerate(pools):
            yield (*pools[:i], pool | {first}, *pools[i + 1 :])


def _with_rollout(pools: Structure) -> Iterator[Structure]:
    """The pools with the rollout on any of them: on one at least, or also on a pool of its own."""
    rollout = frozenset({"rollout"})
    for own in ((), (rollout,)):
        for count in range(0 if own else 1, len(pools) + 1):
            for chosen in combinations(range(len(pools)), count):
                shared = [pool | rollout if i in chosen else pool for i, pool in enumerate(pools)]
                yield (*shared, *own)


class PlacementFamily(NamedTuple):
    """All placements of a structure whose pools have given `kinds` of GPU and whose sizes meet some
    limits.

    `limits`: some pools (their indices) have together no more GPUs than a number. `given`: pools
    that have exactly a number of GPUs. `rollout`: the number of GPUs that the rollout's pools have
    together, if it is not None. `within`: whether the actor's shards lie within a node (None:
    either way); a weight sync is quick if they do, an update often if they do not. `ranks`: whether
    a trained or inference role may compute on some GPUs of its pool, has to on all of them, or has
    to with its model in one shard group. `offloads`: of roles that are not free in it, what may go
    to the host while they idle. `widest_engine`: the most GPUs of an engine."""

    structure: Structure
    kinds: tuple[str, ...]
    limits: tuple[tuple[tuple[int, ...], int], ...]
    given: Mapping[int, int] = {}
    rollout: int | None = None
    within: bool | None = None
    ranks: Ranks = "any"
    offloads: Mapping[str, Sequence[Offload]] = {}
    widest_engine: int | None = None

    @property
    def generating(self) -> tuple[int, ...]:
        """The pools of the rollout."""
        return tuple(i for i, roles in enumerate(self.structure) if "rollout" in roles)

    def pool_of(self, role: str) -> int:
        """The first pool of a role; the only one of a role that trains or infers."""
        return next(i for i, roles in enumerate(self.structure) if role in roles)


def families(structure: Structure, cluster: Cluster) -> Iterator[PlacementFamily]:
    """The families of a structure: one for each choice of a kind of GPU for each pool that the
    cluster has enough GPUs for. All pools of the rollout are of one kind, since its engines are
    alike."""
    gpus = gpus_of_kinds(cluster)
    for kinds in product(gpus, repeat=len(structure)):
        limits = []
        for kind in gpus:
            pools = tuple(pool for pool, own in enumerate(kinds) if own == kind)
            if pools:
                limits.append((pools, gpus[kind]))
        family = PlacementFamily(structure, kinds, tuple(limits))
        of_rollout = {kinds[pool] for pool in family.generating}
        if len(of_rollout) == 1 and all(len(pools) <= most for pools, most in limits):
            yield family


def placement_count(structure: Structure, cluster: Cluster) -> int:
    """How many placements a structure has: n pools of one kind have any sizes that add up to no
    more than there is."""
    count = 0
    for family in families(structure, cluster):
        count += prod(comb(most, len(pools)) for pools, most in family.limits)
    return count


def gpus_of_kinds(cluster: Cluster) -> dict[str, int]:
    """How many GPUs of each kind there are, in the order of the nodes."""
    gpus: Counter[str] = Counter()
    for node in cluster.nodes:
        gpus[node.device] += node.gpus
    return dict(gpus)


def sizes(gpus: int, pools: int) -> Sizes:
    """All ways [n, pools] to give every pool at least one GPU and use each of `gpus` GPUs.

    >>> sizes(4, 2).tolist()
    [[1, 3], [2, 2], [3, 1]]
    """
    if gpus < pools:
        return np.empty((0, pools), dtype=np.int64)
    # The GPUs in a row are divided at pools - 1 places between them.
    divided = np.array(list(combinations(range(1, gpus), pools - 1)), dtype=np.int64)
    divided = divided.reshape(-1, pools - 1) if pools > 1 else np.empty((1, 0), dtype=np.int64)
    return np.diff(divided, axis=1, prepend=0, append=gpus)


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

    >>> from planner.spec.cluster import make_cluster
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
