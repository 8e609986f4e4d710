"""How many call completions a second of the simulator and of the exact evaluator on one core; `make
bench` prints them.

An evaluation of a period counts as one step of its plan, although it says what a simulation needs
many steps for."""

import time

import numpy as np
import pytest
from conftest import colocated, make_plan, make_workload, split

from planner.predict.cycle import cycles
from planner.predict.schedule import steady_edges, tasks_of
from planner.predict.simulate import simulate

pytestmark = pytest.mark.bench

STEPS, LAYOUTS, SCENARIOS = 1000, 1024, 16
HOMES = {"rollout": ["r", "t"], "actor": "t", "critic": "c", "reference": "t", "reward": "c"}


def three_pools(workload):
    stale = workload.model_copy(update={"max_staleness": 1})
    return make_plan(stale, {"r": 1, "t": 1, "c": 1}, HOMES, offsets={"generate": 1}, staleness=1)


def rate(completions, work, runs=7):
    """Per second, of the fastest of some runs: what else the machine does only adds."""
    fastest = np.inf
    for _ in range(runs):
        start = time.perf_counter()
        work()
        fastest = min(fastest, time.perf_counter() - start)
    return completions / fastest


@pytest.mark.parametrize("make", [colocated, split, three_pools])
def test_call_completions_per_second(make):
    plan, rng = make(make_workload()), np.random.default_rng(0)
    tasks, names = tasks_of(plan, STEPS), plan.dataflow.steady.names
    seconds = rng.lognormal(size=len(tasks)).tolist()
    simulated = rate(len(tasks), lambda: simulate(tasks, lambda task: seconds[task.index]))
    found = cycles(names, steady_edges(plan.dataflow, plan.program, plan.pools_of))
    drawn = rng.lognormal(size=(len(names), LAYOUTS, SCENARIOS))
    evaluated = rate(drawn.size, lambda: found.periods(drawn))
    print(
        f"\n{make.__name__}: simpy {simulated:,.0f} call completions/s (at least 100,000), "
        f"exact periods "
        f"{evaluated:,.0f} ({evaluated / simulated:,.0f} times; at least 50), "
        f"{len(found.distance)} cycles"
    )
    assert simulated >= 100_000
    assert evaluated >= 50 * simulated
