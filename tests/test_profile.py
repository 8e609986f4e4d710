import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planner.commands.inputs import read_inputs
from planner.commands.options import JobOptions
from planner.predict.cost import CostModel, Place
from planner.predict.points import HostPoint, Point, point_of
from planner.predict.profile import Profile, check_profiles, load_profiles, warnings_of
from planner.spec.cluster import make_cluster
from planner.spec.errors import UserError
from planner.spec.lengths import Fixed, Lognormal, sample
from planner.spec.plan import RolloutRole, TrainerRole
from planner.spec.workload import Model, Shape, Workload

SHAPE = Shape(hidden=512, layers=8, heads=8, kv_heads=2, intermediate=1536, vocab=32000)
MODEL = Model(shape=SHAPE, random_weights=True)
WORKLOAD = Workload(
    name="small",
    batch=64,
    minibatch=16,
    prompt=Fixed(tokens=100),
    response=Fixed(tokens=200),
    actor=MODEL,
    critic=MODEL,
    reference=MODEL,
    reward=MODEL,
)
VARIED = WORKLOAD.model_copy(update={"response": Lognormal(mean=200, sigma=0.6, max=600)})
CLUSTER = make_cluster(4)
PLACE = Place(parts=(4,), device=CLUSTER.devices["h200"])


def layout(**changes: Any) -> TrainerRole:
    return TrainerRole(
        **{"pools": ("a",), "shard": 4, "micro_batch_tokens": 4096, "recompute": False, **changes}
    )


BATCH = {"sequences": 64, "prompt_tokens": 6400, "response_tokens": 12800}
KEYS: dict[str, dict[str, Any]] = {
    "infer": {"shard": 4, "micro_batch_tokens": 4096, **BATCH},
    "train": {"shard": 4, "micro_batch_tokens": 4096, "minibatch": 16, **BATCH},
    "generate": BATCH,
    "transfer": {"shard": 4},
    "wake": {"shard": 4},
    "offload": {"shard": 4},
}


def point(call: str, role: str = "actor", **changes: Any) -> Point:
    """A call over the whole batch of WORKLOAD on 4 GPUs."""
    base = {"call": call, "role": role, "gpus": 4, "seconds": 1.25, **KEYS[call]}
    return point_of(**{**base, **changes})


def profile(*points: Point, **changes: Any) -> Profile:
    return Profile(**{"device": "h200", "model": SHAPE, "points": points, **changes})


def model(*points: Point, workload: Workload = WORKLOAD) -> CostModel:
    return CostModel(workload, CLUSTER, [profile(*points)])


@pytest.mark.parametrize("call", ["infer", "train"])
def test_an_exact_match_gives_the_measured_seconds(call: str) -> None:
    estimate = getattr(model(point(call)), call)("actor", layout(), PLACE)
    assert estimate.source == "measured"
    assert estimate.seconds == pytest.approx([1.25], rel=1e-12)


def test_exact_matches_of_generate_sync_and_host() -> None:
    rollout = RolloutRole(
        engine="vllm",
        pools=("a",),
        tensor_parallel=2,
        replicas=2,
        memory_fraction=0.5,
        concurrency=16,
    )
    measured = model(
        point("generate", "rollout", tensor_parallel=2, engines=2, concurrency=16, seconds=3.5),
        point("transfer", tensor_parallel=2, engines=2, shared=True, seconds=0.25),
        HostPoint(call="host", role="advantages", **BATCH, seconds=0.5),
    )
    assert measured.generate(rollout, [PLACE]).seconds == pytest.approx([3.5], rel=1e-12)
    synced = measured.sync(layout(), PLACE, rollout, [PLACE], same_node=True, shared=True)
    assert (synced.source, synced.seconds) == ("measured", pytest.approx([0.25], rel=1e-12))
    assert measured.host("advantages").seconds == pytest.approx([0.5], rel=1e-12)
    assert measured.host("score").source == "host"


def test_a_transfer_takes_the_mean_ratio_of_those_that_go_the_same_way() -> None:
    ways: dict[str, dict[str, Any]] = {
        "within": {"shared": True},
        "both": {"partly": True},
        "across": {},
    }
    like = {"tensor_parallel": 1, "engines": 2}
    points = [
        point("transfer", seconds=n, **like, **way) for n, way in enumerate(ways.values(), start=1)
    ]
    rollout = RolloutRole(
        engine="vllm",
        pools=("a",),
        tensor_parallel=1,
        replicas=2,
        memory_fraction=0.5,
        concurrency=16,
    )
    asked = {"within": ([PLACE], True), "both": ([PLACE, PLACE], True), "across": ([PLACE], False)}

    def synced(*points: Point) -> list[tuple[str, float]]:
        measured = model(*points)
        found = [
            measured.sync(layout(), PLACE, rollout, p, same_node=True, shared=s)
            for p, s in asked.values()
        ]
        return [(estimate.source, float(estimate.seconds[0])) for estimate in found]

    assert synced(*points) == [("measured", pytest.approx(n, rel=1e-12)) for n in (1, 2, 3)]
    assert synced(points[1]) == [
        synced()[0],
        ("measured", pytest.approx(2, rel=1e-12)),
        synced()[2],
    ]
    slower, other = (points[0].model_copy(update=x) for x in ({"seconds": 4.0}, {"engines": 3}))
    assert synced(points[0], slower)[0] == ("measured", pytest.approx(2.5))
    assert synced(other)[0] == ("interpolated", pytest.approx(1))


def test_a_measured_batch_of_varied_lengths_is_met_exactly() -> None:
    lengths = tuple(sample(VARIED.response, 64, VARIED.seed, 0, 1).tolist())
    like = {"response_tokens": sum(lengths), "response_lengths": lengths}
    rollout = RolloutRole(
        engine="vllm",
        pools=("a",),
        tensor_parallel=1,
        replicas=4,
        memory_fraction=0.5,
        concurrency=16,
    )
    measured = model(
        point("generate", "rollout", engines=4, concurrency=16, seconds=2.0, **like),
        point("train", seconds=4.0, **like),
        workload=VARIED,
    )
    generated = measured.generate(rollout, [PLACE])
    assert generated.source == "measured"
    assert generated.seconds[0] == pytest.approx(
        2.0
    )  # scenario 0 has the very lengths that were measured
    assert generated.seconds.std() > 0.01
    assert measured.train("actor", layout(), PLACE).seconds[0] == pytest.approx(4.0)


def test_between_points_interpolated_beyond_them_extrapolated() -> None:
    plain = CostModel(WORKLOAD, CLUSTER)
    roofline = plain.infer("actor", layout(), PLACE)
    assert roofline.source == "roofline"
    half = point("infer", sequences=32, prompt_tokens=3200, response_tokens=6400, seconds=1.0)
    twice = point("infer", sequences=128, prompt_tokens=12800, response_tokens=25600, seconds=1.0)
    between = model(half, twice).infer("actor", layout(), PLACE)
    ratios = []
    for measured, sequences in ((half, 32), (twice, 128)):
        other = CostModel(WORKLOAD.model_copy(update={"batch": sequences}), CLUSTER)
        ratios.append(measured.seconds / other.infer("actor", layout(), PLACE).seconds[0])
    assert between.source == "interpolated"
    assert between.seconds[0] == pytest.approx(
        roofline.seconds[0] * np.mean(ratios)
    )  # the middle of the logarithms
    beyond = model(half).infer("actor", layout(), PLACE)
    assert beyond.source == "extrapolated"
    assert beyond.seconds[0] == pytest.approx(roofline.seconds[0] * ratios[0])


def test_another_shard_size_is_extrapolated_from_the_nearest() -> None:
    sharded = [
        point("infer", shard=shard, seconds=seconds) for shard, seconds in ((1, 9.0), (2, 2.0))
    ]
    estimate = model(*sharded).infer("actor", layout(shard=4), PLACE)
    nearest = model(*sharded).infer("actor", layout(shard=2, replicas=2), PLACE)
    assert (estimate.source, nearest.source) == ("extrapolated", "measured")
    assert estimate.seconds[0] == pytest.approx(2.0, rel=0.1)


def test_heads_shapes_and_recomputation_are_kept_apart() -> None:
    measured = model(point("infer", "critic"), point("train", recompute=True))
    assert (
        measured.infer("reward", layout(), PLACE).source == "measured"
    )  # the critic's shape and head
    assert measured.infer("reference", layout(), PLACE).source == "roofline"
    assert measured.train("actor", layout(recompute=True), PLACE).source == "measured"
    assert measured.train("actor", layout(recompute=False), PLACE).source != "measured"


def test_a_roles_own_points_come_first() -> None:
    measured = model(point("infer", "actor", seconds=1.0), point("infer", "reference", seconds=2.0))
    assert measured.infer("actor", layout(), PLACE).seconds == pytest.approx([1.0])
    assert measured.infer("reference", layout(), PLACE).seconds == pytest.approx([2.0])


def test_points_of_as_many_gpus_come_first() -> None:
    half: dict[str, Any] = {
        "shard": 2,
        "sequences": 32,
        "prompt_tokens": 3200,
        "response_tokens": 6400,
    }
    few, many = point("train", gpus=2, seconds=9.0, **half), point("train", seconds=1.0, **half)
    asked = layout(shard=2, replicas=2)
    both, alone = (model(*points).train("actor", asked, PLACE) for points in ((few, many), (many,)))
    assert both.seconds == pytest.approx(alone.seconds, rel=1e-12)
    assert both.seconds[0] < model(few).train("actor", asked, PLACE).seconds[0]


def test_moves_are_measured_too() -> None:
    woken = point("wake", offload="all", seconds=0.75)
    elsewhere = point("wake", offload="all", gpus=8, seconds=2.0)
    sleepy = model(elsewhere, woken).train("actor", layout(offload="all"), PLACE)
    assert sleepy.parts["wake"] == pytest.approx([0.75])
    assert sleepy.parts["offload"] != pytest.approx([0.75])


def test_a_profile_of_another_device_or_model_is_refused() -> None:
    check_profiles([profile(point("infer"))], WORKLOAD, CLUSTER)
    with pytest.raises(UserError, match="another device: the cluster has h200"):
        check_profiles([profile(point("infer"), device="h100")], WORKLOAD, CLUSTER)
    with pytest.raises(UserError, match="has no points yet; measure them with `plan profile`"):
        check_profiles([profile()], WORKLOAD, CLUSTER)
    other = SHAPE.model_copy(update={"layers": 4})
    with pytest.raises(UserError, match="another model: no role of workload 'small'"):
        check_profiles([profile(point("infer"), model=other)], WORKLOAD, CLUSTER)
    check_profiles([profile(point("infer", model=SHAPE), model=other)], WORKLOAD, CLUSTER)


def test_the_commands_say_what_is_not_monotone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "odd.json"
    profile(smaller("infer", seconds=2.0), point("infer", seconds=1.5)).write(path)
    read = read_inputs(JobOptions(gpus=4, profiles=(path,)))
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{path}: {warnings_of(read.profiles[0])[0]}"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('"seconds": NaN', "not valid JSON"),
        ('"seconds": Infinity', "not valid JSON"),
        ('"seconds": 1e999', "points.0.seconds: must be a finite number"),
        ('"seconds": -1.0', "points.0.seconds: must be greater than 0"),
        ('"seconds": 0', "points.0.seconds: must be greater than 0"),
        ('"seconds": "fast"', "points.0.seconds: must be a valid number, .*not 'fast'"),
        ('"seconds": 1.0, "response_lengths": [1, 2]', "response_lengths must be one per sequence"),
        ('"seconds": 1.0, "gpus": 3', "does not divide"),
        ('"seconds": 1.0, "tokens": 3', "unknown key"),
    ],
)
def test_a_bad_point_is_refused_by_file_and_key(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "profile.json"
    lines = profile(point("infer")).to_json().replace('"seconds": 1.25', text).splitlines()
    anew = re.findall(r'"\w+":', text)
    path.write_text(
        "\n".join(line for line in lines if text in line or not any(key in line for key in anew))
    )
    with pytest.raises(UserError, match=problem) as error:
        load_profiles([path])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "key", "value"),
    [
        ("infer", "engines", 2),
        ("wake", "sequences", 8),
        ("host", "gpus", 2),
        ("train", "shared", 1),
    ],
)
def test_a_key_of_another_kind_has_its_default_or_is_refused(
    tmp_path: Path, call: str, key: str, value: int
) -> None:
    path = tmp_path / "profile.json"
    some = HostPoint(call="host", role="score", **BATCH, seconds=1.0)
    profile(some if call == "host" else point(call)).write(path)
    text = path.read_text()
    assert load_profiles([path])[0].to_json() == text
    known = re.search(rf'"{key}": (0|1|false),', text)
    assert known
    path.write_text(text.replace(known[0], f'"{key}": {value},'))
    with pytest.raises(UserError) as error:
        load_profiles([path])
    problem = f"{key} says nothing about a point of {call}; remove it"
    assert str(error.value) == f"{path}: points.0: {problem}"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("infer", "dream"), "points.0: 'call' is 'dream'; choose one of 'infer', 'train', "),
        (('"call"', '"kind"'), "points.0: 'call' is missing; add it"),
    ],
)
def test_a_point_of_no_kind_is_refused(
    tmp_path: Path, change: tuple[str, str], problem: str
) -> None:
    path = tmp_path / "profile.json"
    path.write_text(profile(point("infer")).to_json().replace(*change))
    with pytest.raises(UserError) as error:
        load_profiles([path])
    assert str(error.value).startswith(f"{path}: {problem}")


def test_the_schema_of_a_profile_has_the_keys_of_the_file() -> None:
    written = json.loads(profile(point("wake", offload="all"), point("infer")).to_json())
    schemas = Profile.json_schema()["$defs"]
    for kind, keys in zip(("MovePoint", "TrainerPoint"), written["points"], strict=True):
        assert keys.keys() | {"partly"} == schemas[kind]["properties"].keys()
    assert schemas["MovePoint"]["properties"]["sequences"] == {"const": 0}


def smaller(call: str, **changes: Any) -> Point:
    """Half the batch."""
    return point(
        call, **{"sequences": 32, "prompt_tokens": 3200, "response_tokens": 6400, **changes}
    )


def test_more_work_in_less_time_is_said_and_used() -> None:
    odd = profile(smaller("infer", seconds=2.0), point("infer", seconds=1.5))
    assert warnings_of(odd) == [
        "infer of actor, shard 4, on 4 GPUs: 9,600 tokens of 32 sequences took 2 s, but 19,200 "
        "tokens of 64 sequences "
        "took 1.5 s; more work in less time is used as measured"
    ]
    assert CostModel(WORKLOAD, CLUSTER, [odd]).infer(
        "actor", layout(), PLACE
    ).seconds == pytest.approx([1.5])


def test_more_gpus_that_take_longer_are_said() -> None:
    odd = profile(
        point("train", gpus=4, shard=2, seconds=2.0),
        point("train", gpus=8, shard=2, seconds=2.5, nodes=2),
    )
    assert warnings_of(odd) == [
        "train of actor, shard 2, over 19,200 tokens of 64 sequences: 4 GPUs took 2 s, but 8 GPUs "
        "took 2.5 s; more "
        "GPUs taking longer is used as measured"
    ]


@pytest.mark.parametrize(
    "points",
    [
        [smaller("infer", seconds=1.0), point("infer", seconds=1.5)],  # monotone
        [
            smaller("infer", seconds=2.0, spread=0.4),
            point("infer", seconds=1.5, spread=0.2),
        ],  # within the spreads
        [smaller("infer", seconds=2.0), point("infer", "critic", seconds=1.5)],  # of another role
        [
            smaller("train", seconds=2.0),
            point("train", recompute=True, seconds=1.5),
        ],  # in another layout
        [
            smaller("infer", seconds=2.0),
            point("infer", response_tokens=3200, seconds=1.5),
        ],  # shorter responses
        [
            point("infer", gpus=4, seconds=1.5),
            point("infer", gpus=8, shard=8, seconds=2.0),
        ],  # sharded more
        [point("wake", seconds=2.0), point("wake", seconds=1.5)],  # moves depend on no tokens
    ],
)
def test_no_warning_where_nothing_contradicts(points: list[Point]) -> None:
    assert warnings_of(profile(*points)) == []


def test_one_line_for_each_layout_however_many_points() -> None:
    falling = [
        point(
            "infer",
            sequences=n,
            prompt_tokens=100 * n,
            response_tokens=200 * n,
            seconds=10 - n / 20,
        )
        for n in range(8, 65, 8)
    ]
    (line,) = warnings_of(profile(*falling, *falling))
    assert (
        "of 8 sequences took 9.6 s" in line and "of 64 sequences took 6.8 s" in line
    )  # the worst of them


def test_a_profile_survives_a_round_trip_with_its_hash(tmp_path: Path) -> None:
    path, written = (
        tmp_path / "profile.json",
        profile(point("infer"), point("train"), versions={"torch": "2.11"}),
    )
    written.write(path)
    (read,) = load_profiles([path])
    assert read.points == written.points
    assert read.sha256 == written.sha256 != profile(point("infer")).sha256
