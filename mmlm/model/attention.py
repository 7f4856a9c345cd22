"""Scaled dot-product attention with rotary positions and a key-value cache.

Axes: X valid position of a batch, B record, T position of a prompt, S key position, C column of a cache, N head, K
key-value head, H head width, D model width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from mmlm.model.config import ModelConfig, RopeScaling
from mmlm.model.kernels import RMSNorm, turned
from mmlm.model.packed import HIDDEN, Arrangement
from mmlm.model.rope import frequencies, magnitude

Table = tuple[torch.Tensor, torch.Tensor]


def rotary(
    position_X: torch.Tensor, head_width: int, theta: float, dtype: torch.dtype, scaling: RopeScaling | None = None
) -> Table:
    """cos and sin tables, (X, 1, H/2), computed in float32 (RoFormer, Su et al. 2021, eq. 34); once for all layers."""
    angle = position_X[:, None, None].float() * frequencies(head_width, theta, scaling, position_X.device)
    cos, sin, scale = angle.cos(), angle.sin(), magnitude(scaling)
    if scale != 1:
        cos, sin = cos * scale, sin * scale
    return cos.to(dtype), sin.to(dtype)


def rotate(x_XNH: torch.Tensor, table: Table) -> torch.Tensor:
    cos, sin = table
    if len(x_XNH) <= 32 and not torch.is_grad_enabled():  # a step of generation: three calls instead of eight
        swapped = x_XNH.roll(x_XNH.shape[-1] // 2, -1)
        return torch.addcmul(x_XNH * torch.cat([cos, cos], -1), swapped, torch.cat([-sin, sin], -1))
    return turned(x_XNH, cos, sin)


def kept_as(x: torch.Tensor) -> torch.dtype:
    """The type in which a cache keeps `x`. A CPU that has no tiles for bf16 (AMX) converts all it has kept at every step: 8
    records of 300 positions, 12 heads of 64, on a core of an EPYC (AVX-512) 2.4 ms against 0.5 in float32, of twice the
    memory; with tiles 0.48 against 0.94."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16) or _has_tiles():
        return x.dtype
    return torch.float32


@functools.cache
def _has_tiles() -> bool:
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


class Cache:
    """Rotated keys and values of one layer, (B, K, C, H), in memory that is taken ahead: S of the C columns are filled."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, room: int = 64) -> None:
        """`room`: columns to take beyond the first pass. What is needed beyond them comes in steps of half the size."""
        self.room, self.length = room, 0
        self.aside: dict[str, torch.Tensor] = {}
        """What a fusion keeps of the prompts, by name, (B, ...)."""

    def fill(self, k_XKH: torch.Tensor, v_XKH: torch.Tensor, valid_BT: torch.Tensor) -> None:
        """The first pass: X valid positions of B prompts of T columns. Padding holds zeros."""
        B, T = valid_BT.shape
        self.keys, self.values = (
            x.new_zeros(B, x.shape[1], T + self.room, x.shape[2], dtype=kept_as(x)) for x in (k_XKH, v_XKH)
        )
        whole = len(k_XKH) == B * T
        for buffer, x_XKH in ((self.keys, k_XKH), (self.values, v_XKH)):
            columns_BTKH = buffer[:, :, :T].transpose(1, 2)
            if whole:
                columns_BTKH.copy_(x_XKH.view(B, T, *x_XKH.shape[1:]))
            else:
                columns_BTKH[valid_BT] = x_XKH.to(buffer.dtype)
        self.length = T

    def append(self, k_BKH: torch.Tensor, v_BKH: torch.Tensor) -> None:
        """One more position of each record."""
        S = self.length
        if self.keys.shape[2] == S:
            self.keys, self.values = (F.pad(x, (0, 0, 0, max(64, S // 2))) for x in (self.keys, self.values))
        self.keys.select(2, S).copy_(k_BKH)
        self.values.select(2, S).copy_(v_BKH)
        self.length = S + 1

    def keep(self, rows: list[int]) -> None:
        """Row n becomes what row `rows[n]` was; rows may be left out or come several times.

        Where rows are only left out, and holes filled from the end, nothing but those few rows is moved.
        """
        n = len(rows)
        at = torch.tensor(rows, device=self.keys.device)
        self.aside = {name: x.index_select(0, at) for name, x in self.aside.items()}
        moved = [(to, row) for to, row in enumerate(rows) if to != row]
        if all(row >= n for _, row in moved):
            for x in (self.keys, self.values):
                for to, row in moved:
                    x[to, :, : self.length] = x[row, :, : self.length]
            self.keys, self.values = self.keys[:n], self.values[:n]
            return
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(n, *old.shape[1:])
            new[:, :, : self.length] = old[:, :, : self.length].index_select(0, at)
            setattr(self, name, new)


@dataclass(frozen=True)
class Filling:
    """The arrangement of the first pass of generation: that of training, and what it sees is kept."""

    cache: Cache
    valid_BT: torch.Tensor
    seen: Arrangement

    def attend(self, q_XNH: torch.Tensor, k_XKH: torch.Tensor, v_XKH: torch.Tensor) -> torch.Tensor:
        self.cache.fill(k_XKH, v_XKH, self.valid_BT)
        return self.seen.attend(q_XNH, k_XKH, v_XKH)


@dataclass(frozen=True)
class Step:
    """The arrangement of one more position of each record, over itself and what is in the cache: one fused kernel."""

    cache: Cache
    bias_B11S: torch.Tensor | None
    """HIDDEN where a record's padding stands; None where there is none."""

    @classmethod
    def of(cls, caches: list[Cache], valid_BS: torch.Tensor | None) -> list[Step]:
        bias = None
        if valid_BS is not None:
            bias = caches[0].keys.new_zeros(valid_BS.shape).masked_fill_(~valid_BS, HIDDEN)[:, None, None]
        return [cls(cache, bias) for cache in caches]

    def attend(self, q_XNH: torch.Tensor, k_XKH: torch.Tensor, v_XKH: torch.Tensor) -> torch.Tensor:
        cache = self.cache
        cache.append(k_XKH, v_XKH)
        k, v = cache.keys.narrow(2, 0, cache.length), cache.values.narrow(2, 0, cache.length)
        q, grouped = q_XNH.to(k.dtype).unsqueeze(2), k.shape[1] != q_XNH.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias_B11S, enable_gqa=grouped)
        return y.squeeze(2).to(q_XNH.dtype)


def sharpness_of(config: ModelConfig) -> float:
    """What queries are multiplied by: with muP, scores are divided by H, as much as by √H at the base's head width."""
    chosen = config.initialisation
    return 1.0 if chosen.kind == "depth" else (chosen.base_head_width / config.head_width) ** 0.5


class Attention(nn.Module):
    """softmax(QKᵀ/√H) V over N heads (Vaswani et al. 2017, eq. 1); K key-value heads are shared by N/K heads each
    (Ainslie et al. 2023); queries and keys may be normalised per head (Dehghani et al. 2023, section 2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, H = config.width, config.head_width
        self.heads, self.kv_heads, self.head_width = config.heads, config.key_value_heads, H
        self.qkv = nn.Linear(D, (config.heads + 2 * self.kv_heads) * H, bias=config.attention_bias != "none")
        # matrices in one, to an optimizer that works on matrices: those of queries, keys and values, or one for each head
        self.qkv.weight.parts = 3 if self.kv_heads == self.heads else self.heads + 2 * self.kv_heads  # type: ignore
        self.query_norm = RMSNorm(H, config.norm_epsilon) if config.qk_norm else None
        self.key_norm = RMSNorm(H, config.norm_epsilon) if config.qk_norm else None
        self.out = nn.Linear(config.heads * H, D, bias=config.attention_bias == "all")
        self.sharpness = sharpness_of(config)

    def forward(self, x_XD: torch.Tensor, table: Table | None, arrangement: Arrangement) -> torch.Tensor:
        N, K = self.heads, self.kv_heads
        qkv = self.qkv(x_XD).view(len(x_XD), N + 2 * K, self.head_width)
        qk, v = qkv.split([N + K, K], 1)
        if self.query_norm is not None and self.key_norm is not None:
            qk = torch.cat([self.query_norm(qk[:, :N]), self.key_norm(qk[:, N:])], 1)
        q, k = (qk if table is None else rotate(qk, table)).split([N, K], 1)
        q = q if self.sharpness == 1 else q * self.sharpness
        return self.out(arrangement.attend(q, k, v).flatten(1))
