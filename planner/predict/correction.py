"""Measured points against the roofline: how much longer a call really takes, and how well that is
known.

Each point gives a ratio, measured seconds over the roofline's for the very same call. A call asks
for the ratio of the points that are like it (`likeness.py`), interpolated linearly over the
logarithm of its size (tokens per rank, sequences per engine) and held constant beyond the outermost
points. A transfer asks for one ratio, the mean of those that go its way: it is a small part of a
step, and so the search's bounds are exact about it.

An example. A forward pass was measured with 1,000 tokens per rank, where it took 1.2 times the
roofline's seconds, and with 4,000, where it took 1.1 times. One over 2,000 tokens is taken to last
1.15 times what the roofline says, for log 2,000 lies half way; one over 8,000 tokens 1.1 times.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.predict.columns import Booleans, Column, Integers, Seconds
from planner.predict.likeness import Likeness
from planner.predict.profile import Profile
from planner.spec.cluster import Cluster

Source = Literal["measured", "interpolated", "extrapolated", "roofline", "host"]

# Sizes whose logarithms differ by less are the same: no sampled batch is quite the expected one.
SAME_SIZE = 0.05


@dataclass(frozen=True, kw_only=True)
class KnownRatio:
    """The ratio of a point: measured over roofline seconds, at a logarithm of the size."""

    like: Likeness
    size: float
    ratio: float

    def has(self, preferred: Sequence[int]) -> bool:
        return self.like.preferred == tuple(preferred)


class Ratios(NamedTuple):
    """Ratios [n, S] of many calls in all scenarios, and the Source of each [n]."""

    values: Seconds
    sources: NDArray[np.str_]


class Corrections:
    """The ratios of some profiles' points on a cluster. A profile of a device that the cluster
    lacks is passed over (`profile.check_profiles` refuses it)."""

    def __init__(self, profiles: Sequence[Profile], cluster: Cluster) -> None:
        self._known: dict[Hashable, list[KnownRatio]] = {}
        for profile in profiles:
            device = cluster.devices.get(profile.device)
            for point in profile.points if device else ():
                assert device
                shape = profile.shape_of(point)
                like = point.likeness(shape, device)
                ratio = point.seconds / point.roofline(shape, device, cluster)
                known = KnownRatio(like=like, size=point.size(), ratio=ratio)
                self._known.setdefault(like.key, []).append(known)

    def ratios(self, like: Likeness, sizes: Seconds) -> Ratios:
        """The ratios of n calls at once. `sizes` [n, S] are logarithms; the values of `like` are
        columns [n], or one value for all. Without any like point they are 1, from the roofline."""
        count = len(sizes)
        known = self._known.get(like.key)
        if not known:
            return Ratios(np.ones_like(sizes), np.full(count, "roofline"))
        found = Ratios(np.empty_like(sizes), np.full(count, "extrapolated"))
        exact = [_column(value, count) for value in like.exact]
        for rows, split, preferred in _alike(like, count):
            nearest = _nearest_split(known, split)
            points = _preferred(known, nearest, like.role, preferred)
            at_sizes, ratios = _curve(points)
            centres = sizes[rows].mean(axis=1)
            found.values[rows] = np.interp(sizes[rows], at_sizes, ratios)
            if nearest != split:
                continue
            inside = at_sizes[0] - SAME_SIZE <= centres
            inside &= centres <= at_sizes[-1] + SAME_SIZE
            found.sources[rows[inside]] = "interpolated"
            same = [point for point in points if point.has(preferred)]
            means = _mean_of_same(same, centres, [column[rows] for column in exact])
            measured = ~np.isnan(means)
            found.values[rows[measured]] = means[measured, None]
            found.sources[rows[measured]] = "measured"
        return found

    def mean_ratio(self, key: Hashable) -> float:
        """The mean ratio of all points with this key, whatever their layouts; 1 without any."""
        known = self._known.get(key)
        return float(np.mean([point.ratio for point in known])) if known else 1.0

    def mean_source(self, like: Likeness) -> Source:
        """The source of such a mean for a call: measured if one of the points is of that call."""
        known = self._known.get(like.key, [])
        if any(point.like.exact == like.exact for point in known):
            return "measured"
        return "interpolated" if known else "roofline"


def _column(value: Column, count: int) -> Integers:
    return np.broadcast_to(np.asarray(value, dtype=np.int64), count)


def _alike(like: Likeness, count: int) -> Iterator[tuple[Integers, int, list[int]]]:
    """The rows of calls that have the same split and the same preferred values, and these."""
    columns = [_column(value, count) for value in (like.split, *like.preferred)]
    groups, group_of = np.unique(np.column_stack(columns), axis=0, return_inverse=True)
    for number, (split, *preferred) in enumerate(groups.tolist()):
        yield np.flatnonzero(group_of.reshape(-1) == number), split, preferred


def _nearest_split(known: Sequence[KnownRatio], split: int) -> int:
    """The measured split whose logarithm is nearest to this one's, the smaller of two."""
    splits = {point.like.split for point in known}
    return int(min(splits, key=lambda there: (abs(np.log(there / split)), there)))


def _preferred(
    known: Sequence[KnownRatio], split: int, role: str, preferred: Sequence[int]
) -> list[KnownRatio]:
    """The points with this split that come closest: those of the role, if there are any (otherwise
    another role of the same shape and head will do), and of these the ones with the preferred
    values, as far as there are any."""
    alike = [point for point in known if point.like.split == split]
    alike = [point for point in alike if point.like.role == role] or alike
    for number, value in enumerate(preferred):
        alike = [point for point in alike if point.like.preferred[number] == value] or alike
    return alike


def _curve(points: Sequence[KnownRatio]) -> tuple[Seconds, Seconds]:
    """The sizes that were measured, rising, and the mean ratio at each."""
    sizes = np.unique([point.size for point in points])
    means = [np.mean([point.ratio for point in points if point.size == size]) for size in sizes]
    return sizes, np.array(means)


def _mean_of_same(
    points: Sequence[KnownRatio], centres: Seconds, exact: Sequence[Integers]
) -> Seconds:
    """The mean ratio [n] of the points that have a call's size and exact values; NaN where none
    does. `centres` [n] are the mean sizes of the calls, `exact` columns [n]."""
    total, times = np.zeros(len(centres)), np.zeros(len(centres))
    for point in points:
        fits: Booleans = np.abs(point.size - centres) < SAME_SIZE
        for column, value in zip(exact, point.like.exact, strict=True):
            fits &= column == value
        total, times = total + fits * point.ratio, times + fits
    means = np.full(len(centres), np.nan)
    np.divide(total, times, out=means, where=times > 0)
    return means
