"""Measured seconds of calls, as a file."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby, permutations
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from planner.predict.measurement import Batched, OnGpus
from planner.predict.points import HostPoint, Point, RolloutPoint, TrainerPoint
from planner.spec.cluster import Cluster
from planner.spec.errors import UserError
from planner.spec.files import File
from planner.spec.wording import counted
from planner.spec.workload import Shape, Workload

# Keys of a point that say what was measured, and how much work that was.
FIGURES = {"seconds", "spread", "repeats", "peak_bytes", "reserved_bytes", "allocated_bytes"}
WORK = {"sequences", "prompt_tokens", "response_tokens", "response_lengths"}


class Profile(File):
    """Points of one device (its name in the cluster) and one model shape. `held_out` are points of
    a batch and length that no other point has: predictions are judged by them and never use them.
    `measured` names what was measured of the `workload`, for a measurement that goes on later."""

    SCHEMA: ClassVar[str] = "splitplan/profile/1"

    device: str
    model: Shape
    versions: dict[str, str] = Field(default_factory=dict)
    date: str = ""
    command: str = ""
    points: tuple[Point, ...]
    held_out: tuple[Point, ...] = ()
    workload: str = ""  # its name and the first digits of its sha256
    measured: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """The hash of the content. The file's whitespace does not matter."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def shape_of(self, point: Point) -> Shape:
        return point.model or self.model


def load_profiles(paths: Iterable[Path]) -> tuple[Profile, ...]:
    """Raises UserError."""
    return tuple(Profile.read(path) for path in paths)


def check_profiles(profiles: Sequence[Profile], workload: Workload, cluster: Cluster) -> None:
    """Raise UserError for a profile of another device, or one that says nothing about any role of
    the workload."""
    shapes = [model.shape for model in workload.models.values()]
    for number, profile in enumerate(profiles, 1):
        name = (
            f"profile {number} ({profile.device}, hidden {profile.model.hidden}, "
            f"{profile.model.layers} layers)"
        )
        if profile.device not in cluster.devices:
            has = ", ".join(cluster.devices)
            raise UserError(
                f"{name} is for another device: the cluster has {has}; measure there with `plan "
                "profile`"
            )
        if not profile.points:
            raise UserError(
                f"{name} has no points yet; measure them with `plan profile` and the same --out, "
                "and more --minutes"
            )
        on_gpus = [point for point in profile.points if isinstance(point, OnGpus)]
        if not any(profile.shape_of(point) in shapes for point in on_gpus):
            raise UserError(
                f"{name} is for another model: no role of workload {workload.name!r} has that "
                "shape; leave it out or "
                "measure this workload with `plan profile`"
            )


# --- measurements that are not monotone ---

BatchPoint = TrainerPoint | RolloutPoint | HostPoint


def warnings_of(profile: Profile) -> list[str]:
    """One line for each layout whose points are not monotone by more than their spreads: more work
    in less time, or the same work on more GPUs in more. They are used as they are."""
    points = [point for point in profile.points if isinstance(point, Batched)]
    more_work = _turned(points, WORK, _work, rising=True)
    more_gpus = _turned(points, {"gpus", "nodes", "engines"}, _machines, rising=False)
    found = []
    for less, most in more_work:
        found.append(
            f"{_named(less)} on {_gpus(less)}: {_tokens(less)} took {less.seconds:.3g} s, but "
            f"{_tokens(most)} took {most.seconds:.3g} s; more work in less time is used as measured"
        )
    for less, most in more_gpus:
        found.append(
            f"{_named(less)} over {_tokens(less)}: {_gpus(less)} took {less.seconds:.3g} s, but "
            f"{_gpus(most)} took {most.seconds:.3g} s; more GPUs taking longer is used as measured"
        )
    return found


def _turned(
    points: Sequence[BatchPoint],
    varied: set[str],
    size: Callable[[BatchPoint], tuple[int, ...]],
    rising: bool,
) -> list[tuple[BatchPoint, BatchPoint]]:
    """Pairs of a smaller and a larger point that differ in the `varied` fields only and whose
    seconds contradict `rising` by more than both spreads; for each set of such points the pair that
    does so most."""

    def rest(point: BatchPoint) -> str:
        return point.model_dump_json(exclude=varied | FIGURES)

    def excess(pair: tuple[BatchPoint, BatchPoint]) -> float:
        quick, slow = pair[::-1] if rising else pair
        return (slow.seconds - slow.spread) - (quick.seconds + quick.spread)

    def is_smaller(less: BatchPoint, most: BatchPoint) -> bool:
        """Whether no part is larger; two samples of one batch are never quite the same."""
        parts = zip(size(less), size(most), strict=True)
        return all(a <= b for a, b in parts) and sum(size(less)) < 0.95 * sum(size(most))

    found = []
    for _, alike in groupby(sorted(points, key=rest), key=rest):
        pairs = [pair for pair in permutations(alike, 2) if is_smaller(*pair)]
        worst = max(pairs, key=excess, default=None)
        if worst is not None and excess(worst) > 0:
            found.append(worst)
    return found


def _work(point: BatchPoint) -> tuple[int, ...]:
    """Work that is no larger in any of these takes no longer. Generation takes as long as its
    longest response."""
    tokens = point.prompt_tokens, point.response_tokens
    return point.sequences, *tokens, point.longest_response


def _machines(point: BatchPoint) -> tuple[int, int]:
    """GPUs and engines; the controller's host counts as one."""
    gpus = point.gpus if isinstance(point, OnGpus) else 1
    return gpus, point.engines if isinstance(point, RolloutPoint) else 1


def _named(point: BatchPoint) -> str:
    call = f"{point.call} of {point.role}"
    match point:
        case RolloutPoint():
            return f"{call}, tensor parallel {point.tensor_parallel},"
        case TrainerPoint():
            return f"{call}, shard {point.shard},"
        case HostPoint():
            return call


def _gpus(point: BatchPoint) -> str:
    gpus, _ = _machines(point)
    return counted(gpus, "GPU")


def _tokens(point: BatchPoint) -> str:
    return f"{point.tokens:,} tokens of {point.sequences:,} sequences"
