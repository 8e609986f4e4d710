"""Runs whose generation streams: batches in order and whole, a ledger that is closed to the token,
segments as weights arrive, and what is gone on with after an interruption."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from conftest import make_plan, make_workload, nearly, runs_on
from interrupted import metrics_of
from numpy.typing import NDArray
from recording import Recording
from test_executor_training import with_files

from executor.data.prompts import Synthetic
from executor.fleet.pools import Fleet
from executor.running import checkpoint
from executor.running.execute import execute, resume
from executor.running.options import RunOptions
from executor.running.stream import RolloutStream
from planner.spec.plan import Plan
from planner.spec.timeline import Timeline

STEPS = 6
LENGTHS = {"kind": "lognormal", "mean": 16, "sigma": 1.0, "max": 80}
APART = {"rollout": "r", "actor": "t", "critic": "t", "reference": "t", "reward": "t"}


def streamed(k: int, **changes: Any) -> Plan:
    changes = {"response": LENGTHS, "sync": "in_flight", "max_staleness": k, **changes}
    workload = make_workload(**{"steps": STEPS, **changes})
    roles = {role: pool for role, pool in APART.items() if role in ("rollout", *workload.models)}
    layouts = {"rollout": {"concurrency": 12}}
    return make_plan(
        workload,
        {"r": 1, "t": 1},
        roles,
        offsets={"generate": k},
        staleness=k,
        sync="in_flight",
        layouts=layouts,
    )


class Streaming(Recording):
    """Keeps the lengths of each step's responses too."""

    def __init__(self, plan: Plan, fleet: Fleet | None) -> None:
        super().__init__(plan, fleet)
        self.lengths: list[list[int]] = []
        self.versions: list[NDArray[np.int32]] = []

    def end_step(self, number: int) -> dict[str, Any]:
        sequences = self.steps[number].sequences
        self.lengths.append(sequences.response_lengths.tolist())
        self.versions.append(np.where(sequences.mask, sequences.weights_versions, -1))
        return super().end_step(number)


def asked(plan: Plan, steps: int = STEPS) -> list[list[int]]:
    """The lengths of each step's responses, by the dataset."""
    source = Synthetic(plan.workload)
    return [source.step(step).requests.max_tokens.tolist() for step in range(steps)]


def closed(metrics: list[dict[str, Any]]) -> None:
    """All that was sampled was trained on, or is in flight still."""
    ended = np.cumsum([line["step_sampled_tokens"] for line in metrics])
    for line, before in zip(metrics, ended.tolist(), strict=True):
        assert line["sampled_tokens"] == before + line["in_flight_tokens"]
    assert metrics[-1]["in_flight_tokens"] == metrics[-1]["in_flight_sequences"] == 0


def equal(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """The metrics of two runs, but for what is in flight at the moment."""
    for our, their in zip(ours, theirs, strict=True):
        assert our.keys() == their.keys()
        for name in our.keys() - {"in_flight_tokens", "in_flight_sequences", "sampled_tokens"}:
            assert our[name] == nearly(their[name], rel=1e-5, abs=1e-5), name


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each version samples four tokens of a sequence, and the newest one the rest."""
    monkeypatch.setattr(RolloutStream, "window", 4)


def taken(plan: Plan, fleet: Fleet | None = None, kind: type[Streaming] = Streaming) -> Streaming:
    """All steps of a run, whose batches are those of the dataset and whose ledger is closed."""
    run = kind(plan, fleet)
    run.take(STEPS)
    assert run.lengths == asked(plan)
    closed(run.metrics)
    for number, (metrics, versions) in enumerate(zip(run.metrics, run.versions, strict=True)):
        sampled = versions[versions >= 0]
        assert sampled.min() >= max(0, number - plan.staleness) and sampled.max() <= number
        assert metrics["staleness"] == pytest.approx(number - sampled.mean())
        assert metrics["staleness_max"] == number - sampled.min() <= plan.staleness
        assert metrics["trained_tokens"] == metrics["step_sampled_tokens"] == len(sampled)
    return run


def test_batches_are_whole_and_in_order_while_weights_arrive(two_cores: Fleet) -> None:
    run = taken(streamed(k=2), two_cores)
    assert [metrics["step"] for metrics in run.metrics] == list(range(STEPS))


class Mortal(Streaming):
    """An engine dies after each of the first steps."""

    def end_step(self, number: int) -> dict[str, Any]:
        if number < 2:
            ray.kill(self.processes.engines[0].handle)
        return super().end_step(number)


def test_with_versions_at_fixed_places_a_run_whose_engine_dies_has_equal_metrics(
    two_cores: Fleet, fixed: None
) -> None:
    """Version t - k + p // 4, but at most t, samples the token at place p of step t. Sequences of
    an engine that dies go on with the tokens that they have."""
    plan = streamed(k=2)
    one, other = taken(plan, two_cores), taken(plan, two_cores, Mortal)
    for step, versions in enumerate(one.versions):
        places = np.arange(versions.shape[1]) // 4
        expected = np.minimum(max(0, step - 2) + places, step)
        assert (versions == np.where(versions >= 0, expected, -1)).all()
    equal(one.metrics, other.metrics)
    assert max(metrics["segments"] for metrics in one.metrics) > 2


@pytest.mark.parametrize("kv", ["keep", "recompute"])
def test_tokens_have_the_log_probs_of_the_weights_that_sampled_them(
    two_cores: Fleet, kv: str
) -> None:
    """With a learning rate of nothing all versions are one."""
    plan = streamed(k=1, kv=kv, optimizer={"actor": {"lr": 1e-12}})
    run = taken(plan, two_cores)
    assert max(found.max() for found in run.differences) < 1e-5


def shrink(run: Path) -> None:
    """The timeline of a run knows how its batches became fewer."""
    timeline = Timeline.read(run / "timeline.json")
    spans = [span for span in timeline.spans if span.call == "generate"]
    assert {span.step for span in spans} == set(timeline.ended_parts) == set(range(STEPS))
    for span in spans:
        parts = timeline.ended_parts[span.step]
        assert list(parts) == sorted(parts)
        assert span.start <= parts[0] and parts[-1] <= span.end


def test_a_run_goes_on_with_unfinished_sequences(
    two_cores: Fleet, fixed: None, tmp_path: Path
) -> None:
    """From where they were: nothing is lost or doubled, and all is as in a run in one go. At less
    staleness they are generated again."""
    plan = streamed(k=2)
    options = RunOptions(save_every=2, keep=3, max_restarts=0)
    with runs_on(two_cores):
        whole = execute(plan, name="r", runs=tmp_path, options=options)
        metrics = metrics_of(whole)
        closed(metrics)
        copy = Path(shutil.copytree(whole, tmp_path / "copy" / "r"))
        found = checkpoint.find(copy / "checkpoints" / "step-000002")
        had = [name for name in found.arrays() if name.endswith("/tokens")]
        assert {f"stream/{step}/tokens" for step in (2, 3)} == set(had)
        assert ("generate", 3) not in {(call, step) for call, step, _ in found.manifest.done}
        gone_on = resume(found, options=options)
        resumed = metrics_of(gone_on)
        shrink(whole)
        shrink(gone_on)
        fresher = resume(found, plan=streamed(k=1), options=options)
    closed(resumed)
    assert len(resumed) == len(metrics) == STEPS
    equal(resumed, metrics)
    again = metrics_of(fresher)
    closed(again)
    assert again[:2] == metrics[:2] and len(again) == STEPS
    assert "of steps 2, 3, are generated again" in (fresher / "log.txt").read_text()


def test_evaluations_and_scores_go_beside_a_stream(
    on_two_cores: None, tmp_path: Path, model_directories: dict[str, Path]
) -> None:
    """An evaluation has the weights of its step alone. Sequences are scored as they finish, as
    they would be when all have."""
    given = with_files(tmp_path, model_directories, "length")
    reward = given.reward.changed(processes=1)
    workload = given.changed(reward=reward, sync="in_flight", max_staleness=2, steps=4)
    plan = make_plan(
        workload,
        {"r": 1, "t": 1},
        {"rollout": "r", "actor": "t", "critic": "t"},
        offsets={"generate": 2},
        staleness=2,
        sync="in_flight",
    )
    metrics = metrics_of(execute(plan, name="r", runs=tmp_path))
    closed(metrics)
    assert ["evaluation_score" in line for line in metrics] == [False, True, False, True]
    for line in metrics:  # an eighth for each word, and the end of the sequence is none
        assert line["score"] == pytest.approx(line["response_tokens"] / 8, abs=0.2)
