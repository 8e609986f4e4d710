"""The samples of a prompt in a run: their prompts and keys, where they go, which of them are
selected, and what is learned from them."""

import numpy as np
import pytest
import torch
from conftest import SHAPE, make_workload
from numpy.typing import NDArray

from executor.data.batch import assign, minibatches
from executor.data.prompts import Synthetic
from executor.data.requests import make_requests
from executor.rollout.transformers_engine import TransformersEngine
from executor.running import learning
from executor.training import models
from planner.predict.costs.lengths import SampledLengths
from planner.spec.data import Sampler
from planner.spec.workload import Model, Workload


def grouped(**changes: object) -> Workload:
    return make_workload(**{"critic": None, "samples_per_prompt": 4, **changes})


def grpo(**settings: object) -> Workload:
    return grouped(algorithm={"advantage": "grpo", **settings})


def test_samples_of_a_prompt_stand_together_with_keys_of_their_own():
    requests = Synthetic(grouped(batch=12, minibatch=12)).step(3).requests
    prompts = [tuple(prompt.tolist()) for prompt in requests.prompts()]
    assert len(set(prompts)) == 3 and prompts == [prompts[4 * (row // 4)] for row in range(12)]
    assert requests.keys[:, :4].tolist() == [[7, 3, row // 4, row % 4] for row in range(12)]
    first, which = requests.distinct()
    assert first.tolist() == [0, 4, 8] and which.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_the_planner_draws_the_lengths_of_the_run():
    response = {"kind": "lognormal", "mean": 5, "sigma": 0.5, "max": 8}
    prompt = {"kind": "lognormal", "mean": 5, "sigma": 0.5, "max": 9}
    workload = grpo(oversampling_factor=2).changed(prompt=prompt, response=response)
    drawn, run = SampledLengths.drawn(workload, 4), Synthetic(workload).step(2).requests
    assert drawn.prompts[2].tolist() == run.lengths.tolist() and len(run) == 16
    assert drawn.responses[2].tolist() == run.max_tokens.tolist()
    assert drawn.sequences.shape == (4, 8) and drawn.generated.shape == (4, 16)


def test_a_group_goes_to_one_engine_as_far_as_its_share_goes():
    lengths = np.repeat([5, 9, 5], 4).astype(np.int32)
    shares = [rows.tolist() for rows in assign(lengths, 2, 10, group=4)]
    # 60 and 76 outstanding: the third group goes to the first engine until that has six, and on
    assert shares == [[0, 1, 2, 3, 8, 9], [4, 5, 6, 7, 10, 11]]
    assert [len(rows) for rows in assign(lengths, 5, 10, group=4)] == [3, 2, 3, 1, 3]


def test_a_group_stays_in_one_minibatch():
    parts = minibatches(24, 8, 7, 1, 0, group=4)
    assert sorted(np.concatenate(parts).tolist()) == list(range(24))
    for rows in parts:
        assert set(np.unique(rows // 4, return_counts=True)[1]) == {4}
    assert not np.array_equal(np.concatenate(parts), np.arange(24))


def scored(*scores: float) -> NDArray[np.float32]:
    return np.array(scores, dtype=np.float32)


def test_groups_without_variance_give_way():
    scores = scored(1, 1, 0, 1, 2, 2, 3, 2, 0, 5)  # of five groups; the first and third are alike
    rows, metrics = learning.select(scores, group=2, batch=4)
    assert rows.tolist() == [2, 3, 6, 7]
    assert metrics == {
        "groups/generated": 5,
        "groups/without_variance": 2,
        "groups/used_without_variance": 0,
        "groups/unused": 1,  # the last has variance, and is not needed
    }
    rows, metrics = learning.select(scores, group=2, batch=8)
    assert rows.tolist() == [0, 1, 2, 3, 6, 7, 8, 9]  # the first alike fills the batch
    assert metrics["groups/used_without_variance"] == 1 and metrics["groups/unused"] == 0


def columns_of(*names: str) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(-1, 0.2, (4, 3)).astype(np.float32) for name in names}


def learned(workload: Workload, ended: list[bool]) -> tuple:
    columns = columns_of("log_probs", "proximal_log_probs", "ref_log_probs")
    mask = np.arange(3) < np.array([3, 2, 3, 1])[:, None]
    return learning.estimate(
        workload,
        columns,
        scores=scored(1, 0, 0, 1),
        mask=mask,
        ended=np.array(ended),
        kl_coef=0.05,
    )


def test_truncated_responses_are_not_learned_from_if_that_is_said():
    ended = [True, False, True, True]
    columns, _ = learned(grpo(), ended)
    assert (columns["weights"] > 0).sum(1).tolist() == [3, 2, 3, 1] and "returns" not in columns
    masked, metrics = learned(grpo(mask_truncated=True), ended)
    assert (masked["weights"] > 0).sum(1).tolist() == [3, 0, 3, 1]
    assert metrics["importance/masked_share"] == pytest.approx(2 / 9)
    assert np.array_equal(masked["advantages"], columns["advantages"])  # it counts for the others


def test_the_same_in_blocks_of_rows(monkeypatch):
    whole, figures = learned(grpo(), [True] * 4)
    monkeypatch.setattr("executor.training.masked.BLOCK", 1)
    parts, same = learned(grpo(), [True] * 4)
    assert figures == pytest.approx(same)
    for name, column in whole.items():
        assert parts[name] == pytest.approx(column)


def test_samples_share_the_prefill_of_their_prompt_at_equal_output():
    model = models.load("actor", Model(shape=SHAPE, random_weights=True), 3, torch.float32)
    seen = []
    model.model.register_forward_hook(lambda *args: seen.append(args[2].last_hidden_state.shape))
    prompts = [np.array(prompt, dtype=np.int32) for prompt in ([1, 2, 3], [4, 5, 6, 7, 8])]
    each = [prompt for prompt in prompts for _ in range(3)]
    keys = np.array([(0, 0, row, 0) for row in range(6)])
    asked = make_requests(each, keys, np.full(6, 9), np.zeros(6, dtype=bool))

    def generated(rows: list[int]) -> list[list]:
        engine = TransformersEngine(model, [0], 64)
        return [x.tolist() for x in engine.generate(asked.take(np.array(rows)), Sampler())]

    together = generated(list(range(6)))
    assert seen[0][:2] == (2, 5) and seen[1][0] == 6  # two prompts, then six sequences
    alone = [generated([row]) for row in range(6)]
    assert together[0] == [each[0][0] for each in alone]
    assert together[1] == [token for each in alone for token in each[1]]
    assert together[2] == pytest.approx([p for each in alone for p in each[2]], abs=1e-5)
