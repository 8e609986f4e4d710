"""From scores to advantages. The numbers in these tests are worked out by hand in the comments
beside them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, tensor

from executor.training import ppo

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


# --- KL and rewards ---


def test_kl_estimators_by_hand():
    # policy 1/2, reference 1/4: x = -ln 2. k1 = ln 2, k2 = (ln 2)² / 2 = 0.2402265, k3 = 1/2 - 1 +
    # ln 2 = 0.1931472 policy 1/4, reference 1/2: x = ln 2. k1 = -ln 2, k2 the same, k3 = 2 - 1 - ln
    # 2 = 0.3068528
    log_probs, ref = tensor([0.5, 0.25]).log(), tensor([0.25, 0.5]).log()
    assert close(ppo.kl_penalty(log_probs, ref, "k1"), [0.6931472, -0.6931472])
    assert close(ppo.kl_penalty(log_probs, ref, "k2"), [0.2402265, 0.2402265])
    assert close(ppo.kl_penalty(log_probs, ref, "k3"), [0.1931472, 0.3068528])
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        ppo.kl_penalty(log_probs, ref, "k4")


def test_k1_and_k3_are_unbiased_estimators():
    # KL between [1/2, 1/4, 1/4] and [1/4, 1/4, 1/2]: 1/2 ln 2 + 0 - 1/4 ln 2 = ln 2 / 4
    p, q = tensor([0.5, 0.25, 0.25]), tensor([0.25, 0.25, 0.5])
    for kind in ("k1", "k3"):
        assert (p * ppo.kl_penalty(p.log(), q.log(), kind)).sum().item() == pytest.approx(LN2 / 4)


def test_k3_of_a_token_is_at_most_10():
    # x = 2: e² - 3 = 4.389056, slope 1 - e² = -6.389056 by the log-prob; x = 3 and -12: above 10
    x = tensor([-2.0, -3.0, 12.0], requires_grad=True)
    kl = ppo.kl_penalty(x, tensor([0.0, 0.0, 0.0]), "k3")
    kl.sum().backward()
    assert close(kl, [4.389056, 10.0, 10.0]) and close(x.grad, [-6.389056, 0.0, 0.0])


def test_k3_stays_finite():
    x = tensor([-500.0], requires_grad=True)
    ppo.kl_penalty(x, tensor([0.0]), "k3").sum().backward()
    assert ppo.kl_penalty(x, tensor([0.0]), "k3").isfinite().all() and x.grad.isfinite().all()


def test_token_rewards_by_hand():
    mask = mask_of(3, 1, 0)
    kl = tensor([[1.0, 2.0, -1.0], [4.0, NAN, INF], [NAN, NAN, NAN]])
    rewards = ppo.token_rewards(tensor([10.0, 20.0, NAN]), kl, 0.5, mask)
    # the score on the last real token; the third response is empty, so its score, whatever it is,
    # goes nowhere
    assert close(rewards, [[-0.5, -1.0, 10.5], [18.0, 0.0, 0.0], [0.0, 0.0, 0.0]])


def test_truncated_response_is_scored_and_pays_for_the_missing_eos():
    mask = mask_of(2, 2)
    arguments = (tensor([1.0, 1.0]), torch.zeros(2, 2), 0.1, mask)
    ended = tensor([True, False])
    assert close(ppo.token_rewards(*arguments, ended=ended), [[0.0, 1.0], [0.0, 1.0]])
    assert close(
        ppo.token_rewards(*arguments, ended=ended, missing_eos_penalty=3.0),
        [[0.0, 1.0], [0.0, -2.0]],
    )
    with pytest.raises(AssertionError, match="ended"):
        ppo.token_rewards(*arguments, missing_eos_penalty=3.0)


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
    advantages, returns = ppo.gae(rewards, values, mask, 0.5, 0.5)
    assert close(advantages, [[-3.75, 1.0, 4.0], [4.0, 0.0, 0.0]])
    assert close(returns, [[2.25, 3.0, 8.0], [5.0, 0.0, 0.0]])


def test_gae_limits():
    rewards, values = tensor([[1.0, 2.0, 3.0]]), tensor([[10.0, 20.0, 30.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    # lam = 1, gamma = 1: rewards to go, 6, 5, 3, less the values.  lam = 0: the one-step errors.
    assert close(ppo.gae(rewards, values, mask, 1.0, 1.0)[0], [[-4.0, -15.0, -27.0]])
    assert close(ppo.gae(rewards, values, mask, 1.0, 1.0)[1], [[6.0, 5.0, 3.0]])
    assert close(ppo.gae(rewards, values, mask, 1.0, 0.0)[0], [[11.0, 12.0, -27.0]])


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
    advantages, returns = ppo.gae(
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
    hole = ppo.gae(rewards, values, mask, 0.9, 0.8)
    dense = ppo.gae(
        rewards[:, [0, 2]], values[:, [0, 2]], torch.ones(1, 2, dtype=torch.bool), 0.9, 0.8
    )
    for with_hole, without in zip(hole, dense, strict=True):
        assert close(with_hole[:, [0, 2]], without) and with_hole[0, 1] == 0


def test_whiten_by_hand():
    # 1, 2, 6: mean 3, deviations -2, -1, 3, variance 14/3, deviation 2.1602469
    mask = tensor([[True, True], [True, False]])
    white = ppo.whiten(tensor([[1.0, 2.0], [6.0, NAN]]), mask)
    assert close(white, [[-0.9258201, -0.4629100], [1.3887301, 0.0]])


def test_whiten_gives_mean_0_and_deviation_1():
    torch.manual_seed(0)
    mask = torch.rand(8, 16) < 0.6
    advantages = (5 + 3 * torch.randn(8, 16)).masked_fill(~mask, INF)
    white = ppo.whiten(advantages, mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-5)
    assert white[mask].std(unbiased=False).item() == pytest.approx(1, abs=1e-5)
    assert (white[~mask] == 0).all()


def test_whiten_without_spread():
    assert close(ppo.whiten(tensor([[7.0, NAN]]), tensor([[True, False]])), [[0.0, 0.0]])
    assert close(ppo.whiten(tensor([[7.0, 7.0]]), tensor([[True, True]])), [[0.0, 0.0]])
    assert close(ppo.whiten(tensor([[NAN, NAN]]), tensor([[False, False]])), [[0.0, 0.0]])


# --- from scores to advantages ---


def batch(**changes):
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
    return ppo.advantages(**(arguments | changes))


def test_advantages_by_hand():
    # k1 = [1, 2], [0]; rewards = [-0.5, 4 - 1], [2]; to go = [2.5, 3], [2]; less the values = [1.5,
    # 1], [-1]
    advantages, returns, metrics = batch()
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
    advantages, _, metrics = batch(missing_eos_penalty=1.0)
    assert close(advantages, [[1.5, 1.0], [-2.0, 0.0]])
    assert metrics["score"] == 3.0 and metrics["reward"] == pytest.approx(1.75)


def test_advantages_are_whitened_last():
    advantages, returns, _ = batch(whiten_advantages=True)
    # [1.5, 1, -1] less 1/2 over 1.0801234
    assert close(advantages, [[0.9258201, 0.4629100], [-1.3887301, 0.0]])
    assert close(returns, [[2.5, 3.0], [2.0, 0.0]])


def test_advantages_without_a_reference_or_with_the_kl_in_the_loss():
    no_reference = batch(ref_log_probs=None)
    in_loss = batch(kl_kind="k3")
    for advantages, returns, _ in (no_reference, in_loss):
        # rewards = [0, 4], [2]
        assert close(returns, [[4.0, 4.0], [2.0, 0.0]])
        assert close(advantages, [[3.0, 2.0], [-1.0, 0.0]])
    assert no_reference[2]["kl"] == 0.0 and in_loss[2]["kl"] == 1.0


def test_advantages_without_a_critic():
    # rewards to go [2.5, 3], [2] less their mean 2.5; lam has no meaning without values
    for lam in (0.0, 0.95):
        advantages, returns, metrics = batch(values=None, lam=lam)
        assert close(returns, [[2.5, 3.0], [2.0, 0.0]])
        assert close(advantages, [[0.0, 0.5], [-0.5, 0.0]])
        assert "value" not in metrics and "explained_variance" not in metrics


def test_advantages_of_an_empty_batch_are_finite():
    for values in (None, torch.full((2, 2), NAN)):
        advantages, returns, metrics = batch(
            mask=torch.zeros(2, 2, dtype=torch.bool),
            scores=tensor([NAN, NAN]),
            values=values,
            whiten_advantages=True,
        )
        assert (advantages == 0).all() and (returns == 0).all()
        assert all(math.isfinite(metric) for metric in metrics.values())


def test_a_nan_score_of_a_real_response_is_not_hidden():
    _, _, metrics = batch(scores=tensor([NAN, 2.0]))
    assert math.isnan(metrics["score"])


# --- off-policy diagnostics ---


def test_off_policy_by_hand():
    # ratios 1/2, 1, 1, 4 (a fifth is masked): mean 6.5 / 4; (sum)² = 42.25, n * sum of squares = 4
    # * 18.25 = 73
    proximal = tensor([[0.5, 1.0, 1.0], [4.0, NAN, 1.0]]).log()
    mask = tensor([[True, True, True], [True, False, False]])
    found = ppo.off_policy(
        proximal_log_probs=proximal, behaviour_log_probs=torch.zeros(2, 3), mask=mask
    )
    assert found == pytest.approx(
        {"mean": 1.625, "p01": 0.5, "p99": 4.0, "max": 4.0, "effective_share": 42.25 / 73}
    )
    # of the ratios 1 .. 201 one per cent on each side are two
    many = torch.arange(1, 202).float().log()[None]
    found = ppo.off_policy(
        proximal_log_probs=many,
        behaviour_log_probs=torch.zeros(1, 201),
        mask=torch.ones(1, 201, dtype=torch.bool),
    )
    assert (found["p01"], found["p99"], found["max"]) == pytest.approx((3, 199, 201))


def test_off_policy_of_no_tokens_is_nan():
    empty = torch.zeros(2, 3)
    found = ppo.off_policy(
        proximal_log_probs=empty,
        behaviour_log_probs=empty,
        mask=torch.zeros(2, 3, dtype=torch.bool),
    )
    assert found and all(math.isnan(value) for value in found.values())
