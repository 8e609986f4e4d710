"""Checkpoints that are written and read: the last ones are kept, and what is broken is never taken
for whole."""

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from interrupted import names, one_step_off
from test_fuzz import documents

from executor.running import checkpoint
from executor.running import execute as executing
from executor.running.checkpoint import Manifest
from executor.running.execute import resume
from executor.running.options import RunOptions
from executor.running.run_directory import check_ended, held
from planner.cli import main
from planner.spec.errors import UserError


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


@pytest.mark.slow
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
from interrupted import one_step_off, snapshot
from executor.running import checkpoint, saving
from executor.running.run_directory import timeline_of
run = Path({run!r})
saver = saving.Saver(run / "checkpoints", every=2, keep=2)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
plan = one_step_off()
saver.save(lambda d: snapshot(d, 8, rows=10_000), step=8, done=(), plan=plan,
           timeline=lambda _: timeline_of(plan, 9, []),
           metrics=run / "metrics.jsonl")
saver.wait()
print(saver.error)
"""


def test_a_run_that_goes_on_is_not_gone_on_with_twice(two: Path) -> None:
    with held(two):
        with pytest.raises(UserError, match="the run goes on in another process"):
            resume(checkpoint.find(two), options=RunOptions(steps=9))
        said = CliRunner().invoke(main, ["execute", "--resume", str(two)])
        assert (said.exit_code, said.stdout) == (2, "")
    check_ended(two)


def test_a_run_is_held_before_anything_of_it_starts(
    two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executing, "_train", lambda plan, path, *more: check_ended(path))
    with pytest.raises(UserError, match="the run goes on in another process"):
        resume(checkpoint.find(two), options=RunOptions(steps=9))
    check_ended(two)


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


def test_a_checkpoint_that_is_not_there_is_told_with_those_beside_it(tmp_path: Path) -> None:
    for step in (4, 8):
        (tmp_path / f"step-{step:06d}").mkdir()
    with pytest.raises(UserError, match=r"no checkpoint in it; .* has step-000004, step-000008$"):
        checkpoint.find(tmp_path / "step-000005")
