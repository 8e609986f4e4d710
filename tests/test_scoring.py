"""Samples that a reward function hangs, crashes or fails on."""

import time
from pathlib import Path

import numpy as np
import pytest
from conftest import cpu_cluster

from executor.fleet.pools import Fleet
from executor.running.judges import Judges
from executor.running.run_directory import log
from executor.running.scoring import judge
from planner.spec.errors import UserError
from planner.spec.rewards import RewardFunction

REWARD = """
import os, signal, time

def hang(prompts, responses, answers):
    if any(int(prompt) % 10 == 0 for prompt in prompts):
        time.sleep(1000)
    return [int(response) / 2 for response in responses]

def crash(prompts, responses, answers):
    if "3" in prompts:
        os.kill(os.getpid(), signal.SIGSEGV)
    return [int(response) / 2 for response in responses]

def fail(prompts, responses, answers):
    return [1 / (int(prompt) % 2) for prompt in prompts]
"""


def scores_of(
    tmp_path: Path, name: str, count: int, seconds: float
) -> tuple[list[float], list[int], float]:
    """Scores of the samples that have one, the rows of those without, and the seconds taken."""
    (tmp_path / "judged.py").write_text(REWARD)
    reward = RewardFunction(function=f"{tmp_path}/judged.py:{name}", timeout_seconds=seconds)
    texts = [str(row) for row in range(count)]
    fleet = Fleet(cpu_cluster(1).gpus, "CPU")
    try:
        judges = Judges(fleet, reward)
        judges.set_up()
        began = time.monotonic()
        scores, records = judge(judges, texts, texts, [None] * count)
        taken = time.monotonic() - began
        assert len(judges) == 1 and all(record.end >= record.start for record in records)
    finally:
        fleet.close()
    without = np.flatnonzero(np.isnan(scores)).tolist()
    return scores[~np.isnan(scores)].tolist(), without, taken


@pytest.mark.ray
def test_samples_that_hang_take_their_time_together(ray_two: None, tmp_path: Path) -> None:
    """Eight of eighty hang, for 20 s each: one after the other they would take 160 s, after the
    batch's own 20."""
    scores, without, taken = scores_of(tmp_path, "hang", 80, 20.0)
    assert without == list(range(0, 80, 10))
    assert scores == [row / 2 for row in range(80) if row % 10]
    assert taken < 100


@pytest.mark.ray
def test_a_crash_costs_its_sample(
    ray_two: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log.addHandler(caplog.handler)  # a run before has told it not to propagate
    scores, without, _ = scores_of(tmp_path, "crash", 8, 60.0)
    log.removeHandler(caplog.handler)
    assert without == [3] and scores == [0, 0.5, 1, 2, 2.5, 3, 3.5]
    line = next(line for line in caplog.messages if line.startswith("dropped"))
    assert "prompt '3'" in line and "ended its process, for 1 response: it crashed" in line
    assert "faster" not in line


@pytest.mark.ray
def test_too_many_failures_end_the_run_with_file_and_line(ray_two: None, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        scores_of(tmp_path, "fail", 8, 60.0)
    line = str(error.value)
    assert "2 of 8 samples failed twice, the last one prompt '2'" in line
    assert "ZeroDivisionError: division by zero (judged.py:15)" in line
