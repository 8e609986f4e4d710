"""What the search is made of: structures, sizes, packing, programs, layouts, bounds."""

import doctest
from itertools import product

import numpy as np
import pytest
from conftest import ROLES, make_workload, small_workload, tiny_cluster
from hypothesis import given
from hypothesis import strategies as st

import planner.predict.layouts as layouts
from planner.predict import objective
from planner.predict.cost import Place
from planner.predict.cycle import cycles
from planner.predict.memory import trainer_memory
from planner.predict.objective import with_mean
from planner.predict.points import point_of
from planner.predict.profile import Profile
from planner.predict.schedule import staleness, steady_edges, unroll
from planner.search.solver import branch_and_bound, layout_table, placement
from planner.search.solver.best_program import Program, best_program, cycles_of
from planner.search.solver.bounds import Bounds
from planner.search.solver.branch_and_bound import solve
from planner.search.solver.choices import bound_rates, choices_of
from planner.search.solver.evaluate import Trial, evaluate, ruled_out_by_ideal, ruled_out_by_roles
from planner.search.solver.problem import problem_of
from planner.search.space import placements
from planner.search.space.enumerate_programs import all_programs
from planner.search.space.pins import parse_pins, restriction
from planner.search.space.placements import families, gpus_of, pack, sizes, structures
from planner.search.space.size_boxes import Boxes
from planner.spec.cluster import Cluster, Node, make_cluster
from planner.spec.dataflow import Call, Dataflow, Read, ppo, reinforce
from planner.spec.errors import UserError
from planner.spec.files import profiles_dir
from planner.spec.plan import Issue
from planner.spec.workload_file import load_workload


@pytest.mark.parametrize("module", [objective, placements, placement, layout_table])
def test_examples_in_docstrings_are_right(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


def test_structures_are_all_partitions_with_the_rollout_on_any_union():
    """Of b pools of the other roles (Stirling numbers 1, 7, 6, 1) the rollout takes any of 2^b - 1
    unions, or a pool of its own with any of 2^b."""
    found = structures(ROLES)
    assert (
        len(set(found))
        == len(found)
        == sum(n * (2**b - 1 + 2**b) for b, n in ((1, 1), (2, 7), (3, 6), (4, 1)))
    )
    for structure in found:
        others = [role for pool in structure for role in pool if role != "rollout"]
        assert sorted(others) == ["actor", "critic", "reference", "reward"]
        assert any("rollout" in pool for pool in structure)


def test_sizes_are_all_compositions():
    assert [tuple(row) for row in sizes(4, 2)] == [(1, 3), (2, 2), (3, 1)]
    assert len(sizes(16, 5)) == 1365
    assert len(sizes(2, 3)) == 0


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_pack_gives_every_gpu_once(counts):
    cluster = make_cluster(sum(counts), gpus_per_node=4)
    packed = [gpus_of(pool) for pool in pack(counts, cluster)]
    assert [len(pool) for pool in packed] == counts
    assert sorted(gpu for pool in packed for gpu in pool) == sorted(cluster.gpus)


def test_pack_keeps_pools_on_as_few_nodes_as_there_is_room_for():
    assert _packed((8, 4, 4)) == [[8], [4], [4]]
    assert _packed((4, 12)) == [[4], [8, 4]]


def _packed(counts):
    """GPUs per node of each pool, on two nodes of eight."""
    return [[part.gpus for part in pool] for pool in pack(counts, make_cluster(16))]


@pytest.mark.slow
def test_no_order_that_runs_beats_the_best_program():
    """Of 1,500 random orders and offsets, those that run at all are never faster than the best
    program."""
    rng = np.random.default_rng(0)
    flow = ppo(make_workload()).steady
    names, ran = flow.names, 0
    few = [s for s in structures(ROLES) if len(s) == 2][::5]
    for _ in range(1500):
        sharing = pools_of_calls(flow, few[rng.integers(len(few))])
        pools = dict(sharing)
        order = _random_order(rng, names)
        try:
            tasks = unroll(flow, order, lambda call, pools=pools: pools[call.name], 8)
        except UserError:
            continue
        k = staleness(tasks)
        if k > 1:
            continue
        ran += 1
        seconds = rng.integers(1, 40, len(names)) / 4
        edges = steady_edges(flow, order, lambda call, pools=pools: pools[call.name])
        period = cycles(names, edges).periods(seconds)
        assert _best(flow, sharing, k, with_mean(seconds[:, None])).seconds <= period * (1 + 1e-9)
        assert period >= (bound_rates(flow, sharing, k) @ seconds).max() * (1 - 1e-12)
    assert ran > 100


def pools_of_calls(flow, structure):
    """(call, its pools) for each call."""
    return tuple(
        (call.name, tuple(f"p{i}" for i, roles in enumerate(structure) if roles & {*call.roles}))
        for call in flow.calls
    )


def _random_order(rng, names):
    """A random program that is likely to run: mostly the dataflow's order, with some neighbours
    exchanged and a random part of the calls one step ahead."""
    order = list(names)
    for _ in range(rng.integers(0, 12)):
        i = rng.integers(len(order) - 1)
        order[i], order[i + 1] = order[i + 1], order[i]
    ahead = rng.integers(0, 2)
    offset = dict.fromkeys(names, 0)
    if ahead:
        offset["generate"] = 1
        for name in ("score", "ref_logprobs", "old_logprobs", "values"):
            offset[name] = int(rng.integers(0, 2))
    return tuple(Issue(call=name, offset=offset[name]) for name in order)


def _mean(periods):
    return np.maximum(periods[..., :-1].mean(axis=-1), periods[..., -1])


def _only(periods):
    return periods[..., 0]


def _best(flow, sharing, k, seconds, limit=np.inf):
    objective = _only if seconds.shape[-1] == 1 else _mean
    return best_program(choices_of(flow, sharing, k), seconds, objective, limit)


@pytest.mark.parametrize("k", [0, 1])
def test_the_best_program_is_the_best_of_all(k):
    """At durations that vary over scenarios; and its cut bounds every program at other durations
    too."""
    flow, rng = ppo(make_workload()).steady, np.random.default_rng(k)
    for structure in structures(ROLES)[5::24]:
        sharing = pools_of_calls(flow, structure)
        programs = [p for each in range(k + 1) for p in all_programs(flow, sharing, each).items]
        some = programs[:: max(1, len(programs) // 150)]
        every = [cycles_of(flow, sharing, items) for items in some]
        seconds = with_mean(
            rng.uniform(0.1, 9, (len(flow.names), 1)) * rng.uniform(0.8, 1.2, (len(flow.names), 4))
        )
        found = _best(flow, sharing, k, seconds)
        assert found.program.staleness <= k
        own = cycles_of(flow, sharing, found.program.items).periods(seconds[:, :-1]).mean()
        assert found.seconds == pytest.approx(own, rel=1e-9)
        assert found.cut.bound(seconds[None], _mean)[0] == pytest.approx(own, rel=1e-8)
        assert found.cut.least(seconds.T) == pytest.approx(
            found.cut.bound(seconds.T[:, :, None], _only), rel=1e-12
        )
        other = with_mean(seconds[:, :-1] * rng.uniform(0.5, 2, (len(flow.names), 4)))
        for program in every:
            assert program.periods(seconds[:, :-1]).mean() >= own * (1 - 1e-9)
            assert program.periods(other[:, :-1]).mean() >= found.cut.bound(other[None], _mean)[
                0
            ] * (1 - 1e-9)
        assert _best(flow, sharing, k, seconds, found.seconds).program is None


def test_the_best_program_equals_all_programs_one_by_one():
    flow, rng = reinforce(make_workload(critic=None)).steady, np.random.default_rng(7)
    for structure in structures(("actor", "rollout", "reference", "reward"))[::5]:
        sharing = pools_of_calls(flow, structure)
        seconds = with_mean(rng.uniform(0.1, 9, (len(flow.names), 3)))
        for k in (0, 1, 2):
            every = [p for each in range(k + 1) for p in all_programs(flow, sharing, each).items]
            periods = [
                cycles_of(flow, sharing, items).periods(seconds[:, :-1]).mean() for items in every
            ]
            assert _best(flow, sharing, k, seconds).seconds == pytest.approx(min(periods), rel=1e-9)


def test_the_example_of_best_program():
    """Without the transfer on both pools a step would take as long as generation; on policy, all
    three calls together."""
    weights = Read(data="weights", lag=1)
    calls = (
        Call(
            name="generate",
            roles=("rollout",),
            kind="generate",
            reads=(Read(data="served", latest=True),),
            writes=("sequences",),
        ),
        Call(
            name="train",
            roles=("actor",),
            kind="train",
            reads=(Read(data="sequences"), weights),
            writes=("weights",),
        ),
        Call(
            name="transfer",
            roles=("actor", "rollout"),
            kind="transfer",
            reads=(Read(data="weights"),),
            writes=("served",),
        ),
    )
    sharing = (("generate", ("r",)), ("train", ("t",)), ("transfer", ("r", "t")))
    seconds = np.array([[6.0], [4.0], [1.0]])
    found = [_best(Dataflow(calls=calls), sharing, k, seconds) for k in (0, 1)]
    assert [result.seconds for result in found] == [11.0, 7.0]
    assert found[1].program == Program(
        (Issue(call="generate", offset=1), Issue(call="train"), Issue(call="transfer")), 1
    )
    assert found[1].cut.bound(seconds[None], _only) == [7.0]


def test_event_graphs_made_at_once_are_those_of_the_one_rule():
    """Every pair that shares a pool has an edge; the shortest paths, hence all periods, are the
    same."""
    flow = ppo(make_workload()).steady
    for structure in structures(ROLES)[::30]:
        sharing = pools_of_calls(flow, structure)
        pools, listed = dict(sharing), all_programs(flow, sharing, 1)
        for items, steps in list(zip(*listed, strict=True))[::97]:
            edges = steady_edges(flow, items, lambda call, pools=pools: pools[call.name])
            single = np.full_like(steps, np.inf)
            for (u, v), distance in edges.items():
                single[flow.names.index(u), flow.names.index(v)] = distance
            assert (_shortest(single) == _shortest(steps)).all()


def _shortest(steps):
    for via in range(len(steps)):
        steps = np.minimum(steps, steps[:, via, None] + steps[None, via, :])
    return steps


def default():
    return load_workload(profiles_dir() / "workloads" / "7b.toml"), make_cluster(16)


def best_of_all_placements(problem, restrict):
    """The least seconds of all families that pins allow, one placement at a time."""
    best = np.inf
    for structure in structures(problem.workload.roles):
        for a in filter(None, map(restrict, families(structure, problem.cluster))):
            for counts in product(range(1, len(problem.cluster.gpus) + 1), repeat=len(structure)):
                if all(sum(counts[i] for i in pools) <= most for pools, most in a.limits):
                    found = evaluate(Trial(problem, a, counts, best)).best
                    best = found.seconds if found else best
    return best


def uneven_cluster(nodes, host_memory, network, device):
    """Nodes with these numbers of GPUs and bytes of host memory, and what is changed of a GPU."""
    pairs = zip(nodes, host_memory, strict=True)
    return Cluster(
        name="uneven",
        nodes=tuple(Node(gpus=n, device="g", host_memory_bytes=int(h)) for n, h in pairs),
        devices={"g": tiny_cluster(1).devices["g"].model_copy(update=device)},
        network_bandwidth=network,
    )


LITTLE = {"memory_bytes": 22_810 * 10**6, "flops": 5e13, "host_bandwidth": 2e11}


@pytest.mark.parametrize(
    ("nodes", "host_memory", "network", "device", "changes", "pins"),
    [
        # Pools of one and two GPUs lie on two nodes, though one has three; those of one GPU each
        # lie on one node.
        (
            (3, 2),
            (1e12, 1e12),
            5e9,
            {},
            {"batch": 16, "max_staleness": 1},
            ["actor+critic", "actor/rollout"],
        ),
        # On a node of three and another one a pool of four has one engine of two GPUs, on two
        # smaller nodes two.
        (
            (3, 2, 2, 2),
            (1e12,) * 4,
            50e9,
            {"memory_bytes": 40 * 10**9},
            {"tensor_parallel": 2, "max_staleness": 0},
            [],
        ),
        # What engines on five GPUs offload while they sleep is too much for a host.
        ((3, 2), (66e9, 30e9), 50e9, LITTLE, {"max_staleness": 0}, []),
    ],
)
def test_no_smaller_pools_are_left_out_that_are_better(
    monkeypatch, nodes, host_memory, network, device, changes, pins
):
    monkeypatch.setattr(layouts, "MICRO_BATCH_TOKENS", (8192,))
    monkeypatch.setattr(layouts, "CONCURRENCY", (16, 32))
    monkeypatch.setattr(layouts, "TENSOR_PARALLEL", (1, 2))
    cluster = uneven_cluster(nodes, host_memory, network, device)
    workload = small_workload(**changes)
    restrict = restriction(parse_pins(pins, workload.roles, cluster))
    found = solve(problem_of(workload, cluster, (), None), 1, restrict)
    best = best_of_all_placements(problem_of(workload, cluster, (), None), restrict)
    assert found.best[0].seconds == pytest.approx(best, rel=1e-9)


def test_a_placement_that_an_interrupt_leaves_unevaluated_still_bounds(monkeypatch):
    """The quick plan of this cluster is the best, and known to be only after some placement has
    been evaluated."""

    def interrupted(_):
        raise KeyboardInterrupt

    cluster = uneven_cluster((3, 2, 2, 2), (1e12,) * 4, 50e9, {"memory_bytes": 40 * 10**9})
    problem = problem_of(small_workload(tensor_parallel=2, max_staleness=0), cluster, (), None)
    proven = solve(problem, 1)
    assert not proven.ended and proven.bound == proven.best[0].seconds
    monkeypatch.setattr(branch_and_bound, "evaluate", interrupted)
    ended = solve(problem, 1)
    assert ended.ended and 0 < ended.bound < ended.best[0].seconds == proven.best[0].seconds


def some_profile(workload):
    """What calls and moves took of both kinds of head in a third of some layouts, on a few numbers
    of GPUs."""
    rng, points = np.random.default_rng(3), []
    layouts = product(
        ("actor", "critic"), (1, 4, 8, 12), (1, 2, 4, 8), (4096, 18432), ("none", "all")
    )
    for role, gpus, shard, tokens, offload in layouts:
        if gpus % shard or rng.random() < 2 / 3:
            continue
        where = {
            "role": role,
            "gpus": gpus,
            "shard": shard,
            "seconds": float(rng.uniform(1, 9)),
        }
        batch = {"sequences": workload.batch, "prompt_tokens": 10**5, "response_tokens": 10**5}
        if offload == "all":
            calls, keys = ("wake", "offload"), {"offload": "all"}
        else:
            calls, keys = ("infer", "train"), {"micro_batch_tokens": tokens, **batch}
            keys["minibatch"] = workload.minibatch
        points += [point_of(call=call, **where, **keys) for call in calls]
    return Profile(device="h200", model=workload.actor.shape, points=tuple(points))


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("name", ["actor", "critic", "reference", "reward"])
def test_layouts_as_columns_are_those_one_by_one(name, measured):
    """Seconds and bytes of the tables are the models' own, on filled nodes and on others."""
    workload, cluster = default()
    problem = problem_of(workload, cluster, [some_profile(workload)] if measured else (), None)
    calls = problem.calls_of(name)[: 2 if name in ("actor", "critic") else 1]
    for parts in ((8, 4), (5, 4, 3)):
        place = Place(parts=parts, device=problem.device("h200"))
        found = problem.layouts_at(name, "h200", place)
        for row in range(0, len(found.memory), 7):
            layout = found.layout(row, "p")
            memory = trainer_memory(workload, name, layout, place.device)
            assert found.memory[row].tolist() == [
                memory.idle,
                memory.running - memory.idle,
                memory.host,
            ]
            for call, seconds in zip(calls, found.seconds, strict=False):
                estimate = (
                    problem.model.train
                    if problem.flow[call].kind == "train"
                    else problem.model.infer
                )
                assert seconds[row] == pytest.approx(
                    estimate(name, layout, place).seconds, rel=1e-12
                )


@pytest.mark.nightly
def test_bounds_are_never_above_what_a_placement_takes():
    workload, cluster = default()
    problem = problem_of(workload, cluster, (), None)
    rng, ran = np.random.default_rng(0), 0
    listed = [a for structure in structures(ROLES) for a in families(structure, cluster)]
    bounds = Bounds(problem, listed)
    for number in rng.permutation(len(listed))[:25]:
        pools = len(listed[number].structure)
        counts = rng.multinomial(16 - pools, np.ones(pools) / pools) + 1
        sizes_of = np.zeros((1, max(len(a.structure) for a in listed)), dtype=np.int64)
        sizes_of[0, :pools] = counts
        best = evaluate(Trial(problem, listed[number], counts.tolist())).best
        if best is not None:
            box = Boxes(np.array([number]), sizes_of, sizes_of, np.zeros(1))
            assert bounds.of(box)[0] <= best.seconds * (1 + 1e-9)
            ran += 1
    assert ran > 15


@pytest.mark.nightly
def test_what_is_ruled_out_is_no_better_on_any_smaller_pools():
    workload, cluster = default()
    problem = problem_of(workload, cluster, (), None)
    rng, tests = np.random.default_rng(1), {ruled_out_by_roles: 0, ruled_out_by_ideal: 0}
    listed = [a for structure in structures(ROLES) for a in families(structure, cluster)]
    for number in rng.permutation(len(listed))[:12]:
        pools = len(listed[number].structure)
        large = (
            rng.multinomial(20 - pools, np.ones(pools) / pools) + 1
        )  # more than there are, as a box may be
        small = np.maximum(1, large - rng.integers(0, 4, pools) - 2)
        best = evaluate(Trial(problem, listed[number], small.tolist())).best
        if best is None or sum(small) > 16:
            continue
        for test in tests:
            for times in (0.5, 0.8, 0.95, 1.0):
                trial = Trial(problem, listed[number], large.tolist(), best.seconds * times)
                tests[test] += test(trial).ruled_out
                slower = trial._replace(limit=best.seconds * 1.000001)
                assert not test(slower).ruled_out
    assert min(tests.values()) > 3, tests
