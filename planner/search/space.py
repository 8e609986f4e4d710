"""The space of placements: which roles share a pool, how many GPUs each pool has, and on which nodes they lie."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from planner.spec.cluster import Cluster
from planner.spec.plan import Gpu

Structure = tuple[frozenset[str], ...]  # the roles of each pool; the rollout may be on several


def structures(roles: Sequence[str]) -> tuple[Structure, ...]:
    """Every set partition of the trained and inference roles into pools, with the rollout on any non-empty union of
    those pools and at most one pool of its own. Fewest pools first, in a fixed order."""
    placed = [role for role in roles if role != "rollout"]
    found = [structure for pools in _partitions(placed) for structure in _with_rollout(pools)]
    return tuple(sorted(found, key=lambda s: (len(s), sum("rollout" in pool for pool in s), [sorted(p) for p in s])))


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
                shared = tuple(pool | {"rollout"} if i in chosen else pool for i, pool in enumerate(pools))
                yield (*shared, frozenset({"rollout"})) if own else shared


def sizes(gpus: int, pools: int) -> NDArray[np.int64]:
    """All ways [n, pools] to give every pool at least one GPU and use each GPU of the cluster."""
    if gpus < pools:
        return np.empty((0, pools), dtype=np.int64)
    chosen = list(combinations(range(1, gpus), pools - 1))
    cuts = np.array(chosen, dtype=np.int64).reshape(len(chosen), pools - 1)
    edges = np.concatenate([np.zeros((len(cuts), 1), np.int64), cuts, np.full((len(cuts), 1), gpus)], axis=1)
    return np.diff(edges, axis=1)


def pack(counts: Sequence[int], cluster: Cluster) -> tuple[tuple[Gpu, ...], ...]:
    """The GPUs of each pool, packed onto nodes canonically: larger pools first, each on the fullest node that holds it
    whole, else on the emptiest nodes one after the other. Deterministic."""
    free = {node: list(range(spec.gpus)) for node, spec in enumerate(cluster.nodes)}
    packed: dict[int, tuple[Gpu, ...]] = {}
    for pool in sorted(range(len(counts)), key=lambda i: (-counts[i], i)):
        taken: list[Gpu] = []
        while len(taken) < counts[pool]:
            wanted = counts[pool] - len(taken)
            holding = [node for node in free if len(free[node]) >= wanted]
            if holding:
                node = min(holding, key=lambda n: (len(free[n]), n))
            else:
                node = max(free, key=lambda n: (len(free[n]), -n))
            assert free[node], "more GPUs asked for than the cluster has"
            taken += [(node, free[node].pop(0)) for _ in range(min(wanted, len(free[node])))]
        packed[pool] = _fullest_first(taken)
    return tuple(packed[pool] for pool in range(len(counts)))


def _fullest_first(gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """Ranks follow this order: the node with most of the pool's GPUs first."""
    on_node = Counter(node for node, _ in gpus)
    return tuple(sorted(gpus, key=lambda gpu: (-on_node[gpu[0]], *gpu)))


def parts_of(gpus: Sequence[Gpu]) -> tuple[int, ...]:
    """GPUs per node, in the order of the ranks."""
    return tuple(Counter(node for node, _ in gpus).values())
