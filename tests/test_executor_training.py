"""Real PPO steps of tiny random models: where things run must not change what is computed."""

import contextlib
import gc
import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from conftest import ROLES, SHAPE, colocated, make_plan, make_workload, nearly, split
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from executor.data.batch import Generated, Sequences, collate
from executor.data.prompts import Synthetic
from executor.fleet.pools import Fleet
from executor.running import preflight
from executor.running.execute import execute
from executor.running.loop import Silent, loop
from executor.running.options import RunOptions
from executor.running.step import Training
from executor.training.trainer import Minibatch, Trainer
from planner.predict.schedule import tasks_of
from planner.predict.simulate import simulate
from planner.spec.errors import UserError
from planner.spec.plan import Plan
from planner.spec.rewards import RewardFunction
from planner.spec.timeline import Timeline, step_seconds
from planner.spec.workload import Workload

STEPS = 3
WORKLOAD = make_workload(batch=12, minibatch=6)


class Recording(Training):
    """Keeps the sequences and the metrics of every step."""

    def __init__(self, plan: Plan, fleet: Fleet) -> None:
        super().__init__(plan, preflight.check(plan, local=True), fleet)
        self.tokens: list[np.ndarray] = []
        self.metrics: list[dict[str, Any]] = []

    def end_step(self, number: int) -> dict[str, Any]:
        self.tokens.append(self.steps[number].sequences.tokens)
        self.metrics.append(super().end_step(number))
        return self.metrics[-1]


Train = Callable[[Plan], Recording]


@pytest.fixture(scope="module")
def train(two_cores: Fleet) -> Train:
    """Runs plans of two cores on the same processes."""

    def run(plan: Plan) -> Recording:
        backend = Recording(plan, two_cores)
        loop(tasks_of(plan, STEPS), backend, {}, Silent())
        return backend

    return run


@pytest.fixture(scope="module")
def on_one_core(train: Train) -> Recording:
    return train(colocated(WORKLOAD, cores=1))


def assert_equal(a: Recording, b: Recording) -> None:
    for ours, theirs in zip(a.tokens, b.tokens, strict=True):
        assert np.array_equal(ours, theirs)
    for our, their in zip(a.metrics, b.metrics, strict=True):
        assert our.keys() == their.keys()
        for name in our:
            assert our[name] == nearly(their[name], rel=1e-5, abs=1e-5), name


def test_the_metrics_say_that_something_was_learned_from(on_one_core: Recording) -> None:
    for metrics in on_one_core.metrics:
        assert metrics["actor/grad_norm"] > 0 and metrics["critic/grad_norm"] > 0
        assert metrics["staleness"] == 0 and metrics["weights_version"] == metrics["step"]
        assert all(np.isfinite(value) for value in metrics.values() if isinstance(value, float))
    assert on_one_core.metrics[0]["kl"] == pytest.approx(
        0, abs=1e-6
    )  # the reference is the actor's beginning
    assert on_one_core.metrics[2]["kl"] != pytest.approx(0, abs=1e-6)
    assert on_one_core.metrics[0]["value"] == 0  # the value head starts at zero


def test_the_rollout_samples_from_the_distribution_that_the_trainer_sees(
    on_one_core: Recording,
) -> None:
    for metrics in on_one_core.metrics:
        assert metrics["actor/importance_weight"] == pytest.approx(1, abs=1e-5)
        assert metrics["importance/staleness_kl"] == pytest.approx(0, abs=1e-8)


def test_two_shards_with_recomputation_equal_one_process(
    on_one_core: Recording, train: Train
) -> None:
    layouts = {
        role: {"recompute": True, "micro_batch_tokens": 24} for role in ROLES if role != "rollout"
    }
    assert_equal(on_one_core, train(colocated(WORKLOAD, cores=2, layouts=layouts)))


def test_two_replicas_and_an_idle_rank_equal_one_process(
    on_one_core: Recording, train: Train
) -> None:
    replicas = {"shard": 1, "replicas": 2}
    layouts = {
        "actor": replicas,
        "critic": replicas,
        "reward": {"shard": 1},
        "rollout": {"replicas": 1, "concurrency": 4},
    }
    assert_equal(on_one_core, train(colocated(WORKLOAD, cores=2, layouts=layouts)))


def test_split_equals_colocated(on_one_core: Recording, train: Train) -> None:
    assert_equal(on_one_core, train(split(WORKLOAD)))


@contextlib.contextmanager
def trainer_here(workload: Workload) -> Iterator[Trainer]:
    """A trainer of all roles in this process, to look into it."""
    trainer = Trainer()
    trainer.configure(colocated(workload, cores=1), "all", 0)
    try:
        trainer.join(60.0, *trainer.listen())
        trainer.load_models(None)
        yield trainer
    finally:
        trainer.leave()


def made_up(workload: Workload) -> Sequences:
    """A batch whose responses are all the same token."""
    requests = Synthetic(workload).step(0).requests
    count = int(requests.max_tokens.sum())
    made = Generated(
        lengths=requests.max_tokens,
        tokens=np.ones(count, dtype=np.int32),
        log_probs=np.zeros(count, dtype=np.float32),
        weights_versions=np.zeros(count, dtype=np.int32),
    )
    return collate(requests, [np.arange(len(requests))], [made])


def test_a_trainer_that_leaves_keeps_no_model(ray_two: None) -> None:
    """Although what there is after the warm-up is not looked at for garbage any more."""
    with trainer_here(WORKLOAD) as trainer:
        trainer.warm_up()
        assert gc.get_freeze_count() > 0
        module = weakref.ref(trainer.roles["actor"].module)
        trainer.leave()
        assert module() is None and gc.get_freeze_count() == 0


def test_after_inference_and_after_training_only_shards_stay(ray_two: None) -> None:
    sequences = made_up(WORKLOAD)
    rows, tokens = np.arange(len(sequences.lengths)), int(sequences.response_lengths.sum())
    column = np.zeros(sequences.mask.shape, dtype=np.float32)
    batch, columns = ray.put(sequences), ray.put({"values": column, "returns": column})
    with trainer_here(WORKLOAD) as trainer:
        for role, version in (("reference", None), ("critic", 0)):
            trainer.infer(role, version, [batch], [rows])
            assert all(isinstance(p, DTensor) for p in trainer.roles[role].module.parameters())
        trainer.train(
            "critic",
            1,
            [batch, columns],
            [Minibatch(micro_batches=[rows], tokens=tokens, sequences=len(rows))],
        )
        assert all(isinstance(p, DTensor) for p in trainer.roles["critic"].module.parameters())


def test_adam_is_given_clipped_gradients(ray_two: None) -> None:
    """Its first moments are a tenth of them after one step."""
    workload = make_workload(optimizer={"critic": {"grad_clip": 1e-3}})
    sequences = made_up(workload)
    rows, tokens = np.arange(len(sequences.lengths)), int(sequences.response_lengths.sum())
    column = np.ones(sequences.mask.shape, dtype=np.float32)
    batch, columns = ray.put(sequences), ray.put({"values": 0 * column, "returns": column})
    with trainer_here(workload) as trainer:
        (stats,) = trainer.train(
            "critic",
            1,
            [batch, columns],
            [Minibatch(micro_batches=[rows], tokens=tokens, sequences=len(rows))],
        )
        optimizer = trainer.roles["critic"].optimizer
        assert optimizer is not None
        moments = torch.cat(
            [state["exp_avg"].full_tensor().flatten() for state in optimizer.state.values()]
        )
    assert stats["grad_norm"] > 1e-2
    assert moments.norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-2)


@pytest.mark.parametrize(("clip", "loss"), [(0.2, 0.5 * 4.8**2), ("off", 0.0)])
def test_the_value_is_clipped_unless_that_is_off(ray_two: None, clip: Any, loss: float) -> None:
    """A critic starts with values of 0. Here those before the step are said to have been 5."""
    workload = make_workload(algorithm={"value_clip": clip})
    sequences = made_up(workload)
    rows, tokens = np.arange(len(sequences.lengths)), int(sequences.response_lengths.sum())
    old = np.full(sequences.mask.shape, 5.0, dtype=np.float32)
    batch, columns = ray.put(sequences), ray.put({"values": old, "returns": 0 * old})
    minibatch = Minibatch(micro_batches=[rows], tokens=tokens, sequences=len(rows))
    with trainer_here(workload) as trainer:
        (stats,) = trainer.train("critic", 1, [batch, columns], [minibatch])
    assert stats["value_loss"] == pytest.approx(loss * tokens)


def test_one_step_off_trains_on_stale_sequences(train: Train) -> None:
    roles = {"rollout": "g", "actor": "t", "critic": "t", "reference": "t", "reward": "t"}
    early = [
        "generate",
        "score",
        "ref_logprobs",
        "values",
        "old_logprobs",
    ]  # for the next step, between the updates
    order = [
        *early[:3],
        "advantages",
        "update_critic",
        "values",
        "update_actor",
        "old_logprobs",
        "sync_weights",
    ]
    offsets = dict.fromkeys(early, 1)
    plan = make_plan(WORKLOAD, {"g": 1, "t": 1}, roles, order=order, offsets=offsets, staleness=1)
    metrics = train(plan).metrics
    assert [step["staleness"] for step in metrics] == [0, 1, 1]
    assert [step["weights_version"] for step in metrics] == [0, 0, 1]
    assert [step["staleness_histogram"] for step in metrics] == [{"0": 12}, {"1": 12}, {"1": 12}]
    assert [step["weights_versions"] for step in metrics] == [[[0, 12]], [[0, 12]], [[1, 12]]]
    assert metrics[2]["importance/staleness_kl"] > 0
    shares = [step["importance/effective_share"] for step in metrics]
    assert shares[0] == pytest.approx(1) and shares[2] < 0.9999
    assert (
        metrics[2]["importance/p01"]
        < 1
        < metrics[2]["importance/p99"]
        <= metrics[2]["importance/max"]
    )


def test_a_run_writes_what_it_promises(on_two_cores: None, tmp_path: Path) -> None:
    workload = make_workload(steps=2, proximal="rollout", reference=None, critic=None)
    options = RunOptions(save_every=0, export_every=2)
    path = execute(colocated(workload, cores=1), name="r", runs=tmp_path, options=options)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1] and all(
        line["tokens_per_second"] > 0 for line in lines
    )
    timeline = Timeline.read(path / "timeline.json")
    assert {span.call for span in timeline.spans} == {
        "generate",
        "score",
        "advantages",
        "update_actor",
        "sync_weights",
    }
    assert all(span.tokens > 0 for span in timeline.spans if span.call != "sync_weights")
    assert list(path.glob("events.out.tfevents.*"))
    actor = AutoModelForCausalLM.from_pretrained(path / "checkpoints/final/actor")
    assert actor(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 48)
    exported = AutoModelForCausalLM.from_pretrained(path / "exports/step-000002/actor")
    halves = dict(exported.named_parameters())
    assert all(torch.equal(whole.bfloat16(), halves[n]) for n, whole in actor.named_parameters())


REWARD = """
def length(prompts, responses, answers):
    assert len(answers) == len(prompts) and answers[0] is not None
    return [len(response.split()) / 8 for response in responses]


def late_failure(prompts, responses, answers):
    late_failure.calls = getattr(late_failure, "calls", 0) + 1
    return [0.0] * (len(responses) - (late_failure.calls >= 2))


def sometimes(prompts, responses, answers):
    import os, time

    sometimes.calls = getattr(sometimes, "calls", 0) + 1
    if "3 4" in prompts and sometimes.calls == 1:
        time.sleep(1000)
    if "5 6" in prompts:
        return [float("nan")] * len(prompts)
    return length(prompts, responses, answers)


def hang(prompts, responses, answers):
    import time

    time.sleep(1000)
"""


def with_files(tmp_path: Path, directories: dict[str, Path], function: str) -> Workload:
    """The tiny task from files: a tokenizer, prompts, held-out prompts, a reward function."""
    (tmp_path / "reward.py").write_text(REWARD)
    for name in ("train", "held_out"):
        lines = [json.dumps({"prompt": f"{i} {i + 1}", "answer": str(i)}) for i in range(9)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    model = {"shape": SHAPE, "path": directories["actor"]}
    data = {
        "train": tmp_path / "train.jsonl",
        "evaluation": tmp_path / "held_out.jsonl",
        "evaluate_every": 2,
    }
    reward = {"function": f"{tmp_path}/reward.py:{function}"}
    return make_workload(
        actor=model, critic=model, reference=None, reward=reward, data=data, steps=2
    )


def test_a_run_from_files_with_a_reward_function(
    on_two_cores: None, tmp_path: Path, model_directories: dict[str, Path]
) -> None:
    workload = with_files(tmp_path, model_directories, "length")
    assert workload.data is not None
    workload = workload.changed(data=workload.data.changed(evaluate_first=True))
    path = execute(split(workload), name="r", runs=tmp_path)
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    # Greedy responses have up to 8 words, and their score is an eighth for each.
    assert "evaluation_score" not in metrics[0] and 0 < metrics[1]["evaluation_score"] <= 1
    assert 0 < metrics[0]["initial_evaluation_score"] <= 1
    assert not {"exact_match", "initial_evaluation_score"} & metrics[1].keys()
    assert metrics[0]["score"] == pytest.approx(
        metrics[0]["response_tokens"] / 8, abs=0.2
    )  # the eos is no word
    assert all(line["actor/entropy"] > 0 and 0 <= line["idle/b"] < 1 for line in metrics)
    said = [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]
    of_first = [line for line in said if line["evaluation"] is None]
    assert len(of_first) == 8 and {line["step"] for line in of_first} == {0}
    mean = sum(line["scores"]["score"] for line in of_first) / 8
    assert mean == pytest.approx(metrics[0]["score"])
    assert [line["step"] for line in said if line["evaluation"] == "held-out"] == [0] * 9 + [1] * 9
    assert said[-1]["where"] == f"{tmp_path}/held_out.jsonl:9"
    final = path / "checkpoints/final"
    assert AutoTokenizer.from_pretrained(final / "actor")("1 2")["input_ids"] == [3, 4]
    before, after = (
        AutoModelForCausalLM.from_pretrained(p)
        for p in (model_directories["actor"], final / "actor")
    )
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
    critic = AutoModelForTokenClassification.from_pretrained(final / "critic")
    assert critic.score.weight.abs().sum() > 0


def test_stop_strings_and_tokens_end_responses(
    on_two_cores: None, tmp_path: Path, model_directories: dict[str, Path]
) -> None:
    """Without its EOS nearly every response would be cut; every number is a stop here."""
    workload = with_files(tmp_path, model_directories, "length")
    assert workload.data is not None
    data = workload.data.changed(stop=[*map(str, range(5)), *range(48)])
    path = execute(split(workload.changed(data=data)), name="r", runs=tmp_path)
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["response_tokens"] for line in metrics] == [1, 1]
    assert [line["truncated_share"] for line in metrics] == [0, 0]


def test_a_failure_in_the_middle_keeps_what_was_done(
    on_two_cores: None, tmp_path: Path, model_directories: dict[str, Path]
) -> None:
    plan = split(with_files(tmp_path, model_directories, "late_failure"))
    with pytest.raises(
        UserError,
        match=r"2 of 8 samples failed twice, the last one prompt .*0 rewards for 1 resp",
    ):
        execute(plan, name="r", runs=tmp_path)
    spans = Timeline.read(tmp_path / "r" / "timeline.json").spans
    assert {span.step for span in spans if span.call == "sync_weights"} == {0}
    assert not (tmp_path / "r" / "checkpoints").exists()


@pytest.mark.nightly
def test_a_reward_function_that_hangs_ends_the_run(
    on_two_cores: None, tmp_path: Path, model_directories: dict[str, Path]
) -> None:
    workload = with_files(tmp_path, model_directories, "hang")
    assert isinstance(workload.reward, RewardFunction)
    impatient = workload.reward.model_copy(update={"timeout_seconds": 0.5})
    plan = split(workload.model_copy(update={"reward": impatient}))
    with pytest.raises(UserError, match=r"reward.py:hang' took longer than 0.5 s for 1 response;"):
        execute(plan, name="r", runs=tmp_path)
    done = {span.call for span in Timeline.read(tmp_path / "r" / "timeline.json").spans}
    assert "generate" in done and "score" not in done


def test_a_sample_without_a_reward_is_dropped_and_counted(
    on_two_cores: None, tmp_path: Path, model_directories: dict[str, Path]
) -> None:
    """A batch hangs once: its samples are tried again. One of them never gets a finite number."""
    workload = with_files(tmp_path, model_directories, "sometimes")
    assert isinstance(workload.reward, RewardFunction)
    reward = workload.reward.model_copy(update={"timeout_seconds": 5.0})
    workload = workload.model_copy(update={"reward": reward, "data": workload.data})
    path = execute(split(workload), name="r", runs=tmp_path)
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["dropped"] for line in metrics) in (1, 2)  # of nine prompts sixteen are drawn
    assert all(
        np.isfinite(line["actor/grad_norm"]) and line["actor/skipped"] == 0 for line in metrics
    )
    assert "dropped the sample of prompt '5 6'" in (path / "log.txt").read_text()


@pytest.mark.bench
def test_the_controller_costs_little(ray_two: None, tmp_path: Path) -> None:
    """The measured step time over that of the same program with the measured durations, less 1: at
    most 5%."""
    shape = {**SHAPE, "hidden": 128, "intermediate": 256}
    models = {role: {"shape": shape, "random_weights": True} for role in ROLES if role != "rollout"}
    layouts = {role: {"micro_batch_tokens": 4096} for role in models} | {
        "rollout": {"concurrency": 512}
    }
    plan = split(make_workload(batch=512, minibatch=256, **models), layouts=layouts)
    run = execute(plan, name="r", runs=tmp_path, options=RunOptions(steps=10))
    measured = Timeline.read(run / "timeline.json")
    taken = {(span.call, span.step): span.seconds for span in measured.spans}
    spans = simulate(tasks_of(plan, 10), lambda task: taken[task.call.name, task.step])
    again = measured.model_copy(update={"spans": spans})
    overhead = step_seconds(measured) / step_seconds(again) - 1
    print(f"step {step_seconds(measured):.3f} s, controller overhead {overhead:.1%}")
    assert overhead <= 0.05
