"""A run planned anew from its own steps: the best plan for them, what it saves, how surely, and
after how many steps that pays what a switch costs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner import __version__
from planner.exchange.imported_run import ImportedRun, profile_of
from planner.exchange.own_run import OwnRun
from planner.predict.forecast import predict
from planner.predict.profile import Profile
from planner.search import SearchOptions, find
from planner.spec.plan import Plan, Predicted, Provenance

REPETITIONS = 20  # of the run's steps, for the range of what is saved
NOTHING_SAVED = 0.01  # of a step


@dataclass(frozen=True, kw_only=True)
class PlannedAnew:
    """`best` is the best plan for the run's own seconds and lengths, `now` what these say of the
    plan that the run has. A step of the best one is `saved` seconds shorter: between `low` and
    `high`, the 5th and 95th percentile over draws of the run's steps."""

    best: Plan
    now: Predicted
    saved: float
    low: float
    high: float

    @property
    def is_surely_faster(self) -> bool:
        return self.low > 0 and self.saved >= NOTHING_SAVED * self.now.step_seconds

    def pays_after(self, cost: float) -> int:
        """The steps after which the least saving of the range has paid a cost in seconds."""
        return int(np.ceil(cost / self.low))


def plan_anew(
    found: OwnRun, options: SearchOptions, others: Sequence[Profile], command: str
) -> PlannedAnew:
    """Search with a run's own seconds and lengths, and what other profiles have measured. Raises
    UserError."""
    profiles = (own_profile(found, found.steps, command), *others)
    provenance = Provenance(version=__version__, seed=found.plan.workload.seed, command=command)
    workload, cluster = found.observed.workload, found.plan.cluster
    best = find(workload, cluster, options, profiles=profiles, provenance=provenance).best
    assert best.predicted
    now, (low, high) = predict(found.observed, profiles), _range_of_saving(found, best, others)
    saved = now.step_seconds - best.predicted.step_seconds
    return PlannedAnew(best=best, now=now, saved=saved, low=low, high=high)


def plan_to_go_on_with(
    found: OwnRun, best: Plan, others: Sequence[Profile], name: str, command: str
) -> Plan:
    """The best plan with the run's own workload, which goes on, and with as much staleness allowed
    as the plan has; predicted for that workload."""
    plan = found.plan
    staleness = max(plan.workload.max_staleness, best.staleness)
    workload = plan.workload.changed(max_staleness=staleness)
    profiles = (own_profile(found, found.steps, command), *others)
    written = best.changed(name=name, workload=workload, predicted=None)
    return written.changed(predicted=predict(written, profiles))


def own_profile(found: OwnRun, steps: Sequence[dict[str, float]], command: str) -> Profile:
    """The points of some steps of a run."""
    imported = ImportedRun(plan=found.observed, steps=tuple(steps), phases={}, warmup=0)
    return profile_of(imported, steps, command)


def _range_of_saving(found: OwnRun, best: Plan, others: Sequence[Profile]) -> tuple[float, float]:
    """The 5th and 95th percentile of the seconds saved a step, over draws of the run's steps with
    repetition (the bootstrap of Efron 1979)."""
    rng, saved = np.random.default_rng(0), []
    for _ in range(REPETITIONS):
        chosen = rng.integers(len(found.steps), size=len(found.steps))
        profiles = (own_profile(found, [found.steps[at] for at in chosen], ""), *others)
        before, after = predict(found.observed, profiles), predict(best, profiles)
        saved.append(before.step_seconds - after.step_seconds)
    low, high = np.percentile(saved, (5, 95)).tolist()
    return low, high
