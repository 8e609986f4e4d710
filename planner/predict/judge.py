"""How good estimates are: measured points against what the cost model says of them without knowing
them.

Two judgements. Each third of the points in turn is held out, and estimated from the other two;
points of the same layout and number of sequences are held out together, for one role's would tell
the other's. And a profile's own `held_out` points, of a batch and lengths that nothing else was
measured with, are estimated from all of its points. An estimate comes from the cost model that the
search uses, beside that of the same model without any profile.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.predict.correction import lengths_of, trainer_of
from planner.predict.cost import CostModel
from planner.predict.profile import MEASURED, WORK, Point, Profile
from planner.spec.cluster import Cluster, Device
from planner.spec.engines import engine_for
from planner.spec.lengths import Fixed
from planner.spec.plan import RolloutRole
from planner.spec.workload import Model, Ppo, Shape, Workload

THIRDS = 3


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A point of `profile`, the seconds `estimated` from points that were not held out, and the
    `roofline`'s alone. Without any point like it the two are the same. `unseen`: one of the
    profile's own held-out points."""

    profile: Profile
    point: Point
    estimated: float
    roofline: float
    unseen: bool

    @property
    def informed(self) -> bool:
        """Whether any point was like it."""
        return self.estimated != self.roofline

    @property
    def error(self) -> float:
        """Estimated over measured seconds, less 1."""
        return self.estimated / self.point.seconds - 1

    @property
    def roofline_error(self) -> float:
        return self.roofline / self.point.seconds - 1


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Of the points of one kind of call and role. `noise` is the median of their spreads over their
    seconds; each pair is the median of the errors without their sign, and the worst error.
    `interpolation` is of the `informed` points alone, None if there are none."""

    call: str
    role: str
    points: int
    informed: int
    noise: float
    interpolation: tuple[float, float] | None
    roofline: tuple[float, float]


def judge(profiles: Sequence[Profile], cluster: Cluster) -> list[Judged]:
    """All points of the profiles, which are used together, in their order: first held out by
    thirds, then unseen."""
    third = _thirds(profiles)
    known = [[_without(profile, turn, third) for profile in profiles] for turn in range(THIRDS)]
    found = [
        _judged(profile, point, known[third[_cell(profile, point)]], cluster, unseen=False)
        for profile in profiles
        for point in profile.points
    ]
    for profile in profiles:
        found += [
            _judged(profile, point, profiles, cluster, unseen=True) for point in profile.held_out
        ]
    return found


def errors_of(judged: Sequence[Judged]) -> list[Errors]:
    """By kind of call and role, in their order."""
    kinds = dict.fromkeys((each.point.call, each.point.role) for each in judged)
    return [
        _errors([j for j in judged if (j.point.call, j.point.role) == kind])
        for kind in sorted(kinds, key=_rank)
    ]


def _rank(kind: tuple[str, str]) -> int:
    return ("generate", "infer", "train", "transfer", "wake", "offload", "host").index(kind[0])


def _errors(judged: Sequence[Judged]) -> Errors:
    informed = [each.error for each in judged if each.informed]
    return Errors(
        call=judged[0].point.call,
        role=judged[0].point.role,
        points=len(judged),
        informed=len(informed),
        noise=float(np.median([each.point.spread / each.point.seconds for each in judged])),
        interpolation=_median_and_worst(informed) if informed else None,
        roofline=_median_and_worst([each.roofline_error for each in judged]),
    )


def _median_and_worst(errors: Sequence[float]) -> tuple[float, float]:
    return float(np.median(np.abs(errors))), max(errors, key=abs)


# --- what is held out ---


def _thirds(profiles: Sequence[Profile]) -> dict[str, int]:
    """In turn, the cells of each kind of call, in the order of the profiles."""
    found: dict[str, int] = {}
    counts: dict[str, int] = {}
    for profile in profiles:
        for point in profile.points:
            cell = _cell(profile, point)
            if cell not in found:
                found[cell] = counts.get(point.call, 0) % THIRDS
                counts[point.call] = counts.get(point.call, 0) + 1
    return found


def _cell(profile: Profile, point: Point) -> str:
    """All that is held out together: the layout and the number of sequences, whosever call."""
    alike = point.model_dump_json(exclude=MEASURED | (WORK - {"sequences"}) | {"role", "model"})
    role = point.role if point.call == "host" else point.role == "rollout"
    return f"{profile.device} {profile.shape_of(point)} {role} {alike}"


def _without(profile: Profile, turn: int, third: dict[str, int]) -> Profile:
    points = tuple(point for point in profile.points if third[_cell(profile, point)] != turn)
    return profile.model_copy(update={"points": points, "held_out": ()})


# --- estimates ---


def _judged(
    profile: Profile, point: Point, known: Sequence[Profile], cluster: Cluster, *, unseen: bool
) -> Judged:
    shape, device = profile.shape_of(point), cluster.devices[profile.device]
    estimated, roofline = (estimate(point, shape, device, cluster, which) for which in (known, ()))
    return Judged(
        profile=profile, point=point, estimated=estimated, roofline=roofline, unseen=unseen
    )


def estimate(
    point: Point, shape: Shape, device: Device, cluster: Cluster, profiles: Sequence[Profile] = ()
) -> float:
    """Seconds that the cost model expects of a point's call, in its layout and with its lengths."""
    lengths = lengths_of(point) if point.sequences else (np.ones((1, 1), dtype=np.int64),) * 2
    model = CostModel(_workload(point, shape, *lengths), cluster, profiles, lengths=lengths)
    layout, place = trainer_of(point, device)
    rollout = RolloutRole(
        engine=engine_for(device.kind),
        pools=("measured",),
        tensor_parallel=point.tensor_parallel,
        replicas=point.engines,
        memory_fraction=1.0,
        concurrency=point.concurrency or max(1, point.sequences),
        offload=point.call in ("wake", "offload"),
    )
    if point.call == "host":
        return float(model.host(point.role).seconds[0])
    if point.call == "transfer":
        places, shared = [place] * (1 + point.partly), point.shared or point.partly
        return float(
            model.sync(
                layout, place, rollout, places, same_node=point.nodes == 1, shared=shared
            ).seconds[0]
        )
    if point.role == "rollout":
        found = model.generate(rollout, [place])
    elif point.call == "train" or (point.call != "infer" and point.role in ("actor", "critic")):
        found = model.train(point.role, layout, place)
    else:
        found = model.infer(point.role, layout, place)
    return float((found.parts[point.call] if rollout.offload else found.seconds)[0])


def _workload(
    point: Point, shape: Shape, prompts: NDArray[np.int64], responses: NDArray[np.int64]
) -> Workload:
    """One that has the point's batch and longest lengths; a move is the same with any batch."""
    model, batch = Model(shape=shape, random_weights=True), max(1, point.sequences)
    return Workload(
        name="measured",
        batch=batch,
        minibatch=point.minibatch or batch,
        prompt=Fixed(tokens=max(1, int(prompts.max()))),
        response=Fixed(tokens=max(1, int(responses.max()))),
        actor=model,
        critic=model,
        reference=model,
        reward=model,
        ppo=Ppo(epochs=point.epochs),
    )
