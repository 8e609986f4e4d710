"""What pools wait for, in timelines that are written by hand and in simulated ones."""

import math

import pytest
from conftest import make_workload, small_workload, split, tiny_cluster

from planner.predict.forecast import forecast
from planner.predict.waiting import SHARES, pool_shares
from planner.search import baseline
from planner.spec.timeline import Span, step_seconds

# Actor, rollout and reference on pool a, the critic on pool b, the reward on the host.
PLAN = split(make_workload(reward={"function": "r.py:f"}))


def span(call: str, ready: float, start: float, end: float, *pools: str) -> Span:
    return Span(
        call=call, role="", pools=pools, step=0, issued=0, ready=ready, start=start, end=end
    )


def test_each_second_of_a_gap_has_its_cause() -> None:
    """Pool b waits 10 seconds: from 0 to 1 for the sync that generation waits for, to 2 for the
    controller, to 7 for generation, to 8 for the host's call behind it, to 9 for the reference on
    pool a, and to 10 for the controller again. Pool a waits for nothing but the host."""
    spans = [
        span("sync_weights", -1, -1, 1, "a"),
        span("generate", 1, 2, 7, "a"),
        span("score", 7, 7, 8),
        span("ref_logprobs", 8, 8, 9, "a"),
        span("values", 9, 10, 12, "b"),
    ]
    found = pool_shares(PLAN, spans, 0, 20)
    expected = {"weights": 1, "host": 1 + 1 + 1, "generation": 5, "busy": 2}
    expected["other"] = 1 + 8  # what comes behind 12 is not known
    assert found["b"] == pytest.approx({name: taken / 20 for name, taken in expected.items()})
    assert found["a"]["busy"] == pytest.approx(7 / 20)
    assert all(sum(shares.values()) == pytest.approx(1) for shares in found.values())


def test_a_gap_that_reaches_beyond_the_window_counts_within_it() -> None:
    spans = [span("generate", 0, 0, 30, "a"), span("values", 30, 30, 40, "b")]
    assert pool_shares(PLAN, spans, 10, 20)["b"] == pytest.approx(
        {**dict.fromkeys(SHARES, 0.0), "generation": 1.0}
    )


def test_shares_of_a_simulated_plan_add_up_and_are_those_of_its_prediction() -> None:
    plan = baseline("standalone", small_workload(max_staleness=1), tiny_cluster(4))
    timeline = forecast(plan, 8)
    ends, seconds = timeline.ends, step_seconds(timeline)
    found = pool_shares(plan, timeline.spans, ends[4], ends[4] + seconds)
    assert plan.predicted is not None
    for pool, shares in found.items():
        assert sum(shares.values()) == pytest.approx(1)
        assert shares["busy"] == pytest.approx(plan.predicted.busy[pool], rel=1e-3)
    actor, rollout = (plan.roles[role].pools[0] for role in ("actor", "rollout"))
    assert found[actor]["generation"] > 0.2 and found[rollout]["other"] > 0.2
    assert found[rollout]["generation"] == 0


def test_calls_that_overlap_or_go_on_count_once() -> None:
    """Of ten seconds pool a has 1-4 and 3-6, and what began at 8 goes on; pool b 0-2 and 9-."""
    spans = [
        span("generate", 11, 11, 14, "a"),
        span("generate", 13, 13, 16, "a"),
        span("generate", 18, 18, math.inf, "a"),
        span("values", 2, 2, 12, "b"),
        span("values", 19, 19, math.inf, "b"),
    ]
    found = pool_shares(PLAN, spans, 10, 20)
    assert [found[pool]["busy"] for pool in "ab"] == pytest.approx([0.7, 0.3])
