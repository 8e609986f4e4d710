"""Measuring a tiny workload: every call that a plan makes here has its point."""

import time
from pathlib import Path

import numpy as np
import pytest
from conftest import cpu_cluster, make_workload

from executor.fleet.pools import Fleet
from executor.measuring.group import BatchSize, Group, fitting
from executor.measuring.groups import groups_here, groups_of
from executor.measuring.measure import measure
from executor.measuring.profile import profile
from executor.measuring.samples import Sample, summed_up
from executor.measuring.timing import _pinned_bytes
from planner.commands.local import local_cluster
from planner.predict.cost import CostModel
from planner.predict.layouts import trainer_layouts
from planner.predict.measurement import OnGpus
from planner.predict.points import TrainerPoint
from planner.predict.profile import check_profiles, load_profiles
from planner.predict.roofline import Place
from planner.spec.cluster import make_cluster
from planner.spec.errors import UserError
from planner.spec.files import profiles_dir
from planner.spec.lengths import sample
from planner.spec.workload_file import load_workload

H200 = load_workload(profiles_dir() / "workloads" / "h200-1.5b.toml")


def test_a_profile_has_every_call_on_pools_of_one_and_of_two(
    lent_cores: None, tmp_path: Path
) -> None:
    workload = make_workload(response={"kind": "fixed", "tokens": 6})
    cluster, out, said = cpu_cluster(2), tmp_path / "p.json", []
    last, began = groups_of(workload, cluster)[-1].name, time.perf_counter()
    profile(workload, cluster, out, progress=said.append, only=last, command="the last group")
    result = profile(workload, cluster, out, progress=said.append, command="the others")
    taken = time.perf_counter() - began
    assert load_profiles([out]) == (result,)
    check_profiles([result], workload, cluster)
    assert (
        said[0].startswith("1 group of measurements, about ")
        and "1 group of measurements: there already" in said
    )
    assert len(result.measured) == 3 and result.command == "the last group\nthe others"

    points = {(p.call, p.role, p.gpus) for p in result.points if isinstance(p, OnGpus)}
    inferred, trained = ("reward", "reference", "actor", "critic"), ("actor", "critic")
    for gpus in (1, 2):
        assert {("infer", role, gpus) for role in inferred} | {
            ("train", role, gpus) for role in trained
        } <= points
    ways = {(p.engines, p.shared, p.partly) for p in result.points if p.call == "transfer"}
    assert ways == {(1, True, False), (2, True, False), (2, False, True)}
    assert {p.engines for p in result.points if p.call == "generate"} == {1, 2}
    assert "advantages" in {p.role for p in result.points if p.call == "host"}
    assert all(0 < p.seconds < taken and p.repeats >= 3 for p in result.points)

    model, device = CostModel(workload, cluster, [result]), cluster.device_of((0, 0))
    for role in trained:  # the planner takes them as they were measured
        layout = next(trainer_layouts(workload, role, 1, "p", device))
        estimate = model.train(role, layout, Place(parts=(1,), device=device))
        measured = [
            p.seconds for p in result.points if p.call == "train" and (p.role, p.gpus) == (role, 1)
        ]
        assert (
            estimate.source == "measured" and len(measured) == 2
        )  # with all roles on a core, and on two pools
        assert float(estimate.seconds[0]) == pytest.approx(np.mean(measured), rel=1e-6)

    again: list[str] = []
    assert profile(workload, cluster, out, progress=again.append) == result
    assert again == ["3 groups of measurements: there already"]
    with pytest.raises(UserError, match=r"p\.json: was measured with another workload"):
        profile(workload.model_copy(update={"seed": 1}), cluster, out, progress=again.append)


def test_too_few_minutes_are_refused_before_anything_is_started(tmp_path: Path) -> None:
    workload, out = make_workload(), tmp_path / "p.json"
    with pytest.raises(UserError, match=r"--minutes 0.01: no group .* 1 core, .* takes about 11 s"):
        profile(workload, cpu_cluster(2), out, progress=lambda text: None, minutes=0.01)
    assert not out.exists()


def test_a_small_model_on_the_cores_of_a_server_is_not_expected_to_take_an_hour() -> None:
    """A pass of 135M parameters over 1,024 tokens took 3.1 s on one such core, forward alone."""
    shape = {"hidden": 576, "layers": 30, "heads": 9, "kv_heads": 3, "intermediate": 1536}
    model = {"shape": {**shape, "vocab": 49152, "tied_embeddings": True}, "random_weights": True}
    fixed = {"kind": "fixed", "tokens": 64}
    workload = make_workload(
        **dict.fromkeys(("actor", "critic", "reference"), model),
        batch=16,
        prompt=fixed,
        response=fixed,
        reward={"function": "r.py:f"},
    )
    cluster = local_cluster(1)
    estimate = CostModel(workload, cluster, scenarios=1).infer(
        "reference",
        next(trainer_layouts(workload, "reference", 1, "p", cluster.device_of((0, 0)))),
        Place(parts=(1,), device=cluster.device_of((0, 0))),
    )
    assert 2 * 3.1 / 2 < float(estimate.seconds[0]) < 2 * 3.1 * 2.5


@pytest.mark.nightly
def test_batches_of_several_sizes_run_on_the_same_processes(two_cores: Fleet) -> None:
    workload, cluster = make_workload(batch=8, minibatch=4), cpu_cluster(1)
    (whole,) = groups_of(workload, cluster)
    plan = whole.plans[0]
    batches = (
        BatchSize(sequences=4, repeats=2),
        BatchSize(sequences=8, repeats=2),
        BatchSize(sequences=8, repeats=1, micro_batch_tokens=13),
        BatchSize(sequences=12, repeats=1, stretch=1.5, held_out=True),
    )
    said: list[str] = []
    points, held_out = measure(
        Group(name="sizes", plans=(plan,), batches=batches), two_cores, said.append
    )
    assert len(said) == 1 + 1 + 2 + 2 + 2 + 1  # that it begins, and each step with two warm-ups
    lengths = sample(workload.response, 8, workload.seed, 0, 1)
    generated = {p.sequences: p for p in points if p.call == "generate"}
    assert {n: (p.response_lengths, p.repeats) for n, p in generated.items()} == {
        4: (tuple(lengths[:4]), 2),
        8: (tuple(lengths), 3),  # the micro-batches of the trainers do not matter
    }
    actor = [p for p in points if (p.call, p.role) == ("train", "actor")]
    plain = plan.trainers["actor"].micro_batch_tokens
    assert sorted((p.sequences, p.micro_batch_tokens) for p in actor) == [
        (4, plain),
        (8, 13),
        (8, plain),
    ]
    (sync,) = [p for p in points if p.call == "transfer"]
    assert sync.repeats == 6
    unseen = sample(workload.response, 12, workload.seed, 1, 1)
    stretched = tuple(
        np.clip(np.rint(1.5 * unseen), 1, workload.response.longest).astype(int).tolist()
    )
    assert {p.response_lengths for p in held_out if p.call != "host"} == {stretched}
    assert {p.call for p in held_out} == {"generate", "infer", "train", "host"}


def test_what_is_measured_on_four_gpus() -> None:
    groups = groups_of(H200, make_cluster(4))
    layouts = [plan.trainers["actor"] for group in groups for plan in group.plans]
    shards = {(layout.shard, layout.replicas) for layout in layouts}
    assert shards == {(1, 4), (4, 1), (1, 2), (3, 1), (2, 1), (2, 2)}
    assert {plan.rollout.tensor_parallel for group in groups for plan in group.plans} == {1, 2, 4}
    assert {plan.rollout.offload for group in groups for plan in group.plans} == {False, True}
    assert [batch.sequences for batch in groups[0].batches] == [128, 256, 512, 256, 384]
    assert [batch.held_out for batch in groups[0].batches] == [False, False, False, False, True]
    beside = groups[2].plans[0]
    assert {
        role: layout.pools
        for role, layout in beside.trainers.items()
        if role in ("actor", "critic")
    } == {
        "actor": ("a",),
        "critic": ("b",),
    }
    assert beside.rollout.pools == ("a", "b") and not beside.rollout.offload
    engines = [group.plans[0].rollout.model_dump(exclude={"pools"}) for group in groups]
    assert engines[0] == engines[1] == engines[2] != engines[3]  # the engines stay
    assert groups[1].start_seconds == groups[2].start_seconds < groups[3].start_seconds
    asleep, awake = (_pinned_bytes(group.plans[0]) for group in groups[4:])
    assert groups[4].start_seconds - groups[5].start_seconds == pytest.approx(
        0.5 * (asleep - awake) / 1e9
    )
    assert asleep - awake > 20e9


def test_long_steps_are_repeated_less_and_smaller_batches_are_left_out_first() -> None:
    groups = groups_of(
        load_workload(profiles_dir() / "workloads" / "h200-7b.toml"), make_cluster(4)
    )
    steps = [
        step for group in groups for step in zip(group.batches, group.step_seconds, strict=True)
    ]
    assert {seconds > 15 for _, seconds in steps} == {False, True}
    for batch, seconds in steps:
        assert batch.repeats == (2 if seconds > 15 or batch.held_out else 3)
        assert batch.extra or seconds < 15 or batch.held_out or batch.sequences == 512
    least = [group.only([batch for batch in group.batches if not batch.extra]) for group in groups]
    assert [[batch.sequences for batch in group.batches] for group in least] == [
        [512, 384],
        [512],
        [512],
        [512],
    ]


def test_only_some_groups_may_be_measured() -> None:
    apart = groups_of(H200, make_cluster(4), "1 engine of 1")
    assert [group.name for group in apart] == ["3 + 1 GPUs, shard 3, 32768 tokens, 1 engine of 1"]
    with pytest.raises(
        UserError, match="--only shard 8: no group is named so; there are 4 GPUs, shard 1 x 4, "
    ):
        groups_of(H200, make_cluster(4), "shard 8")


@pytest.mark.slow
def test_what_the_host_does_not_hold_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    large = load_workload(profiles_dir() / "workloads" / "h200-7b.toml")
    said: list[str] = []

    def names(host_gigabytes: int) -> list[str]:
        monkeypatch.setattr(
            "executor.measuring.groups.memory_bytes", lambda: host_gigabytes * 10**9
        )
        return [
            group.name
            for group in groups_here(large, make_cluster(2, gpus_per_node=2), "", said.append)
        ]

    both = names(2000)
    assert ["shard 2" in name for name in both] == [True, False] and not said
    assert names(230) == both[1:]
    assert said == [f"skipped (needs more host memory than this machine's 230 GB): {both[0]}"]
    monkeypatch.setattr("executor.measuring.groups.memory_bytes", lambda: 230 * 10**9)
    with pytest.raises(UserError, match=r"needs more host memory than .*; measure something else"):
        groups_here(large, make_cluster(2, gpus_per_node=2), "shard 2", said.append)
    monkeypatch.setattr("executor.measuring.groups.memory_bytes", lambda: 2000 * 10**9)
    for only in ("", "that sleep"):
        assert groups_here(H200, make_cluster(4), only, said.append) == groups_of(
            H200, make_cluster(4), only
        )


@pytest.mark.parametrize(
    ("taken", "seconds"),
    [([7.9, 10.3], 7.9), ([10.3, 7.9], 7.9), ([3.0, 1.0, 2.0], 2.0), ([4.0, 1.0, 3.0, 2.0], 2.0)],
)
def test_a_point_is_the_median_and_of_an_even_number_the_lower_one(
    taken: list[float], seconds: float
) -> None:
    key = TrainerPoint(call="infer", role="actor", sequences=4, seconds=1.0)
    samples = [
        Sample(
            key=key, seconds=t, tokens={"response_tokens": int(100 * t)}, memory={"used": number}
        )
        for number, t in enumerate(taken)
    ]
    point = summed_up(key, samples)
    assert (point.seconds, point.response_tokens, point.repeats) == (
        seconds,
        int(100 * seconds),
        len(taken),
    )
    assert point.peak_bytes == len(taken) - 1
    assert point.spread == pytest.approx(float(np.subtract(*np.quantile(taken, [0.75, 0.25]))) / 2)


def test_a_budget_drops_extra_batches_then_the_last_groups() -> None:
    groups = groups_of(H200, make_cluster(4))
    total = sum(group.seconds for group in groups)
    assert fitting(groups, total + 1) == groups
    least = [group.only([batch for batch in group.batches if not batch.extra]) for group in groups]
    assert fitting(groups, sum(group.seconds for group in least) + 1e-6) == least
    two = fitting(groups, least[0].seconds + least[1].seconds + 1e-6)
    assert two == [least[0], least[1], None, None, None, None]
    assert fitting(groups, 10) == [None] * 6
    extra = groups[0].only(
        [batch for batch in groups[0].batches if batch.extra]
    )  # what an earlier budget left
    assert fitting([extra], extra.seconds + 1) == [extra] and fitting(
        [extra], extra.seconds - 1
    ) == [None]


def test_more_gpus_than_there_are_are_refused_before_anything_is_started(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs 64 GPUs of kind h200 and this machine has"):
        profile(H200, make_cluster(64, "h200", 64), tmp_path / "p.json", progress=print)
    assert not (tmp_path / "p.json").exists()
