"""Simulation, max-plus recursion and cycle ratio agree on random plans: exactly, not about."""

from fractions import Fraction
from itertools import count

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_simulate import plans

from planner.predict.cycle import cycles
from planner.predict.schedule import steady_edges, tasks_of
from planner.predict.simulate import simulate

EXAMPLES = settings(max_examples=60, deadline=None)


def graph_of(plan):
    return steady_edges(plan.dataflow, plan.program, plan.pools_of)


def cycles_of(plan):
    return cycles(plan.dataflow.steady.names, graph_of(plan))


def recursion(tasks, seconds):
    """End of each task: that of its last predecessor, and what it takes."""
    ends = []
    for task in tasks:
        ends.append(max((ends[index] for index in task.after), default=0) + seconds[task.index])
    return ends


@EXAMPLES
@given(plans(), st.integers(0, 2**32))
def test_every_simulated_start_is_that_of_the_recursion(drawn, seed):
    """Bit by bit, whatever each call of each step takes."""
    tasks = tasks_of(drawn[0], 12)
    seconds = np.random.default_rng(seed).lognormal(size=len(tasks)).tolist()
    spans = simulate(tasks, lambda task: seconds[task.index])
    ends = recursion(tasks, seconds)
    assert [span.end for span in spans] == ends
    assert [span.start for span in spans] == [
        max((ends[i] for i in task.after), default=0) for task in tasks
    ]
    assert [(span.call, span.step) for span in spans] == [
        (task.call.name, task.step) for task in tasks
    ]


@EXAMPLES
@given(plans(), st.integers(0, 2**32))
def test_every_simulated_start_obeys_the_event_graph(drawn, seed):
    """Where all that a task waits for in the steady state is part of the run, it starts when the
    last of it ends."""
    plan, steps = drawn[0], 16
    names = plan.dataflow.steady.names
    seconds = dict(
        zip(names, np.random.default_rng(seed).lognormal(size=len(names)).tolist(), strict=True)
    )
    spans = simulate(tasks_of(plan, steps), lambda task: seconds[task.call.name])
    ends = {(span.call, span.step): span.end for span in spans}
    edges, compared = graph_of(plan), 0
    for span in spans:
        before = [(u, span.step - distance) for (u, v), distance in edges.items() if v == span.call]
        if all(0 <= step < steps for _, step in before):
            assert span.start == max(ends[task] for task in before)
            compared += 1
    assert compared > steps


def exact_slope(plan, seconds):
    """Growth per step of the recursion with whole durations, past its transient: the state, all
    ends of as many rounds as an edge reaches back, has come back but for a shift, after a multiple
    of the cyclicity."""
    offset = {item.call: item.offset for item in plan.program if hasattr(item, "call")}
    edges = graph_of(plan)
    reach = 1 + max(distance + offset[u] - offset[v] for (u, v), distance in edges.items())
    for doubling in count():
        steps = 64 << doubling
        tasks = tasks_of(plan, steps)
        ends = recursion(tasks, [seconds[task.call.name] for task in tasks])
        rounds = {}
        for task in tasks:
            rounds.setdefault(task.step - offset[task.call.name], []).append(ends[task.index])
        seen = {}
        for number in range(
            reach - 1, steps - max(offset.values())
        ):  # whole rounds only: no filling, no draining
            window = [end for back in range(reach) for end in rounds[number - back]]
            state = tuple(end - window[0] for end in window)
            if state in seen:
                earlier, then = seen[state]
                return Fraction(window[0] - then, number - earlier)
            seen[state] = number, window[0]


@EXAMPLES
@given(plans())
def test_the_cycle_ratio_is_the_slope_of_the_recursion(drawn):
    plan, seconds = drawn
    whole = {call: round(4 * s) for call, s in seconds.items()}
    found = cycles_of(plan).periods(
        np.array([whole[call] for call in plan.dataflow.steady.names], dtype=float)
    )
    assert float(found) == pytest.approx(float(exact_slope(plan, whole)), rel=1e-14)


@pytest.mark.nightly
@EXAMPLES
@given(plans(), st.integers(0, 2**32))
def test_many_durations_at_once_are_the_greatest_ratio_of_any_cycle(drawn, seed):
    """Of all cycles of the whole event graph, none left out: [calls, 3, 5] durations give [3, 5]
    periods."""
    plan, _ = drawn
    names = plan.dataflow.steady.names
    seconds = np.random.default_rng(seed).lognormal(size=(len(names), 3, 5))
    edges = graph_of(plan)
    every = [
        (
            [names.index(call) for call in cycle],
            sum(edges[pair] for pair in zip(cycle, [*cycle[1:], cycle[0]], strict=True)),
        )
        for cycle in nx.simple_cycles(nx.DiGraph(list(edges)))
    ]
    expected = np.max([seconds[on].sum(axis=0) / distance for on, distance in every], axis=0)
    found = cycles_of(plan)
    assert found.periods(seconds) == pytest.approx(expected, rel=1e-12)
    critical = [names.index(call) for call in found.critical(seconds[:, 0, 0])]
    ratios = [
        seconds[on, 0, 0].sum() / distance for on, distance in every if sorted(on) == critical
    ]
    assert max(ratios) == pytest.approx(expected[0, 0], rel=1e-12)


@EXAMPLES
@given(plans(), st.data())
def test_no_call_that_takes_longer_makes_a_schedule_shorter(drawn, data):
    """What lets the search drop layouts that are slower in every call."""
    plan, seconds = drawn
    slower = seconds | {
        call: seconds[call] + 2.5 for call in [data.draw(st.sampled_from(sorted(seconds)))]
    }
    tasks = tasks_of(plan, 6)
    for quick, slow in zip(
        *(recursion(tasks, [s[t.call.name] for t in tasks]) for s in (seconds, slower)), strict=True
    ):
        assert quick <= slow
    names = plan.dataflow.steady.names
    before, after = (
        float(cycles_of(plan).periods(np.array([s[n] for n in names]))) for s in (seconds, slower)
    )
    assert before <= after * (1 + 1e-12)
