"""Measuring the calls of a workload on the machine that is there: a few steps of a few small plans, run by the very
processes and the very loop of a real run, and the median duration of each call."""

import contextlib
import platform
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from executor import pools, preflight
from executor.data import PromptSource, Sequences
from executor.processes import fleet_for
from executor.run import Silent, loop
from executor.session import ray_session
from executor.step import Training
from planner.predict.layouts import rollout_layouts, trainer_layouts
from planner.predict.profile import Point, Profile
from planner.predict.schedule import tasks_of
from planner.spec.cluster import Cluster
from planner.spec.errors import UserError
from planner.spec.plan import Issue, Plan, Pool, TrainerRole
from planner.spec.timeline import Span
from planner.spec.workload import Workload

WARMUP, REPEATS = 1, 4  # steps of each plan
PACKAGES = ("torch", "transformers", "ray")


class Measured(Training):
    """Keeps the sequences of every step, for their lengths."""

    def __init__(self, plan: Plan, prompts: PromptSource, fleet: pools.Fleet) -> None:
        super().__init__(plan, prompts, fleet)
        self.made: dict[int, Sequences] = {}

    def end_step(self, number: int) -> dict[str, Any]:
        self.made[number] = self.steps[number].sequences
        return super().end_step(number)


def profile(workload: Workload, cluster: Cluster, out: Path, *, progress: Callable[[str], None]) -> Profile:
    """Measure the workload's calls on one node of the cluster and write the profile to `out`.

    Pools of 1, 2, 4, ... GPUs are measured with as many copies of the plan side by side as the node has room for: so
    the calls share the host's memory and links as they do in a run. Raises UserError."""
    if len(cluster.nodes) != 1:
        raise UserError(f"cluster {cluster.name!r} has {len(cluster.nodes)} nodes; measure on one node of each kind")
    workload = _without_evaluation(workload)
    batches = _plans(workload, cluster)
    prompts = preflight.check(batches[0][0], local=True)
    for batch in batches:
        preflight.check_machine(batch[0])
    device = cluster.nodes[0].device
    seconds = len(batches) * 20
    progress(f"{len(batches)} measurements of {WARMUP + REPEATS} steps, about {seconds} s with their start")
    found: dict[Point, list[Sample]] = defaultdict(list)
    on_cores = pools.resource_of(batches[0][0]) == "CPU"
    with contextlib.ExitStack() as stack:
        stack.enter_context(ray_session(cpus=cluster.nodes[0].gpus if on_cores else None, address=None))
        fleet = fleet_for([plan for batch in batches for plan in batch])
        stack.callback(fleet.close)
        for number, batch in enumerate(batches, start=1):
            progress(f"measuring {number} of {len(batches)}: {batch[0].name}")
            for plan, spans, made in _run_together(batch, prompts, fleet):
                for span in spans:
                    if span.step >= WARMUP:
                        key, sample = _sample(plan, span, made[span.step])
                        found[key].append(sample)
    result = Profile(
        device=device,
        model=workload.actor.shape,
        versions={"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        command=f"plan profile --cluster {cluster.name} (workload {workload.name})",
        points=tuple(_point(key, samples) for key, samples in found.items()),
    )
    result.write(out)
    return result


# --- the plans ---


def _plans(workload: Workload, cluster: Cluster) -> list[list[Plan]]:
    """Batches of plans to run side by side: for each pool size all roles on one pool, and the tutorial's two pools with
    a rollout over both, whose updates and weights go from one pool to the other."""
    gpus = len(cluster.gpus)
    sizes = [2**power for power in range(gpus.bit_length()) if 2**power <= gpus]
    batches = []
    for size in sizes:
        variants = max(len(_trainers(workload, cluster, role, size)) for role in workload.models)
        for variant in range(variants):
            starts = range(0, gpus - size + 1, size)
            batches.append([_colocated(workload, cluster, start, size, variant) for start in starts])
    if gpus > 1:
        batches.append([_split(workload, cluster)])
    return batches


def _trainers(workload: Workload, cluster: Cluster, role: str, size: int) -> list[TrainerRole]:
    """The first layout of each split of a role over a pool: what the search takes unless memory is short."""
    device = cluster.device_of(cluster.gpus[0])
    layouts = trainer_layouts(workload, role, size, "all", device)
    return list({(layout.shard, layout.replicas): layout for layout in reversed(list(layouts))}.values())


def _colocated(workload: Workload, cluster: Cluster, start: int, size: int, variant: int) -> Plan:
    layouts = {role: _trainers(workload, cluster, role, size) for role in workload.models}
    roles = {role: found[min(variant, len(found) - 1)] for role, found in layouts.items()}
    return _plan(f"{size} GPUs, all roles", workload, cluster, {"all": range(start, start + size)}, roles, ("all",))


def _split(workload: Workload, cluster: Cluster) -> Plan:
    half = len(cluster.gpus) // 2
    home = {"actor": "a", "reference": "a", "critic": "b", "reward": "b"}
    roles = {
        role: _trainers(workload, cluster, role, half)[0].model_copy(update={"pools": (home[role],)})
        for role in workload.models
    }
    homes = {"a": range(half), "b": range(half, 2 * half)}
    if not any(home[role] == "b" for role in roles):  # nothing but an engine in the second pool
        homes = {"a": homes["a"], "b": homes["b"]}
    return _plan(f"{half} and {half} GPUs", workload, cluster, homes, roles, ("a", "b"))


def _plan(
    name: str,
    workload: Workload,
    cluster: Cluster,
    homes: dict[str, range],
    trainers: dict[str, TrainerRole],
    rollout_pools: tuple[str, ...],
) -> Plan:
    """The calls in the order of the dataflow; without waits, so what can overlap does."""
    gpus = cluster.gpus
    parts = tuple((len(homes[pool]),) for pool in rollout_pools)
    device = cluster.device_of(gpus[0])
    rollout = next(islice(rollout_layouts(workload, parts, rollout_pools, device), 1))
    draft = Plan(
        name=name,
        workload=workload,
        cluster=cluster,
        pools={pool: Pool(gpus=tuple(gpus[i] for i in home)) for pool, home in homes.items()},
        roles={**trainers, "rollout": rollout},
        program=tuple(Issue(call=call.name) for call in _calls(workload)),
        staleness=0,
    )
    return draft


def _calls(workload: Workload) -> Sequence[Any]:
    from planner.spec.dataflow import ppo

    return ppo(workload).calls


def _without_evaluation(workload: Workload) -> Workload:
    if workload.data is None:
        return workload
    return workload.model_copy(update={"data": workload.data.model_copy(update={"evaluate_every": 0})})


# --- running them ---

Run = tuple[Plan, list[Span], dict[int, Sequences]]


def _run_together(plans: Sequence[Plan], prompts: PromptSource, fleet: pools.Fleet) -> list[Run]:
    """Run plans on disjoint GPUs at the same time, each by a loop of its own."""
    backends = [Measured(plan, prompts, fleet) for plan in plans]

    def run(backend: Measured) -> dict[int, Span]:
        spans: dict[int, Span] = {}
        loop(tasks_of(backend.plan, WARMUP + REPEATS), backend, spans, Silent())
        return spans

    with ThreadPoolExecutor(max_workers=len(plans)) as threads:
        results = list(threads.map(run, backends))
    return [
        (backend.plan, [spans[index] for index in sorted(spans)], backend.made)
        for backend, spans in zip(backends, results, strict=True)
    ]


# --- points ---

Sample = tuple[float, dict[str, Any]]  # seconds of one call, and the tokens it had


def _sample(plan: Plan, span: Span, made: Sequences) -> tuple[Point, Sample]:
    """The point that a span belongs to (its tokens and seconds left open), and what the span adds to it.

    The seconds run from when the call could start, not from when its processes did: the way through the controller is
    part of what a call costs."""
    workload, call = plan.workload, plan.dataflow[span.call]
    shape = None if call.kind == "host" else workload.model_of(span.role).shape
    key: dict[str, Any] = {
        "call": call.kind,
        "role": span.role,
        "model": None if shape == workload.actor.shape else shape,
    }
    tokens: dict[str, Any] = {}
    if call.kind != "transfer":
        key["sequences"] = len(made.lengths)
        tokens = {"prompt_tokens": int(made.prompt_lengths.sum()), "response_tokens": int(made.response_lengths.sum())}
        if len(set(made.response_lengths.tolist())) > 1 and made.response_lengths.min() > 0:
            tokens["response_lengths"] = tuple(made.response_lengths.tolist())
    if call.kind == "host":
        key["role"] = span.call
    elif call.kind in ("generate", "transfer"):
        rollout = plan.rollout
        key |= {
            "tensor_parallel": rollout.tensor_parallel,
            "engines": rollout.replicas,
            "gpus": plan.gpus_of(span.pools),
        }
        if call.kind == "generate":
            key["concurrency"] = rollout.concurrency
    if call.kind in ("infer", "train", "transfer"):
        layout = plan.trainers[call.roles[0]]
        key |= {"gpus": layout.gpus, "shard": layout.shard}
        if call.kind == "transfer":
            key["shared"] = plan.rollout.pools == layout.pools
        else:
            key["micro_batch_tokens"] = layout.micro_batch_tokens
        if call.kind == "train":
            key |= {"recompute": layout.recompute, "minibatch": workload.minibatch, "epochs": workload.ppo.epochs}
    return Point(seconds=1.0, **key), (span.end - span.ready - span.parts.get("wake", 0.0), tokens)


def _point(key: Point, samples: Sequence[Sample]) -> Point:
    """The median, with the tokens of the sample that is nearest to it."""
    seconds = np.array([taken for taken, _ in samples])
    low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75])
    tokens = samples[int(np.abs(seconds - median).argmin())][1]
    figures = {"seconds": float(median), "spread": float(high - low) / 2, "repeats": len(samples)}
    return Point.model_validate({**key.model_dump(), **tokens, **figures})
