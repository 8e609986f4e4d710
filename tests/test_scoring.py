"""Samples that a reward function hangs, crashes or fails on."""

from pathlib import Path

import numpy as np
import pytest
from conftest import cpu_cluster, samples_of
from processes import PATIENCE

from executor.fleet.pools import Fleet
from executor.running.judges import FunctionJudges
from executor.running.run_directory import log
from executor.running.scoring import judge
from planner.spec.errors import UserError
from planner.spec.rewards import RewardFunction

REWARD = """
import os, pathlib, signal, time

MET = pathlib.Path(__file__).parent / "met"

def meet(prompts, responses, answers):
    assert len(prompts) == 1
    if int(prompts[0]) % 3 == 0:
        MET.joinpath(prompts[0]).touch()
        while len(list(MET.iterdir())) < 4:
            time.sleep(0.1)
    return [int(response) / 2 for response in responses]

def hang(prompts, responses, answers):
    if "3" in prompts:
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
) -> tuple[list[float], list[int]]:
    """Scores of the samples that have one, and the rows of those without."""
    (tmp_path / "met").mkdir()
    (tmp_path / "judged.py").write_text(REWARD)
    reward = RewardFunction(function=f"{tmp_path}/judged.py:{name}", timeout_seconds=seconds)
    texts = [str(row) for row in range(count)]
    fleet = Fleet(cpu_cluster(1).gpus, "CPU")
    try:
        judges = FunctionJudges(fleet, reward, 0)
        judges.set_up()
        scores, records = judge(judges, samples_of(" ".join(texts), " ".join(texts)))
        assert len(judges) == 1 and all(record.end >= record.start for record in records)
    finally:
        fleet.close()
    return scores[~np.isnan(scores)].tolist(), np.flatnonzero(np.isnan(scores)).tolist()


@pytest.mark.ray
def test_samples_that_take_long_take_their_time_together(ray_two: None, tmp_path: Path) -> None:
    """Four of twelve wait for each other, and all others get their scores meanwhile."""
    scores, without = scores_of(tmp_path, "meet", 12, PATIENCE)
    assert without == [] and scores == [row / 2 for row in range(12)]


@pytest.mark.ray
def test_a_sample_that_hangs_costs_its_time_twice_and_no_other(
    ray_two: None, tmp_path: Path
) -> None:
    """Once in the batch, once alone."""
    scores, without = scores_of(tmp_path, "hang", 8, 5.0)
    assert without == [3] and scores == [0, 0.5, 1, 2, 2.5, 3, 3.5]


@pytest.mark.ray
def test_a_crash_costs_its_sample(
    ray_two: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log.addHandler(caplog.handler)  # a run before has told it not to propagate
    scores, without = scores_of(tmp_path, "crash", 8, 60.0)
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
    assert "ZeroDivisionError: division by zero (judged.py:25)" in line
