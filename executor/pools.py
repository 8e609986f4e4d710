"""A plan's GPUs as a Ray placement group, and the processes on them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from executor.session import ENVIRONMENT
from executor.worker import Rank, Worker, ask, measure_offset
from planner.spec.errors import UserError
from planner.spec.plan import Gpu, Plan

PLACING_SECONDS = 60.0


Key = tuple[Callable[[], Worker], tuple[Gpu, ...], str]  # class of a process, its GPUs, what it was made for


@dataclass(frozen=True, kw_only=True)
class Seat:
    """One GPU as Ray gave it: a bundle of the placement group. `device` is its CUDA index; None for a core."""

    group: PlacementGroup
    bundle: int
    device: str | None = None


def needed(plan: Plan) -> int:
    """GPUs in the plan's pools."""
    return plan.gpus_of(tuple(plan.pools))


def resource_of(plan: Plan) -> str:
    """What a GPU of the plan is to Ray: a GPU, or a CPU slot where cores stand in for them."""
    kinds = {plan.device_of(pool).kind for pool in plan.pools}
    return "GPU" if "cuda" in kinds else "CPU"


class Fleet:
    """The GPUs of a plan, reserved, and the processes started on them. One plan after another may use a fleet, if it
    was made for all of their GPUs: processes stay, and are configured anew."""

    def __init__(self, gpus: Sequence[Gpu], resource: str) -> None:
        """Raises UserError if Ray has fewer GPUs than that, or not on nodes that correspond to the given ones."""
        self._seats = _reserve(gpus, resource)
        self._processes: dict[Key, Rank] = {}

    def process(self, worker: Callable[[], Worker], gpus: tuple[Gpu, ...], made_for: str = "") -> Rank:
        """The process of a class on some GPUs, all of which it sees; it lives at the first one. Without GPUs it may be
        anywhere. Started if there is none yet that is made for this, but not waited for."""
        key = worker, gpus, made_for
        if key not in self._processes:
            self._processes[key] = start(worker, [self._seats[gpu] for gpu in gpus])
        return self._processes[key]

    def again(self, worker: Callable[[], Worker], gpus: tuple[Gpu, ...], made_for: str = "") -> Rank:
        """A fresh process in the place of one that died or hangs."""
        if (old := self._processes.pop((worker, gpus, made_for), None)) is not None:
            stop([old])
        return self.process(worker, gpus, made_for)

    def retire(
        self, worker: Callable[[], Worker], gpus: Sequence[Gpu], keep: Sequence[tuple[tuple[Gpu, ...], str]]
    ) -> None:
        """End the processes of a class on any of these GPUs, except for what is to stay: their GPUs and what they are
        made for. Those hold memory even when nobody asks them."""
        stays = {(worker, *kept) for kept in keep}
        for key in list(self._processes):  # a copy, for another plan may be starting its processes beside
            if key[0] is worker and key not in stays and {*key[1]} & {*gpus}:
                stop([self._processes.pop(key)])

    @property
    def devices(self) -> dict[Gpu, str]:
        """The CUDA index of each GPU; none of cores."""
        return {gpu: seat.device for gpu, seat in self._seats.items() if seat.device is not None}

    def close(self) -> None:
        """End the processes at once, whatever they are doing, and free the GPUs."""
        stop(list(self._processes.values()))
        remove_placement_group(next(iter(self._seats.values())).group)


def _reserve(gpus: Sequence[Gpu], resource: str) -> dict[Gpu, Seat]:
    has = int(ray.cluster_resources().get(resource, 0))
    if has < len(gpus):
        raise UserError(
            f"{len(gpus)} {resource}s are needed and Ray has {has}; start more nodes, search a plan for fewer, "
            "or use --rehearse"
        )
    nodes = _match_nodes(gpus, resource)
    group = placement_group(
        [{resource: 1} for _ in gpus], bundle_label_selector=[{"ray.io/node-id": nodes[node]} for node, _ in gpus]
    )
    if not group.wait(PLACING_SECONDS):
        remove_placement_group(group)
        raise UserError(f"Ray did not free {len(gpus)} {resource}s within {PLACING_SECONDS:.0f} s; are they in use?")
    seats = {gpu: Seat(group=group, bundle=bundle) for bundle, gpu in enumerate(gpus)}
    return _with_devices(seats) if resource == "GPU" else seats


def _match_nodes(gpus: Sequence[Gpu], resource: str) -> dict[int, str]:
    """Plan node -> Ray node id, the fullest plan node to the largest Ray node."""
    wanted: dict[int, int] = {}
    for node, _ in gpus:
        wanted[node] = wanted.get(node, 0) + 1
    alive = [node for node in ray.nodes() if node["Alive"]]
    largest = sorted(alive, key=lambda node: (-node["Resources"].get(resource, 0), node["NodeID"]))
    fullest = sorted(wanted, key=lambda node: (-wanted[node], node))
    for rank, node in enumerate(fullest):
        has = int(largest[rank]["Resources"].get(resource, 0)) if rank < len(largest) else 0
        if has < wanted[node]:
            raise UserError(
                f"the plan uses {wanted[node]} {resource}s of its node {node}, but Ray's matching node has {has}; "
                "search a plan for the nodes that there are"
            )
    return {node: largest[rank]["NodeID"] for rank, node in enumerate(fullest)}


def _with_devices(seats: dict[Gpu, Seat]) -> dict[Gpu, Seat]:
    """Ask in each bundle which GPU it is. The processes themselves hold no GPU of Ray's, because several share one
    and an engine may span several."""

    def device() -> str:
        return str(ray.get_gpu_ids()[0])

    probe = ray.remote(num_cpus=0, num_gpus=1)(device)
    asked = [probe.options(scheduling_strategy=_strategy(seat)).remote() for seat in seats.values()]
    try:
        found = ray.get(asked, timeout=PLACING_SECONDS)
    except ray.exceptions.GetTimeoutError:
        raise UserError(
            f"Ray's nodes did not name their GPUs within {PLACING_SECONDS:.0f} s; are they alive?"
        ) from None
    return {gpu: replace(seat, device=device) for (gpu, seat), device in zip(seats.items(), found, strict=True)}


def _strategy(seat: Seat) -> PlacementGroupSchedulingStrategy:
    return PlacementGroupSchedulingStrategy(placement_group=seat.group, placement_group_bundle_index=seat.bundle)


def start(worker: Callable[[], Worker], seats: Sequence[Seat] = ()) -> Rank:
    """Start a process without waiting for it."""
    options: dict[str, Any] = {"num_cpus": 0}
    if seats:
        options["scheduling_strategy"] = _strategy(seats[0])
        if devices := [seat.device for seat in seats if seat.device is not None]:
            visible = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", "CUDA_VISIBLE_DEVICES": ",".join(devices)}
            options["runtime_env"] = {"env_vars": {**ENVIRONMENT, **visible}}
    return Rank(name="", handle=ray.remote(worker).options(**options).remote())


def connect(ranks: Sequence[Rank]) -> list[Rank]:
    """Wait until the processes answer, and measure their clocks."""
    ask(ranks, "now")
    return [replace(rank, offset=measure_offset(rank)) for rank in ranks]


def stop(ranks: Sequence[Rank]) -> None:
    """End processes at once, whatever they are doing."""
    for rank in ranks:
        ray.kill(rank.handle)
