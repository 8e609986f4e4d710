"""How good estimates are: measured points against what the cost model says of them without knowing
them.

Two judgements. Each third of the points in turn is held out, and estimated from the other two;
points of the same layout and number of sequences are held out together, for one role's would tell
the other's. And a profile's own `held_out` points, of a batch and lengths that nothing else was
measured with, are estimated from all of its points. An estimate comes from the cost model that the
search uses. It is compared with that of the same model without any profile.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.predict.columns import Grid, Integers
from planner.predict.cost import CostModel
from planner.predict.memory import moved_bytes
from planner.predict.points import (
    HostPoint,
    MovePoint,
    Point,
    RolloutPoint,
    TrainerPoint,
    TransferPoint,
)
from planner.predict.profile import FIGURES, WORK, Profile
from planner.predict.roofline import sharding_of
from planner.spec.algorithm import Algorithm
from planner.spec.cluster import Cluster, Device
from planner.spec.engines import engine_for
from planner.spec.lengths import Fixed
from planner.spec.plan import RolloutRole
from planner.spec.workload import Model, RewardModel, Shape, Workload

CALL_ORDER = ("generate", "infer", "train", "transfer", "wake", "offload", "host")
TURNS = 3  # in which points are held out


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
    """The errors of the points of one kind of call and role. `noise` is the median of their spreads
    over their seconds. Each pair is the median of the errors without their sign, and the worst
    error. `interpolation` covers the `informed` points alone, and is None if there are none."""

    call: str
    role: str
    points: int
    informed: int
    noise: float
    interpolation: tuple[float, float] | None
    roofline: tuple[float, float]


def judge(profiles: Sequence[Profile], cluster: Cluster) -> list[Judged]:
    """All points of the profiles, which are used together, in their order: first those that are
    held out by thirds, then the unseen ones."""
    turn_of = _turns(profiles)
    known = [[_without(profile, turn, turn_of) for profile in profiles] for turn in range(TURNS)]
    found = []
    for profile in profiles:
        for point in profile.points:
            others = known[turn_of[_cell(profile, point)]]
            found.append(_judged(profile, point, others, cluster, unseen=False))
    for profile in profiles:
        for point in profile.held_out:
            found.append(_judged(profile, point, profiles, cluster, unseen=True))
    return found


def errors_of(judged: Sequence[Judged]) -> list[Errors]:
    """The errors of each call and role, in the order of CALL_ORDER."""
    groups: dict[tuple[str, str], list[Judged]] = {}
    for each in judged:
        groups.setdefault((each.point.call, each.point.role), []).append(each)
    in_order = sorted(groups, key=lambda group: CALL_ORDER.index(group[0]))
    return [_errors(groups[group]) for group in in_order]


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


def _turns(profiles: Sequence[Profile]) -> dict[str, int]:
    """The turn in which each cell is held out: those of one kind of call take turns, in the order
    of the profiles."""
    found: dict[str, int] = {}
    counts: dict[str, int] = {}
    for profile in profiles:
        for point in profile.points:
            cell = _cell(profile, point)
            if cell not in found:
                found[cell] = counts.get(point.call, 0) % TURNS
                counts[point.call] = counts.get(point.call, 0) + 1
    return found


def _cell(profile: Profile, point: Point) -> str:
    """A name for the points that are held out together: those of one layout and number of
    sequences, of whatever role."""
    alike = point.model_dump_json(exclude=FIGURES | (WORK - {"sequences"}) | {"role", "model"})
    role = point.role if point.call == "host" else point.role == "rollout"
    return f"{profile.device} {profile.shape_of(point)} {role} {alike}"


def _without(profile: Profile, turn: int, turn_of: dict[str, int]) -> Profile:
    points = tuple(point for point in profile.points if turn_of[_cell(profile, point)] != turn)
    return profile.changed(points=points, held_out=())


# --- estimates ---


def _judged(
    profile: Profile, point: Point, known: Sequence[Profile], cluster: Cluster, *, unseen: bool
) -> Judged:
    shape, device = profile.shape_of(point), cluster.devices[profile.device]
    return Judged(
        profile=profile,
        point=point,
        estimated=estimate(point, shape, device, cluster, known),
        roofline=estimate(point, shape, device, cluster),
        unseen=unseen,
    )


def estimate(
    point: Point, shape: Shape, device: Device, cluster: Cluster, profiles: Sequence[Profile] = ()
) -> float:
    """Seconds that the cost model expects of a point's call, in its layout and with its lengths."""
    match point:
        case TransferPoint() | MovePoint():
            one = np.ones((1, 1), dtype=np.int64)  # neither depends on the batch
            model = CostModel(_workload(shape, one, one), cluster, profiles)
        case TrainerPoint():
            prompts, responses = point.lengths()
            minibatch = point.minibatch or point.sequences
            workload = _workload(shape, prompts, responses, minibatch, point.epochs)
            model = CostModel(workload, cluster, profiles, lengths=(prompts, responses))
        case RolloutPoint() | HostPoint():
            prompts, responses = point.lengths()
            workload = _workload(shape, prompts, responses)
            model = CostModel(workload, cluster, profiles, lengths=(prompts, responses))
    match point:
        case HostPoint():
            found = model.host(point.role)
        case RolloutPoint():
            slots = point.concurrency or point.sequences
            layout = _engines(device, point.tensor_parallel, point.engines, slots)
            found = model.generate(layout, [point.place(device)])
        case TrainerPoint():
            call = model.train if point.call == "train" else model.infer
            found = call(point.role, point.trainer(), point.place(device))
        case TransferPoint():
            place = point.place(device)
            found = model.sync(
                point.layout(),
                place,
                _engines(device, point.tensor_parallel, point.engines, 1),
                [place, place] if point.partly else [place],
                same_node=point.nodes == 1,
                shared=point.meets_shared,
            )
        case MovePoint():
            return _move_seconds(point, shape, device, model)
    return float(found.seconds[0])


def _move_seconds(point: MovePoint, shape: Shape, device: Device, model: CostModel) -> float:
    if point.role == "rollout":
        moves = model.rollouts.moves(point.tensor_parallel, device)
    else:
        grid = Grid.of(point.layout(offload=point.offload))
        moved = moved_bytes(shape, point.role, grid, device, train=True)
        sharding = sharding_of(grid, point.place(device))
        moves = model.trainers.moves(point.role, sharding, moved, device)
    return (moves.wake if point.call == "wake" else moves.offload).item()


def _engines(device: Device, tensor_parallel: int, engines: int, slots: int) -> RolloutRole:
    return RolloutRole(
        engine=engine_for(device.kind),
        pools=("measured",),
        tensor_parallel=tensor_parallel,
        replicas=engines,
        memory_fraction=1.0,
        concurrency=slots,
    )


def _workload(
    shape: Shape,
    prompts: Integers,
    responses: Integers,
    minibatch: int | None = None,
    epochs: int = 1,
) -> Workload:
    """A workload that has a point's batch and longest lengths."""
    model, batch = Model(shape=shape, random_weights=True), prompts.shape[1]
    return Workload(
        name="measured",
        batch=batch,
        minibatch=minibatch or batch,
        prompt=Fixed(tokens=max(1, int(prompts.max()))),
        response=Fixed(tokens=max(1, int(responses.max()))),
        actor=model,
        critic=model,
        reference=model,
        reward=RewardModel(shape=shape, random_weights=True),
        algorithm=Algorithm(epochs=epochs),
    )
