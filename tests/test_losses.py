"""The losses. The numbers in these tests are worked out by hand in the comments beside
them."""

import math

import pytest
import torch
from test_advantages import INF, LN2, NAN, close, mask_of
from torch import Tensor, tensor

from executor.training import lm_head
from executor.training.aggregation import mean_stats, normalizer
from executor.training.losses import entropy_loss, kl_loss, policy_loss, value_loss


def policy(log_probs, proximal, weights, advantages, mask, **options):
    defaults = {"clip": 0.2, "normalizer": 1}
    return policy_loss(
        log_probs=log_probs,
        proximal_log_probs=proximal,
        advantages=advantages,
        weights=weights,
        mask=mask,
        **(defaults | options),
    )


def one_token_policy(
    ratio: float, advantage: float, weight: float = 1.0, **options
) -> tuple[float, float, dict]:
    """Loss, d loss / d log-prob and stats of one token with this ratio new / proximal and this
    importance weight."""
    log_probs = tensor([[math.log(ratio)]], requires_grad=True)
    weights, advantages = tensor([[weight]]), tensor([[advantage]])
    loss, stats = policy(
        log_probs, tensor([[0.0]]), weights, advantages, tensor([[True]]), **options
    )
    loss.backward()
    return loss.item(), log_probs.grad.item(), {name: total.item() for name, total in stats.items()}


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
        assert one_token_policy(ratio, advantage)[:2] == pytest.approx(
            (actual_loss, actual_gradient)
        )


def test_dual_clip_must_be_above_1():
    with pytest.raises(AssertionError, match="dual_clip"):
        one_token_policy(1.0, -1.0, dual_clip=0.9)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.25, 3.0, -3.75, -3.75, 0),  # inside of 1.28
        (1.5, 3.0, -3.84, 0.0, 1),  # 1.28 * 3
        (0.5, -3.0, 2.4, 0.0, 1),  # below as before: 0.8 * 3
    ],
)
def test_the_upper_bound_may_be_another(ratio, advantage, loss, gradient, clipped):
    found = one_token_policy(ratio, advantage, clip_high=0.28)
    assert found[:2] == pytest.approx((loss, gradient)) and found[2]["clip_share"] == clipped


@pytest.mark.parametrize("weight", [0.25, 1.5])
def test_the_importance_weight_is_a_factor(weight):
    loss, gradient, stats = one_token_policy(1.1, 3.0, weight)
    assert loss == pytest.approx(-3.3 * weight) and gradient == pytest.approx(-3.3 * weight)
    assert stats["importance_weight"] == pytest.approx(weight)


def test_clipping_is_against_the_proximal_policy():
    # new / behaviour = 1.1 * 1.5 = 1.65 lies outside the clip range, new / proximal = 1.1 inside:
    # there is a gradient.
    assert one_token_policy(1.1, 1.0, 1.5)[1] == pytest.approx(-1.65)


def test_no_gradient_into_proximal_weights_or_advantages():
    tensors = [tensor([[-1.0]], requires_grad=True) for _ in range(4)]
    log_p, proximal, weights, advantages = tensors
    policy(log_p, proximal, weights, advantages, tensor([[True]]))[0].backward()
    assert tensors[0].grad is not None and all(t.grad is None for t in tensors[1:])


def test_kl_stats_by_hand():
    # new / proximal = 2: 2 - 1 - ln 2 = 0.3068528
    assert one_token_policy(2.0, 1.0)[2]["approx_kl"] == pytest.approx(0.3068528)


# Two responses with ratios 2, 1/2 and 4; their geometric means are 1 and 4.
GSPO = tensor([[2.0, 0.5], [4.0, NAN]])


def test_gspo_by_hand():
    """The ratio is the sequence's: within 1.2 the first has all its tokens' gradients, and the
    second is clipped as a whole."""
    log_probs = GSPO.log().requires_grad_()
    mask, ones = mask_of(2, 1), torch.ones(2, 2)
    loss, stats = policy(log_probs, 0 * ones, ones, 3 * ones, mask, kind="gspo", normalizer=2)
    loss.backward()
    assert loss.item() == pytest.approx(-(3 + 3 + 1.2 * 3) / 2)
    assert close(log_probs.grad, [[-1.5, -1.5], [0.0, 0.0]])  # -1 * 3 / 2 for each token
    assert stats["clip_share"] == 1 and stats["ratio"] == pytest.approx(1 + 1 + 4)


def test_cispo_by_hand():
    """No gradient is cut off: the ratio is a weight, 1.2 where it is above that, 0.8 below."""
    log_probs = GSPO.log().requires_grad_()
    mask, ones = mask_of(2, 1), torch.ones(2, 2)
    loss, stats = policy(log_probs, 0 * ones, ones, 3 * ones, mask, kind="cispo", normalizer=2)
    loss.backward()
    # -(1.2 ln 2 - 0.8 ln 2 + 1.2 ln 4) * 3 / 2
    assert loss.item() == pytest.approx(-(1.2 - 0.8 + 2.4) * LN2 * 1.5)
    assert close(log_probs.grad, [[-1.8, -1.2], [-1.8, 0.0]])
    assert stats["clip_share"] == 3


# --- aggregation ---

# Responses of 3, 1 and 0 tokens in a minibatch of 8 tokens and 4 sequences, of which others have
# the rest; the longest may have 5.
AGGREGATED = {"tokens": 8, "sequences": 4, "longest": 5}


@pytest.mark.parametrize(
    ("kind", "divided_by", "loss"),
    [
        ("token", [8, 8, 8], -(1 + 2 + 3 + 6) / 8),
        ("sequence", [12, 4, 1], -(2 + 6) / 4),  # the means of both
        ("constant", [20, 20, 20], -(6 + 6) / 4 / 5),  # their sums, over 5 tokens each
    ],
)
def test_aggregation_by_hand(kind, divided_by, loss):
    mask = mask_of(3, 1, 0)
    by = normalizer(kind, mask, **AGGREGATED)
    assert by.flatten().tolist() == divided_by
    zeros, ones = torch.zeros(3, 3), torch.ones(3, 3)
    advantages = tensor([[1.0, 2.0, 3.0], [6.0, NAN, INF], [NAN, NAN, NAN]])
    found, _ = policy(zeros, zeros, ones, advantages, mask, normalizer=by)
    assert found.item() == pytest.approx(loss)


def test_a_minibatch_of_nothing_has_loss_0():
    mask = torch.zeros(2, 3, dtype=torch.bool)
    for kind in ("token", "sequence", "constant"):
        by = normalizer(kind, mask, tokens=0, sequences=0, longest=5)
        assert (by == 1).all()


def test_policy_loss_is_the_sum_over_tokens_by_the_normalizer():
    log_probs = torch.zeros(2, 2)
    advantages, mask = tensor([[1.0, 2.0], [4.0, 8.0]]), tensor([[True, True], [True, False]])
    ones = torch.ones(2, 2)
    loss, stats = policy(log_probs, log_probs, ones, advantages, mask, normalizer=14)
    assert loss.item() == pytest.approx(-0.5)  # -(1 + 2 + 4) / 14
    assert mean_stats(stats) == pytest.approx(
        {
            "tokens": 3,
            "policy_loss": -7 / 3,
            "ratio": 1,
            "clip_share": 0,
            "dual_clip_share": 0,
            "importance_weight": 1,
            "approx_kl": 0,
        }
    )


def test_a_ratio_that_would_overflow_stays_finite():
    log_probs = tensor([[0.0]], requires_grad=True)
    far = tensor([[-500.0]])
    loss, stats = policy(log_probs, far, tensor([[1.0]]), tensor([[-1.0]]), tensor([[True]]))
    loss.backward()
    assert (
        loss.isfinite()
        and log_probs.grad.isfinite().all()
        and all(s.isfinite() for s in stats.values())
    )


def test_a_gradient_step_raises_good_tokens_and_lowers_bad_ones():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, requires_grad=True)
    tokens, mask = tensor([3, 1]), torch.ones(1, 2, dtype=torch.bool)
    before = lm_head.log_probs(logits, torch.eye(5), tokens, 1.0)[None]
    loss, _ = policy(before, before, mask.float(), tensor([[1.0, -1.0]]), mask)
    loss.backward()
    assert logits.grad is not None
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
    actual, stats = value_loss(
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
    loss, stats = value_loss(
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
        loss, stats = kl_loss(
            log_probs=log_probs, ref_log_probs=ref, mask=mask, kind=kind, coef=0.1, normalizer=4
        )
        loss.backward()
        assert loss.item() == pytest.approx(0.1 * 2 * value / 4)
        assert close(log_probs.grad, [[0.025 * slope, 0.025 * slope]])
        assert stats["kl_loss"].item() == pytest.approx(2 * value)


def test_k1_is_refused_as_a_loss():
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="reward"):
        kl_loss(log_probs=x, ref_log_probs=x, mask=x == 0, kind="k1", coef=1, normalizer=1)


def test_entropy_loss_rewards_entropy():
    entropy = tensor([[2.0, 4.0]], requires_grad=True)
    loss, stats = entropy_loss(entropy=entropy, mask=tensor([[True, True]]), coef=0.1, normalizer=3)
    loss.backward()
    assert entropy.grad is not None
    assert loss.item() == pytest.approx(-0.2) and (entropy.grad < 0).all() and stats["entropy"] == 6


# --- what holds for every loss ---


def random_batch() -> dict[str, Tensor]:
    """Four responses of 5, 2, 0 and 1 tokens, far enough off policy that every bound is active
    somewhere."""
    generator = torch.Generator().manual_seed(1)
    names = (
        "log_probs",
        "proximal",
        "weights",
        "ref",
        "advantages",
        "values",
        "old_values",
        "returns",
        "entropy",
    )
    data = {name: torch.randn(4, 5, generator=generator) for name in names}
    return data | {"mask": mask_of(5, 2, 0, 1)}


def losses(data: dict[str, Tensor], normalizer: float) -> list[tuple[Tensor, dict[str, Tensor]]]:
    mask, log_probs = data["mask"], data["log_probs"]
    common = {"mask": mask, "normalizer": normalizer}
    batch = log_probs, data["proximal"], data["weights"].exp(), data["advantages"]
    return [
        policy(*batch, dual_clip=1.5, **common),
        policy(*batch, kind="gspo", **common),
        policy(*batch, kind="cispo", **common),
        value_loss(
            values=data["values"],
            old_values=data["old_values"],
            returns=data["returns"],
            clip=0.2,
            **common,
        ),
        kl_loss(log_probs=log_probs, ref_log_probs=data["ref"], kind="k2", coef=0.1, **common),
        kl_loss(log_probs=log_probs, ref_log_probs=data["ref"], kind="k3", coef=0.1, **common),
        entropy_loss(entropy=data["entropy"], coef=0.1, **common),
    ]


TRAINED = ("log_probs", "values", "entropy")


def run(parts: list[dict[str, Tensor]], leaves: dict[str, Tensor], normalizer: float):
    """Losses and stats summed over the parts, and the gradients that have gathered in the
    leaves."""
    results = [losses(part, normalizer) for part in parts]
    torch.stack([loss for result in results for loss, _ in result]).sum().backward()
    per_loss = list(zip(*results, strict=True))
    totals = [sum(loss.item() for loss, _ in each) for each in per_loss]
    stats = [
        {name: sum(s[name].item() for _, s in each) for name in each[0][1]} for each in per_loss
    ]
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
    widths = [
        max(1, int(part["mask"].sum(1).max())) for part in parts
    ]  # each padded to its own longest response
    parts = [
        {n: x[:, :width] for n, x in part.items()}
        for part, width in zip(parts, widths, strict=True)
    ]
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
    dirty = {
        name: x if name == "mask" else x.masked_fill(~mask, bad)
        for name, x in random_batch().items()
    }
    data, leaves = with_leaves(dirty)
    spoilt = run([data], leaves, normalizer=8)
    assert spoilt[0] == clean[0] and spoilt[1] == clean[1]
    for name in TRAINED:
        assert torch.equal(spoilt[2][name], clean[2][name])
        assert (spoilt[2][name][~mask] == 0).all()


def test_the_random_batch_reaches_every_bound():
    ppo, gspo, _, value, *_ = [stats for _, stats in losses(random_batch(), 8)]
    assert 0 < ppo["clip_share"] < 8 and 0 < ppo["dual_clip_share"] < 8
    assert 0 < gspo["clip_share"] < 8 and 0 < value["value_clip_share"] < 8


def test_a_batch_without_tokens_has_loss_0_and_gradient_0():
    """A worker whose share is empty still takes part in the backward pass."""
    data = {name: torch.full((2, 3), NAN) for name in random_batch()} | {
        "mask": torch.zeros(2, 3, dtype=torch.bool)
    }
    data, leaves = with_leaves(data)
    totals, stats, gradients = run([data], leaves, normalizer=0)
    assert totals == [0] * 7
    assert all(total == 0 for s in stats for total in s.values())
    assert all((gradient == 0).all() for gradient in gradients.values())
    assert mean_stats(stats[0])["ratio"] == 0
