"""The model's formulas written out in float64 as papers print them: one record at a time, one head at a time, no cache."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mmlm.model.config import ModelConfig

EPSILON = 1e-6


def softmax(x: Tensor) -> Tensor:
    e = (x - x.max(-1, keepdim=True).values).exp()
    return e / e.sum(-1, keepdim=True)


def rms_norm(x: Tensor, w: Tensor) -> Tensor:
    """Zhang & Sennrich 2019, eq. 4."""
    return x / (x.pow(2).mean(-1, keepdim=True) + EPSILON).sqrt() * w


def layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Ba et al. 2016, eq. 4."""
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return (x - mean) / (variance + EPSILON).sqrt() * w + b


def swiglu(x: Tensor, G: Tensor, U: Tensor, down: Tensor) -> Tensor:
    """Shazeer 2020, eq. 6: (Swish₁(x G) ⊗ x U) O."""
    gate = x @ G
    return (gate / (1 + (-gate).exp()) * (x @ U)) @ down


def perceptron(x: Tensor, W1: Tensor, b1: Tensor, W2: Tensor, b2: Tensor) -> Tensor:
    """Vaswani et al. 2017, eq. 2: max(0, x W₁ + b₁) W₂ + b₂."""
    return torch.maximum(torch.zeros((), dtype=x.dtype), x @ W1 + b1) @ W2 + b2


def gelu(x: Tensor) -> Tensor:
    """Hendrycks & Gimpel 2016: x Φ(x)."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def scaled_dot_product(Q: Tensor, K: Tensor, V: Tensor, sees: Tensor) -> Tensor:
    """Vaswani et al. 2017, eq. 1: softmax(Q Kᵀ / √d_k) V, over the keys that each query sees."""
    scores = Q @ K.T / math.sqrt(Q.shape[-1])
    return softmax(torch.where(sees, scores, -math.inf)) @ V


def rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Su et al. 2021, section 3.2.2, as products of complex numbers; pairs are (i, i + d/2) as in LLaMA."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for i in range(half):
        z = torch.complex(x[:, i], x[:, i + half]) * torch.exp(1j * positions.double() * theta ** (-2 * i / (2 * half)))
        out[:, i], out[:, i + half] = z.real, z.imag
    return out


def sinusoid(position: int, width: int) -> Tensor:
    """Vaswani et al. 2017, section 3.5."""
    made = torch.zeros(width, dtype=torch.float64)
    for i in range(0, width, 2):
        made[i] = math.sin(position / 10000 ** (i / width))
        made[i + 1] = math.cos(position / 10000 ** (i / width))
    return made


def norm(module: Any, x: Tensor) -> Tensor:
    if isinstance(module, nn.LayerNorm):
        return layer_norm(x, module.weight, module.bias)
    return rms_norm(x, module.weight) if isinstance(module, nn.RMSNorm) else x


def attention(module: Any, config: ModelConfig, x: Tensor, of: Tensor, sees: Tensor, rotated: Tensor | None) -> Tensor:
    """Head by head: queries of `x`, keys and values of `of`. `rotated` are the positions, if they are rotary."""
    H, N, K = config.head_width, config.heads, config.key_value_heads
    maps = [module.qkv] if hasattr(module, "qkv") else [module.query, module.key_value]
    q_map, k_map, v_map = torch.cat([m.weight for m in maps]).split([N * H, K * H, K * H])
    biases = torch.cat([torch.zeros_like(m.weight[:, 0]) if m.bias is None else m.bias for m in maps])
    q_bias, k_bias, v_bias = biases.split([N * H, K * H, K * H])
    made = []
    for n in range(N):
        shared = n // (N // K)
        own, theirs = slice(n * H, (n + 1) * H), slice(shared * H, (shared + 1) * H)
        Q = x @ q_map[own].T + q_bias[own]
        Kn, V = (of @ m[theirs].T + b[theirs] for m, b in ((k_map, k_bias), (v_map, v_bias)))
        if config.qk_norm:
            Q, Kn = rms_norm(Q, module.query_norm.weight), rms_norm(Kn, module.key_norm.weight)
        if rotated is not None:
            Q, Kn = rope(Q, rotated, config.rope_theta), rope(Kn, rotated, config.rope_theta)
        made.append(scaled_dot_product(Q, Kn, V, sees) if len(of) else torch.zeros_like(Q))
    out = torch.cat(made, -1) @ module.out.weight.T
    return out if module.out.bias is None else out + module.out.bias


def feed_forward(module: Any, config: ModelConfig, x: Tensor) -> Tensor:
    if config.mlp == "swiglu":
        G, U = module.gate_up.weight.chunk(2)
        return swiglu(x, G.T, U.T, module.out.weight.T)
    W1, b1, W2, b2 = module.up.weight.T, module.up.bias, module.out.weight.T, module.out.bias
    return perceptron(x, W1, b1, W2, b2) if config.mlp == "relu" else gelu(x @ W1 + b1) @ W2 + b2


def block(
    module: Any,
    config: ModelConfig,
    x: Tensor,
    sees: Tensor,
    rotated: Tensor | None,
    source: Tensor | None = None,
) -> Tensor:
    """One layer; with a `source`, what the encoder made, also the attention across."""
    everything = torch.ones(len(x), 0 if source is None else len(source), dtype=torch.bool)
    steps = [(module.attention_norm, lambda y: attention(module.attention, config, y, y, sees, rotated))]
    if source is not None:
        steps += [(module.across_norm, lambda y: attention(module.across, config, y, source, everything, None))]
    steps += [(module.feed_forward_norm, lambda y: feed_forward(module.feed_forward, config, y))]
    for its_norm, inner in steps:
        x = norm(its_norm, x + inner(x)) if config.norm_at == "after" else x + inner(norm(its_norm, x))
    return x


def gated(module: Any, config: ModelConfig, x: Tensor, memory: Tensor) -> Tensor:
    """Alayrac et al. 2022, figure 4: what a text asks of the media, and a feed-forward, each through its own gate."""
    everything = torch.ones(len(x), len(memory), dtype=torch.bool)
    a, b = (math.tanh(gate) for gate in module.gates.tolist())
    y = x + a * attention(module.attention, config, norm(module.attention_norm, x), memory, everything, None)
    return y + b * feed_forward(module.feed_forward, config, norm(module.feed_forward_norm, y))


def place(net: Any, x: Tensor, positions: Tensor) -> Tensor:
    """Positions added to the embeddings, where they are not rotary."""
    if net.config.positions == "sinusoidal":
        return x + torch.stack([sinusoid(t, x.shape[-1]) for t in positions.tolist()])
    return x + net.positions.place.weight[positions] if net.config.positions == "learned" else x
