"""The embedding head: one vector for each record, whatever it gives, so that what means the same lies near.

Axes: R record, D width, E embedding.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class EmbeddingHead(nn.Linear):
    """Hidden states at `<answer>`, which has attended to all of the record → vectors of any length (`unit`). A linear map
    and nothing else, so that an adapter beside it adds to it."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__(width, size, bias=False)


def unit(x_RE: torch.Tensor) -> torch.Tensor:
    """Of length 1, in float32."""
    return F.normalize(x_RE.float(), dim=-1)
