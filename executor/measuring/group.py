"""A group of a profile: small plans that run side by side on the GPUs, with batches of several
sizes that the same processes run one after the other."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from planner.spec.plan import Plan


@dataclass(frozen=True, kw_only=True)
class BatchSize:
    """What a step has instead of the workload's batch: a number of `sequences`, with responses
    `stretch` times as long, in micro-batches of at most `micro_batch_tokens` (None: as the plan
    says). An `extra` one is the first to be left out, and nothing estimates by a `held_out` one."""

    sequences: int
    repeats: int
    stretch: float = 1.0
    micro_batch_tokens: int | None = None
    held_out: bool = False
    extra: bool = False

    @property
    def name(self) -> str:
        text = f"{self.sequences} sequences"
        if self.stretch != 1:
            text += f", {self.stretch:g} times as long"
        if self.micro_batch_tokens:
            text += f", {self.micro_batch_tokens} tokens at once"
        return text


@dataclass(frozen=True, kw_only=True)
class Group:
    """Plans on disjoint GPUs that run at the same time, and their batches in the order of their
    steps. `start_seconds` and `step_seconds`, one for each batch, are estimates."""

    name: str
    plans: tuple[Plan, ...]
    batches: tuple[BatchSize, ...]
    start_seconds: float = 0.0
    step_seconds: tuple[float, ...] = ()

    @property
    def steps(self) -> tuple[tuple[BatchSize, bool], ...]:
        """The batch of each step, and whether it counts: a warm-up does not, before the first batch
        and before those whose micro-batches are so small that other code is compiled for them."""
        found: list[tuple[BatchSize, bool]] = []
        for number, batch in enumerate(self.batches):
            if number == 0 or batch.micro_batch_tokens is not None:
                found.append((batch, False))
            found += [(batch, True)] * batch.repeats
        return tuple(found)

    @property
    def seconds(self) -> float:
        """An estimate of the start and all steps."""
        of_batch = dict(zip(self.batches, self.step_seconds, strict=True))
        return self.start_seconds + sum(of_batch[batch] for batch, _ in self.steps)

    def only(self, batches: Sequence[BatchSize]) -> "Group":
        """The group with some of its batches."""
        kept = [number for number, batch in enumerate(self.batches) if batch in batches]
        return replace(
            self,
            batches=tuple(self.batches[number] for number in kept),
            step_seconds=tuple(self.step_seconds[number] for number in kept),
        )

    def label(self, batch: BatchSize) -> str:
        """How a profile says that a batch has been measured."""
        return f"{self.name}: {batch.name}"


def fitting(groups: Sequence[Group], seconds: float) -> list[Group | None]:
    """Every group, a part of it, or None in its place, so that all together take no longer than
    `seconds`: first the groups without their extra batches in the order of their value, then the
    extra batches in that order."""
    found: list[Group | None] = []
    for group in groups:
        least = group.only([batch for batch in group.batches if not batch.extra])
        fits = bool(least.batches) and least.seconds <= seconds
        found.append(least if fits else None)
        seconds -= least.seconds if fits else 0.0
    for number, group in enumerate(groups):
        kept = found[number]
        if kept is None and not all(batch.extra for batch in group.batches):
            continue
        more = group.seconds - (kept.seconds if kept else 0.0)
        if more <= seconds:
            found[number], seconds = group, seconds - more
    return found
