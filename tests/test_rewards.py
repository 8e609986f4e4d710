"""Rewards as workloads have them, and what scoring beside generation takes."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_workload, small_workload, tiny_cluster

from planner.predict.cost import CostModel
from planner.predict.costs.scoring import Scoring
from planner.predict.cycle import plan_cycles
from planner.predict.forecast import forecast
from planner.report.bottleneck import bottleneck
from planner.search import SearchOptions, find
from planner.spec.errors import UserError
from planner.spec.plan import Plan
from planner.spec.rewards import Overlong, RewardFunction, RewardServer
from planner.spec.timeline import step_seconds
from planner.spec.workload import RewardModel, Workload
from planner.spec.workload_file import load_workload

FUNCTION: dict[str, Any] = {"function": "folder/r.py:f"}
MODEL: dict[str, Any] = {"shape": make_workload().actor.shape, "random_weights": True}
SERVER: dict[str, Any] = {"url": "http://here:8000/score"}


def rated(*rewards: dict[str, Any], **changes: Any) -> Workload:
    return make_workload(**{"reward": None, "rewards": rewards, **changes})


# --- the files ---


def test_rewards_of_every_kind() -> None:
    workload = rated(FUNCTION, MODEL, SERVER, {"overlong_buffer": 4, "weight": 0.5})
    kinds = [RewardFunction, RewardModel, RewardServer, Overlong]
    assert [type(reward) for reward in workload.all_rewards] == kinds
    labels = [reward.label for reward in workload.all_rewards]
    assert labels == ["r.py:f", "reward model", "here:8000", "overlong"]
    assert "reward" in workload.roles and workload.host_rewards == workload.rewards[::2][:2]
    assert Workload.model_validate(workload.model_dump(mode="json")) == workload


def test_a_single_reward_is_written_as_it_always_was() -> None:
    workload = make_workload(reward=FUNCTION)
    written = workload.model_dump(mode="json")
    assert "rewards" not in written
    assert list(written["reward"]) == ["function", "seconds_per_sequence", "timeout_seconds"]


@pytest.mark.parametrize(
    ("rewards", "problem"),
    [
        ([FUNCTION, {**MODEL, "weight": -1}], "the weights sum to nothing"),
        ([MODEL, MODEL], "one model can be placed"),
        ([{"overlong_buffer": 4}], "alone rewards nothing"),
        ([FUNCTION, {"overlong_buffer": 4096}], "more than the"),
        ([FUNCTION, FUNCTION], "2 are called 'r.py:f'"),
        ([{**FUNCTION, "clip": [1, 0]}], "has to be the lower one"),
        ([{"url": "ftp://here"}], "is no address"),
        ([], "is missing"),
    ],
)
def test_rewards_that_cannot_be(rewards: list[dict[str, Any]], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        rated(*rewards)


def test_paths_of_rewards_start_at_the_file(tmp_path: Path) -> None:
    (tmp_path / "w.toml").write_text(
        """schema = "splitplan/workload/1"
name = "w"
batch = 4
minibatch = 4
prompt = { kind = "fixed", tokens = 4 }
response = { kind = "fixed", tokens = 4 }
[actor]
random_weights = true
shape = { hidden = 64, layers = 1, heads = 1, kv_heads = 1, intermediate = 64, vocab = 64 }
[[rewards]]
function = "r.py:f"
[[rewards]]
function = "sub/one.py"
[[rewards]]
function = "math-verify"
"""
    )
    first, second, third = load_workload(tmp_path / "w.toml").host_rewards
    assert isinstance(first, RewardFunction) and isinstance(second, RewardFunction)
    assert isinstance(third, RewardFunction)
    assert (first.file, first.in_file) == (f"{tmp_path}/r.py", "f")
    assert (second.file, second.in_file) == (f"{tmp_path}/sub/one.py", "")
    assert second.at("/there/one.py") == "/there/one.py"
    assert (third.file, third.label) == ("", "math-verify")


def test_a_missing_model_of_several_rewards_is_named(tmp_path: Path) -> None:
    (tmp_path / "w.toml").write_text(
        """schema = "splitplan/workload/1"
[[rewards]]
function = "r.py:f"
[[rewards]]
path = "judge"
"""
    )
    with pytest.raises(UserError, match=r"w\.toml: rewards\.1\.path"):
        load_workload(tmp_path / "w.toml")


def test_a_model_and_functions_are_two_calls() -> None:
    flow = rated(FUNCTION, MODEL, SERVER).dataflow
    assert flow["score"].roles == ("reward",) and flow["score_on_host"].kind == "host"
    reads = {read.data for read in flow["advantages"].reads}
    assert {"rewards", "host_rewards"} <= reads
    assert "score_on_host" not in rated(FUNCTION, SERVER).dataflow.names
    assert rated(FUNCTION, SERVER).dataflow["score"].kind == "host"


# --- what they take ---


def judged(seconds: float, processes: int | None = None) -> RewardFunction:
    return RewardFunction(function="r.py:f", seconds_per_sequence=seconds, processes=processes)


def test_what_sticks_out_of_generation() -> None:
    """Three samples finish at 2, 6 and 10 s of generation."""
    lengths = np.array([[30, 10, 50]])
    assert Scoring([judged(5.0, 1)], lengths).after(np.array([10.0])) == pytest.approx([7.0])
    # Two processes: the last one starts at once, for one of them is free since 7 s.
    assert Scoring([judged(5.0, 2)], lengths).after(np.array([10.0])) == pytest.approx([5.0])
    # Without processes: one after the other, behind generation.
    assert Scoring([judged(5.0)], lengths).after(np.array([10.0])) == pytest.approx([15.0])
    both = Scoring([judged(5.0, 1), judged(3.0)], lengths)
    assert both.after(np.array([10.0])) == pytest.approx([9.0])
    assert both.most(np.array([10.0])).seconds_per_sequence == 3.0


def test_the_queue_agrees_with_one_that_is_played() -> None:
    rng = np.random.default_rng(5)
    for processes in (1, 3, 16):
        lengths = rng.integers(1, 400, size=(1, 50))
        finished = np.sort(lengths[0]) / lengths.max() * 20.0
        free = [0.0] * processes
        for ready in finished:
            at = free.index(min(free))
            free[at] = max(free[at], float(ready)) + 1.3
        found = Scoring([judged(1.3, processes)], lengths).after(np.array([20.0]))
        assert found == pytest.approx([max(free) - 20.0])


def test_generation_and_what_sticks_out_rise_together() -> None:
    lengths = np.random.default_rng(1).lognormal(5, 1, size=(8, 300)).astype(np.int64) + 1
    scoring = Scoring([judged(0.5, 4), judged(0.01, 1)], lengths)
    generation = np.linspace(0, 100, 200)[:, None] * np.ones(8)
    together = generation + scoring.after(generation)
    assert (np.diff(together, axis=0) >= -1e-9).all()
    assert (np.diff(scoring.after(generation), axis=0) <= 1e-9).all()


def test_512_samples_of_half_a_second_beside_20_seconds() -> None:
    """16 processes add at most a tenth of the step."""
    lengths = np.minimum(
        np.random.default_rng(0).lognormal(6, 0.7, size=(16, 512)).astype(np.int64) + 1, 1024
    )
    added = Scoring([judged(0.5, 16)], lengths).after(np.full(16, 20.0))
    assert added.max() <= 2.0


def test_scoring_that_cannot_keep_up_bounds_the_step() -> None:
    """64 samples of 1 s on one process: no step is shorter, however stale its sequences may be."""
    reward = {**FUNCTION, "seconds_per_sequence": 1.0, "processes": 1}
    workload = small_workload(
        reward=reward,
        max_staleness=1,
        response={"kind": "lognormal", "mean": 200, "sigma": 0.7, "max": 512},
    )
    options = SearchOptions(runners_up=0, scenarios=4)
    best = find(workload, tiny_cluster(2), options).best
    assert best.predicted is not None
    assert best.predicted.step_seconds == pytest.approx(64.0)
    assert best.predicted.lower_bound_seconds == pytest.approx(64.0)
    timeline = forecast(best, 8)
    assert step_seconds(timeline) == pytest.approx(64.0, rel=1e-3)


def test_the_simulation_of_a_plan_has_its_predicted_step() -> None:
    reward = {**FUNCTION, "seconds_per_sequence": 0.2, "processes": 2}
    response = {"kind": "empirical", "values": [100, 200, 400], "max": 400}
    workload = small_workload(reward=reward, max_staleness=0, response=response)
    best = find(workload, tiny_cluster(2), SearchOptions(runners_up=0, scenarios=4)).best
    assert best.predicted is not None and best.predicted.proof.status == "optimal"
    model = CostModel(workload, best.cluster)
    score, generate = (model.call(best.dataflow[name], best) for name in ("score", "generate"))
    alone = model.host("score").seconds
    after = model.scoring.after(generate.seconds)
    assert score.seconds == pytest.approx(alone + after) and (after > 0.2 - 1e-9).all()
    steps = forecast(best, 1 + len(score.seconds))
    assert step_seconds(steps) == pytest.approx(best.predicted.step_seconds, rel=0.02)


def test_what_is_scored_before_a_wait_lets_its_call_start_takes_no_time() -> None:
    """One-step-off scores the step before: 2.5 s after its generation, which a wait has outlasted.
    Every cycle that scoring lengthens runs through generation."""
    reward = {**FUNCTION, "seconds_per_sequence": 0.08, "processes": 2}
    lengths = {"kind": "fixed", "tokens": 512}
    workload = small_workload(reward=reward, max_staleness=1, response=lengths)
    options = SearchOptions(runners_up=0, scenarios=1)
    plan = find(workload, tiny_cluster(2), options).baselines["one-step-off"]
    assert isinstance(plan, Plan) and plan.predicted is not None
    found = plan_cycles(plan)
    score, generate = found.calls.index("score"), found.calls.index("generate")
    assert (found.counts[:, generate] >= found.counts[:, score]).all()
    timeline = forecast(plan, 60)
    ends = timeline.ends
    assert (ends[50] - ends[30]) / 20 == pytest.approx(plan.predicted.step_seconds)
    lasting = [span.end - span.start for span in timeline.spans if span.call == "score"]
    assert lasting[40] < plan.predicted.call_seconds["score"]


def test_the_bottleneck_names_the_slowest_reward() -> None:
    slow = {"function": "slow.py:f", "seconds_per_sequence": 2.0, "processes": 2}
    quick = {"function": "quick.py:f", "seconds_per_sequence": 0.1, "processes": 2}
    workload = small_workload(
        reward=None,
        rewards=(quick, slow),
        response={"kind": "lognormal", "mean": 200, "sigma": 0.7, "max": 512},
    )
    best = find(workload, tiny_cluster(2), SearchOptions(runners_up=0, scenarios=4)).best
    told = bottleneck(best)
    assert told.startswith("Bottleneck: reward slow.py:f, for which GPUs wait: score ")
    assert "With processes = 64 it would score beside generation, and add 2.00 s to it" in told
    assert math.isclose(best.predicted.step_seconds, 64, rel_tol=0.2) if best.predicted else False
