"""How long groups of measurements take."""

from collections.abc import Sequence
from dataclasses import replace

from executor.measuring.group import Group
from executor.rollout.vllm.worker import made_for
from planner.predict.cost import CostModel
from planner.predict.memory import role_memory
from planner.spec.cluster import Cluster
from planner.spec.plan import Gpu, Plan
from planner.spec.workload import Workload

# Seconds in addition to the calls themselves, as they were on hosts of 1 to 4 H200 and on the cores
# of a laptop.
SESSION_START_SECONDS = {"cuda": 25.0, "cpu": 8.0}  # Ray, and importing libraries in all processes
ENGINE_START_SECONDS = {"cuda": 60.0, "cpu": 1.0}  # to start some side by side
PEERS_START_SECONDS = 15.0  # beyond that, if an engine has several GPUs
PINNING_SECONDS_PER_BYTE = 0.5e-9  # per byte of the host that is taken for what is offloaded
TRAINER_START_SECONDS = {"cuda": 12.0, "cpu": 2.0}  # to load models and take over the weights
COMPILING_SECONDS = {"cuda": 20.0, "cpu": 0.0}  # in the first step of all
# Two repeats of a longer step are enough, and those of part of a batch are left out first.
LONG_STEP_SECONDS = 15.0


def estimated(groups: Sequence[Group], workload: Workload, cluster: Cluster) -> list[Group]:
    """The groups with the seconds of their start and of their steps."""
    kind = cluster.device_of(cluster.gpus[0]).kind
    models: dict[int, CostModel] = {}  # by the number of sequences
    running: set[tuple[tuple[Gpu, ...], str]] = set()
    found = []
    for number, group in enumerate(groups):
        engines = {(gpus, made_for(plan)) for plan in group.plans for _, gpus in plan.engine_gpus()}
        start = _start_seconds(group, kind, first=number == 0, new_engines=not engines <= running)
        running = engines  # an engine of another kind on the same GPUs ends
        steps, batches = [], []
        for batch in group.batches:
            if batch.sequences not in models:
                # Not checked: a measured batch need be no multiple of the minibatch.
                sized = workload.model_copy(update={"batch": batch.sequences})
                models[batch.sequences] = CostModel(sized, cluster, scenarios=1)
            seconds = _step_seconds(group.plans[0], models[batch.sequences])
            steps.append(max(1.0, batch.stretch) * seconds)
            if steps[-1] > LONG_STEP_SECONDS:
                less = batch.sequences < workload.batch and not batch.held_out
                batch = replace(batch, repeats=min(2, batch.repeats), extra=batch.extra or less)
            batches.append(batch)
        found.append(
            replace(group, batches=tuple(batches), start_seconds=start, step_seconds=tuple(steps))
        )
    return found


def _start_seconds(group: Group, kind: str, *, first: bool, new_engines: bool) -> float:
    """Seconds until the processes of a group are ready and its first step has compiled, on a
    `kind` of device."""
    seconds = TRAINER_START_SECONDS[kind]
    if new_engines:
        seconds += ENGINE_START_SECONDS[kind]
        if any(plan.rollout.tensor_parallel > 1 for plan in group.plans):
            seconds += PEERS_START_SECONDS
    pinned = sum(map(_pinned_bytes, group.plans))
    seconds += PINNING_SECONDS_PER_BYTE * pinned
    seconds += COMPILING_SECONDS[kind] / (1 if first else 3)  # later ones find most of it compiled
    return seconds + (SESSION_START_SECONDS[kind] if first else 0.0)


def _pinned_bytes(plan: Plan) -> int:
    """Bytes of hosts for what roles and engines offload."""
    return sum(
        role_memory(plan, role).host * plan.gpus_of(layout.pools)
        for role, layout in plan.roles.items()
    )


def _step_seconds(plan: Plan, model: CostModel) -> float:
    """Seconds of all calls one after the other, by the roofline."""
    return sum(float(model.call(call, plan).seconds[0]) for call in plan.dataflow.calls)
