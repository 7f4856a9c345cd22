"""Scaled dot-product attention with rotary positions and a key-value cache.

Axes: X valid position of a batch, B record, S key position, N head, K key-value head, H head width, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from mmlm.model.config import ModelConfig
from mmlm.model.kernels import RMSNorm
from mmlm.model.packed import HIDDEN, Arrangement, Block, probabilities, repeated

Table = tuple[torch.Tensor, torch.Tensor]


def rotary(position_X: torch.Tensor, head_width: int, theta: float, dtype: torch.dtype) -> Table:
    """cos and sin tables, (X, 1, H/2), computed in float32 (RoFormer, Su et al. 2021, eq. 34); once for all layers."""
    frequency = theta ** (-torch.arange(0, head_width, 2, device=position_X.device, dtype=torch.float32) / head_width)
    angle = position_X[:, None, None].float() * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x_XNH: torch.Tensor, table: Table) -> torch.Tensor:
    cos, sin = table
    a, b = x_XNH.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


@dataclass
class Cache:
    """Rotated keys and values of one layer, (K, B, S, H), of the positions of B records seen so far."""

    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    aside: dict[str, torch.Tensor] = field(default_factory=dict)
    """What a fusion keeps of the prompts, by name, (B, ...): whoever takes rows of the keys takes them of these, too."""

    def extend(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.keys is not None and self.values is not None:
            k, v = torch.cat([self.keys, k], 2), torch.cat([self.values, v], 2)
        self.keys, self.values = k, v
        return k, v


@dataclass(frozen=True)
class Cached:
    """The arrangement of generation: B records of L queries each, over what is in the cache and over themselves."""

    cache: Cache
    block: Block

    @classmethod
    def prompts(
        cls, caches: list[Cache], valid_BT: torch.Tensor, prompt_BT: torch.Tensor, *, prefix: bool
    ) -> list[Cached]:
        """For the first pass: left-padded prompts, padding included."""
        sees_BTS = torch.ones(valid_BT.shape[1], valid_BT.shape[1], dtype=torch.bool, device=valid_BT.device).tril()[
            None
        ]
        if prefix:
            sees_BTS = sees_BTS | (prompt_BT[:, :, None] & prompt_BT[:, None, :])
        return cls._of(caches, sees_BTS & valid_BT[:, None])

    @classmethod
    def step(cls, caches: list[Cache], valid_BS: torch.Tensor) -> list[Cached]:
        """For one more position of each record."""
        return cls._of(caches, valid_BS[:, None])

    @classmethod
    def _of(cls, caches: list[Cache], sees_BLS: torch.Tensor) -> list[Cached]:
        bias = torch.zeros(sees_BLS.shape, device=sees_BLS.device).masked_fill(~sees_BLS, HIDDEN)
        block = Block(0, bias.shape[1], bias.shape[2], 0, bias)
        return [cls(cache, block) for cache in caches]

    def attend(self, q_XNH: torch.Tensor, k_XKH: torch.Tensor, v_XKH: torch.Tensor) -> torch.Tensor:
        B, N = len(self.block.bias), q_XNH.shape[1]
        q, k, v = (x.transpose(0, 1).unflatten(1, (B, -1)) for x in (q_XNH, k_XKH, v_XKH))
        k, v = (repeated(x, N).flatten(0, 1) for x in self.cache.extend(k, v))
        y_YLH = torch.bmm(probabilities(q.flatten(0, 1), k, self.block), v)
        return y_YLH.view(N, -1, y_YLH.shape[-1]).transpose(0, 1)


class Attention(nn.Module):
    """softmax(QKᵀ/√H) V over N heads (Vaswani et al. 2017, eq. 1); K key-value heads are shared by N/K heads each
    (Ainslie et al. 2023); queries and keys may be normalised per head (Dehghani et al. 2023, section 2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, H = config.width, config.head_width
        self.heads, self.kv_heads, self.head_width = config.heads, config.key_value_heads, H
        self.qkv = nn.Linear(D, (config.heads + 2 * self.kv_heads) * H, bias=False)
        # matrices in one, to an optimizer that works on matrices: those of queries, keys and values, or one for each head
        self.qkv.weight.parts = 3 if self.kv_heads == self.heads else self.heads + 2 * self.kv_heads  # type: ignore
        self.query_norm = RMSNorm(H) if config.qk_norm else None
        self.key_norm = RMSNorm(H) if config.qk_norm else None
        self.out = nn.Linear(config.heads * H, D, bias=False)

    def forward(self, x_XD: torch.Tensor, table: Table, arrangement: Arrangement) -> torch.Tensor:
        N, K = self.heads, self.kv_heads
        qkv = self.qkv(x_XD).view(len(x_XD), N + 2 * K, self.head_width)
        qk, v = qkv.split([N + K, K], 1)
        if self.query_norm is not None and self.key_norm is not None:
            qk = torch.cat([self.query_norm(qk[:, :N]), self.key_norm(qk[:, N:])], 1)
        q, k = rotate(qk, table).split([N, K], 1)
        return self.out(arrangement.attend(q, k, v).flatten(1))
