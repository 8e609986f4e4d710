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
from planner.spec.workload import load_workload

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
    angles = (torch.arange(TOKENS)[:, None] * frequencies).repeat(1, 2)[:, None]
    one, other = x.float().chunk(2, -1)
    return x.float() * angles.cos() + torch.cat([-other, one], -1) * angles.sin()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return (
        scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0]
        .transpose(0, 1)
        .flatten(1)
    )


def layer(x: Tensor, weights: list[Tensor], kind: torch.dtype) -> Tensor:
    q_, k_, v_, o_, gate, up, down = (w.to(kind) for w in weights)
    h = normed(x).to(kind)
    q, k, v = (linear(h, w).view(TOKENS, -1, shape.head_dim) for w in (q_, k_, v_))
    x = (x.float() + linear(attention(rotated(q).to(kind), rotated(k).to(kind), v), o_).float()).to(
        x.dtype
    )
    h = normed(x).to(kind)
    inner = silu(linear(h, gate).float()).to(kind) * linear(h, up)
    return (x.float() + linear(inner, down).float()).to(x.dtype)


with torch.no_grad():
    torch.manual_seed(0)
    wide, narrow, hidden = (
        shape.heads * shape.head_dim,
        shape.kv_heads * shape.head_dim,
        shape.hidden,
    )
    embedding = weight(shape.vocab, hidden)
    start = embedding[torch.randint(0, shape.vocab, (TOKENS,))]
    states = {way: start.to(residual) for way, (_, residual) in WAYS.items()}
    sizes = [(wide, hidden), (narrow, hidden), (narrow, hidden), (hidden, wide)]
    sizes += [
        (shape.intermediate, hidden),
        (shape.intermediate, hidden),
        (hidden, shape.intermediate),
    ]
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
