"""Log-probs and entropies of tokens, computed from hidden states for a few tokens at a time. The
logits of a whole micro-batch are never held, nor is their fp32 copy. The backward pass computes
each chunk's logits again, for both at once, which costs 2·V·H more operations per token, a few
percent of a step."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from planner.predict.memory import LOGIT_CHUNK_TOKENS


class Shaping(NamedTuple):
    """What some models do with a head's products before they are logits: `scale` them, and bound
    them as `cap * tanh(product / cap)`."""

    scale: float = 1.0
    cap: float | None = None

    def logits(self, products: Tensor) -> Tensor:
        """The logits, in fp32."""
        scaled = products.float() * self.scale
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)

    def derivative(self, logits: Tensor) -> Tensor | float:
        """The derivative of the logits by the products."""
        return self.scale if self.cap is None else self.scale * (1 - (logits / self.cap) ** 2)


PLAIN = Shaping()


def log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    chunk_tokens: int = LOGIT_CHUNK_TOKENS,
    bias: Tensor | None = None,
    shaping: Shaping = PLAIN,
) -> Tensor:
    """log softmax(logits / temperature) at the targets, where the logits are hidden @ weight.T +
    bias in its `shaping`: `[S, H]`, `[V, H]`, `[S]`, bias `[V]` -> fp32 `[S]`.

    Matrix products run in the type of `hidden`, all else in fp32."""
    settings = temperature, chunk_tokens, shaping, False
    found, _ = _LogProbs.apply(hidden, weight, bias, targets, *settings)
    return cast(Tensor, found)


def log_probs_and_entropies(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    chunk_tokens: int = LOGIT_CHUNK_TOKENS,
    bias: Tensor | None = None,
    shaping: Shaping = PLAIN,
) -> tuple[Tensor, Tensor]:
    """What `log_probs` gives, and the entropies `[S]` in nats of softmax(logits / temperature),
    both of the same logits: entropies take no memory and no products of their own."""
    settings = temperature, chunk_tokens, shaping, True
    found = _LogProbs.apply(hidden, weight, bias, targets, *settings)
    return cast(tuple[Tensor, Tensor], found)


class _LogProbs(torch.autograd.Function):
    """Log-probs and entropies; no entropies where they are not `wanted`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_tokens: int,
        shaping: Shaping,
        wanted: bool,
    ) -> tuple[Tensor, Tensor]:
        assert temperature > 0, f"temperature {temperature}: greedy sampling has no log-probs"
        pairs = zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
        parts = [
            _on(h, _pick)(linear(h, weight, bias), t, temperature, shaping, wanted)
            for h, t in pairs
        ]
        picked, normalizer, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, bias, targets, normalizer, entropy)
        ctx.temperature, ctx.chunk_tokens, ctx.shaping = temperature, chunk_tokens, shaping
        return picked, entropy

    @staticmethod
    def backward(ctx: Any, of_picked: Tensor, of_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalizer, entropy = ctx.saved_tensors
        of_hidden = torch.empty_like(hidden)
        of_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        of_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        for begin in range(0, len(hidden), ctx.chunk_tokens):
            part = slice(begin, begin + ctx.chunk_tokens)
            of_products = _on(hidden[part], _pick_backward)(
                linear(hidden[part], weight, bias),
                targets[part],
                normalizer[part],
                of_picked[part],
                entropy[part],
                of_entropy[part],
                ctx.temperature,
                ctx.shaping,
            )
            of_hidden[part] = of_products @ weight
            if of_weight is not None:
                of_weight.addmm_(of_products.T, hidden[part])
            if of_bias is not None:
                of_bias += of_products.sum(0)
        return of_hidden, of_weight, of_bias, *[None] * 5


def _pick(
    products: Tensor, targets: Tensor, temperature: float, shaping: Shaping, wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs `[s]`, the logarithms of the softmax's denominators `[s]`, and the entropies `[s]`,
    or `[0]` where they are not wanted."""
    scaled = shaping.logits(products) / temperature
    normalizer = scaled.logsumexp(-1)
    picked = scaled.gather(-1, targets[:, None])[:, 0] - normalizer
    if not wanted:
        return picked, normalizer, normalizer.new_empty(0)
    log_p = _bounded(scaled - normalizer[:, None])
    return picked, normalizer, -(log_p.exp() * log_p).sum(-1)


def _pick_backward(
    products: Tensor,
    targets: Tensor,
    normalizer: Tensor,
    of_picked: Tensor,
    entropy: Tensor,
    of_entropy: Tensor,
    temperature: float,
    shaping: Shaping,
) -> Tensor:
    """The gradient by the products; -p (log p + H) is that of an entropy H by a scaled logit."""
    logits = shaping.logits(products)
    log_p = logits / temperature - normalizer[:, None]
    picked = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    of_scaled = (picked.float() - log_p.exp()) * of_picked[:, None]
    if len(entropy):
        surplus = _bounded(log_p) + entropy[:, None]
        of_scaled = of_scaled - log_p.exp() * surplus * of_entropy[:, None]
    of_logits = of_scaled / temperature
    return (of_logits * shaping.derivative(logits)).to(products.dtype)


def _bounded(log_p: Tensor) -> Tensor:
    """Log-probs above -infinity, so that 0 * log 0 is 0."""
    return log_p.clamp(min=torch.finfo(torch.float32).min)


_compiled: dict[Callable[..., Any], Callable[..., Any]] = {}


def _on(device_of: Tensor, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself, or fused into one kernel where that pays. For no row and for a single
    one it would be compiled once more each."""
    if not device_of.is_cuda or len(device_of) < 2:
        return function
    if function not in _compiled:
        _compiled[function] = torch.compile(function, dynamic=True)
    return _compiled[function]
