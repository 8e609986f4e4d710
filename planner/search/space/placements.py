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


class Arrangement(NamedTuple):
    """A structure with the kind of GPU of each pool, and what its sizes must meet: some pools have
    no more GPUs together than `limits` says, those in `given` have exactly so many, and the
    rollout's together `rollout` if that is not None. The actor's shards lie `within` a node or not
    (None: either), which a weight sync and an update ask for opposite reasons."""

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


def arrangements(structure: Structure, cluster: Cluster) -> Iterator[Arrangement]:
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
            yield Arrangement(structure, kinds, tuple(limit for limit in limits if limit[0]))


def placements(structure: Structure, cluster: Cluster) -> int:
    """How many placements a structure has: n pools of one kind have any sizes that add up to no
    more than there is."""
    return sum(
        prod(comb(most, len(pools)) for pools, most in a.limits)
        for a in arrangements(structure, cluster)
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


Part = tuple[int, int, int]  # of a pool on a node: the node, its first GPU and how many they are


def spread(
    counts: Sequence[int], cluster: Cluster, kinds: Sequence[str] = ()
) -> tuple[tuple[Part, ...], ...]:
    """What each pool has on which node, in the order of its ranks: the node with most of its GPUs
    first.

    Packed onto the nodes of its kind (any kind if none are given) canonically: larger pools first,
    each on the fullest node that holds it whole, else on the emptiest nodes one after the other,
    and what is left again on the fullest node that holds it. Deterministic."""
    used = [0] * len(cluster.nodes)
    placed: dict[int, tuple[Part, ...]] = {}
    for pool in sorted(range(len(counts)), key=lambda i: (-counts[i], i)):
        nodes = [
            n for n, spec in enumerate(cluster.nodes) if not kinds or spec.device == kinds[pool]
        ]
        free = sorted(
            ((cluster.nodes[n].gpus - used[n], n) for n in nodes),
            key=lambda node: (-node[0], node[1]),
        )
        parts: list[Part] = []
        wanted, at = counts[pool], 0
        while wanted:
            most, node = free[at]
            assert most, "more GPUs asked for than the cluster has"
            if most >= wanted:
                node = min((there, n) for there, n in free[at:] if there >= wanted)[1]
            count = min(wanted, most)
            parts.append((node, used[node], count))
            used[node], wanted, at = used[node] + count, wanted - count, at + 1
        placed[pool] = tuple(sorted(parts, key=lambda part: (-part[2], part[0])))
    return tuple(placed[pool] for pool in range(len(counts)))


def pack(
    counts: Sequence[int], cluster: Cluster, kinds: Sequence[str] = ()
) -> tuple[tuple[Gpu, ...], ...]:
    """The GPUs of each pool, as they are `spread`."""
    return tuple(map(gpus_of, spread(counts, cluster, kinds)))


def gpus_of(parts: Sequence[Part]) -> tuple[Gpu, ...]:
    """The GPUs of a pool, in the order of its ranks."""
    return tuple(
        (node, index) for node, first, count in parts for index in range(first, first + count)
    )


def parts_of(gpus: Sequence[Gpu]) -> tuple[int, ...]:
    """GPUs per node, in the order of the ranks."""
    return tuple(Counter(node for node, _ in gpus).values())


def sharing_of(flow: Dataflow, structure: Sequence[frozenset[str]]) -> Sharing:
    """Which pools (p0, p1, ...) each call occupies if the pools have these roles."""
    return tuple(
        (call.name, tuple(f"p{i}" for i, roles in enumerate(structure) if roles & set(call.roles)))
        for call in flow.calls
    )
