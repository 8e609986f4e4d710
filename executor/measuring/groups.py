"""The groups of a profile: which small plans, in which groups, with which batches."""

from collections.abc import Callable, Iterator, Sequence

from executor.measuring.group import BatchSize, Group
from executor.measuring.small_plans import apart_plan, shared_plan, split_plan
from executor.measuring.timing import estimated
from planner.predict.layouts import MICRO_BATCH_TOKENS
from planner.spec.cluster import Cluster
from planner.spec.errors import UserError
from planner.spec.lengths import Fixed
from planner.spec.machine import memory_bytes
from planner.spec.plan import Plan
from planner.spec.workload import Workload


def groups_of(workload: Workload, cluster: Cluster, only: str = "") -> list[Group]:
    """All groups of a workload on one node whose names contain `only`, the most valuable first,
    with their estimates. Raises UserError if there are others alone."""
    found = _all(workload, cluster)
    chosen = [group for group in found if only in group.name]
    if found and not chosen:
        names = "; ".join(group.name for group in found)
        raise UserError(f"--only {only}: no group is named so; there are {names}")
    return estimated(chosen, workload, cluster)


def _all(workload: Workload, cluster: Cluster) -> list[Group]:
    on_cpu = cluster.device_of(cluster.gpus[0]).kind == "cpu"
    return list(_on_cores(workload, cluster) if on_cpu else _on_gpus(workload, cluster))


def groups_here(
    workload: Workload, cluster: Cluster, only: str, say: Callable[[str], None]
) -> list[Group]:
    """The groups of `groups_of` without those that offload more than this machine's memory holds;
    `say` is told of them. Raises UserError if no other is left."""
    (node,) = cluster.nodes
    there = min(node.host_memory_bytes, memory_bytes())
    smaller = cluster.changed(nodes=(node.changed(host_memory_bytes=there),))
    every = [group.name for group in groups_of(workload, cluster, only)]
    here = [group for group in _all(workload, smaller) if only in group.name]
    left_out = [name for name in every if name not in {group.name for group in here}]
    why = f"needs more host memory than this machine's {there / 1e9:.0f} GB"
    if left_out and not here:
        raise UserError(
            f"{'; '.join(left_out)} {why}; measure something else, or on a machine that has more"
        )
    for name in left_out:
        say(f"skipped ({why}): {name}")
    return estimated(here, workload, cluster)


# --- what is measured ---


def _on_cores(workload: Workload, cluster: Cluster) -> Iterator[Group]:
    """Groups for each number of cores: all roles on one pool, repeated as often as there is room,
    and the tutorial's two pools with a rollout over both, whose updates and weights go from one
    pool to the other."""
    count = len(cluster.gpus)
    batches = (BatchSize(sequences=workload.batch, repeats=6),)  # cores are noisier than GPUs
    for size in (2**power for power in range(count.bit_length())):
        places = (range(first, first + size) for first in range(0, count - size + 1, size))
        yield from _group(
            batches, *(shared_plan(workload, cluster, cores, size, 1) for cores in places)
        )
    if count > 1:
        yield from _group(
            batches, split_plan(workload, cluster, count // 2, count // 2, 1, asleep=True)
        )


def _on_gpus(workload: Workload, cluster: Cluster) -> Iterator[Group]:
    """Shards over one GPU (what is chosen where it fits), over all, over those that an engine
    leaves and over half; engines of one, half and all; weights that stay within their GPUs, others
    and both; updates side by side on halves; roles awake and asleep. In few groups, and those with
    the same engines together: an engine of another kind takes one to three minutes to start. The
    first is measured with all batches."""
    count = len(cluster.gpus)
    every, most = _batches(workload), range(count)
    regular = tuple(
        batch for batch in every if not batch.held_out and batch.micro_batch_tokens is None
    )
    large = tuple(batch for batch in regular if not batch.extra)
    small = list(_group(every, shared_plan(workload, cluster, most, 1, 1)))
    yield from small
    if count == 1:
        yield from _group(large, shared_plan(workload, cluster, most, 1, 1, asleep=True))
        return
    yield from _group(large if small else every, shared_plan(workload, cluster, most, count, 1))
    yield from _group(large, split_plan(workload, cluster, count // 2, 1, 1))
    yield from _group(regular, apart_plan(workload, cluster, count - max(1, count // 4)))
    if count > 2:
        yield from _group(
            large, split_plan(workload, cluster, count // 2, count // 2, count // 2, asleep=True)
        )
    yield from _group(
        large, shared_plan(workload, cluster, most, count // 2, count, asleep=count == 2)
    )


def _group(batches: Sequence[BatchSize], *plans: Plan | None) -> Iterator[Group]:
    """The group of these plans, which are alike, if they fit the memory."""
    there = tuple(plan for plan in plans if plan is not None)
    if there:
        tokens = there[0].trainers["actor"].micro_batch_tokens
        batches = [
            b for b in batches if b.micro_batch_tokens is None or b.micro_batch_tokens < tokens
        ]
        copies = f"{len(there)} times " if len(there) > 1 else ""
        yield Group(name=copies + there[0].name, plans=there, batches=tuple(batches))


def _batches(workload: Workload) -> tuple[BatchSize, ...]:
    """A quarter, half and all of the workload's batch, in whole minibatches; half of it in small
    micro-batches; and the held-out one. Only all of it where prompts come from a file."""
    sizes = sorted({_share(workload, 0.25), _share(workload, 0.5), workload.batch})
    if workload.data is not None:
        return (BatchSize(sequences=workload.batch, repeats=3),)
    plain = [BatchSize(sequences=n, repeats=3, extra=2 * n < workload.batch) for n in sizes]
    tokens = max(MICRO_BATCH_TOKENS[0], workload.longest)
    narrow = BatchSize(sequences=sizes[-2:][0], repeats=3, micro_batch_tokens=tokens, extra=True)
    stretch = 0.5 if isinstance(workload.response, Fixed) else 1.5
    unseen = BatchSize(sequences=_share(workload, 0.75), repeats=2, stretch=stretch, held_out=True)
    return (*plain, narrow, unseen)


def _share(workload: Workload, share: float) -> int:
    """A share of the batch, in whole minibatches."""
    return max(1, round(share * workload.batch / workload.minibatch)) * workload.minibatch
