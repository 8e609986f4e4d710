"""Real PPO steps of tiny random models: where things run must not change what is computed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROLES, colocated, make_plan, make_workload, split
from transformers import AutoModelForCausalLM

from executor import preflight
from executor.run import Silent, execute, loop
from executor.step import Training
from planner.predict.schedule import tasks_of
from planner.spec.plan import Plan
from planner.spec.timeline import Span, Timeline

STEPS = 3
WORKLOAD = make_workload(batch=12, minibatch=6)


class Recording(Training):
    """Keeps the sequences and the metrics of every step."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan, preflight.check(plan, local=True))
        self.tokens: list[np.ndarray] = []
        self.metrics: list[dict[str, Any]] = []

    def end_step(self, number: int) -> dict[str, Any]:
        self.tokens.append(self.steps[number].sequences.tokens)
        self.metrics.append(super().end_step(number))
        return self.metrics[-1]


def train(plan: Plan, steps: int = STEPS) -> Recording:
    backend = Recording(plan)
    spans: dict[int, Span] = {}
    try:
        loop(tasks_of(plan, steps), backend, spans, Silent())
    finally:
        backend.close()
    return backend


@pytest.fixture(scope="module")
def on_one_core(ray_two: None) -> Recording:
    return train(colocated(WORKLOAD, cores=1))


def assert_equal(a: Recording, b: Recording) -> None:
    for ours, theirs in zip(a.tokens, b.tokens, strict=True):
        assert np.array_equal(ours, theirs)
    for ours, theirs in zip(a.metrics, b.metrics, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name


def test_the_metrics_say_that_something_was_learned_from(on_one_core: Recording) -> None:
    for metrics in on_one_core.metrics:
        assert metrics["actor/grad_norm"] > 0 and metrics["critic/grad_norm"] > 0
        assert metrics["staleness"] == 0 and metrics["weights_version"] == metrics["step"]
        assert all(np.isfinite(value) for value in metrics.values())
    assert on_one_core.metrics[0]["kl"] == pytest.approx(0, abs=1e-6)  # the reference is the actor's beginning
    assert on_one_core.metrics[2]["kl"] != pytest.approx(0, abs=1e-6)
    assert on_one_core.metrics[0]["value"] == 0  # the value head starts at zero


def test_the_rollout_samples_from_the_distribution_that_the_trainer_sees(on_one_core: Recording) -> None:
    for metrics in on_one_core.metrics:
        assert metrics["actor/importance_weight"] == pytest.approx(1, abs=1e-5)
        assert metrics["actor/staleness_kl"] == pytest.approx(0, abs=1e-8)


def test_two_shards_with_recomputation_equal_one_process(on_one_core: Recording) -> None:
    layouts = {role: {"recompute": True, "micro_batch_tokens": 24} for role in ROLES if role != "rollout"}
    assert_equal(on_one_core, train(colocated(WORKLOAD, cores=2, layouts=layouts)))


def test_two_replicas_and_an_idle_rank_equal_one_process(on_one_core: Recording) -> None:
    replicas = {"shard": 1, "replicas": 2}
    layouts = {
        "actor": replicas,
        "critic": replicas,
        "reward": {"shard": 1},
        "rollout": {"replicas": 1, "concurrency": 4},
    }
    assert_equal(on_one_core, train(colocated(WORKLOAD, cores=2, layouts=layouts)))


def test_split_equals_colocated(on_one_core: Recording) -> None:
    assert_equal(on_one_core, train(split(WORKLOAD)))


def test_one_step_off_trains_on_stale_sequences(ray_two: None) -> None:
    roles = {"rollout": "g", "actor": "t", "critic": "t", "reference": "t", "reward": "t"}
    plan = make_plan(WORKLOAD, {"g": 1, "t": 1}, roles, offsets={"generate": 1}, staleness=1)
    metrics = train(plan).metrics
    assert [step["staleness"] for step in metrics] == [0, 1, 1]
    assert [step["weights_version"] for step in metrics] == [0, 0, 1]
    assert metrics[2]["actor/staleness_kl"] > 0


def test_a_run_writes_what_it_promises(ray_two: None, tmp_path: Path) -> None:
    workload = make_workload(steps=2, proximal="rollout", reference=None, critic=None)
    path = execute(colocated(workload, cores=1), name="r", runs=tmp_path)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1] and all(line["tokens_per_second"] > 0 for line in lines)
    timeline = Timeline.read(path / "timeline.json")
    assert {span.call for span in timeline.spans} == {"generate", "score", "advantages", "update_actor", "sync_weights"}
    assert all(span.tokens > 0 for span in timeline.spans if span.call != "sync_weights")
    assert list(path.glob("events.out.tfevents.*"))
    actor = AutoModelForCausalLM.from_pretrained(path / "checkpoints/final/actor")
    assert actor(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 48)
