"""What scoring beside generation adds to it: a quarter of 512 samples of half a second, on a
quarter of 16 processes, beside 20 s of generation."""

import time
from pathlib import Path

import numpy as np
import pytest
from conftest import cpu_cluster, make_workload

from executor.data.prompts import Synthetic
from executor.fleet.pools import Fleet
from executor.rollout.tray import Tray
from executor.running.judges import judges_of
from executor.running.rewarding import Rewarding
from planner.predict.costs.scoring import Scoring

pytestmark = [pytest.mark.bench, pytest.mark.ray]

BATCH, PROCESSES, SECONDS, GENERATION = 128, 4, 0.5, 20.0
SLOW = f"""
import time

def slow(prompts, responses, answers):
    time.sleep({SECONDS} * len(responses))
    return [float(len(response.split())) for response in responses]
"""


def test_512_samples_of_half_a_second_add_a_tenth_at_most(ray_two: None, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    reward = {
        "function": f"{tmp_path}/slow.py:slow",
        "seconds_per_sequence": SECONDS,
        "processes": PROCESSES,
    }
    response = {"kind": "lognormal", "mean": 512, "sigma": 0.7, "max": 2048}
    workload = make_workload(reward=reward, batch=BATCH, response=response)
    source = Synthetic(workload)
    prompts = source.step(0)
    lengths = prompts.requests.max_tokens
    fleet = Fleet(cpu_cluster(1).gpus, "CPU")
    try:
        tray = fleet.process(Tray, ())
        judges = judges_of(fleet, workload.host_rewards[0], 0)
        judges.set_up()
        early = Rewarding(workload, source, {0: judges}, tray).begin(prompts)
        assert early is not None
        hand_over = early.hand_over(np.arange(BATCH))
        responses = [np.arange(length, dtype=np.int32) % 7 for length in lengths.tolist()]
        began = time.monotonic()
        for row in np.argsort(lengths).tolist():  # an engine that takes as long for each token
            due = began + GENERATION * lengths[row] / lengths.max()
            time.sleep(max(0.0, due - time.monotonic()))
            hand_over([row], [responses[row].tolist()])
        early.finish(responses)
        ended = time.monotonic()
        scores = early.beside[0].scores()
        added = time.monotonic() - ended
        judges.close()
    finally:
        fleet.close()
    assert scores.tolist() == lengths.tolist()
    expected = Scoring(workload.host_rewards, lengths[None]).after(np.array([GENERATION])).item()
    print(f"added {added:.2f} s to {ended - began:.2f} s of generation, predicted {expected:.2f} s")
    assert added <= 0.1 * GENERATION
