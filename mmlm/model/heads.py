"""The embedding head: one vector for each record, whatever it gives, so that what means the same lies near.

Axes: R record, D width, E embedding.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class EmbeddingHead(nn.Linear):
    """Hidden states at `<answer>`, which has attended to all of the record → vectors of length 1, in float32."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__(width, size, bias=False)

    def forward(self, x_RD: torch.Tensor) -> torch.Tensor:
        return F.normalize(super().forward(x_RD).float(), dim=-1)
