"""Measured seconds of calls, as a file."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby, permutations
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from planner.spec.cluster import Cluster
from planner.spec.errors import UserError
from planner.spec.files import Bytes, Count, File, Spec, Tokens
from planner.spec.plan import Offload
from planner.spec.workload import Epochs, Shape, Workload

Head = Literal["lm", "scalar"]
# Of a key that came later: files without it keep their sha256.
_LEFT_OUT_IF_FALSE = Field(exclude_if=lambda value: not value)


def head_of(role: str) -> Head:
    """A critic and a reward model have a scalar head instead of the vocabulary's."""
    return "scalar" if role in ("critic", "reward") else "lm"


class Point(Spec):
    """One call, measured alone: the median `seconds` of `repeats`, their spread (half the
    interquartile range), and the layout and the tokens that it was measured with.

    `prompt_tokens` and `response_tokens` are totals over the call's `sequences`; `response_lengths`
    gives each sequence's response in the order of the batch where they differ. `seconds` of a
    `wake` and of an `offload` belong to these moves alone; those of the other calls are without
    them. Of a `transfer`, `gpus` and `shard` are the actor's, `engines` and `tensor_parallel` the
    rollout's. A `host` call has its name as role. `peak_bytes` is what the fullest GPU had in use,
    `reserved_bytes` what the allocator of the process that ran the call held of it,
    `allocated_bytes` its tensors; 0 where that is not known."""

    call: Literal["generate", "infer", "train", "transfer", "wake", "offload", "host"]
    role: str
    gpus: Count = 1
    nodes: Count = 1
    shard: Count = 1
    micro_batch_tokens: Tokens | None = None
    recompute: bool = False
    offload: Offload = "none"  # what a wake or an offload moves
    tensor_parallel: Count = 1
    engines: Count = 1
    concurrency: Count | None = None
    shared: bool = False  # of a transfer: all engines are on the actor's GPUs
    partly: Annotated[bool, _LEFT_OUT_IF_FALSE] = (
        False  # of a transfer: some are, and some are elsewhere
    )
    sequences: Annotated[int, Field(ge=0, le=2**20)] = 0
    minibatch: Count | None = None
    epochs: Epochs = 1
    prompt_tokens: Bytes = 0
    response_tokens: Bytes = 0
    response_lengths: tuple[Tokens, ...] = ()
    seconds: PositiveFloat
    spread: NonNegativeFloat = 0.0
    repeats: PositiveInt = 1
    peak_bytes: Bytes = 0
    reserved_bytes: Bytes = 0
    allocated_bytes: Bytes = 0
    model: Shape | None = None  # where it is not the profile's

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.call in ("generate", "infer", "train", "host") and not self.sequences:
            raise ValueError(f"a point of {self.call} needs the number of its sequences")
        if self.minibatch and self.sequences % self.minibatch:
            raise ValueError(
                f"sequences = {self.sequences} is no multiple of minibatch = {self.minibatch}"
            )
        if self.nodes > self.gpus:
            raise ValueError(f"nodes = {self.nodes} is more than gpus = {self.gpus}")
        if self.gpus % self.shard:
            raise ValueError(f"shard = {self.shard} does not divide gpus = {self.gpus}")
        lengths = self.response_lengths
        if lengths and (len(lengths) != self.sequences or sum(lengths) != self.response_tokens):
            raise ValueError(
                "response_lengths must be one per sequence and add up to response_tokens"
            )
        return self


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
        """Of the content, whatever the file's whitespace."""
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
        if not any(
            profile.shape_of(point) in shapes for point in profile.points if point.call != "host"
        ):
            raise UserError(
                f"{name} is for another model: no role of workload {workload.name!r} has that "
                "shape; leave it out or "
                "measure this workload with `plan profile`"
            )


# --- measurements that are not monotone ---

MEASURED = {"seconds", "spread", "repeats", "peak_bytes", "reserved_bytes", "allocated_bytes"}
WORK = {"sequences", "prompt_tokens", "response_tokens", "response_lengths"}
GPUS = {"gpus", "nodes", "engines"}


def warnings_of(profile: Profile) -> list[str]:
    """One line for each layout whose points are not monotone by more than their spreads: more work
    in less time, or the same work on more GPUs in more. They are used as they are."""
    runs = [
        point for point in profile.points if point.call in ("generate", "infer", "train", "host")
    ]
    more = [
        f"{_named(less)} on {_gpus(less)}: {_tokens(less)} took {less.seconds:.3g} s, but "
        f"{_tokens(most)} took "
        f"{most.seconds:.3g} s; more work in less time is used as measured"
        for less, most in _turned(runs, WORK, _work, rising=True)
    ]
    wider = [
        f"{_named(less)} over {_tokens(less)}: {_gpus(less)} took {less.seconds:.3g} s, but "
        f"{_gpus(most)} took "
        f"{most.seconds:.3g} s; more GPUs taking longer is used as measured"
        for less, most in _turned(
            runs, GPUS, lambda point: (point.gpus, point.engines), rising=False
        )
    ]
    return more + wider


def _turned(
    points: Sequence[Point],
    varied: set[str],
    size: Callable[[Point], tuple[int, ...]],
    rising: bool,
) -> list[tuple[Point, Point]]:
    """Of the points that differ in the `varied` fields only, the smaller and the larger one whose
    seconds contradict `rising` most, where any do by more than both spreads."""

    def rest(point: Point) -> str:
        return point.model_dump_json(exclude=varied | MEASURED)

    def excess(pair: tuple[Point, Point]) -> float:
        quick, slow = pair[::-1] if rising else pair
        return (slow.seconds - slow.spread) - (quick.seconds + quick.spread)

    found = []
    for _, alike in groupby(sorted(points, key=rest), key=rest):
        pairs = [
            (less, most)
            for less, most in permutations(alike, 2)
            if all(a <= b for a, b in zip(size(less), size(most), strict=True))
            and sum(size(less))
            < 0.95 * sum(size(most))  # two samples of one batch are never quite the same
        ]
        worst = max(pairs, key=excess, default=None)
        if worst is not None and excess(worst) > 0:
            found.append(worst)
    return found


def _work(point: Point) -> tuple[int, ...]:
    """No other point has less to do that is nowhere above this. Generation takes as long as its
    longest response."""
    longest = max(
        point.response_lengths, default=-(-point.response_tokens // max(1, point.sequences))
    )
    return point.sequences, point.prompt_tokens, point.response_tokens, longest


def _named(point: Point) -> str:
    split = (
        f"tensor parallel {point.tensor_parallel}"
        if point.call == "generate"
        else f"shard {point.shard}"
    )
    return f"{point.call} of {point.role}" + ("" if point.call == "host" else f", {split},")


def _gpus(point: Point) -> str:
    return f"{point.gpus} GPU" + "s" * (point.gpus != 1)


def _tokens(point: Point) -> str:
    return (
        f"{point.prompt_tokens + point.response_tokens:,} tokens of {point.sequences:,} sequences"
    )
