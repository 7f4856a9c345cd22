"""One layer of the Transformer: attention, then a feed-forward, each added to the residual stream; and many of them.

Axes: X valid position of the batch, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from mmlm.model.attention import Attention, Table
from mmlm.model.classic import Perceptron, norm_of
from mmlm.model.config import ModelConfig
from mmlm.model.kernels import rows_of, swiglu
from mmlm.model.packed import Arrangement
from mmlm.model.recompute import NONE, Recompute


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)), the latter only where `read` says, if it does; with
    `norm_at: after`, norm(x + attention(x)), then norm(x + feed-forward(x)) (Vaswani et al. 2017, section 3.1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.after = config.norm_at == "after"
        self.attention_norm = norm_of(config)
        self.attention = Attention(config)
        self.feed_forward_norm = norm_of(config)
        self.feed_forward = feed_forward_of(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x_XD: torch.Tensor, table: Table | None, seen: Arrangement, read: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`table` of rotary positions, if positions are rotary."""
        x_XD = self.add(x_XD, self.attention_norm, lambda x: self.attention(x, table, seen))
        if read is not None:
            x_XD = rows_of(x_XD, read)
        return self.add(x_XD, self.feed_forward_norm, self.feed_forward)

    def writers(self) -> list[nn.Linear]:
        """The maps whose results are added to the residual stream."""
        return [self.attention.out, self.feed_forward.out]

    def add(self, x_XD: torch.Tensor, norm: nn.Module, inner: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """What a sub-layer makes of the residual stream, added to it."""
        made_XD = inner(x_XD if self.after else norm(x_XD))
        if self.training:
            made_XD = self.dropout(made_XD)
        return norm(x_XD + made_XD) if self.after else x_XD + made_XD


def feed_forward_of(config: ModelConfig) -> FeedForward | Perceptron:
    return FeedForward(config) if config.mlp == "swiglu" else Perceptron(config)


class Reader(NamedTuple):
    """The blocks in which the modalities of a record meet: all of a model, or those of its encoder."""

    blocks: nn.ModuleList
    norm: nn.Module
    """Behind the last of them."""
    both_ways: bool = False
    """Whether each position sees all of its record, or only what stands before it (and perhaps the prompt)."""


class FeedForward(nn.Module):
    """SwiGLU: (SiLU(x G) * x U) O (Shazeer 2020, eq. 6)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.feed_forward
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.gate_up.weight.parts = 2  # type: ignore[attr-defined]  # as in Attention
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x_XD: torch.Tensor) -> torch.Tensor:
        return self.out(swiglu(self.gate_up(x_XD)))


def run(
    blocks: Iterable[nn.Module],
    x_XD: torch.Tensor,
    table: Table | None,
    seen: Arrangement | Sequence[Arrangement],
    read: torch.Tensor | None = None,
    *,
    recompute: Recompute = NONE,
    before: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Through all blocks, each with its own arrangement or all with the same. The last feed-forward, and what comes out,
    are only of the positions `read`, if given. `before` changes what block n gets.
    """
    stack = list(blocks)
    for n, block in enumerate(stack):
        if before is not None:
            x_XD = before(n, x_XD)
        here, arrangement = read if n == len(stack) - 1 else None, seen[n] if isinstance(seen, Sequence) else seen
        x_XD = recompute.through(n, block, x_XD, table, arrangement, here)
    return x_XD
