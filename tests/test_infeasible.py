"""What is said when nothing fits: the numbers are those of the memory model, and what is proposed
really fits."""

import re

import pytest
from conftest import small_workload, tiny_cluster

from planner.predict.memory import process_bytes, trainer_memory
from planner.search import SearchOptions, baseline, find
from planner.search.questions.variants import resized
from planner.spec.cluster import Node, make_cluster
from planner.spec.errors import UserError
from planner.spec.lengths import Fixed
from planner.spec.plan import TrainerRole


def message_of(workload, cluster, *pins):
    with pytest.raises(UserError) as error:
        find(workload, cluster, SearchOptions(pins=pins))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_role_that_needs_too_much_and_what_would_do():
    workload, cluster = small_workload(max_staleness=0), tiny_cluster(1, memory=24e9)
    said = message_of(workload, cluster)
    needed, shard, enough = re.search(
        r"actor needs (\d+) GB per GPU at shard (\d) \(it fits from shard (\d)\)", said
    ).groups()
    device = cluster.devices["g"]
    assert shard == "1"

    def leanest(shard):
        layout = TrainerRole(
            pools=("p",), shard=shard, micro_batch_tokens=4096, recompute=True, offload="all"
        )
        return trainer_memory(workload, "actor", layout, device).running + process_bytes(device)

    assert round(leanest(1) / 1e9) == int(needed) > 24 >= leanest(int(enough)) / 1e9
    gpus = int(re.search(r"it fits with (\d+) GPUs of the same kind", said)[1])
    assert find(workload, resized(cluster, gpus)).best
    assert "no plan fits" in message_of(workload, resized(cluster, gpus - 1))


def test_shorter_responses_that_fit():
    workload = small_workload(max_staleness=0, response={"kind": "fixed", "tokens": 60_000})
    cluster = tiny_cluster(1, memory=52e9)
    said = message_of(workload, cluster)
    tokens = int(re.search(r"responses of at most ([\d,]+) tokens", said)[1].replace(",", ""))
    fitting = workload.model_copy(update={"response": Fixed(tokens=tokens)})
    assert find(fitting, cluster).best


@pytest.mark.slow
def test_host_memory_is_named_where_it_binds():
    """GPUs that hold one role at a time, and a host without room for the others."""
    cluster = tiny_cluster(1, memory=45e9)
    (node,) = cluster.nodes
    assert find(small_workload(max_staleness=0), cluster).best
    poor = cluster.model_copy(
        update={"nodes": (Node(gpus=1, device=node.device, host_memory_bytes=10**9),)}
    )
    said = message_of(small_workload(max_staleness=0), poor)
    assert "of host memory (copies for checkpoints" in said and "of its 1 GB are there" in said


def test_pins_that_leave_too_little_memory():
    workload, cluster = small_workload(max_staleness=0), tiny_cluster(4, memory=24e9)
    assert find(workload, cluster).best
    assert "one does without them" in message_of(workload, cluster, "actor=1", "actor/critic")


def test_a_baseline_that_does_not_fit_says_which_pool_needs_how_much():
    workload, cluster = small_workload(max_staleness=1), tiny_cluster(4, memory=24e9)
    said = find(workload, cluster).baselines["split"]
    pattern = (
        r"split: actor\+rollout on 2 GPUs take at least (\d+) GB per GPU "
        r"\(while it runs actor (\d+) GB, "
        r"rollout [\d.]+ GB\), and a GPU has 24 GB; use more GPUs or smaller models"
    )
    needed, actor = map(int, re.fullmatch(pattern, said).groups())
    layout = TrainerRole(
        pools=("p",), shard=2, micro_batch_tokens=4096, recompute=True, offload="all"
    )
    assert (
        round(trainer_memory(workload, "actor", layout, cluster.devices["g"]).running / 1e9)
        == actor
    )
    assert needed > 24
    with pytest.raises(UserError, match="take at least"):
        baseline("split", workload, tiny_cluster(4, memory=(needed - 1) * 1e9))
    assert baseline("split", workload, tiny_cluster(4, memory=(needed + 1) * 1e9))


def test_engines_that_are_larger_than_a_node_or_a_pool():
    workload = small_workload(tensor_parallel=4)
    said = message_of(workload, tiny_cluster(2))
    assert (
        "its engines take 4 GPUs of one node (tensor_parallel), and no node has more than 2" in said
    )
    assert (
        "an engine takes 4 GPUs (tensor_parallel), and actor+rollout has 2"
        in find(workload, tiny_cluster(4)).baselines["split"]
    )


SEVENTY = {
    "hidden": 8192,
    "layers": 80,
    "heads": 64,
    "kv_heads": 8,
    "intermediate": 28672,
    "vocab": 128256,
}


def large_workload(**changes):
    model = {"shape": SEVENTY, "random_weights": True}
    models = {"actor": model, "critic": model, "max_staleness": 0}
    return small_workload(**{**models, "batch": 256, "minibatch": 128, **changes})


def test_adam_on_the_host_is_named_where_it_would_do():
    said = message_of(large_workload(), make_cluster(16, "a100"))
    assert "actor needs 107 GB per GPU at shard 16" in said
    assert said.endswith("or train LoRA adapters, which this executor does not")


def test_context_parallelism_is_named_where_one_sequence_is_too_much():
    long = large_workload(prompt={"kind": "fixed", "tokens": 40_000}, response=Fixed(tokens=10_000))
    said = message_of(long, make_cluster(64))
    assert "others split a sequence of 50,000 tokens over GPUs (context parallelism)" in said


def test_the_pin_that_fails_is_named_with_what_is_missing():
    pins = ("actor=8", "critic=8", "rollout=8")
    said = message_of(large_workload(), make_cluster(32, "a800"), *pins)
    failed = re.findall(r"--pin (\w+)=8 fails: \w+ alone takes at least (\d+) GB", said)
    assert [role for role, _ in failed] == ["actor", "critic"]  # a rollout fits its eight
    missing = int(re.search(r"(\d+) GB more than the 84 GB of one", said)[1])
    assert missing == pytest.approx(int(failed[0][1]) - 84, abs=1)
