"""Log-probs and entropies of tokens, computed from hidden states for a few tokens at a time. The
logits of a whole micro-batch are never held, nor is their fp32 copy. The backward pass computes
each chunk's logits again, which costs 2·V·H more operations per token, a few percent of a step."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from planner.predict.memory import LOGIT_CHUNK_TOKENS


def log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    chunk_tokens: int = LOGIT_CHUNK_TOKENS,
) -> Tensor:
    """log softmax(hidden @ weight.T / temperature) at the targets: `[S, H]`, `[V, H]`, `[S]` ->
    fp32 `[S]`.

    Matrix products run in the type of `hidden`, all else in fp32."""
    assert temperature > 0, f"temperature {temperature}: greedy sampling has no log-probs"
    return cast(Tensor, _LogProbs.apply(hidden, weight, targets, temperature, chunk_tokens))


def entropies(
    hidden: Tensor, weight: Tensor, temperature: float, chunk_tokens: int = LOGIT_CHUNK_TOKENS
) -> Tensor:
    """Entropy in nats of softmax(hidden @ weight.T / temperature): `[S, H]`, `[V, H]` -> fp32
    `[S]`."""
    parts = [
        checkpoint(
            _entropy, chunk, weight, temperature, use_reentrant=False, preserve_rng_state=False
        )
        for chunk in hidden.split(chunk_tokens)
    ]
    return torch.cat(parts)


def _entropy(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    log_p = ((hidden @ weight.T).float() / temperature).log_softmax(-1)
    return -(log_p.exp() * log_p.clamp(min=torch.finfo(torch.float32).min)).sum(
        -1
    )  # the clamp makes 0 * log 0 be 0


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        chunk_tokens: int,
    ) -> Tensor:
        pairs = zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
        parts = [_on(hidden, _pick)(h @ weight.T, t, temperature) for h, t in pairs]
        picked, normalizer = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, targets, normalizer)
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        return picked

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normalizer = ctx.saved_tensors
        of_hidden = torch.empty_like(hidden)
        of_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for begin in range(0, len(hidden), ctx.chunk_tokens):
            part = slice(begin, begin + ctx.chunk_tokens)
            logits = hidden[part] @ weight.T
            of_logits = _on(hidden, _pick_backward)(
                logits, targets[part], normalizer[part], gradient[part], ctx.temperature
            )
            of_hidden[part] = of_logits @ weight
            if of_weight is not None:
                of_weight.addmm_(of_logits.T, hidden[part])
        return of_hidden, of_weight, None, None, None


def _pick(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs `[s]` and the logarithms of the softmax's denominators `[s]`."""
    scaled = logits.float() / temperature
    normalizer = scaled.logsumexp(-1)
    return scaled.gather(-1, targets[:, None])[:, 0] - normalizer, normalizer


def _pick_backward(
    logits: Tensor, targets: Tensor, normalizer: Tensor, gradient: Tensor, temperature: float
) -> Tensor:
    probabilities = (logits.float() / temperature - normalizer[:, None]).exp()
    picked = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    return ((picked.float() - probabilities) * (gradient / temperature)[:, None]).to(logits.dtype)


_compiled: dict[Callable[..., Any], Callable[..., Any]] = {}


def _on(device_of: Tensor, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself, or fused into one kernel where that pays."""
    if not device_of.is_cuda:
        return function
    if function not in _compiled:
        _compiled[function] = torch.compile(function, dynamic=True)
    return _compiled[function]
