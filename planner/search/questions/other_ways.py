"""What else could be done where nothing fits: what others do there that this executor does not, and
which pins leave a role too little room."""

from collections.abc import Callable, Iterator, Sequence

from planner.predict.layouts import trainer_layouts
from planner.predict.memory import RoleMemory, pool_peak, process_bytes, trainer_memory
from planner.search.solver.problem import Problem
from planner.search.space.pins import Pin, parse_pins
from planner.spec.cluster import Cluster, Device
from planner.spec.limits import MOST_GPUS_ASKED
from planner.spec.wording import counted, gigabytes
from planner.spec.workload import TRAINED, Workload

Leanest = Callable[[Workload, Cluster, str, Device, int], RoleMemory]


def what_others_do(problem: Problem, device: Device, gpus: int) -> str:
    """What other stacks do for a trained role that does not fit all GPUs; empty where that would
    not help either."""
    for role in problem.workload.roles:
        if role not in TRAINED or _fits(_leanest_update(problem, role, device, gpus), device):
            continue
        found = _leanest_update(problem, role, device, gpus)
        moments = found.detail["optimizer"]
        spared = found.running - moments - moments // 20
        if spared + process_bytes(device) <= device.memory_bytes:
            return (
                "; others keep Adam's moments on the host and update there, or train LoRA adapters,"
                " which this executor does not"
            )
        if not _fits(_leanest_update(problem, role, device, MOST_GPUS_ASKED), device):
            tokens = problem.workload.longest
            return (
                f"; others split a sequence of {tokens:,} tokens over GPUs (context parallelism), "
                "which this executor does not"
            )
    return ""


def _leanest_update(problem: Problem, role: str, device: Device, gpus: int) -> RoleMemory:
    workload = problem.workload
    layouts = trainer_layouts(workload, role, gpus, "pool", device)
    found = (trainer_memory(workload, role, layout, device) for layout in layouts)
    return min(found, key=lambda memory: memory.running)


def _fits(memory: RoleMemory, device: Device) -> bool:
    return memory.running + process_bytes(device) <= device.memory_bytes


def pins_that_fail(problem: Problem, texts: Sequence[str], leanest: Leanest) -> str:
    """The pins that give a role too few GPUs, each with the gigabytes that are missing on each of
    them; empty if every pinned role fits its GPUs alone."""
    workload, cluster = problem.workload, problem.cluster
    pins = parse_pins(texts, workload.roles, cluster)
    return "; ".join(_failures(problem, pins, leanest))


def _failures(problem: Problem, pins: Sequence[Pin], leanest: Leanest) -> Iterator[str]:
    workload, cluster = problem.workload, problem.cluster
    for pin in pins:
        if pin.gpus is None:
            continue
        (role,), gpus = pin.roles, pin.gpus
        missing = []
        for device in cluster.devices.values():
            memory = leanest(workload, cluster, role, device, gpus)
            peak = pool_peak([memory], role != "rollout", role == "rollout", device)
            missing.append((peak - device.memory_bytes, peak, device))
        short, peak, device = min(missing, key=lambda each: each[0])
        if short > 0:
            yield (
                f"--pin {pin.text} fails: {role} alone takes at least {gigabytes(peak)} per GPU on "
                f"{counted(gpus, 'GPU')}, {gigabytes(short)} more than the "
                f"{gigabytes(device.memory_bytes)} of one"
            )
