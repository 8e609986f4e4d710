"""The numbers in these tests are worked out by hand in the comments beside them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, tensor

from executor import lm_head, ppo

NAN, INF = math.nan, math.inf
LN2 = math.log(2)


def close(actual: Tensor, expected, tolerance: float = 1e-6) -> bool:
    expected = torch.as_tensor(expected, dtype=torch.float32)
    assert actual.shape == expected.shape
    assert torch.allclose(actual, expected, rtol=0, atol=tolerance), f"{actual} is not {expected}"
    return True


def policy(log_probs, proximal, behaviour, advantages, mask, **options):
    defaults = {"clip": 0.2, "importance_cap": 2.0, "normalizer": 1}
    return ppo.policy_loss(
        log_probs=log_probs,
        proximal_log_probs=proximal,
        behaviour_log_probs=behaviour,
        advantages=advantages,
        mask=mask,
        **(defaults | options),
    )


def one_token_policy(ratio: float, advantage: float, importance: float = 1.0, **options) -> tuple[float, float, dict]:
    """Loss, d loss / d log-prob and stats of one token with these ratios new / proximal and proximal / behaviour."""
    log_probs = tensor([[math.log(ratio)]], requires_grad=True)
    behaviour = tensor([[-math.log(importance)]])
    loss, stats = policy(log_probs, tensor([[0.0]]), behaviour, tensor([[advantage]]), tensor([[True]]), **options)
    loss.backward()
    return loss.item(), log_probs.grad.item(), {name: total.item() for name, total in stats.items()}


def mask_of(*lengths: int) -> Tensor:
    """True on the first `lengths[b]` columns of row b, as wide as the longest."""
    return torch.arange(max(lengths)) < tensor(lengths)[:, None]


# --- KL and rewards ---


def test_kl_estimators_by_hand():
    # policy 1/2, reference 1/4: x = -ln 2. k1 = ln 2, k2 = (ln 2)² / 2 = 0.2402265, k3 = 1/2 - 1 + ln 2 = 0.1931472
    # policy 1/4, reference 1/2: x = ln 2. k1 = -ln 2, k2 the same, k3 = 2 - 1 - ln 2 = 0.3068528
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


def test_k3_stays_finite():
    x = tensor([-500.0], requires_grad=True)
    ppo.kl_penalty(x, tensor([0.0]), "k3").sum().backward()
    assert ppo.kl_penalty(x, tensor([0.0]), "k3").isfinite().all() and x.grad.isfinite().all()


def test_token_rewards_by_hand():
    mask = mask_of(3, 1, 0)
    kl = tensor([[1.0, 2.0, -1.0], [4.0, NAN, INF], [NAN, NAN, NAN]])
    rewards = ppo.token_rewards(tensor([10.0, 20.0, NAN]), kl, 0.5, mask)
    # the score on the last real token; the third response is empty, so its score, whatever it is, goes nowhere
    assert close(rewards, [[-0.5, -1.0, 10.5], [18.0, 0.0, 0.0], [0.0, 0.0, 0.0]])


def test_truncated_response_is_scored_and_pays_for_the_missing_eos():
    mask = mask_of(2, 2)
    arguments = (tensor([1.0, 1.0]), torch.zeros(2, 2), 0.1, mask)
    ended = tensor([True, False])
    assert close(ppo.token_rewards(*arguments, ended=ended), [[0.0, 1.0], [0.0, 1.0]])
    assert close(ppo.token_rewards(*arguments, ended=ended, missing_eos_penalty=3.0), [[0.0, 1.0], [0.0, -2.0]])
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
@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**31 - 1))
def test_gae_equals_the_double_sum(lengths, gamma, lam, seed):
    """A_t = sum over l >= 0 of (gamma * lam)^l * delta_{t+l}, sequence by sequence, without a recursion."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, len(lengths), 7, generator=generator)
    mask = torch.arange(7) < tensor(lengths)[:, None]
    advantages, returns = ppo.gae(rewards.masked_fill(~mask, NAN), values.masked_fill(~mask, NAN), mask, gamma, lam)
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
    dense = ppo.gae(rewards[:, [0, 2]], values[:, [0, 2]], torch.ones(1, 2, dtype=torch.bool), 0.9, 0.8)
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
    # k1 = [1, 2], [0]; rewards = [-0.5, 4 - 1], [2]; to go = [2.5, 3], [2]; less the values = [1.5, 1], [-1]
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
            "explained_variance": -6.0,  # the errors vary by 3.5 / 3, the returns, 2.5, 3 and 2, by 0.5 / 3
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
            mask=torch.zeros(2, 2, dtype=torch.bool), scores=tensor([NAN, NAN]), values=values, whiten_advantages=True
        )
        assert (advantages == 0).all() and (returns == 0).all()
        assert all(math.isfinite(metric) for metric in metrics.values())


def test_a_nan_score_of_a_real_response_is_not_hidden():
    _, _, metrics = batch(scores=tensor([NAN, 2.0]))
    assert math.isnan(metrics["score"])


# --- the policy loss ---


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.0, 3.0, -3.0, -3.0, 0),  # on policy: the policy gradient
        (1.1, 3.0, -3.3, -3.3, 0),  # inside
        (1.5, 3.0, -3.6, 0.0, 1),  # rose enough already: 1.2 * 3, no gradient
        (0.5, 3.0, -1.5, -1.5, 0),  # fell although it is good: not clipped
        (0.5, -3.0, 2.4, 0.0, 1),  # fell enough already: 0.8 * 3
        (1.5, -3.0, 4.5, 4.5, 0),  # rose although it is bad: not clipped
    ],
)
def test_clipping(ratio, advantage, loss, gradient, clipped):
    actual_loss, actual_gradient, stats = one_token_policy(ratio, advantage)
    assert actual_loss == pytest.approx(loss) and actual_gradient == pytest.approx(gradient)
    assert stats["clip_share"] == clipped
    assert stats["ratio"] == pytest.approx(ratio) and stats["policy_loss"] == pytest.approx(loss)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "dual_clipped"),
    [
        (5.0, -2.0, 6.0, 0.0, 1),  # 3 * 2 instead of 5 * 2
        (2.5, -2.0, 5.0, 5.0, 0),  # below the bound of 3
        (0.5, -2.0, 1.6, 0.0, 0),  # the ordinary clipping: 0.8 * 2
        (5.0, 2.0, -2.4, 0.0, 0),  # a positive advantage: 1.2 * 2, as without dual clip
        (0.1, 2.0, -0.2, -0.2, 0),
    ],
)
def test_dual_clip_acts_on_negative_advantages_only(ratio, advantage, loss, gradient, dual_clipped):
    actual_loss, actual_gradient, stats = one_token_policy(ratio, advantage, dual_clip=3.0)
    assert actual_loss == pytest.approx(loss) and actual_gradient == pytest.approx(gradient)
    assert stats["dual_clip_share"] == dual_clipped
    if not dual_clipped:
        assert one_token_policy(ratio, advantage)[:2] == pytest.approx((actual_loss, actual_gradient))


def test_dual_clip_must_be_above_1():
    with pytest.raises(AssertionError, match="dual_clip"):
        one_token_policy(1.0, -1.0, dual_clip=0.9)


@pytest.mark.parametrize(
    ("importance", "weight", "capped"), [(1.0, 1.0, 0), (0.25, 0.25, 0), (1.5, 1.5, 0), (8.0, 2.0, 1)]
)
def test_importance_weight_is_truncated(importance, weight, capped):
    loss, gradient, stats = one_token_policy(1.1, 3.0, importance)
    assert loss == pytest.approx(-3.3 * weight) and gradient == pytest.approx(-3.3 * weight)
    assert stats["importance_weight"] == pytest.approx(weight) and stats["cap_share"] == capped


def test_clipping_is_against_the_proximal_policy():
    # new / behaviour = 1.1 * 1.5 = 1.65 lies outside the clip range, new / proximal = 1.1 inside: there is a gradient.
    assert one_token_policy(1.1, 1.0, 1.5)[1] == pytest.approx(-1.65)


def test_no_gradient_into_proximal_behaviour_or_advantages():
    tensors = [tensor([[-1.0]], requires_grad=True) for _ in range(4)]
    policy(*tensors, tensor([[True]]))[0].backward()
    assert tensors[0].grad is not None and all(t.grad is None for t in tensors[1:])


def test_kl_stats_by_hand():
    # new / proximal = 2: 2 - 1 - ln 2 = 0.3068528; proximal / behaviour = 1/2: 1/2 - 1 + ln 2 = 0.1931472
    _, _, stats = one_token_policy(2.0, 1.0, 0.5)
    assert stats["approx_kl"] == pytest.approx(0.3068528) and stats["staleness_kl"] == pytest.approx(0.1931472)


def test_policy_loss_is_the_sum_over_tokens_by_the_normalizer():
    log_probs = torch.zeros(2, 2)
    advantages, mask = tensor([[1.0, 2.0], [4.0, 8.0]]), tensor([[True, True], [True, False]])
    loss, stats = policy(log_probs, log_probs, log_probs, advantages, mask, normalizer=14)
    assert loss.item() == pytest.approx(-0.5)  # -(1 + 2 + 4) / 14
    assert ppo.mean_stats(stats) == pytest.approx(
        {
            "tokens": 3,
            "policy_loss": -7 / 3,
            "ratio": 1,
            "clip_share": 0,
            "dual_clip_share": 0,
            "importance_weight": 1,
            "cap_share": 0,
            "approx_kl": 0,
            "staleness_kl": 0,
        }
    )


def test_a_ratio_that_would_overflow_stays_finite():
    log_probs = tensor([[0.0]], requires_grad=True)
    far = tensor([[-500.0]])
    loss, stats = policy(log_probs, far, far, tensor([[-1.0]]), tensor([[True]]))
    loss.backward()
    assert loss.isfinite() and log_probs.grad.isfinite().all() and all(s.isfinite() for s in stats.values())


def test_a_gradient_step_raises_good_tokens_and_lowers_bad_ones():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, requires_grad=True)
    tokens, mask = tensor([3, 1]), torch.ones(1, 2, dtype=torch.bool)
    before = lm_head.log_probs(logits, torch.eye(5), tokens, 1.0)[None]
    loss, _ = policy(before, before, before, tensor([[1.0, -1.0]]), mask)
    loss.backward()
    with torch.no_grad():
        after = lm_head.log_probs(logits - 0.1 * logits.grad, torch.eye(5), tokens, 1.0)[None]
    assert after[0, 0] > before[0, 0] and after[0, 1] < before[0, 1]


# --- the other losses ---


@pytest.mark.parametrize(
    ("value", "loss", "gradient", "clipped"),
    [
        # old value 1, clip 0.5; the loss is half of the larger of the two squares
        (2.0, 0.125, 0.0, 1),  # target 2: 0 against (1.5 - 2)² = 1/4: went too far, no gradient
        (1.25, 0.28125, -0.75, 0),  # target 2: inside, (3/4)² / 2
        (0.0, 2.0, -2.0, 0),  # target 2: 4 against (0.5 - 2)²: the wrong way, pulled back
    ],
)
def test_value_clipping(value, loss, gradient, clipped):
    values = tensor([[value]], requires_grad=True)
    actual, stats = ppo.value_loss(
        values=values,
        old_values=tensor([[1.0]]),
        returns=tensor([[2.0]]),
        mask=tensor([[True]]),
        clip=0.5,
        normalizer=1,
    )
    actual.backward()
    assert actual.item() == pytest.approx(loss) and values.grad.item() == pytest.approx(gradient)
    assert stats["value_clip_share"] == clipped and stats["value"] == value and stats["tokens"] == 1


def test_value_loss_without_clipping():
    values = tensor([[3.0, 1.0]], requires_grad=True)
    loss, stats = ppo.value_loss(
        values=values,
        old_values=tensor([[0.0, 0.0]]),
        returns=tensor([[1.0, 0.0]]),
        mask=tensor([[True, True]]),
        clip=None,
        normalizer=5,
    )
    loss.backward()
    assert loss.item() == pytest.approx(0.5)  # (4 + 1) / 2 / 5
    assert close(values.grad, [[0.4, 0.2]])  # [2, 1] / 5
    assert stats["value_clip_share"] == 0 and stats["value_loss"] == pytest.approx(2.5)


def test_kl_loss_by_hand():
    # new 1/2, reference 1/4, 2 tokens of 4, coefficient 0.1: k2 0.2402265, k3 0.1931472 each
    # d k2 / d log-prob = ln 2, d k3 / d log-prob = 1 - 1/2; times 0.1 / 4
    ref, mask = tensor([[0.25, 0.25]]).log(), tensor([[True, True]])
    for kind, value, slope in (("k2", 0.2402265, LN2), ("k3", 0.1931472, 0.5)):
        log_probs = tensor([[0.5, 0.5]]).log().requires_grad_()
        loss, stats = ppo.kl_loss(log_probs=log_probs, ref_log_probs=ref, mask=mask, kind=kind, coef=0.1, normalizer=4)
        loss.backward()
        assert loss.item() == pytest.approx(0.1 * 2 * value / 4)
        assert close(log_probs.grad, [[0.025 * slope, 0.025 * slope]])
        assert stats["kl_loss"].item() == pytest.approx(2 * value)


def test_k1_is_refused_as_a_loss():
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="reward"):
        ppo.kl_loss(log_probs=x, ref_log_probs=x, mask=x == 0, kind="k1", coef=1, normalizer=1)


def test_entropy_loss_rewards_entropy():
    entropy = tensor([[2.0, 4.0]], requires_grad=True)
    loss, stats = ppo.entropy_loss(entropy=entropy, mask=tensor([[True, True]]), coef=0.1, normalizer=3)
    loss.backward()
    assert loss.item() == pytest.approx(-0.2) and (entropy.grad < 0).all() and stats["entropy"] == 6


# --- what holds for every loss ---


def random_batch() -> dict[str, Tensor]:
    """Four responses of 5, 2, 0 and 1 tokens, far enough off policy that every bound is active somewhere."""
    generator = torch.Generator().manual_seed(1)
    names = ("log_probs", "proximal", "behaviour", "ref", "advantages", "values", "old_values", "returns", "entropy")
    data = {name: torch.randn(4, 5, generator=generator) for name in names}
    return data | {"mask": mask_of(5, 2, 0, 1)}


def losses(data: dict[str, Tensor], normalizer: float) -> list[tuple[Tensor, dict[str, Tensor]]]:
    mask, log_probs = data["mask"], data["log_probs"]
    common = {"mask": mask, "normalizer": normalizer}
    return [
        policy(log_probs, data["proximal"], data["behaviour"], data["advantages"], dual_clip=1.5, **common),
        ppo.value_loss(
            values=data["values"], old_values=data["old_values"], returns=data["returns"], clip=0.2, **common
        ),
        ppo.kl_loss(log_probs=log_probs, ref_log_probs=data["ref"], kind="k2", coef=0.1, **common),
        ppo.kl_loss(log_probs=log_probs, ref_log_probs=data["ref"], kind="k3", coef=0.1, **common),
        ppo.entropy_loss(entropy=data["entropy"], coef=0.1, **common),
    ]


TRAINED = ("log_probs", "values", "entropy")


def run(parts: list[dict[str, Tensor]], leaves: dict[str, Tensor], normalizer: float):
    """Losses and stats summed over the parts, and the gradients that have gathered in the leaves."""
    results = [losses(part, normalizer) for part in parts]
    torch.stack([loss for result in results for loss, _ in result]).sum().backward()
    per_loss = list(zip(*results, strict=True))
    totals = [sum(loss.item() for loss, _ in each) for each in per_loss]
    stats = [{name: sum(s[name].item() for _, s in each) for name in each[0][1]} for each in per_loss]
    return totals, stats, {name: leaf.grad for name, leaf in leaves.items()}


def with_leaves(data: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    leaves = {name: data[name].clone().requires_grad_() for name in TRAINED}
    return data | leaves, leaves


@pytest.mark.parametrize("split", [[2, 2], [1, 3], [1, 1, 1, 1]])
def test_losses_do_not_change_with_micro_batches(split):
    data, leaves = with_leaves(random_batch())
    whole = run([data], leaves, normalizer=8)
    data, leaves = with_leaves(random_batch())
    columns = zip(*(x.split(split) for x in data.values()), strict=True)
    parts = [dict(zip(data, rows, strict=True)) for rows in columns]
    widths = [max(1, int(part["mask"].sum(1).max())) for part in parts]  # each padded to its own longest response
    parts = [{n: x[:, :width] for n, x in part.items()} for part, width in zip(parts, widths, strict=True)]
    split_up = run(parts, leaves, normalizer=8)
    assert split_up[0] == pytest.approx(whole[0], rel=1e-5)
    for one, other in zip(split_up[1], whole[1], strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    for name in TRAINED:
        assert close(split_up[2][name], whole[2][name])


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 1e30])
def test_what_is_in_masked_places_does_not_matter(bad):
    data, leaves = with_leaves(random_batch())
    clean = run([data], leaves, normalizer=8)
    mask = data["mask"]
    dirty = {name: x if name == "mask" else x.masked_fill(~mask, bad) for name, x in random_batch().items()}
    data, leaves = with_leaves(dirty)
    spoilt = run([data], leaves, normalizer=8)
    assert spoilt[0] == clean[0] and spoilt[1] == clean[1]
    for name in TRAINED:
        assert torch.equal(spoilt[2][name], clean[2][name])
        assert (spoilt[2][name][~mask] == 0).all()


def test_the_random_batch_reaches_every_bound():
    stats = {name: total.item() for _, s in losses(random_batch(), 8) for name, total in s.items()}
    for name in ("clip_share", "dual_clip_share", "cap_share", "value_clip_share"):
        assert 0 < stats[name] < 8, name


def test_a_batch_without_tokens_has_loss_0_and_gradient_0():
    """A worker whose share is empty still takes part in the backward pass."""
    data = {name: torch.full((2, 3), NAN) for name in random_batch()} | {"mask": torch.zeros(2, 3, dtype=torch.bool)}
    data, leaves = with_leaves(data)
    totals, stats, gradients = run([data], leaves, normalizer=0)
    assert totals == [0] * 5
    assert all(total == 0 for s in stats for total in s.values())
    assert all((gradient == 0).all() for gradient in gradients.values())
    assert ppo.mean_stats(stats[0])["ratio"] == 0


# --- off-policy diagnostics ---


def test_off_policy_by_hand():
    # ratios 1/2, 1, 1, 4 (a fifth is masked): mean 6.5 / 4; (sum)² = 42.25, n * sum of squares = 4 * 18.25 = 73
    proximal = tensor([[0.5, 1.0, 1.0], [4.0, NAN, 1.0]]).log()
    mask = tensor([[True, True, True], [True, False, False]])
    found = ppo.off_policy(proximal_log_probs=proximal, behaviour_log_probs=torch.zeros(2, 3), mask=mask)
    assert found == pytest.approx({"mean": 1.625, "p01": 0.5, "p99": 4.0, "max": 4.0, "effective_share": 42.25 / 73})
    # of the ratios 1 .. 201 one per cent on each side are two
    many = torch.arange(1, 202).float().log()[None]
    found = ppo.off_policy(
        proximal_log_probs=many, behaviour_log_probs=torch.zeros(1, 201), mask=torch.ones(1, 201, dtype=torch.bool)
    )
    assert (found["p01"], found["p99"], found["max"]) == pytest.approx((3, 199, 201))


def test_off_policy_of_no_tokens_is_nan():
    empty = torch.zeros(2, 3)
    found = ppo.off_policy(
        proximal_log_probs=empty, behaviour_log_probs=empty, mask=torch.zeros(2, 3, dtype=torch.bool)
    )
    assert found and all(math.isnan(value) for value in found.values())
