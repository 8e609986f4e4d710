"""Updates of a role, seen from the controller: the minibatches of its ranks, what they say of them,
and steps that were left out."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from executor.data.batch import minibatches, spread
from executor.data.requests import Ints, Rows
from executor.training.aggregation import mean_stats
from executor.training.trainer import Minibatch
from planner.predict.schedule import Task
from planner.spec.errors import UserError
from planner.spec.workload import Workload

MOST_SKIPPED = 8  # optimizer steps in a row without finite gradients


def minibatches_of_ranks(
    workload: Workload,
    step: int,
    *,
    epochs: int,
    lengths: Ints,
    learned: NDArray[np.integer],
    ranks: int,
    most: int,
) -> list[list[Minibatch]]:
    """The minibatches of each rank: each is formed over the whole batch and then spread over the
    ranks, in micro-batches of `most` tokens. `lengths` and `learned` are `[B]`: the tokens of a
    sequence, and how many of them are learned from."""
    each: list[list[Minibatch]] = [[] for _ in range(ranks)]
    for rows in _rows(workload, step, epochs, len(lengths)):
        tokens, sequences = int(learned[rows].sum()), int(np.count_nonzero(learned[rows]))
        for rank, share in enumerate(spread(rows, lengths, ranks, most)):
            each[rank].append(Minibatch(micro_batches=share, tokens=tokens, sequences=sequences))
    return each


def _rows(workload: Workload, step: int, epochs: int, batch: int) -> Iterator[Rows]:
    """The sequences of each minibatch, all epochs in a row."""
    for epoch in range(epochs):
        key = workload.seed, step, epoch
        yield from minibatches(batch, workload.minibatch, *key, group=workload.group)


def count_skipped(skipped: dict[str, int], task: Task, role: str, norms: list[float]) -> None:
    """Count in `skipped`, by role, how many optimizer steps in a row had no finite gradients, after
    an update with these gradient norms. Raises UserError at too many."""
    for norm in norms:
        skipped[role] = 0 if np.isfinite(norm) else skipped.get(role, 0) + 1
        if skipped[role] >= MOST_SKIPPED:
            raise UserError(
                f"{task.call.name} of step {task.step}: loss or gradient was not finite in "
                f"{MOST_SKIPPED} optimizer steps in a row, which were left out; look at the "
                f"rewards and the {role}'s learning rate, and resume from the last checkpoint"
            )


def update_metrics(role: str, ranks: list[list[dict[str, float]]]) -> dict[str, float]:
    """Means over minibatches of what the ranks summed; the gradient norm is the same on every rank.
    Minibatches that were left out are `skipped` and do not count, unless all of them were."""
    means: list[dict[str, float]] = []
    finite = [bool(np.isfinite(part["grad_norm"])) for part in ranks[0]]
    for counts, *parts in zip(finite, *ranks, strict=True):
        if any(finite) and not counts:
            continue
        sums = {name: sum(part[name] for part in parts) for name in parts[0] if name != "grad_norm"}
        means.append({"grad_norm": parts[0]["grad_norm"], **mean_stats(sums)})
    names = [name for name in means[0] if name != "tokens"]
    found = {f"{role}/{name}": float(np.mean([mean[name] for mean in means])) for name in names}
    return {**found, f"{role}/skipped": float(finite.count(False))}
