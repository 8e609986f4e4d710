"""Judging profiles: what is held out is not used, and a point is estimated as the very call that it
was."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from test_profile import CLUSTER, SHAPE, VARIED, point, profile, smaller

from planner.cli import main
from planner.predict.judge import Judged, errors_of, estimate, judge
from planner.predict.points import HostPoint, Point
from planner.predict.profile import Profile
from planner.spec.files import profiles_dir
from planner.spec.lengths import sample

DEVICE = CLUSTER.devices["h200"]
LENGTHS = tuple(sample(VARIED.response, 64, 0, 0, 1).tolist())
LIKE: dict[str, Any] = {"response_tokens": sum(LENGTHS), "response_lengths": LENGTHS}
ENGINES: dict[str, Any] = {"tensor_parallel": 2, "engines": 2}
EVERY_CALL = [
    point("infer", **LIKE),
    point("infer", "critic", shard=2, **LIKE),
    point("train", recompute=True, minibatch=32, epochs=2, **LIKE),
    point("generate", "rollout", concurrency=16, **ENGINES, **LIKE),
    point("transfer", engines=4, shared=True),
    point("transfer", gpus=3, shard=3, engines=1),
    point("transfer", gpus=2, shard=2, engines=3, partly=True),
    point("wake", offload="all"),
    point("wake", "critic", offload="optimizer"),
    point("offload", "reference", offload="all"),
    point("wake", "rollout", shard=1, tensor_parallel=2, gpus=2),
    HostPoint(
        call="host",
        role="advantages",
        sequences=64,
        prompt_tokens=6400,
        response_tokens=12800,
        seconds=0.5,
    ),
]


def like_the_roofline(times: float, *points: Point) -> Profile:
    """Points that take so many times what the cost model says without a profile."""
    taken = [
        p.model_copy(update={"seconds": times * estimate(p, SHAPE, DEVICE, CLUSTER)})
        for p in points
    ]
    return profile(*taken)


def sizes(call: str, role: str = "actor", **changes: Any) -> list[Point]:
    return [
        point(call, role, sequences=n, prompt_tokens=100 * n, response_tokens=200 * n, **changes)
        for n in (16, 32, 64, 128)
    ]


@pytest.mark.parametrize("measured", EVERY_CALL, ids=lambda p: f"{p.call}-{p.role}")
def test_a_point_that_is_known_is_estimated_as_it_was_measured(measured: Point) -> None:
    assert estimate(measured, SHAPE, DEVICE, CLUSTER, [profile(measured)]) == pytest.approx(
        measured.seconds, rel=1e-9
    )
    assert estimate(measured, SHAPE, DEVICE, CLUSTER) != pytest.approx(measured.seconds, rel=0.01)


def test_the_longest_response_counts_not_the_mean() -> None:
    even = point("generate", "rollout", concurrency=64, **ENGINES)
    tail = point(
        "generate", "rollout", concurrency=64, **ENGINES, response_lengths=(12737, *[1] * 63)
    )
    assert estimate(tail, SHAPE, DEVICE, CLUSTER) > 5 * estimate(even, SHAPE, DEVICE, CLUSTER)


def test_where_the_roofline_is_off_by_a_factor_estimates_are_right() -> None:
    judged = judge([like_the_roofline(1.25, *sizes("infer"), *sizes("train"))], CLUSTER)
    infer, train = errors_of(judged)
    assert (infer.call, infer.role, infer.points, infer.informed) == ("infer", "actor", 4, 4)
    for errors in (infer, train):
        assert errors.interpolation == pytest.approx((0, 0), abs=1e-9)
        assert errors.roofline == pytest.approx((0.2, -0.2))


def test_a_point_is_estimated_without_itself_and_without_the_other_roles_of_its_layout() -> None:
    whole = like_the_roofline(1.0, *sizes("infer", "critic"), *sizes("infer", "reward"))
    odd = whole.model_copy(
        update={
            "points": tuple(
                p.model_copy(update={"seconds": 3 * p.seconds}) if p.sequences == 32 else p
                for p in whole.points
            )
        }
    )
    by_size = {(j.point.role, j.point.sequences): j for j in judge([odd], CLUSTER)}
    for role in ("critic", "reward"):
        assert by_size[role, 32].error == pytest.approx(1 / 3 - 1)
        assert by_size[role, 64].error > 0.1  # its neighbour is used


def test_the_worst_error_keeps_its_sign() -> None:
    first, second = like_the_roofline(1.0, *sizes("infer")[:2]).points
    changed = [
        first,
        second.model_copy(update={"seconds": 4 * second.seconds, "spread": 0.4 * second.seconds}),
    ]
    judged = [
        Judged(profile=profile(), point=p, estimated=p.seconds * ratio, roofline=1.0, unseen=False)
        for p, ratio in zip(changed, (1.1, 0.7), strict=True)
    ]
    (errors,) = errors_of(judged)
    assert errors.interpolation == pytest.approx((0.2, -0.3))
    assert errors.noise == pytest.approx(0.05)  # of 0 and 0.1


def test_without_a_like_point_only_the_roofline_is_judged() -> None:
    moves = [point("wake", shard=shard, offload="all") for shard in (2, 4)]
    for points, informed in ((moves[:1], 0), (moves, 2)):
        (errors,) = errors_of(judge([profile(*points)], CLUSTER))
        assert (errors.points, errors.informed, errors.interpolation is None) == (
            len(points),
            informed,
            not informed,
        )


def test_held_out_points_are_judged_by_all_points_and_never_used() -> None:
    known = like_the_roofline(1.5, *sizes("infer"))
    unseen = point("infer", sequences=48, prompt_tokens=4800, response_tokens=19200, seconds=1.0)
    both = known.model_copy(update={"held_out": (unseen,)})
    judged = judge([both], CLUSTER)
    assert [j.unseen for j in judged] == [False] * 4 + [True]
    assert judged[-1].estimated == pytest.approx(1.5 * judged[-1].roofline)
    assert [j.estimated for j in judged[:-1]] == [j.estimated for j in judge([known], CLUSTER)]


def test_profiles_of_several_files_are_used_together() -> None:
    many, one = (
        like_the_roofline(1.25, *sizes("infer")),
        like_the_roofline(1.25, smaller("infer", gpus=8, shard=4)),
    )
    (alone,) = judge([one], CLUSTER)
    with_others = judge([many, one], CLUSTER)[-1]
    assert with_others.profile is one and not alone.informed
    assert with_others.error == pytest.approx(0, abs=1e-9)


def test_the_command_writes_a_page_and_keeps_its_notes(tmp_path: Path) -> None:
    path, out = tmp_path / "p.json", tmp_path / "README.md"
    profile(
        *EVERY_CALL, measured=("4 GPUs",), date="2026-01-02", command="plan profile --gpus 4"
    ).write(path)
    run = CliRunner().invoke(main, ["judge", str(path), "--out", str(out)])
    assert run.exit_code == 0, run.stderr
    page = out.read_text()
    assert (
        "| train | actor | 1 | 0.0% |" in page
        and "plan profile --gpus 4" in page
        and "- 4 GPUs\n" in page
    )
    assert (
        "- micro-batches of 8,192, 18,432 or 32,768 tokens\n" in page
        and "- more than one node\n" in page
    )
    assert "updates with recomputation" not in page
    out.write_text(page + "\n## Notes\n\nAs it is.\n")
    assert CliRunner().invoke(main, ["judge", str(path), "--out", str(out)]).exit_code == 0
    assert out.read_text() == page + "\n## Notes\n\nAs it is.\n"


def test_profiles_of_two_devices_are_refused(tmp_path: Path) -> None:
    for device in ("h200", "h100"):
        profile(EVERY_CALL[0], device=device).write(tmp_path / f"{device}.json")
    run = CliRunner().invoke(
        main, ["judge", str(tmp_path / "h200.json"), str(tmp_path / "h100.json")]
    )
    assert run.exit_code == 2
    assert (
        run.stderr == "plan: the profiles are of h100, h200; judge those of one device at a time\n"
    )


def test_the_shipped_pages_are_of_the_shipped_profiles() -> None:
    found = list(profiles_dir().glob("*/*.json"))
    assert found
    for path in found:
        page = (path.parent / "README.md").read_text()
        assert f"## {path.name}\n" in page, "make it anew with plan judge"
        assert Profile.read(path).sha256[:12] in page, "make it anew with plan judge"
