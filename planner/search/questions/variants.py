"""Other clusters and workloads than those given: what `what-if` asks about, and what could make a
job fit."""

from planner.spec.cluster import Cluster, Node
from planner.spec.lengths import MOST_SIGMA, Empirical, Fixed, Lognormal
from planner.spec.workload import MODEL_ROLES, Model, Workload


def resized(cluster: Cluster, gpus: int) -> Cluster:
    """A cluster of `gpus` GPUs whose nodes are those of this one, over and over; the last may be
    cut."""
    nodes: list[Node] = []
    while gpus:
        node = cluster.nodes[len(nodes) % len(cluster.nodes)]
        nodes.append(node.changed(gpus=min(gpus, node.gpus)))
        gpus -= nodes[-1].gpus
    count = sum(node.gpus for node in nodes)
    return cluster.changed(name=f"{count}x{nodes[0].device}", nodes=tuple(nodes))


def with_response(workload: Workload, factor: float) -> Workload:
    """The workload with responses `factor` times as long, and the same for their limit."""
    lengths = workload.response
    scaled: Fixed | Lognormal | Empirical
    if isinstance(lengths, Fixed):
        scaled = Fixed(tokens=max(1, round(factor * lengths.tokens)))
    elif isinstance(lengths, Lognormal):
        limit = max(1, round(factor * lengths.max))
        scaled = Lognormal(mean=min(factor * lengths.mean, limit), sigma=lengths.sigma, max=limit)
    else:
        values = tuple(max(1, round(factor * value)) for value in lengths.values)
        scaled = Empirical(values=values, max=max(1, round(factor * lengths.max)))
    return workload.changed(response=scaled)


def with_tail(workload: Workload, factor: float) -> Workload | None:
    """The workload with a longer tail of the responses: `factor` times the sigma, at the same mean
    and limit. None if they have no tail."""
    lengths = workload.response
    if not isinstance(lengths, Lognormal) or factor * lengths.sigma > MOST_SIGMA:
        return None
    return workload.changed(response=lengths.changed(sigma=factor * lengths.sigma))


def with_models(workload: Workload, other: Workload) -> Workload:
    """The workload with random weights of another workload's shapes. A model that the other lacks
    gets its actor's shape."""
    shapes = {role: other.models.get(role, other.actor).shape for role in MODEL_ROLES}
    models = {role: Model(shape=shapes[role], random_weights=True) for role in workload.models}
    return workload.changed(**models)


def with_network(cluster: Cluster, factor: float) -> Cluster:
    """The cluster with links between nodes that carry `factor` times as much."""
    return cluster.changed(network_bandwidth=factor * cluster.network_bandwidth)
