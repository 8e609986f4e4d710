"""Samples that are scored one by one, by a server that threads of ours ask."""

import threading
import time

import numpy as np
import pytest
from conftest import samples_of
from test_reward_server import serving

from executor.running.judges import ServerJudges
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
