"""One layer of the Transformer: attention, then a feed-forward, each added to the residual stream.

Axes: X valid position of the batch, D width.
"""

from __future__ import annotations

import torch
from torch import nn

from mmlm.model.attention import Attention, Table
from mmlm.model.config import ModelConfig
from mmlm.model.kernels import RMSNorm, rows_of, swiglu
from mmlm.model.packed import Arrangement


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)), the latter only where `read` says, if it does."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.width)
        self.feed_forward = FeedForward(config.width, config.feed_forward)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x_XD: torch.Tensor, table: Table, seen: Arrangement, read: torch.Tensor | None = None
    ) -> torch.Tensor:
        x_XD = x_XD + self.dropout(self.attention(self.attention_norm(x_XD), table, seen))
        if read is not None:
            x_XD = rows_of(x_XD, read)
        return x_XD + self.dropout(self.feed_forward(self.feed_forward_norm(x_XD)))


class FeedForward(nn.Module):
    """SwiGLU: (SiLU(x G) * x U) O (Shazeer 2020, eq. 6)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.gate_up.weight.parts = 2  # type: ignore[attr-defined]  # as in Attention
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x_XD: torch.Tensor) -> torch.Tensor:
        return self.out(swiglu(self.gate_up(x_XD)))
