"""How far apart bf16 alone puts the log-probs of an engine and of a trainer, for a Qwen2 of random
weights.

    python reports/h200/rounding.py 7b      # 2 minutes and 8 GB on two CPU cores; or 1.5b

The same bf16 weights and tokens go through the model three times, layer by layer: in fp32; as an
engine computes, where what each operation gives and the residual are bf16; and as the trainers do,
where the residual is fp32. No kernel of a GPU takes part, so what differs is rounding.
"""

import sys

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from planner.spec.files import profiles_dir
from planner.spec.workload_file import load_workload

TOKENS = 256
WAYS = {  # the type of the products, the type of the residual
    "fp32": (torch.float32, torch.float32),
    "engine": (torch.bfloat16, torch.bfloat16),
    "trainer": (torch.bfloat16, torch.float32),
}
shape = load_workload(profiles_dir() / "workloads" / f"h200-{sys.argv[1]}.toml").actor.shape


def weight(rows: int, columns: int) -> Tensor:
    return (0.02 * torch.randn(rows, columns)).bfloat16()


def normed(x: Tensor) -> Tensor:
    return x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)


def rotated(x: Tensor) -> Tensor:
    """`[tokens, heads, head_dim]`, each token by its place."""
    frequencies = 1e6 ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
    angles = torch.arange(TOKENS)[:, None] * frequencies
    angles = angles.repeat(1, 2)[:, None]
    x = x.float()
    one, other = x.chunk(2, -1)
    turned = torch.cat([-other, one], -1)
    return x * angles.cos() + turned * angles.sin()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`[tokens, heads, head_dim]` each -> `[tokens, hidden]`."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    found = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return found[0].transpose(0, 1).flatten(1)


def plus(residual: Tensor, more: Tensor) -> Tensor:
    """Added in fp32, and kept in the type of the residual."""
    return (residual.float() + more.float()).to(residual.dtype)


def layer(x: Tensor, weights: list[Tensor], kind: torch.dtype) -> Tensor:
    """The residual after a layer whose products have a kind of number."""
    to_q, to_k, to_v, from_heads, gate, up, down = (weight.to(kind) for weight in weights)
    h = normed(x).to(kind)
    q, k, v = (linear(h, to).view(TOKENS, -1, shape.head_dim) for to in (to_q, to_k, to_v))
    q, k = rotated(q).to(kind), rotated(k).to(kind)
    x = plus(x, linear(attention(q, k, v), from_heads))
    h = normed(x).to(kind)
    opened = silu(linear(h, gate).float()).to(kind)
    return plus(x, linear(opened * linear(h, up), down))


with torch.no_grad():
    torch.manual_seed(0)
    hidden, inner = shape.hidden, shape.intermediate
    wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    embedding = weight(shape.vocab, hidden)
    start = embedding[torch.randint(0, shape.vocab, (TOKENS,))]
    states = {way: start.to(residual) for way, (_, residual) in WAYS.items()}
    sizes = [(wide, hidden), (narrow, hidden), (narrow, hidden), (hidden, wide)]
    sizes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    for _ in range(shape.layers):
        weights = [weight(*size) for size in sizes]
        states = {way: layer(states[way], weights, kind) for way, (kind, _) in WAYS.items()}
    head = embedding if shape.tied_embeddings else weight(shape.vocab, hidden)
    found: dict[str, Tensor] = {}
    for way, (kind, _) in WAYS.items():  # fp32 is first: the tokens are drawn from it
        log_probs = linear(normed(states[way]).to(kind), head.to(kind)).float().log_softmax(-1)
        if not found:
            drawn = torch.multinomial(log_probs.exp(), 1)
        found[way] = log_probs.gather(1, drawn)
    for one, other in (("engine", "fp32"), ("trainer", "fp32"), ("engine", "trainer")):
        distance = (found[one] - found[other]).abs().mean().item()
        print(f"{one} and {other}: {distance:.4f} apart, the mean over {TOKENS} tokens")
