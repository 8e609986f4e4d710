"""The losses of actor and critic and their gradients, against verl, OpenRLHF and TRL. What differs
by definition is in docs/peers.md."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peers import (
    ActorConfig,
    GRPOTrainer,
    PolicyLoss,
    ValueLoss,
    aggregate_loss,
    compute_rollout_correction_weights,
    verl,
)
from random_batches import (
    CAP,
    CLIP,
    DUAL,
    KL_COEF,
    VALUE_CLIP,
    Batch,
    assert_close,
    assert_same_loss,
    seeds,
)
from torch import Tensor

from executor.training import aggregation, correction, losses

pytestmark = pytest.mark.peers


def our_policy_loss(
    batch: Batch, log_probs: Tensor, **settings: Any
) -> tuple[Tensor, aggregation.Stats]:
    log_ratio = batch.nan("proximal") - batch.nan("behaviour")
    given: dict[str, Any] = {"clip": CLIP, "normalizer": batch.tokens, **settings}
    return losses.policy_loss(
        log_probs=log_probs,
        proximal_log_probs=batch.nan("proximal"),
        advantages=batch.nan("advantages"),
        weights=correction.importance_weights(log_ratio, batch.mask, cap=CAP),
        mask=batch.mask,
        **given,
    )


OF_VERL = {
    "ppo": verl.compute_policy_loss_vanilla,
    "gspo": verl.compute_policy_loss_gspo,
    "cispo": verl.compute_policy_loss_cispo,
}


@seeds
@pytest.mark.parametrize("high", [CLIP, 0.28])
@pytest.mark.parametrize("kind", ["ppo", "gspo", "cispo"])
def test_policy_loss_of_verl(seed: int, kind: Any, high: float) -> None:
    """Dual clip is always on there in PPO, and the importance weights are truncated."""
    batch = Batch(seed)
    ours, theirs = batch.nan("log_probs"), batch.plain("log_probs")
    dual = DUAL if kind == "ppo" else None
    our_loss, stats = our_policy_loss(batch, ours, kind=kind, clip_high=high, dual_clip=dual)
    weights, _ = compute_rollout_correction_weights(
        batch.proximal - batch.behaviour, batch.real, "token", CAP
    )
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio=CLIP,
        clip_ratio_low=CLIP,
        clip_ratio_high=high,
        clip_ratio_c=DUAL,
    )
    their_loss, said = OF_VERL[kind](
        batch.proximal, theirs, batch.advantages, batch.real, "token-mean", config, weights
    )
    assert_same_loss(our_loss, their_loss, ours, theirs)
    means = aggregation.mean_stats(stats)
    assert means["clip_share"] == pytest.approx(said["actor/pg_clipfrac"])
    assert means["dual_clip_share"] == pytest.approx(said["actor/pg_clipfrac_lower"])


@seeds
@pytest.mark.parametrize("dual", [None, DUAL])
def test_policy_loss_of_openrlhf(seed: int, dual: float | None) -> None:
    batch = Batch(seed)
    ours, theirs = batch.nan("log_probs"), batch.plain("log_probs")
    our_loss, stats = our_policy_loss(batch, ours, dual_clip=dual)
    loss = PolicyLoss(
        CLIP,
        CLIP,
        dual,
        is_correction_level="token",
        is_correction_mode="clip",
        is_correction_threshold=(0.0, CAP),
    )
    given = batch.proximal, batch.advantages, batch.real, batch.behaviour
    their_loss, clipped, _, _, filtered = loss(theirs, *given)
    assert_same_loss(our_loss, their_loss, ours, theirs)
    means = aggregation.mean_stats(stats)
    assert means["clip_share"] == pytest.approx(clipped.item())
    share = (batch.proximal - batch.behaviour).exp()[batch.mask] > CAP
    assert share.float().mean().item() == pytest.approx(filtered.item())


def trl_loss(batch: Batch, log_probs: Tensor, **settings: Any) -> Tensor:
    """TRL's loss of a micro-batch, in which all weights of the rollout are 1."""
    keep = SimpleNamespace(
        gather=lambda given: given, reduce=lambda given, reduction: given, num_processes=1
    )
    trainer = GRPOTrainer.__new__(GRPOTrainer)
    defaults: dict[str, Any] = {
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "beta": 0.0,
        "loss_type": "bnpo",
        "epsilon_low": CLIP,
        "epsilon_high": CLIP,
        "use_vllm": False,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": log_probs.shape[1],
        "_entropy_bonus_enabled": False,
        "_metrics": {"train": _Discard()},
        "model": SimpleNamespace(training=True),
        "accelerator": keep,
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        "_get_per_token_logps_and_entropies": lambda *_, **__: (
            log_probs,
            torch.zeros_like(log_probs),
            None,
        ),
    }
    vars(trainer).update(defaults | settings)
    ids = torch.zeros_like(batch.mask, dtype=torch.long)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": ids,
        "completion_mask": batch.mask.long(),
        "advantages": batch.advantages,
        "old_per_token_logps": batch.proximal,
        "ref_per_token_logps": batch.reference,
        "num_items_in_batch": torch.tensor(batch.tokens),
    }
    loss: Tensor = trainer._compute_loss(None, inputs)
    return loss


class _Discard(dict[str, list[float]]):
    def __missing__(self, name: str) -> list[float]:
        return []


@seeds
def test_policy_loss_of_trl(seed: int) -> None:
    """Its type bnpo is a mean over tokens. On fresh samples: behaviour and proximal are one."""
    batch = Batch(seed)
    batch.behaviour = batch.proximal
    ours, theirs = batch.nan("log_probs"), batch.plain("log_probs")
    our_loss, _ = our_policy_loss(batch, ours)
    assert_same_loss(our_loss, trl_loss(batch, theirs), ours, theirs)


def sequences_of(batch: Batch, sequences: int) -> Tensor:
    """What makes each sequence count the same."""
    return aggregation.normalizer(
        "sequence", batch.mask, tokens=batch.tokens, sequences=sequences, longest=99
    )


@seeds
def test_gspo_of_openrlhf_and_trl(seed: int) -> None:
    """Theirs is a mean over sequences, and the gradient of the ratio of one goes to its tokens
    through their mean. OpenRLHF leaves out sequences that are empty, TRL does not."""
    batch = Batch(seed)
    batch.behaviour = batch.proximal
    batch.advantages = batch.scores[:, None] * batch.real
    ours, theirs = batch.nan("log_probs"), batch.plain("log_probs")
    normalizer = sequences_of(batch, int(batch.mask.any(1).sum()))
    our_loss, _ = our_policy_loss(batch, ours, kind="gspo", normalizer=normalizer)
    loss = PolicyLoss(CLIP, CLIP, policy_loss_type="gspo")
    assert_same_loss(
        our_loss, loss(theirs, batch.proximal, batch.advantages, batch.real)[0], ours, theirs
    )
    ours, theirs = batch.nan("log_probs"), batch.plain("log_probs")
    normalizer = sequences_of(batch, len(batch.mask))
    our_loss, _ = our_policy_loss(batch, ours, kind="gspo", normalizer=normalizer)
    settings = {"importance_sampling_level": "sequence", "loss_type": "grpo"}
    assert_same_loss(our_loss, trl_loss(batch, theirs, **settings), ours, theirs)


@seeds
def test_cispo_of_trl(seed: int) -> None:
    """It has no lower bound, and calls the upper one 1 + what it is called here."""
    batch = Batch(seed)
    batch.behaviour = batch.proximal
    ours, theirs = batch.nan("log_probs"), batch.plain("log_probs")
    our_loss, _ = our_policy_loss(batch, ours, kind="cispo", clip=1.0, clip_high=0.5)
    their_loss = trl_loss(batch, theirs, loss_type="cispo", epsilon_high=1.5)
    assert_same_loss(our_loss, their_loss, ours, theirs)


@seeds
@pytest.mark.parametrize("kind", ["token", "sequence", "constant"])
def test_aggregation(seed: int, kind: Any) -> None:
    """verl and OpenRLHF count the sequences that are not empty, TRL counts all."""
    batch = Batch(seed)
    batch.behaviour = batch.proximal
    some, width = int(batch.mask.any(1).sum()), batch.mask.shape[1]

    def ours(sequences: int) -> Tensor:
        normalizer = aggregation.normalizer(
            kind, batch.mask, tokens=batch.tokens, sequences=sequences, longest=width
        )
        return aggregation.normalized(batch.nan("values"), batch.mask, normalizer)

    names = {
        "token": "token-mean",
        "sequence": "seq-mean-token-mean",
        "constant": "seq-mean-token-sum-norm",
    }
    assert_close(ours(some), verl.agg_loss(batch.values, batch.real, names[kind]))
    if kind != "constant":
        by_token = kind == "token"
        assert_close(
            ours(some), aggregate_loss(batch.values, batch.real, token_level_loss=by_token)
        )
    # TRL's loss is that of a policy that did not move: minus the advantages.
    batch.advantages, batch.log_probs = -batch.values, batch.proximal
    of_trl = {"token": "bnpo", "sequence": "grpo", "constant": "dr_grpo"}
    assert_close(
        ours(len(batch.mask)), trl_loss(batch, batch.plain("log_probs"), loss_type=of_trl[kind])
    )


@seeds
def test_kl_loss_of_trl(seed: int) -> None:
    """Its k3 has no cap."""
    batch = Batch(seed)
    batch.behaviour = batch.proximal
    batch.reference = batch.log_probs + (batch.reference - batch.log_probs).clamp(-2, 2)
    ours, theirs = batch.nan("log_probs"), batch.plain("log_probs")
    our_loss, _ = our_policy_loss(batch, ours)
    kl, _ = losses.kl_loss(
        log_probs=ours,
        ref_log_probs=batch.nan("reference"),
        mask=batch.mask,
        kind="k3",
        coef=KL_COEF,
        normalizer=batch.tokens,
    )
    assert_same_loss(our_loss + kl, trl_loss(batch, theirs, beta=KL_COEF), ours, theirs)


@seeds
@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_kl_loss(seed: int, kind: Any) -> None:
    batch = Batch(seed)
    ours, theirs = batch.nan("log_probs"), batch.plain("log_probs")
    our_loss, _ = losses.kl_loss(
        log_probs=ours,
        ref_log_probs=batch.nan("reference"),
        mask=batch.mask,
        kind=kind,
        coef=KL_COEF,
        normalizer=batch.tokens,
    )
    kl = verl.kl_penalty(theirs, batch.reference, kind)
    assert_same_loss(our_loss, KL_COEF * verl.agg_loss(kl, batch.real, "token-mean"), ours, theirs)


@seeds
@pytest.mark.parametrize("clip", [VALUE_CLIP, None])
def test_value_loss(seed: int, clip: float | None) -> None:
    batch = Batch(seed)
    ours, theirs = batch.nan("values"), batch.plain("values")
    our_loss, stats = losses.value_loss(
        values=ours,
        old_values=batch.nan("old_values"),
        returns=batch.nan("returns"),
        mask=batch.mask,
        clip=clip,
        normalizer=batch.tokens,
    )
    (our_gradient,) = torch.autograd.grad(our_loss, ours, retain_graph=True)
    of_openrlhf = ValueLoss(clip)(theirs, batch.old_values, batch.returns, batch.real)
    assert_same_loss(our_loss, of_openrlhf, ours, theirs)
    if clip is None:
        return  # it cannot be turned off in verl
    theirs = batch.plain("values")
    of_verl, clipped = verl.compute_value_loss(
        theirs, batch.returns, batch.old_values, batch.real, clip
    )
    assert_close(our_loss, of_verl)
    (their_gradient,) = torch.autograd.grad(of_verl, theirs)
    assert_close(our_gradient, their_gradient)
    assert aggregation.mean_stats(stats)["value_clip_share"] == pytest.approx(clipped.item())


@seeds
def test_micro_batches_add_up(seed: int) -> None:
    """Sums of micro-batches over the tokens of the minibatch, as the peers aggregate by token."""
    batch = Batch(seed)
    entropy = batch.nan("values")
    parts = [slice(0, 2), slice(2, None)]
    ours = sum(
        losses.entropy_loss(
            entropy=entropy[part], mask=batch.mask[part], coef=-1.0, normalizer=batch.tokens
        )[0]
        for part in parts
    )
    of_verl = verl.agg_loss(batch.values, batch.real, "token-mean")
    of_openrlhf = aggregate_loss(batch.values, batch.real)
    assert_close(ours, of_verl)
    assert_close(ours, of_openrlhf)
