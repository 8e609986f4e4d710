"""Why a plan is as fast as it is: what binds it, where its GPUs idle, and what each decision and
each cost is worth."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.predict.cost import CostModel
from planner.predict.cycle import Cycles, plan_cycles
from planner.predict.profile import Profile
from planner.predict.schedule import unroll
from planner.search.questions.ladder import Rung, ladder, seconds_of, step_of, waits_of
from planner.search.solver.problem import problem_of, scenarios_of
from planner.spec.plan import Issue, Plan, Wait

# Idle time is counted from step SETTLED on, when the schedule repeats itself, and before STEPS.
SETTLED, STEPS = 8, 16


class Effect(NamedTuple):
    """The cost of a call and its effect on the step: mean seconds, its shortest and longest
    scenario, the source of the figure, seconds of a step per second of the call, and the step if
    the call took 10% more or less."""

    call: str
    seconds: float
    shortest: float
    longest: float
    source: str
    share: float
    slower: float
    faster: float


class WaitPrice(NamedTuple):
    """A wait in words, and the seconds per step that it alone costs."""

    what: str
    seconds: float


class Bubble(NamedTuple):
    """Seconds per step in which a pool idles before a call, because that call waits for another."""

    pool: str
    call: str
    waits_for: str
    seconds: float


class Critical(NamedTuple):
    """A cycle that binds: its calls, the steps that it spans, and in which share of the length
    scenarios it does."""

    calls: tuple[str, ...]
    steps: int
    share: float


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """`ladder` starts at a baseline (`ladder[0].what`) and ends at the plan; `waits` are that
    baseline's waits."""

    step_seconds: float
    ladder: tuple[Rung, ...]
    waits: tuple[WaitPrice, ...]
    critical: tuple[Critical, ...]
    effects: tuple[Effect, ...]
    bubbles: tuple[Bubble, ...]


def explain(plan: Plan, profiles: Sequence[Profile] = ()) -> Explanation:
    """Explain a plan, at the costs that the profiles (else the roofline) give. Raises UserError."""
    problem = problem_of(plan.workload, plan.cluster, profiles, None, scenarios=scenarios_of(plan))
    model, seconds = problem.model, seconds_of(plan, problem.model)
    rungs = ladder(plan, problem)
    start = rungs[0]
    return Explanation(
        step_seconds=rungs[-1].seconds,
        ladder=rungs,
        waits=tuple(
            WaitPrice(what, start.seconds - step_of(without, model))
            for what, without in waits_of(start.plan)
        ),
        critical=_critical(plan, seconds),
        effects=effects(plan, model),
        bubbles=bubbles(plan, seconds),
    )


def _critical(plan: Plan, seconds: NDArray[np.float64]) -> tuple[Critical, ...]:
    """The cycles that bind in some scenario, the most frequent first."""
    found = plan_cycles(plan)
    binding = Counter((found.counts @ seconds / found.distance[:, None]).argmax(axis=0).tolist())
    return tuple(
        Critical(
            calls=tuple(
                call for call, on in zip(found.calls, found.counts[row], strict=True) if on
            ),
            steps=int(found.distance[row]),
            share=times / seconds.shape[1],
        )
        for row, times in sorted(binding.items(), key=lambda entry: (-entry[1], entry[0]))
    )


def effects(plan: Plan, model: CostModel, change: float = 0.1) -> tuple[Effect, ...]:
    """The effect of each call of the steady state, where `change` makes it slower or faster.

    A period is the largest of (sum over a cycle's calls of their seconds) / (its steps), so its
    derivative by a call's seconds is 1 / steps where the call is on the cycle that binds, and 0
    elsewhere; the mean over the scenarios."""
    found, seconds = plan_cycles(plan), seconds_of(plan, model)
    rates = found.counts / found.distance[:, None]
    shares = rates[(rates @ seconds).argmax(axis=0)].mean(axis=0)
    listed = []
    for row, name in enumerate(found.calls):
        slower = _step_if(found, seconds, row, 1 + change)
        faster = _step_if(found, seconds, row, 1 - change)
        drawn, source = seconds[row], model.call(plan.dataflow[name], plan).source
        listed.append(
            Effect(
                call=name,
                seconds=float(drawn.mean()),
                shortest=float(drawn.min()),
                longest=float(drawn.max()),
                source=source,
                share=float(shares[row]),
                slower=slower,
                faster=faster,
            )
        )
    return tuple(listed)


def _step_if(found: Cycles, seconds: NDArray[np.float64], row: int, factor: float) -> float:
    """The mean step if the call in this row took `factor` times its seconds."""
    changed = seconds.copy()
    changed[row] *= factor
    return float(found.periods(changed).mean())


def bubbles(plan: Plan, seconds: NDArray[np.float64]) -> tuple[Bubble, ...]:
    """Where each pool idles in the steady state, the longest first; seconds are the mean over the
    scenarios [S].

    All scenarios are run at once: a call starts when the last of its predecessors has ended, and
    what a pool idles before that is put down to this predecessor. Pools of a stream are left
    out."""
    flow = plan.dataflow.steady
    names = flow.names
    program = [item for item in plan.program if isinstance(item, Wait) or item.call in names]
    ahead = max(item.offset for item in program if isinstance(item, Issue))
    tasks = unroll(flow, program, plan.pools_of, STEPS + ahead + 1)
    ends = np.zeros((len(tasks), seconds.shape[1]))
    streaming = plan.rollout.pools if plan.streams else ()
    free = {pool: np.zeros(seconds.shape[1]) for pool in plan.pools if pool not in streaming}
    idle: dict[tuple[str, str, str], float] = defaultdict(float)
    for task in tasks:
        start, last = np.zeros(seconds.shape[1]), np.zeros(seconds.shape[1], dtype=np.int64)
        if task.after:
            before = ends[list(task.after)]
            start, last = before.max(axis=0), np.array(task.after)[before.argmax(axis=0)]
        pools = [pool for pool in task.pools if pool in free]
        for pool in pools:
            if SETTLED <= task.step < STEPS:
                gaps = (start - free[pool]) / (STEPS - SETTLED) / len(start)
                for gap, index in zip(gaps.tolist(), last.tolist(), strict=True):
                    idle[pool, task.call.name, tasks[index].call.name] += gap
        ends[task.index] = start + seconds[names.index(task.call.name)]
        free.update(dict.fromkeys(pools, ends[task.index]))
    shown = [Bubble(*where, gap) for where, gap in idle.items() if gap > 1e-9]
    return tuple(sorted(shown, key=lambda bubble: -bubble.seconds))
