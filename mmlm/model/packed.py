"""Attention of packed records: each position sees its own record only, and no mask of a whole sequence ever exists.

Everything outside attention works on the X valid positions of a batch, one after the other. Attention takes them
apart into groups of records of similar length, padded to the longest of the group: padding is seen by nobody else.

Forward and backward of one layer, CPU ms of one core (AVX-512 and AMX, torch 2.13), about 4,000 positions, 8 heads of 64
(41: 5,248 positions, 4 heads of 32). "masked": a block mask over sequences of 2,048. "SDPA": the groups, each with the
library's kernel. "here": groups, blocks of 128 queries, which skip the keys that no query of the block sees.

    records of        bf16: masked   SDPA   here       fp32: masked   SDPA   here
    41 positions                62     61     10                 16     16     14
    20 to 120                  605    126     44                750     93     81
    100 to 500                 934    202     66              1,130    230    185
    2,048                      602    334    178                  -    422    487

Blocks of 128: 64 took 215 and 457 ms at 2,048, 256 took 199 and 528, 512 took 271 and 691.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

HIDDEN = -3e4
"""Added to the scores of keys that a query does not see; fits float16, and its exponential is 0."""
QUERIES = 128
"""Queries of a block."""
FLEX = 128
"""Queries, and keys, of a block of FlexAttention."""
WORTH = 5e7
"""Multiplications of all layers in a group's average product, from which kernels for its shape are worth compiling. Forward and
backward of shapes met for the first time, 24 choices of 40 to 300 positions, 2 to 36 records, 2 and 12 layers, 4 heads of 32 and
8 of 64, one core with AMX: at 3e6 float32 takes a third of the time of bf16, from 1.3e7 to 4e7 0.5 to 1.05 of it, from
6e7 to 1.6e8 0.8 to 1.2, at 1e9 1.7."""
KEPT = 1024
"""Probabilities of longer records are computed again in the backward pass instead of kept: they grow with L²."""


def flash() -> Any:
    """The library's attention over records of any length; None before torch 2.10. It brings torch's compiler with it,
    which takes a second to import: nobody needs it without a GPU."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def hide_from_compiler(arrangement: Any) -> None:
    """Before blocks are compiled: attention by groups is not to be traced, its loops are others in every batch."""
    if not hasattr(arrangement.attend, "_torchdynamo_disable"):
        arrangement.attend = torch.compiler.disable(arrangement.attend)


class Arrangement(Protocol):
    """How the positions of a batch attend to each other. Axes: X valid position, N head, K key-value head, H head width."""

    def attend(self, q_XNH: torch.Tensor, k_XKH: torch.Tensor, v_XKH: torch.Tensor) -> torch.Tensor:
        """softmax(QKᵀ/√H) V, (X, N, H), over what each position sees."""
        ...


def arrange(
    segment_BT: torch.Tensor, prompt_BT: torch.Tensor, *, prefix: bool, dtype: torch.dtype, layers: int = 1
) -> Arrangement:
    """The fastest arrangement there is for this device and so many layers: one fused kernel over records of any length on
    a GPU, groups of records of similar length elsewhere."""
    if segment_BT.is_cuda and dtype != torch.float32:
        if not prefix and flash() is not None:
            return Varlen.of(segment_BT)
        return Flex.of(segment_BT, prompt_BT, prefix=prefix, compiled=True)
    return Grouped.of(segment_BT, prompt_BT, prefix=prefix, dtype=dtype, layers=layers)


def arrange_both_ways(segment_BT: torch.Tensor, *, dtype: torch.dtype, layers: int = 1) -> Arrangement:
    """As `arrange`, with every position seeing all of its record: for encoders."""
    if segment_BT.is_cuda and dtype != torch.float32 and flash() is not None:
        return Varlen.of(segment_BT, window=(-1, -1))
    return arrange(segment_BT, torch.ones_like(segment_BT, dtype=torch.bool), prefix=True, dtype=dtype, layers=layers)


@dataclass(frozen=True)
class Block:
    """Queries `first` to `last` of every record of a group, and the keys before `reach`, which are all that they see."""

    first: int
    last: int
    reach: int
    seen: int
    """Keys before this one are seen by all of these queries."""
    bias: torch.Tensor
    """(1 or G, last - first, reach - seen): HIDDEN where a query does not see a key."""


@dataclass(frozen=True)
class Group:
    """G records as rows of L positions."""

    records: int
    length: int
    rows: torch.Tensor | None
    """(G * L,) int64: which valid position stands where; None when they stand so already."""
    padding: torch.Tensor | None
    """Those of the G * L places that hold nothing."""
    blocks: tuple[Block, ...]

    def take(self, x_KXF: torch.Tensor) -> torch.Tensor:
        """(K * G, L, F), heads outermost."""
        taken = x_KXF if self.rows is None else x_KXF.index_select(1, self.rows)
        return taken.reshape(-1, self.length, x_KXF.shape[-1])

    def work(self) -> float:
        """Multiplications of one of the products of a block, for each value of a position: the mean over blocks."""
        return self.records * sum((b.last - b.first) * b.reach for b in self.blocks) / len(self.blocks)


@dataclass(frozen=True)
class Grouped:
    """Groups one after the other."""

    groups: tuple[Group, ...]
    back: torch.Tensor | None
    """(X,) int64: where each valid position stands among those of all groups; None when in order."""
    layers: int = 1
    """How many use it."""

    @classmethod
    def of(
        cls, segment_BT: torch.Tensor, prompt_BT: torch.Tensor, *, prefix: bool, dtype: torch.dtype, layers: int = 1
    ) -> Grouped:
        """Records of similar length together: at most an eighth, or 8 positions, shorter than the longest."""
        device = segment_BT.device
        starts, lengths = records_of(segment_BT.cpu().numpy())
        prompts = prompt_BT[segment_BT >= 0].cpu().numpy()
        groups, place, at = [], np.empty(int(lengths.sum()), np.int64), 0
        for chosen in similar(lengths):
            L = int(lengths[chosen[0]])
            inside = np.arange(L) < lengths[chosen, None]
            rows = np.where(inside, starts[chosen, None] + np.arange(L), 0)
            place[rows[inside]] = at + np.flatnonzero(inside)
            at += rows.size
            blocks = _blocks(L, prompts[rows] & inside if prefix else None, dtype, device)
            in_order = (
                bool(inside.all()) and rows.size == len(place) and bool((rows.ravel() == np.arange(len(place))).all())
            )
            groups.append(
                Group(
                    records=len(chosen),
                    length=L,
                    rows=None if in_order else torch.from_numpy(rows.ravel()).to(device),
                    padding=None if inside.all() else torch.from_numpy(np.flatnonzero(~inside)).to(device),
                    blocks=blocks,
                )
            )
        back = None if groups[0].rows is None else torch.from_numpy(place).to(device)
        return cls(tuple(groups), back, layers)

    def precisions(self, q_XNH: torch.Tensor) -> list[torch.dtype]:
        """The precision in which each group is worked on: where compiling kernels of low precision for its shape takes
        longer than they save, float32, whose kernels are ready-made."""
        low, width = q_XNH.dtype, q_XNH[0].numel()
        if q_XNH.is_cuda or low not in (torch.bfloat16, torch.float16):
            return [low] * len(self.groups)
        return [low if group.work() * width * self.layers > WORTH else torch.float32 for group in self.groups]

    def attend(self, q_XNH: torch.Tensor, k_XKH: torch.Tensor, v_XKH: torch.Tensor) -> torch.Tensor:
        return _Attend.apply(q_XNH, k_XKH, v_XKH, self)

    def positions(self, parts_KPF: list[torch.Tensor]) -> torch.Tensor:
        """What each group gave, (K, G * L, F) → (X, K, F)."""
        whole = torch.cat(parts_KPF, 1) if len(parts_KPF) > 1 else parts_KPF[0]
        return (whole if self.back is None else whole.index_select(1, self.back)).transpose(0, 1)


def records_of(segment_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First valid position, and length, of each record, in order of sequences and segments."""
    valid = segment_BT >= 0
    number = (np.arange(len(segment_BT))[:, None] * (segment_BT.shape[1] + 1) + segment_BT)[valid]
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    return starts, np.diff(starts, append=len(number))


def similar(lengths: np.ndarray) -> list[np.ndarray]:
    """Numbers of records in groups of similar length, the longest first in each."""
    order = np.argsort(-lengths, kind="stable")
    falling = lengths[order]
    cuts, longest = [], falling[0]
    for n, length in enumerate(falling.tolist()):
        if longest - length > max(8, longest // 8):
            cuts.append(n)
            longest = length
    groups = np.split(order, cuts)
    if len(groups) == 1 and (lengths == lengths[0]).all():
        return [np.arange(len(lengths))]
    return groups


def _blocks(length: int, prompt_GL: np.ndarray | None, dtype: torch.dtype, device: torch.device) -> tuple[Block, ...]:
    """Causal, and where `prompt_GL` is given, prompts in both directions."""
    prompt = np.zeros((1, length), bool) if prompt_GL is None else prompt_GL
    ends = np.flatnonzero(prompt.any(0))
    behind = int(ends[-1]) + 1 if len(ends) else 0
    blocks = []
    for first in range(0, length, QUERIES):
        last = min(first + QUERIES, length)
        reach, seen = (max(last, behind), 0) if first < behind else (last, first)
        sees = np.arange(first, last)[:, None] >= np.arange(seen, reach)[None]
        sees = sees[None] | (prompt[:, first:last, None] & prompt[:, None, seen:reach] if first < behind else False)
        bias = torch.from_numpy(np.where(sees, 0.0, HIDDEN)).to(device, dtype)
        blocks.append(Block(first, last, reach, seen, bias))
    return tuple(blocks)


def probabilities(q_YLF: torch.Tensor, k_YSH: torch.Tensor, block: Block) -> torch.Tensor:
    """(Y, queries of all heads, reach) of one block; Y is key-value heads times records."""
    k = k_YSH[:, : block.reach].transpose(1, 2)
    q = rows_of_heads(q_YLF, block, k_YSH.shape[-1])
    scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k, beta=0, alpha=_scale(k_YSH))
    records, queries = block.bias.shape[:2]
    scores.view(-1, records, queries, q.shape[1] // queries, block.reach)[..., block.seen :] += block.bias[:, :, None]
    return scores.softmax(-1)


def rows_of_heads(x_YLF: torch.Tensor, block: Block, width: int) -> torch.Tensor:
    """(Y, queries of all heads, H) of one block: the heads that share keys and values ask side by side, at each position."""
    return x_YLF[:, block.first : block.last].unflatten(-1, (-1, width)).flatten(1, 2)


def _scale(x: torch.Tensor) -> float:
    return float(x.shape[-1] ** -0.5)


class _Attend(torch.autograd.Function):
    """Attention of all groups, and its gradient, block by block.

    The R = N/K heads that share keys and values are rows of one product: F = R H values stand at each position.
    """

    @staticmethod
    def forward(
        ctx: Any, q_XNH: torch.Tensor, k_XKH: torch.Tensor, v_XKH: torch.Tensor, grouped: Grouped
    ) -> torch.Tensor:
        K, H = k_XKH.shape[1:]
        needed = any(ctx.needs_input_grad)
        parts, saved, precisions = [], [], grouped.precisions(q_XNH)
        whole = [x.reshape(len(x), K, -1).transpose(0, 1).contiguous() for x in (q_XNH, k_XKH, v_XKH)]
        for group, dtype in zip(grouped.groups, precisions, strict=True):
            q, k, v = (group.take(x_KXF) for x_KXF in whole)
            wq, wk, wv = (x.to(dtype) for x in (q, k, v))
            y, kept = torch.empty_like(q), []
            for block in group.blocks:
                p = probabilities(wq, wk, block)
                rows_of_heads(y, block, H).copy_(torch.bmm(p, wv[:, : block.reach]))
                if needed and group.length <= KEPT:
                    kept.append(p)
            parts.append(y.view(K, -1, y.shape[-1]))
            saved += [q, k, v, *kept]
        ctx.save_for_backward(*(saved if needed else ()))
        ctx.grouped, ctx.precisions, ctx.kv_heads = grouped, precisions, K
        return grouped.positions(parts).reshape(q_XNH.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        K, shape = ctx.kv_heads, gradients[0].shape
        g_KXF = gradients[0].reshape(len(gradients[0]), K, -1).transpose(0, 1).contiguous()
        parts: tuple[list[torch.Tensor], ...] = ([], [], [])
        saved = list(ctx.saved_tensors)
        for group, dtype in zip(ctx.grouped.groups, ctx.precisions, strict=True):
            kept = len(group.blocks) if group.length <= KEPT else 0
            (q, k, v), ps, saved = saved[:3], saved[3 : 3 + kept], saved[3 + kept :]
            g = group.take(g_KXF)
            if group.padding is not None:
                g.view(K, -1, g.shape[-1]).index_fill_(1, group.padding, 0)
            q, k, v, wide_g = (x.to(dtype) for x in (q, k, v, g))
            for part, made in zip(parts, _backward(q, k, v, wide_g, ps, group), strict=True):
                part.append(made.to(g.dtype).view(K, -1, made.shape[-1]))
        q, k, v = (ctx.grouped.positions(part) for part in parts)
        return q.reshape(shape), k, v, None


def _backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, kept: list[torch.Tensor], group: Group
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of one group: with P = softmax(S), dS = P ∘ (dP - rowsum(dP ∘ P))."""
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    nothing, H = q.new_empty(1, 1, 1), k.shape[-1]
    for n, block in enumerate(group.blocks):
        p = kept[n] if kept else probabilities(q, k, block)
        asked, given, keys = rows_of_heads(q, block, H), rows_of_heads(g, block, H), slice(0, block.reach)
        dv[:, keys] += torch.bmm(p.transpose(1, 2), given)
        dp = torch.bmm(given, v[:, keys].transpose(1, 2))
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
        rows_of_heads(dq, block, H).copy_(torch.baddbmm(nothing, ds, k[:, keys], beta=0, alpha=_scale(k)))
        dk[:, keys] += torch.baddbmm(nothing, ds.transpose(1, 2), asked, beta=0, alpha=_scale(k))
    return dq, dk, dv


@dataclass(frozen=True)
class Varlen:
    """Flash attention over records of any length (Dao 2023), on a GPU in bf16 or fp16."""

    ends: torch.Tensor
    """(records + 1,) int32: where records begin and end among the valid positions."""
    longest: int
    window: tuple[int, int]
    """How many positions before and after itself each one sees; -1 is all."""
    kernel: Any

    @classmethod
    def of(cls, segment_BT: torch.Tensor, window: tuple[int, int] = (-1, 0)) -> Varlen:
        lengths = lengths_of(segment_BT)
        ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        return cls(ends, int(lengths.max()), window, flash())

    def attend(self, q_XNH: torch.Tensor, k_XKH: torch.Tensor, v_XKH: torch.Tensor) -> torch.Tensor:
        grouped = k_XKH.shape[1] != q_XNH.shape[1]
        return self.kernel(  # type: ignore[no-any-return]
            q_XNH, k_XKH, v_XKH, self.ends, self.ends, self.longest, self.longest,
            window_size=self.window, enable_gqa=grouped,
        )  # fmt: skip


def numbered(segment_BT: torch.Tensor) -> torch.Tensor:
    """(X,) int64: the record of each valid position, counted through the batch, on the device of `segment_BT`."""
    B, T = segment_BT.shape
    number_BT = torch.arange(B, device=segment_BT.device)[:, None] * (T + 1) + segment_BT
    return torch.unique_consecutive(number_BT[segment_BT >= 0], return_inverse=True)[1]


def lengths_of(segment_BT: torch.Tensor) -> torch.Tensor:
    """Positions of each record, in order of sequences and segments, on the device of `segment_BT`."""
    return torch.bincount(numbered(segment_BT))


@dataclass(frozen=True)
class Flex:
    """FlexAttention over all valid positions, with a mask of blocks of 128: for prompts in both directions on a GPU."""

    mask: Any
    compiled: bool

    @classmethod
    def of(cls, segment_BT: torch.Tensor, prompt_BT: torch.Tensor, *, prefix: bool, compiled: bool) -> Flex:
        from torch.nn.attention.flex_attention import BlockMask

        lengths = lengths_of(segment_BT)
        record_X = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        prompt_X = prompt_BT[segment_BT >= 0] & prefix

        def sees(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return (record_X[q] == record_X[k]) & ((q >= k) | (prompt_X[q] & prompt_X[k]))

        kinds = block_kinds(lengths, prompt_X)
        lists = [_ordered(kind) for kind in kinds]
        X = len(record_X)
        mask = BlockMask.from_kv_blocks(*lists[0], *lists[1], BLOCK_SIZE=FLEX, mask_mod=sees, seq_lengths=(X, X))
        return cls(mask, compiled)

    def attend(self, q_XNH: torch.Tensor, k_XKH: torch.Tensor, v_XKH: torch.Tensor) -> torch.Tensor:
        kernel = _flex(self.compiled)
        q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (q_XNH, k_XKH, v_XKH))
        y = kernel(q, k, v, block_mask=self.mask, enable_gqa=k.shape[1] != q.shape[1])
        return y[0].transpose(0, 1)  # type: ignore[no-any-return]


def block_kinds(lengths: torch.Tensor, prompt_X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which blocks of FLEX queries and keys see each other in part, and which wholly; (blocks, blocks) bool, both.

    Told from where records begin and end: the library's `create_block_mask` makes the X x X matrix first, 4 GB of it at
    65,536 positions. Of a block above the diagonal, which only prompts can see, it is enough that one may.
    """
    X, device = len(prompt_X), lengths.device
    first_B = torch.arange(0, X, FLEX, device=device)
    last_B = (first_B + FLEX).clamp_max(X) - 1
    ends = lengths.cumsum(0)
    low_B, high_B = (torch.searchsorted(ends, at, right=True) for at in (first_B, last_B))  # first and last record
    prompts_B = torch.nn.functional.pad(prompt_X, (0, -X % FLEX)).view(-1, FLEX).any(1)
    at_B = torch.arange(len(first_B), device=device)
    meet_BB = (low_B[:, None] <= high_B) & (low_B <= high_B[:, None])
    before_BB = at_B[:, None] > at_B
    one_BB = (low_B == high_B) & (low_B == high_B)[:, None] & (low_B == low_B[:, None])
    whole_BB = one_BB & before_BB & (last_B - first_B == FLEX - 1) & (last_B - first_B == FLEX - 1)[:, None]
    seen_BB = meet_BB & (before_BB | (at_B[:, None] == at_B) | (prompts_B & prompts_B[:, None]))
    return seen_BB & ~whole_BB, whole_BB


def _ordered(kind_BB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, 1, blocks) counts and (1, 1, blocks, blocks) numbers of the keys' blocks of each queries' block, int32."""
    numbers = kind_BB.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return kind_BB.sum(1).to(torch.int32)[None, None], numbers.to(torch.int32)[None, None]


@functools.cache
def _flex(compiled: bool) -> Any:
    """Compiled once in a process, for any number of positions."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention
