"""What the hosts of a plan have to hold, and who says that they cannot."""

import numpy as np
import pytest
from test_memory import SEVEN_B, SMALL, plan

from planner.predict.host_memory import (
    SAMPLE_BYTES_PER_TOKEN,
    allowed,
    batch_bytes,
    copied_bytes,
    host_memory,
    named,
)
from planner.predict.memory_check import check_memory
from planner.search import find
from planner.search.options import SearchOptions
from planner.spec.cluster import Cluster, Node, load_device
from planner.spec.errors import UserError
from planner.spec.plan import Plan

N = SEVEN_B.actor.shape.parameters()


def test_a_batch_more_is_in_flight_with_each_step_of_staleness() -> None:
    batch = 64 * 40 * SAMPLE_BYTES_PER_TOKEN  # sequences of 10 + 30 tokens
    assert [batch_bytes(SMALL, k) for k in (0, 1, 2)] == [batch, 2 * batch, 3 * batch]
    ahead = plan().model_copy(update={"staleness": 2})
    more = host_memory(ahead)[0]["batches in flight"] - host_memory(plan())[0]["batches in flight"]
    assert more == 2 * batch_bytes(SEVEN_B, 0)


def test_what_a_checkpoint_copies_is_twelve_bytes_a_parameter() -> None:
    """Actor and critic of 8 shards on one node: the whole state of both. On a node with 2 of 8
    GPUs a quarter of it; with replicas, one of them."""
    critic = SEVEN_B.model_of("critic").shape.parameters("scalar")
    found = host_memory(plan())[0]
    assert found["copies for checkpoints"] == pytest.approx(12 * (N + critic), rel=1e-6)
    assert "copies for checkpoints" not in host_memory(plan(), saves=False)[0]
    one, eight = (copied_bytes(SEVEN_B, "actor", np.array(shard), 2).item() for shard in (1, 8))
    assert one == 12 * N and eight == pytest.approx(12 * N / 4, rel=1e-6)
    assert copied_bytes(SEVEN_B, "reference", np.array(1), 2) == 0


def test_what_is_offloaded_is_pinned_and_engines_asleep_take_up_to_twice_their_weights() -> None:
    """Engines drop their weights where a transfer comes before each generation."""
    assert "engines asleep" not in host_memory(plan())[0]
    ahead = host_memory(plan().model_copy(update={"staleness": 1}))[0]
    assert ahead["engines asleep"] == 8 * 2 * 2 * N
    critic = SEVEN_B.model_of("critic").shape.parameters("scalar")
    both = 12 * (N + critic)  # weights and moments, and the frozen roles' bf16
    assert both < host_memory(plan())[0]["what is offloaded"] < both + 2 * 2 * (N + critic) + 16
    assert host_memory(plan())[0]["processes"] == 8 * 2 * 4 * 10**9


def test_a_host_that_is_too_small_is_refused_with_what_takes_how_much() -> None:
    parts = host_memory(plan())[0]
    small = plan()
    memory = int(sum(parts.values()) / 0.95)
    for bytes_there, fits in ((memory + 10**9, True), (memory - 10**9, False)):
        node = small.cluster.nodes[0].model_copy(update={"host_memory_bytes": bytes_there})
        cluster = small.cluster.model_copy(update={"nodes": (node,)})
        held = small.model_copy(update={"cluster": cluster})
        if fits:
            check_memory(held)
            continue
        with pytest.raises(UserError, match=r"node 0 needs \d+ GB of host memory") as error:
            check_memory(held)
        assert named(parts) in str(error.value) and "Ray ends processes" in str(error.value)
    assert allowed(small.cluster.nodes[0]) == 1_900_000_000_000  # 95% of 2 TB


@pytest.mark.nightly
def test_the_search_offloads_no_more_than_hosts_hold() -> None:
    """An 8-GPU node of 80 GB each: with a small host the search chooses what fits there, as
    `host_memory` counts; with a smaller one it says what takes how much."""
    workload = SEVEN_B.changed(batch=64, minibatch=64, max_staleness=0)
    device = load_device("h100")

    def best(host: float) -> Plan:
        node = Node(gpus=4, device="h100", host_memory_bytes=int(host))
        cluster = Cluster(name="c", nodes=(node,), devices={"h100": device}, network_bandwidth=1e10)
        found = find(workload, cluster, SearchOptions(scenarios=1))
        assert found.best is not None
        return found.best

    roomy = sum(host_memory(best(2e12))[0].values())
    enough = best(roomy / 0.95 + 1e9)
    assert sum(host_memory(enough)[0].values()) <= roomy + 10**9
    with pytest.raises(UserError, match=r"of host memory \(.*copies for checkpoints \d+ GB"):
        best(100e9)
