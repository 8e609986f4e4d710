"""The search's optimum against an auditor's, on random small instances."""

import numpy as np
import pytest
from auditor import TOLERANCE, Auditor, Given
from conftest import make_workload

from planner.predict.cost import CostModel, Place
from planner.predict.judge import estimate
from planner.predict.kv_cache import AMPLE
from planner.predict.memory import kv_room
from planner.predict.points import point_of
from planner.predict.profile import Profile
from planner.search import SearchOptions, find
from planner.spec.cluster import Cluster, Device, Node
from planner.spec.errors import UserError
from planner.spec.plan import RolloutRole

SCENARIOS = 2  # of random lengths: each multiplies the work of the auditor
# As many seeds are tried by `make test-fast`, by `make test` and by `make nightly`.
QUICK, SLOW, NIGHTLY = 8, 24, 460
LONGEST = (8, 10, 12, 20)  # they take the auditor as long as all others together: every night too
LONGER = [
    pytest.param(seed, marks=pytest.mark.slow) for seed in range(QUICK, SLOW) if seed not in LONGEST
]
SEEDS = [*range(QUICK), *LONGER]
CROWDED = [4, 8, 9, 20, 30, 36]  # seeds with which the best engines preempt


def instance(seed, lengths_vary=False):
    """A random workload of two to five roles on one to four GPUs; some, of fewer, with random
    response lengths if `lengths_vary`."""
    rng = np.random.default_rng(seed)
    length, varied = int(rng.integers(16, 2048)), lengths_vary and rng.random() < 0.2
    lengths = {"kind": "lognormal", "mean": length, "sigma": 0.7, "max": 4 * length}

    def model():
        width = int(rng.choice([512, 1024, 2048]))
        shape = {
            "hidden": width,
            "layers": int(rng.integers(4, 25)),
            "heads": width // 64,
            "kv_heads": width // 128,
            "intermediate": 4 * width,
            "vocab": 32000,
        }
        return {"shape": shape, "random_weights": True}

    minibatch = int(rng.choice([4, 6, 8, 16]))
    workload = make_workload(
        name=f"audit-{seed}",
        batch=minibatch * int(rng.integers(1, 4)),
        minibatch=minibatch,
        prompt={"kind": "fixed", "tokens": int(rng.integers(16, 512))},
        response=lengths if varied else {"kind": "fixed", "tokens": length},
        actor=model(),
        critic=model() if rng.random() < 0.8 else None,
        reference=model() if rng.random() < 0.5 and not varied else None,
        reward=model()
        if rng.random() < 0.4 and not varied
        else {"function": "r.py:f", "seconds_per_sequence": 0.01},
        proximal=str(rng.choice(["recompute", "rollout"])),
        max_staleness=int(rng.integers(0, 2 if varied else 3)),
    )
    return grouped(workload, seed), cluster_of(rng, gpus=int(rng.integers(1, 3 if varied else 5)))


def grouped(workload, seed):
    """The workload, or without a critic often one with two samples of each prompt, of which some
    generate more than they train on."""
    rng = np.random.default_rng((seed, 1))
    if workload.critic is not None or rng.random() < 0.3:
        return workload
    factor = 1.5 if rng.random() < 0.5 and workload.batch % 4 == 0 else 1.0
    algorithm = {"advantage": "grpo", "oversampling_factor": factor}
    return workload.changed(samples_per_prompt=2, algorithm=algorithm)


def cluster_of(rng, gpus):
    nodes = []
    while sum(nodes) < gpus:
        nodes.append(int(rng.integers(1, gpus - sum(nodes) + 1)))
    device = Device(
        memory_bytes=int(10 ** rng.uniform(9.9, 10.8)),
        flops=10 ** rng.uniform(13.5, 14.5),
        memory_bandwidth=10 ** rng.uniform(11.5, 12.5),
        link_bandwidth=10 ** rng.uniform(10, 11.5),
        host_bandwidth=10 ** rng.uniform(9.5, 10.7),
        overhead_seconds=float(rng.choice([0, 0.02])),
        launch_seconds=float(rng.choice([0, 2e-4])),
        context_bytes=5 * 10**8,
    )
    host = int(rng.choice([10**12, 10 ** rng.uniform(9.9, 10.9)]))
    return Cluster(
        name="audited",
        nodes=tuple(Node(gpus=count, device="g", host_memory_bytes=host) for count in nodes),
        devices={"g": device},
        network_bandwidth=10 ** rng.uniform(9, 11),
    )


def profile_of(workload, cluster, seed):
    """What the actor's calls and moves took on one GPU and on all, and what some ways of its sync
    took: up to four times as long as the roofline says, or a quarter of it."""
    rng, shape, gpus = np.random.default_rng(seed), workload.actor.shape, len(cluster.gpus)
    batch = {
        "sequences": workload.batch,
        "prompt_tokens": 100 * workload.batch,
        "response_tokens": 100 * workload.batch,
    }

    def measured(call, role="actor", **fields):
        point = point_of(call=call, role=role, seconds=1.0, **fields)
        seconds = estimate(point, shape, cluster.devices["g"], cluster) * 4 ** rng.uniform(-1, 1)
        return point.model_copy(update={"seconds": seconds})

    points, places = [], []
    for count in sorted({1, gpus}):
        where = {"gpus": count, "shard": int(rng.choice([1, count]))}
        places.append(where)
        trainer = {"micro_batch_tokens": 8192, **batch, **where}
        points += [
            measured("infer", **trainer),
            measured("train", minibatch=workload.minibatch, **trainer),
        ]
        ways = [{"shared": True}, {}, {"partly": True}]
        points += [
            measured("transfer", engines=1, **where, **way) for way in ways if rng.random() < 0.7
        ]
    points.append(measured("generate", "rollout", engines=1, concurrency=workload.batch, **batch))
    points += [
        measured(move, offload="all", **where) for where in places for move in ("wake", "offload")
    ]
    return Profile(device="g", model=shape, points=tuple(points))


def assert_optimal(workload, cluster, *profiles):
    """The search's optimum is the auditor's, and its bound is not above it."""
    try:
        options = SearchOptions(runners_up=0, scenarios=SCENARIOS)
        predicted = find(workload, cluster, options, profiles=profiles).best.predicted
    except UserError as error:
        assert "no plan fits" in str(error)
        predicted = None
    given = Given(workload, cluster, CostModel(workload, cluster, profiles, scenarios=SCENARIOS))
    found = Auditor(given, predicted and predicted.step_seconds).step_seconds()
    if predicted is None:
        assert found is None
    else:
        assert found is not None, f"no plan takes {predicted.step_seconds} s"
        assert found == pytest.approx(predicted.step_seconds, rel=TOLERANCE)
        assert predicted.lower_bound_seconds <= found * (1 + TOLERANCE)
    return predicted


@pytest.mark.parametrize("seed", SEEDS)
def test_the_search_finds_the_auditors_optimum(seed):
    assert_optimal(*instance(seed))


@pytest.mark.parametrize("seed", SEEDS[: SLOW // 3])
def test_the_search_finds_the_auditors_optimum_of_measured_costs(seed):
    workload, cluster = instance(seed)
    assert_optimal(workload, cluster, profile_of(workload, cluster, seed))


def crowded(seed):
    """A random workload whose engines have no room for all of their share, on one GPU or two."""
    rng = np.random.default_rng(seed)
    width, layers = int(rng.choice([512, 1024])), int(rng.integers(4, 13))
    shape = {"hidden": width, "layers": layers, "heads": width // 64, "kv_heads": width // 64}
    model = {
        "shape": {**shape, "intermediate": 4 * width, "vocab": 32000},
        "random_weights": True,
    }
    mean, minibatch = int(rng.integers(200, 3000)), int(rng.choice([8, 16, 24]))
    sigma = float(rng.uniform(0.4, 1.1))
    workload = make_workload(
        batch=10 * minibatch,
        minibatch=minibatch,
        prompt={"kind": "fixed", "tokens": int(rng.integers(16, 1500))},
        response={"kind": "lognormal", "mean": mean, "sigma": sigma, "max": 4 * mean},
        actor=model,
        critic=None,
        reference=None,
        reward={"function": "r.py:f", "seconds_per_sequence": 0.001},
        algorithm={"advantage": "rloo"},
        samples_per_prompt=2,
        max_staleness=int(rng.integers(0, 2)),
    )
    weights = 24 * width * width * layers
    device = Device(
        memory_bytes=9 * weights + int(rng.uniform(7e9, 12e9)),
        flops=10 ** rng.uniform(13.5, 14.5),
        memory_bandwidth=10 ** rng.uniform(11.5, 12.5),
        link_bandwidth=1e11,
        host_bandwidth=3e10,
        context_bytes=5 * 10**8,
    )
    nodes = (Node(gpus=int(rng.integers(1, 3)), device="g", host_memory_bytes=10**12),)
    devices = {"g": device}
    return workload, Cluster(name="c", nodes=nodes, devices=devices, network_bandwidth=1e10)


@pytest.mark.parametrize("seed", CROWDED)
def test_the_search_finds_the_auditors_optimum_where_engines_preempt(seed):
    workload, cluster = crowded(seed)
    assert_optimal(workload, cluster)
    best = find(workload, cluster, SearchOptions(runners_up=0, scenarios=SCENARIOS)).best
    assert kv_room(workload, best.rollout, cluster.devices["g"]) < AMPLE


@pytest.mark.slow
def test_a_layout_that_pays_only_on_split_nodes_is_found():
    """A pool of 2 + 1 + 1 GPUs where larger micro-batches save gathers that 2 + 2 GPUs hide behind
    the computation."""
    assert_optimal(*instance(146))


def test_weights_that_go_two_ways_are_gathered_twice():
    """A rollout over the actor's pool and the critic's: fewer shards pay, and no layout may be
    dropped for another that is quicker but for the second gathering."""

    def model(width, layers):
        heads = {"heads": width // 64, "kv_heads": width // 128}
        shape = {
            "hidden": width,
            "layers": layers,
            **heads,
            "intermediate": 4 * width,
            "vocab": 32000,
        }
        return {"shape": shape, "random_weights": True}

    workload = make_workload(
        batch=4,
        minibatch=2,
        prompt={"kind": "fixed", "tokens": 812},
        response={"kind": "fixed", "tokens": 1165},
        actor=model(512, 14),
        critic=model(1024, 15),
        reference=None,
        reward={"function": "r.py:f", "seconds_per_sequence": 0.01},
        proximal="rollout",
        max_staleness=0,
    )
    device = Device(
        memory_bytes=8321663354,
        flops=7.30114734586735e14,
        memory_bandwidth=3.98962755e11,
        link_bandwidth=1.69335964922e11,
        host_bandwidth=1.21432209084e11,
        launch_seconds=8.349425150048825e-05,
        context_bytes=5 * 10**8,
    )
    node = Node(gpus=4, device="g", host_memory_bytes=10**12)
    assert_optimal(
        workload, Cluster(name="one", nodes=(node,), devices={"g": device}, network_bandwidth=1e10)
    )


def test_scoring_that_is_longer_than_the_rest_bounds_a_step():
    assert_optimal(*instance(108, lengths_vary=True))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [106, 114, 122, 123])
def test_what_is_scored_beside_generation(seed):
    """Scoring alone takes as long as generation on one engine, more or less: the faster generation
    is, the more sticks out."""
    workload, cluster = instance(seed, lengths_vary=True)
    engine = RolloutRole(
        engine="vllm",
        pools=("p",),
        tensor_parallel=1,
        replicas=1,
        memory_fraction=0.95,  # room for a sequence on the smallest GPU
        concurrency=workload.batch,
    )
    place = Place(parts=(1,), device=cluster.devices["g"])
    alone = CostModel(workload, cluster).generate(engine, [place]).seconds.mean()
    share = [0.7, 1.2, 3.0][seed % 3]
    judged = {
        "function": "r.py:f",
        "processes": 2,
        "seconds_per_sequence": 2 * share * float(alone) / workload.batch,
    }
    assert_optimal(workload.changed(reward=judged), cluster)


def test_scoring_may_take_longer_than_a_step():
    """Samples of one step are scored beside the calls of the next."""
    workload, cluster = instance(2001)
    slow = {"function": "r.py:f", "processes": 5, "seconds_per_sequence": 0.35}
    workload = workload.changed(critic=None, max_staleness=1, reward=slow, algorithm={})
    predicted = assert_optimal(workload, cluster)
    assert predicted.call_seconds["score"] > predicted.step_seconds


@pytest.mark.nightly
@pytest.mark.parametrize("seed", [*LONGEST, *range(SLOW, NIGHTLY)])
def test_the_search_finds_the_auditors_optimum_every_night(seed):
    workload, cluster = instance(seed, lengths_vary=seed not in LONGEST)
    assert_optimal(workload, cluster, *[profile_of(workload, cluster, seed)] * (seed % 2))
