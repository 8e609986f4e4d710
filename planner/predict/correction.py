"""Measured points against the roofline: how much longer a call really takes, and how well that is
known.

Each point gives a ratio, measured seconds over the roofline's for the very same call. A call asks
for the ratio of the points that are like it (same kind of call, model shape and head, device),
interpolated linearly over the logarithm of its size (tokens per rank, sequences per engine) and
held constant beyond the outermost points. A transfer asks for one ratio, the mean of those that go
its way: it is a small part of a step, and so the search's bounds are exact about it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from planner.predict.generation import engine_speed, generation_seconds
from planner.predict.memory import engine_weight_bytes, offloaded_bytes
from planner.predict.profile import Point, Profile, head_of
from planner.predict.roofline import Place, infer_cost, shares, split_of, sync_cost, train_cost
from planner.spec.cluster import Cluster, Device
from planner.spec.plan import TrainerRole
from planner.spec.workload import Shape

Way = Literal["all", "some", "none"]  # the engines of a transfer that share the actor's GPUs
Source = Literal["measured", "interpolated", "extrapolated", "roofline", "host"]

HOST_SECONDS = 5e-3  # of a call on the controller
HOST_SECONDS_PER_TOKEN = 5e-8  # collecting, GAE and handing out again; profiles replace both
# Sizes whose logarithms differ by less are the same: no sampled batch is quite the expected one.
SAME_SIZE = 0.05


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A point with the logarithm of its size and its ratio to the roofline."""

    point: Point
    size: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a point should have in common with a call, from what must be near to what is merely
    preferred: `split` is the shard size or the tensor-parallel size; `preferred` are fields of
    Point, `exact` those that make it the same call."""

    split: Any
    preferred: dict[str, object] = field(default_factory=dict)
    exact: dict[str, object] = field(default_factory=dict)


class Corrections:
    """The ratios of some profiles' points on a cluster. A profile of a device that the cluster
    lacks is passed over (`profile.check_profiles` refuses it)."""

    def __init__(self, profiles: Sequence[Profile], cluster: Cluster) -> None:
        self._points: dict[object, list[Measured]] = {}
        for profile in profiles:
            device = cluster.devices.get(profile.device)
            for point in profile.points if device else ():
                assert device
                way = way_of(shared=point.shared or point.partly, separate=not point.shared)
                key = _key(point.call, profile.shape_of(point), point.role, device, way)
                size, seconds = _size_and_roofline(point, profile.shape_of(point), device, cluster)
                self._points.setdefault(key, []).append(
                    Measured(point=point, size=size, ratio=point.seconds / seconds)
                )

    def ratio(
        self,
        call: str,
        shape: Shape,
        role: str,
        device: Device,
        size: NDArray[np.float64],
        layout: Layout,
    ) -> tuple[NDArray[np.float64], Source]:
        """Ratios like `size` (logarithms), and their source. 1 and `roofline` without any like
        point."""
        found = self._alike(call, shape, role, device)
        if not found:
            return np.ones_like(size), "roofline"
        nearest = _nearest(found, layout.split)
        alike = _like(found, nearest, role, layout.preferred)
        centre = float(size.mean())
        wanted = {**layout.preferred, **layout.exact}
        same = [
            m.ratio
            for m in alike
            if nearest == layout.split
            and abs(m.size - centre) < SAME_SIZE
            and all(getattr(m.point, name) == value for name, value in wanted.items())
        ]
        if same:
            return np.full_like(size, np.mean(same)), "measured"
        sizes, ratios = _curve(alike)
        inside = sizes[0] - SAME_SIZE <= centre <= sizes[-1] + SAME_SIZE
        source: Source = "interpolated" if inside and nearest == layout.split else "extrapolated"
        return np.interp(size, sizes, ratios), source

    def ratios(
        self,
        call: str,
        shape: Shape,
        role: str,
        device: Device,
        sizes: NDArray[np.float64],
        layout: Layout,
    ) -> NDArray[np.float64]:
        """`ratio` of many calls [n] at once, `sizes` [n, S]; the fields of `layout` are columns
        [n], or one value."""
        found = self._alike(call, shape, role, device)
        ratios = np.ones_like(sizes)
        if not found:
            return ratios
        splits, which = np.unique(np.broadcast_to(layout.split, len(sizes)), return_inverse=True)
        columns = [
            which,
            *(np.broadcast_to(np.asarray(c), len(sizes)) for c in layout.preferred.values()),
        ]
        for key in np.unique(
            np.column_stack([column.astype(np.int64) for column in columns]), axis=0
        ).tolist():
            rows = np.flatnonzero(
                np.all(
                    [column == value for column, value in zip(columns, key, strict=True)], axis=0
                )
            )
            split, preferred = (
                int(splits[key[0]]),
                dict(zip(layout.preferred, key[1:], strict=True)),
            )
            nearest = _nearest(found, split)
            alike = _like(found, nearest, role, preferred)
            ratios[rows] = np.interp(sizes[rows], *_curve(alike))
            centres, same, times = (
                sizes[rows].mean(axis=1),
                np.zeros(len(rows)),
                np.zeros(len(rows)),
            )
            for m in alike if nearest == split else ():
                if all(getattr(m.point, name) == value for name, value in preferred.items()):
                    fits = np.abs(m.size - centres) < SAME_SIZE
                    for name, column in layout.exact.items():
                        fits &= np.broadcast_to(np.asarray(column), len(sizes))[rows] == getattr(
                            m.point, name
                        )
                    same, times = same + fits * m.ratio, times + fits
            measured = times > 0
            ratios[rows[measured]] = (same[measured] / times[measured])[:, None]
        return ratios

    def of_transfers(
        self, shape: Shape, role: str, device: Device, way: Way
    ) -> tuple[float, tuple[Point, ...]]:
        """The mean ratio of all transfers that go this way, 1 without any, and their points."""
        found = self._alike("transfer", shape, role, device, way)
        return float(np.mean([m.ratio for m in found])) if found else 1.0, tuple(
            m.point for m in found
        )

    def _alike(
        self, call: str, shape: Shape, role: str, device: Device, way: Way | None = None
    ) -> list[Measured]:
        return self._points.get(_key(call, shape, role, device, way), []) if self._points else []


def _nearest(found: Sequence[Measured], split: int) -> int:
    """The measured split that is nearest to this one, the smaller of two."""
    return min((abs(np.log(_split(m.point) / split)), _split(m.point)) for m in found)[1]


def _like(
    found: Sequence[Measured], split: int, role: str, preferred: Mapping[str, object]
) -> list[Measured]:
    """Of the points with this split those of the role, if any (another of its shape and head will
    do), and with what is preferred, as far as there are any."""
    alike = [m for m in found if _split(m.point) == split]
    alike = [m for m in alike if m.point.role == role] or alike
    for name, value in preferred.items():
        alike = [m for m in alike if getattr(m.point, name) == value] or alike
    return alike


def _curve(alike: Sequence[Measured]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The mean ratio at each size that was measured."""
    sizes = np.unique([m.size for m in alike])
    return sizes, np.array(
        [np.mean([m.ratio for m in alike if m.size == known]) for known in sizes]
    )


def way_of(*, shared: bool, separate: bool) -> Way:
    """Of a transfer to engines on the actor's GPUs (`shared`), elsewhere (`separate`), or both."""
    return "none" if not shared else "some" if separate else "all"


def _key(call: str, shape: Shape, role: str, device: Device, way: Way | None) -> object:
    """A role matters by its head; of a host call it is the name. Only a transfer goes a way."""
    if call == "host":
        return call, role
    if call in ("wake", "offload"):
        return call, shape, role == "rollout", device
    return call, shape, head_of(role), device, way if call == "transfer" else None


def _split(point: Point) -> int:
    return (
        point.tensor_parallel
        if point.call == "generate" or point.role == "rollout"
        else point.shard
    )


def _size_and_roofline(
    point: Point, shape: Shape, device: Device, cluster: Cluster
) -> tuple[float, float]:
    """Logarithm of a point's size, and what the roofline says of it."""
    layout, place = trainer_of(point, device)
    split = split_of(layout, place)
    if point.call == "host":
        return float(np.log(point.sequences)), float(
            host_seconds(np.array(point.prompt_tokens + point.response_tokens))
        )
    if point.call == "transfer":
        seconds = sync_cost(
            shape,
            split,
            device,
            cluster,
            point.tensor_parallel,
            same_node=point.nodes == 1,
            shared=point.shared or point.partly,
            separate=not point.shared,
        )
        return 0.0, seconds
    if point.call in ("wake", "offload"):
        if point.role == "rollout":
            count = engine_weight_bytes(shape, point.tensor_parallel, device)
        else:
            count = offloaded_bytes(
                shape, point.role, point.shard, point.offload, device, train=True
            )
        return 0.0, max(1, count) / device.host_bandwidth
    prompts, responses = lengths_of(point)
    if point.call == "generate":
        engines = [engine_speed(shape, point.tensor_parallel, device)] * point.engines
        slots, limit = point.concurrency or point.sequences, int(responses.max())
        generated = (
            generation_seconds(prompts, responses, engines, slots, limit)[0]
            + device.overhead_seconds
        )
        return float(np.log(point.sequences / point.engines)), float(generated)
    head, total = head_of(point.role), prompts + responses
    if point.call == "infer":
        cost = infer_cost(
            shape, head, split, device, cluster, shares(total, point.sequences, point.gpus)
        )
    else:
        work = shares(total, point.minibatch or point.sequences, point.gpus)
        cost = train_cost(shape, head, split, device, cluster, work, point.epochs)
    return float(np.log(total.sum() / point.gpus)), float(cost.compute[0] + cost.transfer[0])


def trainer_of(point: Point, device: Device) -> tuple[TrainerRole, Place]:
    """The trainer's layout that a point was measured with, and its GPUs, as evenly over the nodes
    as they go."""
    each, left = divmod(point.gpus, point.nodes)
    place = Place(parts=tuple(each + (node < left) for node in range(point.nodes)), device=device)
    layout = TrainerRole(
        pools=("measured",),
        shard=point.shard,
        replicas=point.gpus // point.shard,
        micro_batch_tokens=point.micro_batch_tokens
        or max(1, point.prompt_tokens + point.response_tokens),
        recompute=point.recompute,
        offload=point.offload,
    )
    return layout, place


def lengths_of(point: Point) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Prompt and response lengths [1, sequences] of a point; totals are spread evenly."""
    prompts = _evenly(point.prompt_tokens, point.sequences)
    responses = np.array(
        point.response_lengths or _evenly(point.response_tokens, point.sequences), dtype=np.int64
    )
    return prompts[None], responses[None]


def _evenly(total: int, count: int) -> NDArray[np.int64]:
    return np.diff(np.arange(count + 1) * total // count)


def host_seconds(tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of a call on the controller over so many tokens."""
    return np.asarray(HOST_SECONDS + HOST_SECONDS_PER_TOKEN * tokens, dtype=np.float64)
