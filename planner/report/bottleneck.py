"""What bounds a step, in one sentence, and what would help where that is a reward."""

import numpy as np

from planner.predict.cost import SCENARIOS
from planner.predict.costs.lengths import SampledLengths
from planner.predict.costs.scoring import Scoring
from planner.report.compare import critical_seconds
from planner.report.tables import roles_of, seconds
from planner.spec.plan import Plan
from planner.spec.rewards import HostReward

LITTLE_SHARE = 0.02  # of the step: a call on it that takes less is not named
CHEAP_SHARE = 0.05  # of the rest of the step, that a reward may take
NEAR_LEAST = 1.1  # times the least seconds that any number of processes would leave


def bottleneck(plan: Plan) -> str:
    """What bounds the step: the calls of the cycle that binds, and whether one pool holds them all.
    A reward from the host on it gets another sentence."""
    assert plan.predicted is not None
    calls = critical_seconds(plan, plan.predicted.call_seconds)
    total = sum(calls.values())
    large = {call: value for call, value in calls.items() if value >= LITTLE_SHARE * total > 0}
    shares = [f"{call} {value / total:.0%}" for call, value in large.items()]
    parts = ", ".join(shares) + (", the rest little" if len(shares) < len(calls) else "")
    on_host = [call for call in large if not _pools(plan, call)]
    scores = next((call for call in on_host if plan.dataflow[call].scores), None)
    if scores is not None:
        return _by_a_reward(plan, calls, scores, parts)
    occupied = [_pools(plan, call) for call in calls]
    shared = set.intersection(*filter(None, occupied)) if any(occupied) and not on_host else set()
    for pool in plan.pools:
        if pool in shared:
            gpus = len(plan.pools[pool].gpus)
            return f"Bottleneck: the GPUs of {roles_of(plan, pool)} ({gpus}) always work: {parts}."
    return f"Bottleneck: no pool on its own, but calls that wait for each other: {parts}."


def _pools(plan: Plan, call: str) -> set[str]:
    return set(plan.pools_of(plan.dataflow[call]))


def _by_a_reward(plan: Plan, calls: dict[str, float], scores: str, parts: str) -> str:
    """The sentence where scoring on the host is on the cycle that binds."""
    workload, taken = plan.workload, calls[scores]
    lengths = SampledLengths.drawn(workload, SCENARIOS)
    assert plan.predicted is not None
    of_call = plan.predicted.call_seconds.get(plan.dataflow.generates.name, 0.0)
    generation = np.full(lengths.scenarios, of_call)
    slowest = Scoring(workload.host_rewards, lengths.responses).most(generation)
    if not slowest.seconds_per_sequence and slowest.processes is None:  # it was measured
        slowest = slowest.changed(seconds_per_sequence=taken / workload.generated)

    def after(processes: int) -> float:
        tried = slowest.changed(processes=processes)
        return float(Scoring([tried], lengths.responses).after(generation).mean())

    wanted = CHEAP_SHARE * (sum(calls.values()) - taken)
    enough = max(wanted, NEAR_LEAST * after(workload.generated))
    low, high = 1, workload.generated  # the fewest that are enough
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if after(middle) <= enough else (middle + 1, high)
    return _told(slowest, low, after(low), calls, scores, parts)


def _told(
    slowest: HostReward,
    processes: int,
    left: float,
    calls: dict[str, float],
    scores: str,
    parts: str,
) -> str:
    taken = calls[scores]
    what = f"Bottleneck: calls that wait for each other, with reward {slowest.label}"
    if taken == max(calls.values()):
        what = f"Bottleneck: reward {slowest.label}, for which GPUs wait"
    if processes <= (slowest.processes or 0):
        return f"{what}: {parts}. More processes would not help."
    return (
        f"{what}: {parts}. With processes = {processes} it would score beside generation, and add "
        f"{seconds(left)} s to it instead of {seconds(taken)}."
    )
