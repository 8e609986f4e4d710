"""What measured points make of the roofline, by hand: which points a call is compared with, and
what lies between and beyond them."""

from collections.abc import Sequence

import numpy as np
import pytest

from planner.predict.correction import Corrections, Ratios
from planner.predict.likeness import Likeness
from planner.predict.points import Point, TrainerPoint
from planner.predict.profile import Profile
from planner.spec.cluster import make_cluster
from planner.spec.workload import Shape

SHAPE = Shape(hidden=512, layers=8, heads=8, kv_heads=2, intermediate=1536, vocab=32000)
CLUSTER = make_cluster(4)
H200 = CLUSTER.devices["h200"]


def measured(
    ratio: float,
    tokens: int = 1000,
    shard: int = 1,
    role: str = "actor",
    micro_batch_tokens: int = 4096,
    gpus: int = 4,
    sequences: int = 8,
) -> TrainerPoint:
    """A forward pass over `tokens` tokens per rank that took `ratio` times the roofline's
    seconds."""
    prompt, response = gpus * tokens // 4, 3 * gpus * tokens // 4
    point = TrainerPoint(
        call="infer",
        role=role,
        gpus=gpus,
        shard=shard,
        micro_batch_tokens=micro_batch_tokens,
        sequences=sequences,
        prompt_tokens=prompt,
        response_tokens=response,
        seconds=1.0,
    )
    return point.changed(seconds=ratio * point.roofline(SHAPE, H200, CLUSTER))


def corrections(*points: Point, device: str = "h200") -> Corrections:
    return Corrections([Profile(device=device, model=SHAPE, points=points)], CLUSTER)


def ratios(found: Corrections, tokens: Sequence[int], **changes: int) -> Ratios:
    """The ratios of calls over so many tokens per rank, each in one scenario."""
    like = measured(1.0, **changes).likeness(SHAPE, H200)
    return found.ratios(like, np.log(np.array(tokens, dtype=float))[:, None])


def test_between_two_sizes_the_logarithm_counts_and_beyond_them_nothing_changes() -> None:
    known = corrections(measured(1.2, tokens=1000), measured(1.1, tokens=4000))
    found = ratios(known, [500, 1000, 2000, 4000, 8000])
    assert found.values[:, 0] == pytest.approx([1.2, 1.2, 1.15, 1.1, 1.1])
    assert found.sources.tolist() == [
        "extrapolated",
        "measured",
        "interpolated",
        "measured",
        "extrapolated",
    ]


def test_without_a_like_point_the_roofline_is_all_there_is() -> None:
    like = measured(1.0).likeness(SHAPE, H200)
    other = like._replace(key=("train", *like.key[1:]))
    found = corrections(measured(1.2)).ratios(other, np.zeros((2, 3)))
    assert (found.values == 1).all() and found.sources.tolist() == ["roofline", "roofline"]


def test_a_profile_of_a_device_that_the_cluster_lacks_is_passed_over() -> None:
    found = ratios(corrections(measured(1.2), device="h100"), [1000])
    assert found.sources.tolist() == ["roofline"]


def test_the_nearest_split_counts_and_of_two_as_near_the_smaller() -> None:
    known = corrections(measured(1.2, shard=1), measured(1.6, shard=4))
    assert ratios(known, [1000], shard=4).values[0, 0] == pytest.approx(1.6)
    nearest = ratios(known, [1000], shard=2)
    assert nearest.values[0, 0] == pytest.approx(1.2)
    assert nearest.sources.tolist() == ["extrapolated"]


def test_points_of_the_role_come_first_and_another_of_its_head_will_do() -> None:
    both = corrections(measured(1.2, role="actor"), measured(1.4, role="reference"))
    actor, reference = (
        both.ratios(like, np.log([[1000.0]])).values[0, 0]
        for like in (
            measured(1.0, role="actor").likeness(SHAPE, H200),
            measured(1.0, role="reference").likeness(SHAPE, H200),
        )
    )
    assert (actor, reference) == (pytest.approx(1.2), pytest.approx(1.4))
    alone = corrections(measured(1.4, role="reference"))
    assert ratios(alone, [1000]).values[0, 0] == pytest.approx(1.4)


def test_preferred_values_narrow_the_points_as_far_as_there_are_any() -> None:
    known = corrections(
        measured(1.2, micro_batch_tokens=4096, gpus=4),
        measured(1.4, micro_batch_tokens=8192, gpus=4),
        measured(1.6, micro_batch_tokens=8192, gpus=2),
    )
    exact = ratios(known, [1000], micro_batch_tokens=8192, gpus=2)
    assert exact.values[0, 0] == pytest.approx(1.6) and exact.sources[0] == "measured"
    # No point has one GPU: the mean of those with these micro-batches, and of another call.
    near = ratios(known, [1000], micro_batch_tokens=8192, gpus=1)
    assert near.values[0, 0] == pytest.approx(1.5) and near.sources[0] == "interpolated"


def test_a_call_of_another_batch_is_not_measured_though_its_size_is() -> None:
    known = corrections(measured(1.2, sequences=8))
    assert ratios(known, [1000], sequences=16).sources.tolist() == ["interpolated"]


def test_many_calls_at_once_are_the_same_calls_one_by_one() -> None:
    known = corrections(
        measured(1.2, shard=1), measured(1.3, shard=2, tokens=3000), measured(1.5, shard=4)
    )
    like = measured(1.0).likeness(SHAPE, H200)
    columns = Likeness(like.key, like.role, np.array([1, 2, 4, 2]), like.preferred, like.exact)
    sizes = np.log([[900.0, 1100.0], [2000.0, 2500.0], [1000.0, 1000.0], [9000.0, 9000.0]])
    together = known.ratios(columns, sizes)
    for row, shard in enumerate((1, 2, 4, 2)):
        alone = known.ratios(like._replace(split=shard), sizes[row : row + 1])
        assert (alone.values[0] == together.values[row]).all()
        assert alone.sources[0] == together.sources[row]


def test_a_mean_ratio_is_of_all_points_that_go_the_same_way() -> None:
    first, second = measured(1.2), measured(1.6, shard=4)
    known = corrections(first, second)
    key = first.likeness(SHAPE, H200).key
    assert known.mean_ratio(key) == pytest.approx(1.4)
    assert known.mean_ratio("another") == 1.0
    assert known.mean_source(first.likeness(SHAPE, H200)) == "measured"
    other = first.likeness(SHAPE, H200)._replace(exact=(99,))
    assert known.mean_source(other) == "interpolated"
    assert known.mean_source(other._replace(key="another")) == "roofline"
