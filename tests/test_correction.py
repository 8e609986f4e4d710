"""Distances between policies, and what corrects for them. The numbers in these tests are worked out
by hand in the comments beside them."""

import math

import pytest
import torch
from test_advantages import INF, LN2, NAN, close, mask_of
from torch import tensor

from executor.training.correction import importance_weights, off_policy
from executor.training.kl import adapted_coef, kl_penalty

# --- KL ---


def test_kl_estimators_by_hand():
    # policy 1/2, reference 1/4: x = -ln 2. k1 = ln 2, k2 = (ln 2)² / 2 = 0.2402265, k3 = 1/2 - 1 +
    # ln 2 = 0.1931472 policy 1/4, reference 1/2: x = ln 2. k1 = -ln 2, k2 the same, k3 = 2 - 1 - ln
    # 2 = 0.3068528
    log_probs, ref = tensor([0.5, 0.25]).log(), tensor([0.25, 0.5]).log()
    assert close(kl_penalty(log_probs, ref, "k1"), [0.6931472, -0.6931472])
    assert close(kl_penalty(log_probs, ref, "k2"), [0.2402265, 0.2402265])
    assert close(kl_penalty(log_probs, ref, "k3"), [0.1931472, 0.3068528])
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        kl_penalty(log_probs, ref, "k4")


def test_k1_and_k3_are_unbiased_estimators():
    # KL between [1/2, 1/4, 1/4] and [1/4, 1/4, 1/2]: 1/2 ln 2 + 0 - 1/4 ln 2 = ln 2 / 4
    p, q = tensor([0.5, 0.25, 0.25]), tensor([0.25, 0.25, 0.5])
    for kind in ("k1", "k3"):
        assert (p * kl_penalty(p.log(), q.log(), kind)).sum().item() == pytest.approx(LN2 / 4)


def test_k3_of_a_token_is_at_most_10():
    # x = 2: e² - 3 = 4.389056, slope 1 - e² = -6.389056 by the log-prob; x = 3 and -12: above 10
    x = tensor([-2.0, -3.0, 12.0], requires_grad=True)
    kl = kl_penalty(x, tensor([0.0, 0.0, 0.0]), "k3")
    kl.sum().backward()
    assert close(kl, [4.389056, 10.0, 10.0]) and close(x.grad, [-6.389056, 0.0, 0.0])


def test_k3_stays_finite():
    x = tensor([-500.0], requires_grad=True)
    kl_penalty(x, tensor([0.0]), "k3").sum().backward()
    assert kl_penalty(x, tensor([0.0]), "k3").isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("kl", "coef"),
    [
        (0.1, 0.5),  # on target
        (0.11, 0.5 * (1 + 0.1 * 64 / 1000)),  # a tenth above
        (5.0, 0.5 * (1 + 0.2 * 64 / 1000)),  # far above: no faster than at a fifth
        (0.0, 0.5 * (1 - 0.2 * 64 / 1000)),
    ],
)
def test_the_weight_of_the_penalty_follows_its_target(kl, coef):
    found = adapted_coef(0.5, kl, target=0.1, sequences=64, horizon=1000)
    assert found == pytest.approx(coef)


# --- importance weights ---

# Ratios of the proximal to the behaviour policy: their products are 4 and 1/4, their geometric
# means 4^(1/3) = 1.587 and 1/4.
RATIOS = tensor([[0.5, 2.0, 4.0], [0.25, NAN, INF]])
MASK = mask_of(3, 1)


@pytest.mark.parametrize(
    ("level", "weights"),
    [
        ("token", [[0.5, 2.0, 3.0], [0.25, 0.0, 0.0]]),  # 4 is truncated at 3
        ("sequence", [[3.0, 3.0, 3.0], [0.25, 0.0, 0.0]]),
        ("off", [[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]),
    ],
)
def test_weights_are_truncated(level, weights):
    assert close(importance_weights(RATIOS.log(), MASK, level=level, cap=3.0), weights)


@pytest.mark.parametrize(
    ("masking", "low", "high", "weights"),
    [
        ("token", 0.5, 3.0, [[0.5, 2.0, 0.0], [0.0, 0.0, 0.0]]),  # 4 and 1/4 are outside
        ("sequence", 0.2, 3.9, [[0.0, 0.0, 0.0], [0.25, 0.0, 0.0]]),
        ("geometric", 0.5, 2.0, [[0.5, 2.0, 3.0], [0.0, 0.0, 0.0]]),
    ],
)
def test_what_is_too_far_off_is_masked(masking, low, high, weights):
    found = importance_weights(RATIOS.log(), MASK, cap=3.0, masking=masking, low=low, high=high)
    assert close(found, weights)
    assert (found >= 0).all()


def test_weights_of_policies_far_apart_are_finite_and_not_nothing():
    weights = importance_weights(tensor([[-500.0, 500.0]]), mask_of(2), cap=2.0)
    assert 0 < weights[0, 0] < 1e-8 and weights[0, 1] == 2.0


# --- off-policy diagnostics ---


def test_off_policy_by_hand():
    # ratios 1/2, 1, 1, 4 (the others are masked): mean 6.5 / 4; (sum)² = 42.25, n * sum of squares
    # = 4 * 18.25 = 73; k3: 1/2 - 1 + ln 2, 0, 0, 4 - 1 - 2 ln 2: (2.5 - ln 2) / 4
    log_ratio = tensor([[0.5, 1.0, 1.0], [4.0, NAN, 1.0]]).log()
    found = off_policy(log_ratio[mask_of(3, 1)])
    expected = {"mean": 1.625, "p01": 0.5, "p99": 4.0, "max": 4.0, "effective_share": 42.25 / 73}
    assert found == pytest.approx({**expected, "staleness_kl": (2.5 - LN2) / 4})
    # of the ratios 1 .. 201 one per cent on each side are two
    found = off_policy(torch.arange(1, 202).float().log())
    assert (found["p01"], found["p99"], found["max"]) == pytest.approx((3, 199, 201))


def test_off_policy_of_no_tokens_is_nan():
    found = off_policy(torch.zeros(0))
    assert found and all(math.isnan(value) for value in found.values())
