"""Attention from the positions of one part of each record to those of another: from what a decoder writes to what an
encoder read (Vaswani et al. 2017, section 3.2.3).

Forward and backward of one layer on one core (AVX-512 and AMX, torch 2.13), ms, products with a softmax between them
against the library's kernel: 128 records of 4 by 37 positions in bf16 17 against 145, in float32 23 against 15; 16 of 40 by
200 in bf16 64 against 69, in float32 79 against 79.

Axes: Y position that asks, S position that is asked, R record, N head, K key-value head, H head width, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from mmlm.model.attention import Cache, sharpness_of
from mmlm.model.block import feed_forward_of
from mmlm.model.classic import norm_of
from mmlm.model.config import ModelConfig
from mmlm.model.kernels import RMSNorm
from mmlm.model.packed import HIDDEN, flash, similar


class Crossing(Protocol):
    """Who asks whom."""

    def attend(self, q_YNH: torch.Tensor, k_SKH: torch.Tensor | None, v_SKH: torch.Tensor | None) -> torch.Tensor:
        """softmax(QKᵀ/√H) V, (Y, N, H), over the keys of each query's record; 0 where it has none."""
        ...


class CrossAttention(nn.Module):
    """As Attention, with queries of one sequence and keys and values of another, neither of which knows positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, H = config.width, config.head_width
        self.heads, self.kv_heads, self.head_width = config.heads, config.key_value_heads, H
        self.query = nn.Linear(D, config.heads * H, bias=config.attention_bias != "none")
        self.key_value = nn.Linear(D, 2 * self.kv_heads * H, bias=config.attention_bias != "none")
        self.key_value.weight.parts = 2  # type: ignore[attr-defined]  # as in Attention
        self.query_norm = RMSNorm(H, config.norm_epsilon) if config.qk_norm else None
        self.key_norm = RMSNorm(H, config.norm_epsilon) if config.qk_norm else None
        self.out = nn.Linear(config.heads * H, D, bias=config.attention_bias == "all")
        self.sharpness = sharpness_of(config)

    def forward(self, x_YD: torch.Tensor, source_SD: torch.Tensor | None, crossing: Crossing) -> torch.Tensor:
        """Without a source, over what `crossing` remembers of one."""
        q = self.query(x_YD).unflatten(1, (self.heads, self.head_width))
        q = q if self.query_norm is None else self.query_norm(q)
        q = q if self.sharpness == 1 else q * self.sharpness
        if source_SD is None:
            return self.out(crossing.attend(q, None, None).flatten(1))
        k, v = self.key_value(source_SD).unflatten(1, (2 * self.kv_heads, self.head_width)).chunk(2, 1)
        k = k if self.key_norm is None else self.key_norm(k)
        return self.out(crossing.attend(q, k, v).flatten(1))


class GatedLayer(nn.Module):
    """y = x + tanh(a) · attention(norm(x) → memory), then y + tanh(b) · feed-forward(norm(y)) (Flamingo, Alayrac et al.
    2022, figure 4)."""

    def __init__(self, config: ModelConfig, gate: float) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = norm_of(config), norm_of(config)
        self.attention, self.feed_forward = CrossAttention(config), feed_forward_of(config)
        self.gates = nn.Parameter(torch.full((2,), gate))

    def forward(self, x_YD: torch.Tensor, memory_MD: torch.Tensor | None, crossing: Crossing) -> torch.Tensor:
        a, b = self.gates.tanh()
        x_YD = x_YD + a * self.attention(self.attention_norm(x_YD), memory_MD, crossing)
        return x_YD + b * self.feed_forward(self.feed_forward_norm(x_YD))


def cross(asking_R: torch.Tensor, asked_R: torch.Tensor, dtype: torch.dtype) -> Crossing:
    """By how many positions of each record ask and are asked; both stand record by record. One fused kernel on a GPU,
    groups of records of similar length elsewhere."""
    if asking_R.is_cuda and dtype != torch.float32 and bool((asking_R * asked_R).any()) and flash() is not None:
        return CrossVarlen.of(asking_R, asked_R)
    return CrossGrouped.of(asking_R.cpu().numpy(), asked_R.cpu().numpy(), asking_R.device)


def attend(
    q_GNYH: torch.Tensor, k_GKSH: torch.Tensor, v_GKSH: torch.Tensor, bias_G11S: torch.Tensor | None
) -> torch.Tensor:
    """Of G records of as many positions each, (G, N, Y, H), by the faster way on a CPU."""
    N, K = q_GNYH.shape[1], k_GKSH.shape[1]
    if K != N:
        k_GKSH, v_GKSH = (x.repeat_interleave(N // K, 1) for x in (k_GKSH, v_GKSH))
    if q_GNYH.dtype == torch.float32:
        return F.scaled_dot_product_attention(q_GNYH, k_GKSH, v_GKSH, attn_mask=bias_G11S)
    scores = q_GNYH * q_GNYH.shape[-1] ** -0.5 @ k_GKSH.transpose(2, 3)
    return (scores if bias_G11S is None else scores + bias_G11S).softmax(-1) @ v_GKSH


@dataclass(frozen=True)
class Group:
    """G records, padded to as many positions."""

    asking: torch.Tensor
    """(G, Y) int64: which positions ask; the first one's number where there is none."""
    asked: torch.Tensor
    """(G, S) int64."""
    hidden: torch.Tensor | None
    """(G, 1, 1, S) bool: where nobody is asked; None where every place is filled."""


@dataclass(frozen=True)
class CrossGrouped:
    """Groups one after the other."""

    groups: tuple[Group, ...]
    answered: torch.Tensor
    """int64: which places of all groups hold positions that ask."""
    places: torch.Tensor
    """int64: the numbers of those positions."""

    @classmethod
    def of(cls, asking_R: np.ndarray, asked_R: np.ndarray, device: torch.device) -> CrossGrouped:
        begins, reaches = (np.cumsum(n) - n for n in (asking_R, asked_R))
        some = np.flatnonzero((asked_R > 0) & (asking_R > 0))
        groups, answered, places, at = [], [], [], 0
        for chosen in similar(asked_R[some]) if len(some) else []:
            records = some[chosen]
            Y, S = int(asking_R[records].max()), int(asked_R[records].max())
            asks, is_asked = np.arange(Y) < asking_R[records, None], np.arange(S) < asked_R[records, None]
            asking = np.where(asks, begins[records, None] + np.arange(Y), 0)
            asked = np.where(is_asked, reaches[records, None] + np.arange(S), 0)
            hidden = None if is_asked.all() else torch.from_numpy(~is_asked)[:, None, None].to(device)
            groups.append(Group(torch.from_numpy(asking).to(device), torch.from_numpy(asked).to(device), hidden))
            answered.append(at + np.flatnonzero(asks))
            places.append(asking[asks])
            at += asks.size
        joined = (np.concatenate(n) if n else np.zeros(0, np.int64) for n in (answered, places))
        return cls(tuple(groups), *(torch.from_numpy(n).to(device) for n in joined))

    def attend(self, q_YNH: torch.Tensor, k_SKH: torch.Tensor | None, v_SKH: torch.Tensor | None) -> torch.Tensor:
        assert k_SKH is not None and v_SKH is not None
        if not self.groups:  # the parameters are touched all the same: ZeRO waits for their gradients
            return q_YNH * 0 + (k_SKH.sum() + v_SKH.sum()) * 0
        made = []
        for group in self.groups:
            q, k, v = (taken(x, at) for x, at in ((q_YNH, group.asking), (k_SKH, group.asked), (v_SKH, group.asked)))
            bias = None if group.hidden is None else q.new_zeros(group.hidden.shape).masked_fill_(group.hidden, HIDDEN)
            made.append(attend(q, k, v, bias).transpose(1, 2).flatten(0, 1))
        y_YNH = torch.cat(made).index_select(0, self.answered)
        return torch.zeros_like(q_YNH).index_copy(0, self.places, y_YNH)


def taken(x_XNH: torch.Tensor, at_GL: torch.Tensor) -> torch.Tensor:
    """(G, N, L, H)."""
    return x_XNH.index_select(0, at_GL.flatten()).view(*at_GL.shape, *x_XNH.shape[1:]).transpose(1, 2)


@dataclass(frozen=True)
class CrossVarlen:
    """Flash attention over records of any length (Dao 2023), on a GPU in bf16 or fp16."""

    asking: torch.Tensor
    """(records + 1,) int32: where records begin and end among the positions that ask."""
    asked: torch.Tensor
    longest: tuple[int, int]
    kernel: Any

    @classmethod
    def of(cls, asking_R: torch.Tensor, asked_R: torch.Tensor) -> CrossVarlen:
        ends = [F.pad(n.cumsum(0), (1, 0)).to(torch.int32) for n in (asking_R, asked_R)]
        return cls(ends[0], ends[1], (int(asking_R.max()), int(asked_R.max())), flash())

    def attend(self, q_YNH: torch.Tensor, k_SKH: torch.Tensor | None, v_SKH: torch.Tensor | None) -> torch.Tensor:
        assert k_SKH is not None and v_SKH is not None
        return self.kernel(  # type: ignore[no-any-return]
            q_YNH, k_SKH, v_SKH, self.asking, self.asked, *self.longest, window_size=(-1, -1),
            enable_gqa=k_SKH.shape[1] != q_YNH.shape[1],
        )  # fmt: skip


@dataclass(frozen=True)
class Remembering:
    """The first pass of generation, in which each record asks once: keys and values are kept beside the cache."""

    cache: Cache
    asked_R: torch.Tensor

    def attend(self, q_YNH: torch.Tensor, k_SKH: torch.Tensor | None, v_SKH: torch.Tensor | None) -> torch.Tensor:
        assert k_SKH is not None and v_SKH is not None
        keep(self.cache, self.asked_R, k_SKH, v_SKH)
        return Remembered(self.cache).attend(q_YNH)


@dataclass(frozen=True)
class Remembered:
    """Every later pass: one position of each record."""

    cache: Cache

    def attend(
        self, q_YNH: torch.Tensor, k_SKH: torch.Tensor | None = None, v_SKH: torch.Tensor | None = None
    ) -> torch.Tensor:
        keys, values, here_RS = (self.cache.aside[name] for name in ("asked_keys", "asked_values", "asked"))
        bias = q_YNH.new_zeros(here_RS.shape).masked_fill_(~here_RS, HIDDEN)[:, None, None]
        y = attend(q_YNH.unsqueeze(2), keys, values, bias).squeeze(2)
        return y * here_RS.any(1)[:, None, None]


@dataclass(frozen=True)
class Keeping:
    """The first pass of generation, in which each record asks at many positions: what is asked is kept beside the cache."""

    cache: Cache
    asked_R: torch.Tensor
    crossing: Crossing

    def attend(self, q_YNH: torch.Tensor, k_SKH: torch.Tensor | None, v_SKH: torch.Tensor | None) -> torch.Tensor:
        assert k_SKH is not None and v_SKH is not None
        keep(self.cache, self.asked_R, k_SKH, v_SKH)
        return self.crossing.attend(q_YNH, k_SKH, v_SKH)


def keep(cache: Cache, asked_R: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor) -> None:
    """Keys and values of each record, padded to the longest, go beside the cache."""
    longest = max(1, int(asked_R.max()))
    here_RS = torch.arange(longest, device=k_SKH.device) < asked_R[:, None]
    at_RS = (here_RS.flatten().cumsum(0) - 1).clamp_min(0).view(here_RS.shape)
    k_SKH, v_SKH = (x if len(x) else x.new_zeros(1, *x.shape[1:]) for x in (k_SKH, v_SKH))
    cache.aside["asked_keys"], cache.aside["asked_values"] = taken(k_SKH, at_RS), taken(v_SKH, at_RS)
    cache.aside["asked"] = here_RS
