"""From scores to advantages. The numbers in these tests are worked out by hand in the comments
beside them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, tensor

from executor.training.advantages import (
    Estimated,
    estimate,
    gae,
    group_advantages,
    token_rewards,
    varied,
    whiten,
)

NAN, INF = math.nan, math.inf
LN2 = math.log(2)


def close(actual: Tensor, expected, tolerance: float = 1e-6) -> bool:
    expected = torch.as_tensor(expected, dtype=torch.float32)
    assert actual.shape == expected.shape
    assert torch.allclose(actual, expected, rtol=0, atol=tolerance), f"{actual} is not {expected}"
    return True


def mask_of(*lengths: int) -> Tensor:
    """True on the first `lengths[b]` columns of row b, as wide as the longest."""
    return torch.arange(max(lengths)) < tensor(lengths)[:, None]


# --- rewards ---


def test_token_rewards_by_hand():
    mask = mask_of(3, 1, 0)
    kl = tensor([[1.0, 2.0, -1.0], [4.0, NAN, INF], [NAN, NAN, NAN]])
    rewards = token_rewards(tensor([10.0, 20.0, NAN]), kl, 0.5, mask)
    # the score on the last real token; the third response is empty, so its score, whatever it is,
    # goes nowhere
    assert close(rewards, [[-0.5, -1.0, 10.5], [18.0, 0.0, 0.0], [0.0, 0.0, 0.0]])


def test_truncated_response_is_scored_and_pays_for_the_missing_eos():
    mask = mask_of(2, 2)
    arguments = (tensor([1.0, 1.0]), torch.zeros(2, 2), 0.1, mask)
    ended = tensor([True, False])
    assert close(token_rewards(*arguments, ended=ended), [[0.0, 1.0], [0.0, 1.0]])
    assert close(
        token_rewards(*arguments, ended=ended, missing_eos_penalty=3.0),
        [[0.0, 1.0], [0.0, -2.0]],
    )
    with pytest.raises(AssertionError, match="ended"):
        token_rewards(*arguments, missing_eos_penalty=3.0)


# --- GAE and whitening ---


def test_gae_by_hand():
    # gamma = lam = 1/2, so gamma * lam = 1/4.
    # delta_2 = 8 - 4 = 4               A_2 = 4                return 8
    # delta_1 = 0 + 4/2 - 2 = 0         A_1 = 0 + 4/4 = 1      return 3
    # delta_0 = 1 + 2/2 - 6 = -4        A_0 = -4 + 1/4 = -3.75 return 2.25
    # second row: one token, delta = 5 - 1 = 4, nothing bootstrapped from what is in the padding
    rewards = tensor([[1.0, 0.0, 8.0], [5.0, NAN, 100.0]])
    values = tensor([[6.0, 2.0, 4.0], [1.0, INF, 100.0]])
    mask = mask_of(3, 1)
    advantages, returns = gae(rewards, values, mask, 0.5, 0.5)
    assert close(advantages, [[-3.75, 1.0, 4.0], [4.0, 0.0, 0.0]])
    assert close(returns, [[2.25, 3.0, 8.0], [5.0, 0.0, 0.0]])


def test_gae_limits():
    rewards, values = tensor([[1.0, 2.0, 3.0]]), tensor([[10.0, 20.0, 30.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    # lam = 1, gamma = 1: rewards to go, 6, 5, 3, less the values.  lam = 0: the one-step errors.
    assert close(gae(rewards, values, mask, 1.0, 1.0)[0], [[-4.0, -15.0, -27.0]])
    assert close(gae(rewards, values, mask, 1.0, 1.0)[1], [[6.0, 5.0, 3.0]])
    assert close(gae(rewards, values, mask, 1.0, 0.0)[0], [[11.0, 12.0, -27.0]])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=4),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 2**31 - 1),
)
def test_gae_equals_the_double_sum(lengths, gamma, lam, seed):
    """A_t = sum over l >= 0 of (gamma * lam)^l * delta_{t+l}, sequence by sequence, without a
    recursion."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, len(lengths), 7, generator=generator)
    mask = torch.arange(7) < tensor(lengths)[:, None]
    advantages, returns = gae(
        rewards.masked_fill(~mask, NAN), values.masked_fill(~mask, NAN), mask, gamma, lam
    )
    for b, n in enumerate(lengths):
        v = [*values[b, :n].tolist(), 0.0]
        delta = [rewards[b, t].item() + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            expected = sum((gamma * lam) ** step * delta[t + step] for step in range(n - t))
            assert advantages[b, t].item() == pytest.approx(expected, abs=1e-4)
            assert returns[b, t].item() == pytest.approx(expected + v[t], abs=1e-4)
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_gae_steps_over_a_hole_in_the_mask():
    # The token in the middle is not the policy's: the first one bootstraps from the third.
    mask = tensor([[True, False, True]])
    rewards, values = tensor([[1.0, NAN, 3.0]]), tensor([[0.5, NAN, 2.0]])
    hole = gae(rewards, values, mask, 0.9, 0.8)
    dense = gae(rewards[:, [0, 2]], values[:, [0, 2]], torch.ones(1, 2, dtype=torch.bool), 0.9, 0.8)
    for with_hole, without in zip(hole, dense, strict=True):
        assert close(with_hole[:, [0, 2]], without) and with_hole[0, 1] == 0


def test_whiten_by_hand():
    # 1, 2, 6: mean 3, deviations -2, -1, 3, variance 14/3, deviation 2.1602469
    mask = tensor([[True, True], [True, False]])
    white = whiten(tensor([[1.0, 2.0], [6.0, NAN]]), mask)
    assert close(white, [[-0.9258201, -0.4629100], [1.3887301, 0.0]])


def test_whiten_gives_mean_0_and_deviation_1():
    torch.manual_seed(0)
    mask = torch.rand(8, 16) < 0.6
    advantages = (5 + 3 * torch.randn(8, 16)).masked_fill(~mask, INF)
    white = whiten(advantages, mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-5)
    assert white[mask].std(unbiased=False).item() == pytest.approx(1, abs=1e-5)
    assert (white[~mask] == 0).all()


def test_whiten_without_spread():
    assert close(whiten(tensor([[7.0, NAN]]), tensor([[True, False]])), [[0.0, 0.0]])
    assert close(whiten(tensor([[7.0, 7.0]]), tensor([[True, True]])), [[0.0, 0.0]])
    assert close(whiten(tensor([[NAN, NAN]]), tensor([[False, False]])), [[0.0, 0.0]])


# --- from scores to advantages ---


def batch(**changes) -> Estimated:
    """Two responses of 2 and 1 tokens; the second was truncated."""
    arguments = {
        "scores": tensor([4.0, 2.0]),
        "log_probs": tensor([[-1.0, -1.0], [-1.0, NAN]]),
        "ref_log_probs": tensor([[-2.0, -3.0], [-1.0, NAN]]),
        "values": tensor([[1.0, 2.0], [3.0, NAN]]),
        "mask": tensor([[True, True], [True, False]]),
        "ended": tensor([True, False]),
        "gamma": 1.0,
        "lam": 1.0,
        "kl_coef": 0.5,
        "whiten_advantages": False,
    }
    return estimate(**(arguments | changes))


def test_advantages_by_hand():
    # k1 = [1, 2], [0]; rewards = [-0.5, 4 - 1], [2]; to go = [2.5, 3], [2]; less the values = [1.5,
    # 1], [-1]
    found = batch()
    advantages, returns, metrics = found.advantages, found.returns, found.metrics
    assert close(advantages, [[1.5, 1.0], [-1.0, 0.0]])
    assert close(returns, [[2.5, 3.0], [2.0, 0.0]])
    assert metrics == pytest.approx(
        {
            "score": 3.0,  # (4 + 2) / 2
            "reward": 2.25,  # (2.5 + 2) / 2
            "kl": 1.0,  # (1 + 2 + 0) / 3
            "response_tokens": 1.5,
            "truncated_share": 0.5,
            "advantage": 0.5,
            "advantage_std": 1.0801234,  # deviations 1, 1/2, -3/2: sqrt(3.5 / 3)
            "return": 2.5,
            "value": 2.0,
            # The errors vary by 3.5 / 3, the returns, 2.5, 3 and 2, by 0.5 / 3.
            "explained_variance": -6.0,
        },
        rel=1e-5,
    )


def test_advantages_pay_for_the_missing_eos():
    found = batch(missing_eos_penalty=1.0)
    assert close(found.advantages, [[1.5, 1.0], [-2.0, 0.0]])
    assert found.metrics["score"] == 3.0 and found.metrics["reward"] == pytest.approx(1.75)


def test_advantages_are_whitened_last():
    found = batch(whiten_advantages=True)
    # [1.5, 1, -1] less 1/2 over 1.0801234
    assert close(found.advantages, [[0.9258201, 0.4629100], [-1.3887301, 0.0]])
    assert close(found.returns, [[2.5, 3.0], [2.0, 0.0]])


def test_advantages_without_a_reference_or_with_the_kl_in_the_loss():
    no_reference = batch(ref_log_probs=None)
    in_loss = batch(kl_kind="k3")
    for found in (no_reference, in_loss):
        # rewards = [0, 4], [2]
        assert close(found.returns, [[4.0, 4.0], [2.0, 0.0]])
        assert close(found.advantages, [[3.0, 2.0], [-1.0, 0.0]])
    assert no_reference.metrics["kl"] == 0.0 and in_loss.metrics["kl"] == 1.0


def test_reinforce_plus_plus_by_hand():
    # rewards to go [2.5, 3], [2] less their mean 2.5; lam has no meaning without values
    for lam in (0.0, 0.95):
        found = batch(values=None, kind="reinforce++", lam=lam)
        assert close(found.returns, [[2.5, 3.0], [2.0, 0.0]])
        assert close(found.advantages, [[0.0, 0.5], [-0.5, 0.0]])
        assert "value" not in found.metrics and "explained_variance" not in found.metrics
    # with gamma = 1/2 [-0.5 + 3 / 2, 3], [2]: mean 2, variance 2/3
    found = batch(values=None, kind="reinforce++", gamma=0.5, whiten_advantages=True)
    assert close(found.returns, [[1.0, 3.0], [2.0, 0.0]])
    assert close(found.advantages, [[-1.2247449, 1.2247449], [0.0, 0.0]])


REWARDS = tensor([1.0, 2.0, 6.0, 7.0, 7.0, 7.0])  # of two groups of three: means 3 and 7
ALL = torch.ones(6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        # deviations -2, -1, 3; their squares add up to 14, over 2 is 7
        ("grpo", [-2 / math.sqrt(7), -1 / math.sqrt(7), 3 / math.sqrt(7)]),
        ("dr_grpo", [-2.0, -1.0, 3.0]),
        ("rloo", [1 - 4, 2 - 3.5, 6 - 1.5]),  # each less the mean of the other two
        ("reinforce++-baseline", [-2.0, -1.0, 3.0]),
    ],
)
def test_groups_by_hand(kind, first):
    assert close(group_advantages(kind, REWARDS, ALL, 3), [*first, 0.0, 0.0, 0.0], 2e-6)


def test_a_group_without_some_of_its_samples():
    some = tensor([True, False, True, True, False, False])
    # 1 and 6: mean 3.5, deviation sqrt(2 * 6.25); 7 is alone
    found = group_advantages("grpo", REWARDS, some, 3)
    assert close(found, [-0.7071068, 0.0, 0.7071068, 0.0, 0.0, 0.0], 1e-6)
    assert close(group_advantages("rloo", REWARDS, some, 3), [-5.0, 0.0, 5.0, 0.0, 0.0, 0.0])


def test_equal_rewards_that_no_float_holds_give_no_advantage():
    found = group_advantages("grpo", torch.full((3,), 0.1), torch.ones(3, dtype=torch.bool), 3)
    assert (found.abs() < 1e-9).all()


def test_all_tokens_of_a_response_have_the_advantage_of_its_rewards():
    # rewards with the KL: 2.5 and 2, mean 2.25; deviation 0.25 * sqrt(2)
    changes = {"values": None, "group": 2, "lam": 0.0}
    found = batch(kind="grpo", **changes)
    expected = 0.25 / (0.25 * math.sqrt(2) + 1e-6)
    assert close(found.advantages, [[expected, expected], [-expected, 0.0]])
    assert close(found.returns, [[2.5, 2.5], [2.0, 0.0]])
    assert found.metrics["groups_without_variance"] == 0.0
    # whitened over the three tokens: 0.25, 0.25, -0.25 have mean 1/12 and deviation 0.2357023
    found = batch(kind="reinforce++-baseline", whiten_advantages=True, **changes)
    assert close(found.advantages, [[0.7071068, 0.7071068], [-1.4142136, 0.0]])


def test_groups_whose_scores_differ():
    scores = tensor([1.0, 1.0, 0.5, 1.0, NAN, 1.0, NAN, NAN])
    assert varied(scores, 2).tolist() == [False, True, False, False]
    assert varied(scores, 4).tolist() == [True, False]


def test_advantages_of_an_empty_batch_are_finite():
    for kind in ("gae", "reinforce++", "grpo"):
        found = batch(
            mask=torch.zeros(2, 2, dtype=torch.bool),
            scores=tensor([NAN, NAN]),
            values=torch.full((2, 2), NAN) if kind == "gae" else None,
            kind=kind,
            group=2,
            whiten_advantages=True,
        )
        assert (found.advantages == 0).all() and (found.returns == 0).all()
        assert all(math.isfinite(metric) for metric in found.metrics.values())


def test_a_nan_score_of_a_real_response_is_not_hidden():
    assert math.isnan(batch(scores=tensor([NAN, 2.0])).metrics["score"])
