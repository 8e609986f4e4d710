"""A plan's GPUs as a Ray placement group, and the processes on them."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from executor.fleet.asking import Rank, ask, measure_offset, to_each
from executor.fleet.session import ENVIRONMENT, in_time
from executor.fleet.worker import Worker
from planner.spec.errors import UserError
from planner.spec.files import profiles_dir, read_data
from planner.spec.machine import memory_bytes
from planner.spec.plan import Gpu, Plan

PLACING_SECONDS = 60.0
NODE_CHECK_SECONDS = 1.0  # between two looks at whether the nodes are still there


W = TypeVar("W", bound=Worker)
# Class of a process, its GPUs, what it was made for.
Key = tuple[type[Worker], tuple[Gpu, ...], str]


@dataclass(frozen=True, kw_only=True)
class Seat:
    """One GPU as Ray gave it: a bundle of the placement group. `device` is its CUDA index; None for
    a core."""

    group: PlacementGroup
    bundle: int
    device: str | None = None


def needed(plan: Plan) -> int:
    """GPUs in the plan's pools."""
    return plan.gpus_of(tuple(plan.pools))


def resource_of(plan: Plan) -> str:
    """The resource of Ray that stands for a GPU of the plan: a GPU, or a CPU slot where cores stand
    in for GPUs."""
    kinds = {plan.device_of(pool).kind for pool in plan.pools}
    return "GPU" if "cuda" in kinds else "CPU"


class Fleet:
    """The GPUs of a plan, reserved, and the processes started on them. One plan after another may
    use a fleet, if it was made for all of their GPUs: processes stay, and are configured again."""

    def __init__(
        self, gpus: Sequence[Gpu], resource: str, kinds: Mapping[int, str] | None = None
    ) -> None:
        """`kinds`: the kind of GPU of the plan's nodes. Raises UserError if Ray has fewer GPUs than
        that, or not on nodes that correspond to the given ones."""
        self._seats = _reserve(gpus, resource, kinds or {})
        self._processes: dict[Key, Rank[Any]] = {}

    def process(self, worker: type[W], gpus: tuple[Gpu, ...], made_for: str = "") -> Rank[W]:
        """The process of a class on some GPUs, all of which it sees; it lives at the first one.
        Without GPUs it may be anywhere. Started if there is none yet that is made for this, but not
        waited for."""
        key = worker, gpus, made_for
        if key not in self._processes:
            self._processes[key] = start(worker, [self._seats[gpu] for gpu in gpus])
        return cast(Rank[W], self._processes[key])

    def again(self, worker: type[W], gpus: tuple[Gpu, ...], made_for: str = "") -> Rank[W]:
        """A fresh process in the place of one that died or hangs."""
        self.end(worker, gpus, made_for)
        return self.process(worker, gpus, made_for)

    def end(self, worker: type[Worker], gpus: tuple[Gpu, ...], made_for: str = "") -> None:
        """End a process, whatever it is doing, if there is one."""
        if (old := self._processes.pop((worker, gpus, made_for), None)) is not None:
            stop([old])

    def retire(
        self,
        worker: type[Worker],
        gpus: Sequence[Gpu],
        keep: Sequence[tuple[tuple[Gpu, ...], str]],
    ) -> None:
        """End the processes of a class on any of these GPUs, except for what is to stay: their GPUs
        and what they are made for. Those hold memory even when nobody asks them."""
        stays = {(worker, *kept) for kept in keep}
        for key in list(
            self._processes
        ):  # a copy, for another plan may be starting its processes meanwhile
            if key[0] is worker and key not in stays and {*key[1]} & {*gpus}:
                stop([self._processes.pop(key)])

    @property
    def devices(self) -> dict[Gpu, str]:
        """The CUDA index of each GPU; none of cores."""
        return {gpu: seat.device for gpu, seat in self._seats.items() if seat.device is not None}

    def close(self) -> None:
        """End the processes at once, whatever they are doing, and free the GPUs."""
        with in_time():
            stop(list(self._processes.values()))
            remove_placement_group(next(iter(self._seats.values())).group)


def memory_of_nodes(plan: Plan) -> dict[int, int]:
    """Bytes of memory of the machines that stand for a plan's nodes in a cluster. Raises UserError
    if there are too few, or if they do not answer."""
    gpus = [gpu for pool in plan.pools.values() for gpu in pool.gpus]
    kinds = {node: plan.cluster.nodes[node].device for node, _ in gpus}
    _check_count(len(gpus), resource_of(plan))
    nodes = _match_nodes(gpus, resource_of(plan), kinds)
    probe = ray.remote(num_cpus=0)(memory_bytes)
    asked = [
        probe.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=there, soft=False)
        ).remote()
        for there in nodes.values()
    ]
    return dict(zip(nodes, _answers(asked, "memory"), strict=True))


def _answers(asked: list[Any], what: str) -> list[Any]:
    """What nodes answer. Raises UserError."""
    try:
        found: list[Any] = ray.get(asked, timeout=PLACING_SECONDS)
    except ray.exceptions.GetTimeoutError:
        raise UserError(
            f"Ray's nodes did not name their {what} within {PLACING_SECONDS:.0f} s; check that "
            "they are alive"
        ) from None
    return found


def _reserve(gpus: Sequence[Gpu], resource: str, kinds: Mapping[int, str]) -> dict[Gpu, Seat]:
    """Each GPU's seat, on the Ray node that stands for its node. A node that is lost meanwhile is
    replaced."""
    deadline = time.monotonic() + PLACING_SECONDS
    while time.monotonic() < deadline:
        if not _alive():
            raise UserError(
                "Ray takes its node for dead: its processes (raylet, gcs_server) were killed or "
                "stopped, or the machine was too busy for a minute; go on with --resume"
            )
        _check_count(len(gpus), resource)
        nodes = _match_nodes(gpus, resource, kinds)
        group = placement_group(
            [{resource: 1} for _ in gpus],
            bundle_label_selector=[{"ray.io/node-id": nodes[node]} for node, _ in gpus],
        )
        if _is_placed(group, set(nodes.values()), deadline):
            seats = {gpu: Seat(group=group, bundle=bundle) for bundle, gpu in enumerate(gpus)}
            return _with_devices(seats) if resource == "GPU" else seats
        remove_placement_group(group)
    raise UserError(
        f"Ray did not free {len(gpus)} {resource}s within {PLACING_SECONDS:.0f} s; check what else "
        "uses them"
    )


def _check_count(needed: int, resource: str) -> None:
    """Raise UserError if Ray has fewer GPUs, or cores, than are needed."""
    has = int(ray.cluster_resources().get(resource, 0))
    if has < needed:
        raise UserError(
            f"{needed} {resource}s are needed and Ray has {has}; start more nodes, search a plan "
            "for fewer, or play the plan with `plan execute --rehearse`"
        )


def _is_placed(group: PlacementGroup, nodes: set[str], deadline: float) -> bool:
    """Whether Ray places a group by then; not waited for any longer when one of its nodes is
    gone."""
    while time.monotonic() < deadline and nodes <= {node["NodeID"] for node in _alive()}:
        if group.wait(NODE_CHECK_SECONDS):
            return True
    return False


def _alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _match_nodes(gpus: Sequence[Gpu], resource: str, kinds: Mapping[int, str]) -> dict[int, str]:
    """Plan node -> Ray node id, the fullest plan node to the largest Ray node with GPUs of its
    kind."""
    wanted = Counter(node for node, _ in gpus)
    free = sorted(_alive(), key=lambda node: (-node["Resources"].get(resource, 0), node["NodeID"]))
    found: dict[int, str] = {}
    for node in sorted(wanted, key=lambda node: (-wanted[node], node)):
        kind = kinds.get(node, "")
        largest = next((there for there in free if _may_be(there, kind)), None)
        has = int(largest["Resources"].get(resource, 0)) if largest else 0
        if largest is None or has < wanted[node]:
            raise UserError(
                f"the plan uses {wanted[node]} {resource}s of its node {node}, but Ray's matching "
                f"node has {has}"
                f"{f' of kind {kind}' if kind and resource == 'GPU' else ''}; "
                "search a plan for the nodes that there are"
            )
        free.remove(largest)
        found[node] = largest["NodeID"]
    return found


def _may_be(node: Mapping[str, Any], kind: str) -> bool:
    """Whether a Ray node's GPUs may be of a kind. Ray names those it knows; a cluster file may have
    other names."""
    prefix = "accelerator_type:"
    named = [name.removeprefix(prefix) for name in node["Resources"] if name.startswith(prefix)]
    if not named or kind not in read_data(profiles_dir() / "devices.toml"):
        return True
    return any(name.split("-")[0] == kind.upper() for name in named)


def _with_devices(seats: dict[Gpu, Seat]) -> dict[Gpu, Seat]:
    """Ask in each bundle which GPU it is. The processes themselves hold no GPU of Ray's, because
    several share one and an engine may span several."""

    def device() -> str:
        return str(ray.get_gpu_ids()[0])

    probe = ray.remote(num_cpus=0, num_gpus=1)(device)
    asked = [probe.options(scheduling_strategy=_strategy(seat)).remote() for seat in seats.values()]
    found = _answers(asked, "GPUs")
    given = {
        gpu: replace(seat, device=device)
        for (gpu, seat), device in zip(seats.items(), found, strict=True)
    }
    return _in_order(given)


def _in_order(given: Mapping[Gpu, Seat]) -> dict[Gpu, Seat]:
    """Give the plan's GPUs of each node the devices in the order of their numbers, in whatever
    order Ray chose them. Ranks that are neighbours in the plan are then neighbours on the node."""
    found: dict[Gpu, Seat] = {}
    for node in dict.fromkeys(node for node, _ in given):
        gpus = sorted(gpu for gpu in given if gpu[0] == node)
        seats = sorted(
            (given[gpu] for gpu in gpus),
            key=lambda seat: (len(seat.device or ""), seat.device or ""),
        )
        found |= zip(gpus, seats, strict=True)
    return found


def _strategy(seat: Seat) -> PlacementGroupSchedulingStrategy:
    return PlacementGroupSchedulingStrategy(
        placement_group=seat.group, placement_group_bundle_index=seat.bundle
    )


def start(worker: type[W], seats: Sequence[Seat] = ()) -> Rank[W]:
    """Start a process without waiting for it."""
    options: dict[str, Any] = {"num_cpus": 0}
    if seats:
        options["scheduling_strategy"] = _strategy(seats[0])
        if devices := [seat.device for seat in seats if seat.device is not None]:
            visible = {
                "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
                "CUDA_VISIBLE_DEVICES": ",".join(devices),
            }
            options["runtime_env"] = {"env_vars": {**ENVIRONMENT, **visible}}
    actor: Any = ray.remote(worker)
    return Rank(name="", handle=actor.options(**options).remote())


def connect(ranks: Sequence[Rank[W]]) -> list[Rank[W]]:
    """Wait until the processes answer, and measure their clocks."""
    ask(to_each(ranks, Worker.now))
    return [replace(rank, offset=measure_offset(rank)) for rank in ranks]


def stop(ranks: Sequence[Rank[Any]]) -> None:
    """End processes at once, whatever they are doing."""
    with in_time():
        for rank in ranks:
            ray.kill(rank.handle)
