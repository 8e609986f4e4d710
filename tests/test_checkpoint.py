"""Runs that are interrupted and gone on with, as if nothing had happened; what is broken is never
taken for whole."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROLES, SHAPE, make_plan, make_workload, nearly, runs_on, split
from hypothesis import HealthCheck, given, settings
from safetensors.torch import save_file
from test_fuzz import documents

from executor.fleet.pools import Fleet
from executor.running import checkpoint, saving
from executor.running.changes import content_of
from executor.running.checkpoint import Manifest
from executor.running.execute import execute, resume
from executor.running.options import RunOptions
from executor.running.run_directory import lock, timeline_of
from executor.running.stops import in_flight
from executor.training import shards
from executor.training.offload import Parking
from planner.predict.schedule import tasks_of
from planner.spec.errors import UserError
from planner.spec.plan import Plan
from planner.spec.timeline import Timeline

STEPS = 4
OPTIONS = RunOptions(save_every=2, keep=2, max_restarts=0)
WORKLOAD = make_workload(steps=STEPS)


def one_step_off(**more: Any) -> Plan:
    """Sequences of the next step are made, scored and valued beside the updates, so there are many
    in flight."""
    roles = more.pop(
        "homes", {"rollout": "g", "actor": "t", "critic": "t", "reference": "t", "reward": "g"}
    )
    order = [
        "generate",
        "score",
        "ref_logprobs",
        "old_logprobs",
        "values",
        "advantages",
        "update_critic",
    ]
    order += ["update_actor", "sync_weights"]
    offsets = {
        "generate": 1,
        "score": 1,
        "ref_logprobs": 0 if more.pop("late_reference", False) else 1,
    }
    pools = more.pop("pools", {"g": 1, "t": 1})
    return make_plan(
        WORKLOAD,
        pools,
        roles,
        order=order,
        offsets=offsets,
        staleness=1,
        name="one-step-off",
        **more,
    )


TIMED = ("seconds", "tokens_per_second")


def metrics_of(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]


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


def test_a_resumed_run_equals_one_without_interruption(whole: Path, tmp_path: Path) -> None:
    """In processes that have never seen the run."""
    found = at_step_2(whole, tmp_path)
    assert found.manifest.step == 2 and bool(found.manifest.done) == (found.plan.staleness == 1)
    run = resume(found, options=OPTIONS)
    assert metrics_of(run) == metrics_of(whole) and len(metrics_of(run)) == STEPS
    spans = Timeline.read(run / "timeline.json").spans
    assert len({(span.call, span.step) for span in spans}) == len(spans) == 9 * STEPS
    assert [path.name for path in checkpoint.listed(run / "checkpoints")] == [
        "step-000002",
        "step-000004",
    ]
    for role in ("actor", "critic"):
        model = Path("checkpoints/final") / role / "model.safetensors"
        assert (run / model).read_bytes() == (whole / model).read_bytes()


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
    plan = split(make_workload(optimizer={"actor": {"lr": 1e-5}, "critic": {"lr": 1e-3}}))
    run = resume(found, plan=plan, options=OPTIONS)
    ours, theirs = metrics_of(run), metrics_of(whole)
    assert ours[:2] == theirs[:2] and ours[2]["reward"] == theirs[2]["reward"]
    assert ours[3]["reward"] != theirs[3]["reward"]  # of what other weights sampled
    assert "INFO optimizer.actor.lr: 0.001 becomes 1e-05" in (run / "log.txt").read_text()
    assert checkpoint.find(run).plan == plan
    assert Plan.read(run / "plan-until-000002.json") == found.plan
    assert len(Timeline.read(run / "timeline.json").spans) == 9 * STEPS


# --- without processes: what is read, and what is refused ---


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A run with two small checkpoints, as `Saver` writes them."""
    plan, run = one_step_off(), tmp_path / "run"
    saver = saving.Saver(run / "checkpoints", every=2, keep=2)
    run.mkdir()
    tasks = tasks_of(plan, 9)
    for step in (2, 4, 6):
        (run / "metrics.jsonl").write_text("".join(f'{{"step": {i}}}\n' for i in range(step)))
        stop = next(
            task.index + 1
            for task in tasks
            if (task.call.name, task.step) == ("sync_weights", step - 1)
        )
        done = in_flight(tasks, stop)
        timeline = timeline_of(plan, 9, [])
        saver.save(
            lambda directory, step=step: snapshot(directory, step),
            step=step,
            done=done,
            plan=plan,
            timeline=timeline,
            metrics=run / "metrics.jsonl",
        )
    saver.wait()
    assert not saver.error
    return run


def snapshot(directory: Path, step: int, rows: int = 8) -> saving.Snapshot:
    writers = []
    for rank in range(2):
        model = torch.nn.Linear(3, rows, bias=False)
        copied = shards.copy("actor", model, torch.optim.AdamW(model.parameters()), step, rank)
        assert copied is not None
        writers.append(shards.Writer({"actor": copied}, directory))

    def written() -> Any:
        parts = [writer.finished() for writer in writers]
        return None if None in parts else parts

    arrays = {f"{step}/scores": np.arange(4, dtype=np.float32)}
    return saving.Snapshot(
        arrays=arrays,
        metrics={step: {"kl": float("nan")}},
        evaluations={},
        skipped={},
        written=written,
    )


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_the_last_ones_are_kept_and_what_they_hold_is_read(two: Path) -> None:
    assert names(two) == ["step-000004", "step-000006"]
    found = checkpoint.find(two)
    assert (
        found.manifest.step == 6
        and found.metrics.count(b"\n") == 6
        and found.plan == one_step_off()
    )
    assert list(found.arrays()) == ["6/scores"] and found.manifest.metrics == {6: {"kl": None}}
    assert checkpoint.find(two / "checkpoints" / "step-000004").manifest.step == 4
    assert ("generate", 6, 5) in found.manifest.done and {
        step for _, step, _ in found.manifest.done
    } == {6}


@pytest.mark.parametrize(
    "name", ["actor-00000.safetensors", "metrics.jsonl", "plan.json", "checkpoint.json"]
)
@pytest.mark.parametrize("how", ["cut", "flipped", "missing"])
def test_a_broken_checkpoint_is_refused_by_name_and_the_one_before_offered(
    two: Path, name: str, how: str
) -> None:
    path = two / "checkpoints" / "step-000006" / name
    content = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        place = content.index(b'"step": 6') + 8 if name == "checkpoint.json" else len(content) - 5
        content[place] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    with pytest.raises(UserError) as error:
        checkpoint.find(two)
    line = str(error.value)
    assert (
        str(path) in line
        and line.endswith(f"--resume {two}/checkpoints/step-000004")
        and "\n" not in line
    )
    latest = checkpoint.latest(two)
    assert latest is not None and latest.manifest.step == 4


def test_a_manifest_that_says_anything_else_is_refused_in_one_line_or_whole(two: Path) -> None:
    """Its own hash is right, as in one that was changed on purpose."""
    path = two / "checkpoints" / "step-000006" / "checkpoint.json"
    as_written = json.loads(path.read_text())

    @settings(
        max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(documents(as_written))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        with contextlib.suppress(
            UserError, ValueError
        ):  # what cannot be parsed stays without a hash
            unsigned = Manifest.parse(json.loads(content), path)
            unsigned.model_copy(update={"sha256": unsigned.digest()}).write(path)
        try:
            found = checkpoint.find(two)
        except UserError as error:
            assert str(path.parent) in str(error) and len(str(error).splitlines()) == 1
        else:
            assert found.plan == one_step_off()

    check()


def test_parts_of_a_model_lie_in_files_of_the_checkpoint(two: Path) -> None:
    path = two / "checkpoints" / "step-000006" / "checkpoint.json"
    shutil.copy(path.parent / "actor-00000.safetensors", two)
    text = path.read_text().replace('"file": "actor-00000', '"file": "../../actor-00000')
    elsewhere = Manifest.parse(json.loads(text), path)
    elsewhere.model_copy(update={"sha256": elsewhere.digest()}).write(path)
    with pytest.raises(
        UserError,
        match=r"actor has parts in '\.\./\.\./actor-00000.safetensors', which is none of its",
    ):
        checkpoint.find(two)


def test_a_checkpoint_that_was_being_written_is_none(two: Path) -> None:
    shutil.copytree(two / "checkpoints/step-000006", two / "checkpoints/.step-000008")
    assert checkpoint.find(two).manifest.step == 6
    for name in names(two):
        shutil.rmtree(two / "checkpoints" / name)
    with pytest.raises(UserError, match="no checkpoint in it"):
        checkpoint.find(two)


FULL = """
import resource, sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
from test_checkpoint import one_step_off, snapshot
from executor.running import checkpoint, saving
from executor.running.run_directory import timeline_of
run = Path({run!r})
saver = saving.Saver(run / "checkpoints", every=2, keep=2)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
plan = one_step_off()
saver.save(lambda d: snapshot(d, 8, rows=10_000), step=8, done=(), plan=plan,
           timeline=timeline_of(plan, 9, []),
           metrics=run / "metrics.jsonl")
saver.wait()
print(saver.error)
"""


def test_a_run_that_goes_on_is_not_gone_on_with_twice(two: Path) -> None:
    held = lock(two)
    with pytest.raises(UserError, match="the run goes on in another process"):
        resume(checkpoint.find(two), options=RunOptions(steps=9))
    os.close(held)
    os.close(lock(two))


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoints_before(two: Path) -> None:
    """A limit on the size of files stands in for the disk: writing fails in the middle of a file,
    too."""
    code = FULL.format(tests=str(Path(__file__).parent), run=str(two))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert "File too large" in done.stdout, done
    assert names(two) == ["step-000004", "step-000006"]
    assert checkpoint.find(two).manifest.step == 6


def test_rows_are_read_from_the_pieces_that_hold_them(tmp_path: Path) -> None:
    """Three ranks wrote; any other number of them reads, moments too."""
    whole = torch.arange(21.0).view(7, 3)
    parts = []
    for rank, (begin, end) in enumerate([(0, 3), (3, 6), (6, 7)]):
        file = f"actor-{rank}.safetensors"
        save_file({"weights/w": whole[begin:end].contiguous()}, tmp_path / file)
        stored = shards.Stored(
            shape=(7, 3), moments=False, pieces=(shards.Piece(file=file, begin=begin, end=end),)
        )
        parts.append(shards.RoleState(version=5, optimizer_steps=9, tensors={"w": stored}))
    saved = shards.Saved(directory=tmp_path, roles={"actor": shards.merge(parts)})
    restored = shards.Restored("actor", saved)
    for begin, end in [(0, 7), (0, 4), (4, 7), (2, 3), (5, 7)]:
        rows = restored.rows(["tied", "w"], torch.Size([7, 3]), begin, end, torch.device("cpu"))
        assert torch.equal(rows, whole[begin:end])
    with pytest.raises(UserError, match=r"no w of shape \[8, 3\]"):
        restored.rows(["w"], torch.Size([8, 3]), 0, 1, torch.device("cpu"))


def test_a_rank_that_is_done_first_tells_its_part_until_all_are(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 5)
    copied = shards.copy("actor", model, torch.optim.AdamW(model.parameters()), 1, 0)
    assert copied is not None
    writer = shards.Writer({"actor": copied}, tmp_path)
    while (first := writer.finished()) is None:
        time.sleep(0.01)
    assert (
        writer.finished() == first and set(first[0]) == {"actor"} and set(first[1]) == {copied.file}
    )


def test_moments_that_are_given_are_those_that_adam_makes() -> None:
    models = [torch.nn.Linear(3, 5), torch.nn.Linear(3, 5)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1, fused=True) for model in models]
    shards.give_moments(optimizers[1], torch.device("cpu"))
    assert not optimizers[0].state and len(optimizers[1].state) == 2
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            model(torch.arange(3.0) - step).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    copies = [shards.copy("actor", *pair, 1, 0) for pair in zip(models, optimizers, strict=True)]
    assert copies[0] is not None and copies[1] is not None and copies[0].state == copies[1].state
    assert all(
        torch.equal(copies[1].tensors[name], tensor) for name, tensor in copies[0].tensors.items()
    )


def test_what_is_parked_on_the_host_is_saved_from_there() -> None:
    model = torch.nn.Linear(3, 5)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    straight = shards.copy("actor", model, optimizer, 1, 0)
    weights, moments = Parking(), Parking()
    weights.park(model.parameters())
    moments.park(x for state in optimizer.state.values() for x in state.values() if x.dim())
    parked = shards.copy(
        "actor", model, optimizer, 1, 0, lambda tensor: moments.peek(weights.peek(tensor))
    )
    assert straight is not None and parked is not None and straight.state == parked.state
    assert len(parked.tensors) == 6
    assert all(
        torch.equal(parked.tensors[name], tensor) for name, tensor in straight.tensors.items()
    )


def test_a_plan_for_another_job_is_refused(two: Path) -> None:
    found = checkpoint.find(two)
    other = split(make_workload(seed=8, batch=16))
    with pytest.raises(UserError, match=r"another workload .*: batch, seed may not differ"):
        found.check(other)
    found.check(split(make_workload(steps=99)))


def rewritten(path: Path, **content: str) -> None:
    """The manifest of a checkpoint with this content of files."""
    manifest = Manifest.read(path / "checkpoint.json").changed(content=content)
    manifest.changed(sha256=manifest.digest()).write(path / "checkpoint.json")


def test_settings_that_people_change_in_mid_run_may_change_and_are_named(two: Path) -> None:
    found = checkpoint.find(two)
    observed = {"kind": "empirical", "values": [3, 4, 9], "max": 9}
    algorithm = {"temperature": 0.8, "kl_coef": 0.01}
    optimizer = {"actor": {"lr": 1e-4}, "critic": {"lr": 1e-3}}
    settings = {"algorithm": algorithm, "optimizer": optimizer}
    changed = make_workload(steps=9, response=observed, **settings)
    assert found.check(split(changed)) == [
        "algorithm.kl_coef: 0.05 becomes 0.01",
        "optimizer.actor.lr: 0.001 becomes 0.0001",
        "response: lognormal (mean 5, sigma 0.5, max 8) becomes empirical (values 3 values, max 9)",
    ]
    for key, other in (
        ("algorithm.temperature", {"algorithm": {**algorithm, "temperature": 1.0}}),
        ("prompt", {"prompt": {"kind": "fixed", "tokens": 6}}),  # which makes other prompts
    ):
        with pytest.raises(UserError, match=f"{key} may not differ"):
            found.check(split(make_workload(**{**settings, **other})))


def test_models_and_files_may_lie_elsewhere_if_they_hold_the_same(
    two: Path, tmp_path: Path, model_directories: dict[str, Path]
) -> None:
    places = [tmp_path / "here", tmp_path / "there"]
    plans = []
    for place in places:
        shutil.copytree(model_directories["actor"], place / "actor")
        (place / "train.jsonl").write_text('{"prompt": "1 2"}\n')
        (place / "reward.py").write_text("def f(prompts, responses, answers): ...\n")
        workload = make_workload(
            actor={"shape": SHAPE, "path": place / "actor"},
            data={"train": place / "train.jsonl", "evaluate_every": 0},
            reward={"function": f"{place}/reward.py:f"},
            steps=STEPS,
        )
        plans.append(split(workload))
    here, there = plans
    directory = two / "checkpoints" / "step-000006"
    rewritten(directory, **content_of(here.workload))
    found = replace(checkpoint.find(two), plan=here)
    assert found.check(here) == []
    assert found.check(there) == [
        f"actor.path: now {places[1]}/actor (as before)",
        f"data.train: now {places[1]}/train.jsonl (as before)",
        f"reward.function: now {places[1]}/reward.py (as before)",
    ]
    (places[1] / "reward.py").write_text("def f(prompts, responses, answers): return []\n")
    assert f"reward.function: {places[1]}/reward.py is not what it was" in found.check(there)
    weights = places[1] / "actor" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r": the content of actor.path may not differ"):
        found.check(there)
    shutil.rmtree(places[0])
    with pytest.raises(
        UserError, match=r"actor.path: nothing is at .* --resume .*run --plan .*plan"
    ):
        found.check(here)


def test_a_pipeline_that_had_drained_is_said_to_differ(two: Path) -> None:
    """As after `--steps 6`, behind which nothing was in flight."""
    directory = two / "checkpoints" / "step-000006"
    manifest = Manifest.read(directory / "checkpoint.json").changed(done=())
    manifest.changed(sha256=manifest.digest()).write(directory / "checkpoint.json")
    left = checkpoint.find(two).left(tasks_of(one_step_off(), 9))
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
    left = evaluated.left(tasks_of(one_step_off(), 9))
    assert left.ended == set(range(left.stop)) and not left.differs and evaluated.written == 3


def test_another_program_does_every_task_that_is_left_once(two: Path) -> None:
    found = checkpoint.find(two / "checkpoints" / "step-000004")
    _, ended, stop, differs = found.left(tasks_of(one_step_off(), 9))
    assert ended == set(range(stop)) and stop > 0 and not differs
    for plan in (split(WORKLOAD), one_step_off(late_reference=True)):
        tasks, ended, stop, differs = found.left(tasks_of(plan, 9))
        assert differs.startswith("sequences in flight, of step 4, are generated again")
        left = [task for task in tasks if task.index not in ended]
        assert {task.step for task in left} == set(range(4, 9)) and len(left) == 9 * 5
        made = [task.weights_version for task in left if task.call.name == "generate"]
        assert made == ([4, 5, 6, 7, 8] if plan.name == "split" else [4, 4, 5, 6, 7])
