"""A plan's pools as Ray placement groups, and the processes in them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from executor.session import ENVIRONMENT
from executor.worker import Rank, Worker, ask, measure_offset
from planner.spec.errors import UserError
from planner.spec.plan import Plan

PLACING_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Seat:
    """One GPU of a pool as Ray gave it. `devices` is its CUDA index there; empty for a core."""

    group: PlacementGroup
    bundle: int
    devices: tuple[str, ...] = ()


def needed(plan: Plan) -> int:
    return plan.gpus_of(tuple(plan.pools))


def resource_of(plan: Plan) -> str:
    """What a GPU of the plan is to Ray: a GPU, or a CPU slot where cores stand in for them."""
    kinds = {plan.device_of(pool).kind for pool in plan.pools}
    return "GPU" if "cuda" in kinds else "CPU"


def reserve(plan: Plan) -> dict[str, list[Seat]]:
    """A seat for each GPU of each pool, on Ray nodes that correspond to the plan's one to one. Raises UserError if Ray
    has fewer GPUs than the plan needs, or not together."""
    resource = resource_of(plan)
    has = int(ray.cluster_resources().get(resource, 0))
    if has < needed(plan):
        raise UserError(
            f"plan {plan.name!r} needs {needed(plan)} {resource}s and Ray has {has}; "
            "start more nodes, search a plan for fewer, or use --rehearse"
        )
    nodes = _match_nodes(plan, resource)
    seats: dict[str, list[Seat]] = {}
    for name, pool in plan.pools.items():
        group = placement_group(
            [{resource: 1} for _ in pool.gpus],
            strategy="PACK",
            bundle_label_selector=[{"ray.io/node-id": nodes[node]} for node, _ in pool.gpus],
        )
        if not group.wait(PLACING_SECONDS):
            raise UserError(f"Ray did not place pool {name!r} within {PLACING_SECONDS:.0f} s; are its GPUs in use?")
        seats[name] = [Seat(group=group, bundle=bundle) for bundle in range(len(pool.gpus))]
    return _with_devices(seats) if resource == "GPU" else seats


def _match_nodes(plan: Plan, resource: str) -> dict[int, str]:
    """Plan node -> Ray node id, the fullest plan node to the largest Ray node."""
    wanted: dict[int, int] = {}
    for pool in plan.pools.values():
        for node, _ in pool.gpus:
            wanted[node] = wanted.get(node, 0) + 1
    alive = [node for node in ray.nodes() if node["Alive"]]
    free = sorted(alive, key=lambda node: (-node["Resources"].get(resource, 0), node["NodeID"]))
    busiest = sorted(wanted, key=lambda node: (-wanted[node], node))
    for rank, node in enumerate(busiest):
        has = int(free[rank]["Resources"].get(resource, 0)) if rank < len(free) else 0
        if has < wanted[node]:
            raise UserError(
                f"plan {plan.name!r} uses {wanted[node]} {resource}s of its node {node}, but Ray's matching node has "
                f"{has}; search a plan for the nodes that there are"
            )
    return {node: free[rank]["NodeID"] for rank, node in enumerate(busiest)}


def _with_devices(seats: dict[str, list[Seat]]) -> dict[str, list[Seat]]:
    """Ask in each bundle which GPU it is. The processes themselves hold no GPU of Ray's, because several share one
    and an engine may span several."""

    def devices() -> tuple[str, ...]:
        return tuple(str(index) for index in ray.get_gpu_ids())

    flat = [seat for pool in seats.values() for seat in pool]
    probe = ray.remote(num_cpus=0, num_gpus=1)(devices)
    found = iter(ray.get([probe.options(scheduling_strategy=_strategy(seat)).remote() for seat in flat]))
    return {name: [replace(seat, devices=next(found)) for seat in pool] for name, pool in seats.items()}


def _strategy(seat: Seat) -> PlacementGroupSchedulingStrategy:
    return PlacementGroupSchedulingStrategy(
        placement_group=seat.group, placement_group_bundle_index=seat.bundle, placement_group_capture_child_tasks=False
    )


def start(worker: Callable[..., Worker], seats: Sequence[Seat] | None, *args: Any) -> ActorHandle:
    """Start a process of class `worker` at the first of its seats, with all of their devices visible; anywhere
    without seats. Does not wait for it."""
    options: dict[str, Any] = {"num_cpus": 0}
    if seats:
        options["scheduling_strategy"] = _strategy(seats[0])
        devices = [device for seat in seats for device in seat.devices]
        if devices:
            visible = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", "CUDA_VISIBLE_DEVICES": ",".join(devices)}
            options["runtime_env"] = {"env_vars": {**ENVIRONMENT, **visible}}
    return ray.remote(worker).options(**options).remote(*args)


def connect(ranks: Sequence[Rank]) -> list[Rank]:
    """Wait until the processes answer, and measure their clocks. Raises WorkerError."""
    ask(ranks, "now")
    return [replace(rank, offset=measure_offset(rank.handle)) for rank in ranks]


def stop(ranks: Sequence[Rank], seats: dict[str, list[Seat]]) -> None:
    """End the processes at once, whatever they are doing, and free their GPUs."""
    for rank in ranks:
        ray.kill(rank.handle)
    for pool in seats.values():
        remove_placement_group(pool[0].group)
