"""Runs that are interrupted and gone on with, as if nothing had happened."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROLES, make_plan, make_workload, nearly, runs_on, split
from interrupted import OPTIONS, STEPS, WORKLOAD, metrics_of, one_step_off, said_in

from executor.fleet.pools import Fleet
from executor.running import checkpoint
from executor.running.checkpoint import Manifest
from executor.running.execute import execute, resume
from planner.spec.errors import UserError
from planner.spec.plan import Plan
from planner.spec.timeline import Timeline


@pytest.fixture(scope="module", params=["split", "one-step-off"])
def whole(
    request: pytest.FixtureRequest, two_cores: Fleet, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run without interruption, with checkpoints at its steps 2 and 4."""
    plan = split(WORKLOAD) if request.param == "split" else one_step_off()
    with runs_on(two_cores):
        return execute(plan, name="r", runs=tmp_path_factory.mktemp("whole"), options=OPTIONS)


def at_step_2(whole: Path, tmp_path: Path) -> checkpoint.Checkpoint:
    """Of a copy of the run. What came later is there still, as after an interruption, and must not
    count."""
    return checkpoint.find(
        Path(shutil.copytree(whole, tmp_path / "r")) / "checkpoints" / "step-000002"
    )


def test_a_resumed_run_equals_one_without_interruption(
    whole: Path, on_two_cores: None, tmp_path: Path
) -> None:
    """Number for number. In processes that have never seen the run: tests/test_soak.py."""
    found = at_step_2(whole, tmp_path)
    assert found.manifest.step == 2 and bool(found.manifest.done) == (found.plan.staleness == 1)
    run = resume(found, options=OPTIONS)
    assert metrics_of(run) == metrics_of(whole) and len(metrics_of(run)) == STEPS
    assert said_in(run) == said_in(whole) and len(said_in(run)) == 8 * STEPS
    spans = Timeline.read(run / "timeline.json").spans
    assert len({(span.call, span.step) for span in spans}) == len(spans) == 9 * STEPS
    assert [path.name for path in checkpoint.listed(run / "checkpoints")] == [
        "step-000002",
        "step-000004",
    ]
    for role in ("actor", "critic"):
        model = Path("checkpoints/final") / role / "model.safetensors"
        assert (run / model).read_bytes() == (whole / model).read_bytes()


def test_groups_that_were_selected_rates_and_weights_that_change_are_gone_on_with(
    two_cores: Fleet, tmp_path: Path
) -> None:
    """The batch of the next step has been selected beside the updates, learning rates and the
    weight of the KL penalty are on their way."""
    algorithm = {"advantage": "grpo", "oversampling_factor": 1.5, "kl_target": 0.1}
    rates = {"lr": 1e-3, "warmup_steps": 2, "schedule": "cosine"}
    workload = make_workload(
        steps=STEPS,
        critic=None,
        samples_per_prompt=2,
        algorithm=algorithm,
        optimizer={"actor": rates},
    )
    homes = {"rollout": "g", "actor": "t", "reference": "t", "reward": "g"}
    ahead = {"generate": 1, "score": 1, "select": 1}
    plan = make_plan(workload, {"g": 1, "t": 1}, homes, offsets=ahead, staleness=1)
    with runs_on(two_cores):
        whole = execute(plan, name="r", runs=tmp_path, options=OPTIONS)
        metrics = metrics_of(whole)
        found = at_step_2(whole, tmp_path / "copy")
        assert ("select", 2) in {(call, step) for call, step, _ in found.manifest.done}
        assert found.manifest.kl_coef == metrics[2]["kl_coef"] != metrics[0]["kl_coef"]
        assert metrics_of(resume(found, options=OPTIONS)) == metrics
    assert {step["groups/generated"] for step in metrics} == {6}
    assert all("critic/value_loss" not in step and step["staleness"] <= 1 for step in metrics)


@pytest.mark.parametrize("whole", ["split"], indirect=True)
def test_a_run_that_was_killed_behind_its_last_step_ends(
    whole: Path, on_two_cores: None, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "r"))
    there = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert resume(checkpoint.find(run), options=OPTIONS) == run
    assert there == {
        path: path.stat().st_mtime_ns for path in run.rglob("*")
    }  # what has ended is left as it is
    with pytest.raises(UserError, match="4 steps are done; choose --steps 4 or more"):
        resume(checkpoint.find(run), options=replace(OPTIONS, steps=3))
    (run / "timeline.json").unlink()
    shutil.rmtree(run / "checkpoints/final/critic")
    resume(checkpoint.find(run), options=OPTIONS)
    assert metrics_of(run) == metrics_of(whole)
    assert Timeline.read(run / "timeline.json") == Timeline.read(whole / "timeline.json")
    model = "checkpoints/final/critic/model.safetensors"
    assert (run / model).read_bytes() == (whole / model).read_bytes()


def test_another_plan_goes_on_from_resharded_weights(
    whole: Path, on_two_cores: None, tmp_path: Path
) -> None:
    """On other pools, with other shards; a pipeline is filled anew if the program would not have
    filled it so."""
    found = at_step_2(whole, tmp_path)
    shards_of_two = one_step_off(pools={"all": 2}, homes=dict.fromkeys(ROLES, "all"))
    run = resume(found, plan=shards_of_two, options=OPTIONS)
    ours, theirs = metrics_of(run), metrics_of(whole)
    assert [line["step"] for line in ours] == [0, 1, 2, 3] and ours[:2] == theirs[:2]
    equal = 2 if found.plan.staleness else 1  # steps with the same versions: split has no staleness
    for a, b in zip(ours[2 : 2 + equal], theirs[2 : 2 + equal], strict=True):
        assert a == {name: nearly(value, rel=1e-4, abs=1e-5) for name, value in b.items()}
    assert ours[3]["staleness"] == 1
    assert Plan.read(run / "plan-until-000002.json").pools == found.plan.pools
    assert {span.step for span in Timeline.read(run / "timeline-until-000002.json").spans} >= {0, 1}
    assert {span.step for span in Timeline.read(run / "timeline.json").spans} == {2, 3}


@pytest.mark.parametrize("whole", ["split"], indirect=True)
def test_another_learning_rate_is_used_logged_and_kept(
    whole: Path, on_two_cores: None, tmp_path: Path
) -> None:
    found = at_step_2(whole, tmp_path)
    rates = {"actor": {"lr": 1e-5}, "critic": {"lr": 1e-3}}
    plan = split(make_workload(steps=STEPS, optimizer=rates))
    run = resume(found, plan=plan, options=OPTIONS)
    ours, theirs = metrics_of(run), metrics_of(whole)
    assert ours[:2] == theirs[:2] and ours[2]["reward"] == theirs[2]["reward"]
    assert ours[3]["reward"] != theirs[3]["reward"]  # of what other weights sampled
    assert "INFO optimizer.actor.lr: 0.001 becomes 1e-05" in (run / "log.txt").read_text()
    assert checkpoint.find(run).plan == plan
    assert Plan.read(run / "plan-until-000002.json") == found.plan
    assert len(Timeline.read(run / "timeline.json").spans) == 9 * STEPS


# --- without processes: what is left to do ---


def test_a_pipeline_that_had_drained_is_said_to_differ(two: Path) -> None:
    """As after `--steps 6`, behind which nothing was in flight."""
    directory = two / "checkpoints" / "step-000006"
    manifest = Manifest.read(directory / "checkpoint.json").changed(done=())
    manifest.changed(sha256=manifest.digest()).write(directory / "checkpoint.json")
    left = checkpoint.find(two).left(one_step_off(), 9)
    assert left.differs == (
        "the pipeline had drained: the sequences of step 6 are generated by weights 6, where a run "
        "in one go takes older ones; metrics differ from those of a run in one go"
    )
    made = [task.weights_version for task in left.tasks if task.call.name == "generate"]
    assert made[6:] == [6, 6, 7]


def test_what_watches_the_training_may_do_so_at_other_steps(two: Path) -> None:
    """Step 3 lacked its evaluation only; now it has none, and is ended without it."""
    found = checkpoint.find(two / "checkpoints" / "step-000004")
    ended = [*WORKLOAD.dataflow.names]
    done = (
        *found.manifest.done,
        *((call, 3, 4 if call == "sync_weights" else 3) for call in ended),
    )
    evaluated = replace(
        found,
        manifest=found.manifest.model_copy(update={"done": done}),
        metrics=b"{}\n" * 3,
    )
    left = evaluated.left(one_step_off(), 9)
    assert left.ended == set(range(left.stop)) and not left.differs and evaluated.written == 3


def test_another_program_does_every_task_that_is_left_once(two: Path) -> None:
    found = checkpoint.find(two / "checkpoints" / "step-000004")
    _, ended, stop, differs, _ = found.left(one_step_off(), 9)
    assert ended == set(range(stop)) and stop > 0 and not differs
    for plan in (split(WORKLOAD), one_step_off(late_reference=True)):
        tasks, ended, stop, differs, _ = found.left(plan, 9)
        assert differs.startswith("sequences in flight, of step 4, are generated again")
        left = [task for task in tasks if task.index not in ended]
        assert {task.step for task in left} == set(range(4, 9)) and len(left) == 9 * 5
        made = [task.weights_version for task in left if task.call.name == "generate"]
        assert made == ([4, 5, 6, 7, 8] if plan.name == "split" else [4, 4, 5, 6, 7])
