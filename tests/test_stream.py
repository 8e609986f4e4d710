"""Samples that are scored one by one, by a server that threads of ours ask."""

import threading
import time

import numpy as np
import pytest
from conftest import make_workload, samples_of
from test_reward_server import serving

from executor.data.prompts import Synthetic
from executor.running.judges import ServerJudges
from executor.running.rewarding import Rewarding
from executor.running.scoring import Stream
from planner.spec.errors import UserError
from planner.spec.rewards import RewardServer

TEXTS = " ".join(map(str, range(16)))


def test_samples_are_scored_as_they_are_given() -> None:
    """The first is scored before the second is there; four at a time."""
    together = threading.Barrier(4)

    def slow(body):
        if int(body["responses"][0]) >= 4:
            together.wait(60)
        return 200, f"[{body['responses'][0]}]".encode()

    with serving(slow) as (url, asked):
        judges = ServerJudges(RewardServer(url=url, processes=4))
        stream, samples = Stream(judges, 16), samples_of(TEXTS, TEXTS)
        stream.give(0, samples.take([0]))
        while not asked:
            time.sleep(0.01)
        for row in range(1, 16):
            stream.give(row, samples.take([row]))
        assert stream.scores().tolist() == list(range(16))
        judges.close()


def test_a_sample_that_is_given_again_has_its_last_score() -> None:
    with serving(lambda body: (200, f"[{body['responses'][0]}]".encode())) as (url, _):
        judges = ServerJudges(RewardServer(url=url, processes=2))
        stream = Stream(judges, 1)
        for row in range(10):
            stream.give(0, samples_of(TEXTS, TEXTS).take([row]))
        assert stream.scores().tolist() == [9.0]
        judges.close()


def test_a_sample_that_fails_twice_is_dropped_and_too_many_end_the_run() -> None:
    def fails(body):
        number = int(body["responses"][0])
        return (200, b"[1]") if number not in failing else (400, b"")

    with serving(fails) as (url, asked):
        judges = ServerJudges(RewardServer(url=url, processes=2, retries=0))
        failing = {3, 5}
        stream, samples = Stream(judges, 16), samples_of(TEXTS, TEXTS)
        for row in range(16):
            stream.give(row, samples.take([row]))
        assert np.flatnonzero(np.isnan(stream.scores())).tolist() == [3, 5]
        assert len(asked) == 18
        failing = {3, 5, 7}
        stream = Stream(judges, 16)
        for row in range(16):
            stream.give(row, samples.take([row]))
        with pytest.raises(UserError, match=r"3 of 16 samples failed twice, the last one prompt"):
            stream.scores()
        judges.close()


def test_rewards_with_processes_and_without_score_a_batch_together() -> None:
    """One is asked for each sample, the other for all; an evaluation weighs and bounds them."""

    def rated(body):
        numbers = [len(each.split()) for each in body["responses"]]
        return 200, str([float(n) for n in numbers]).encode()

    with serving(rated) as (one, asked_one), serving(rated) as (other, asked_other):
        rewards = (
            {"url": one, "processes": 3, "weight": 2.0, "name": "one"},
            {"url": other, "clip": [0, 2], "normalize": True, "name": "other"},
        )
        workload = make_workload(reward=None, rewards=rewards)
        source = Synthetic(workload)
        prompts = source.step(0)
        lengths = np.array([1, 2, 3, 4, 5, 6, 7, 8])
        responses = [np.arange(n, dtype=np.int32) for n in lengths]
        judges = {at: ServerJudges(each) for at, each in enumerate(workload.host_rewards)}
        rewarding = Rewarding(workload, source, judges, None)
        assert rewarding.begin(prompts) is None  # without a tray
        found, records = rewarding.score(prompts, responses)
        for each in judges.values():
            each.close()
    assert found[0].tolist() == found[1].tolist() == lengths.tolist()
    assert [len(body["query"]) for body in asked_other] == [8] and len(asked_one) == 8
    assert len(records) == 1 and records[0].end >= records[0].start
    expected = 2 * lengths + np.minimum(lengths, 2)
    assert rewarding.evaluated(found).tolist() == expected.tolist()
