"""Features of pictures, sounds and fields → tokens of the sequence, one contract for all: `module(rows, at)` gives a token
for each row, where `at` says which place in its picture, sound or record the row has; `fill` puts them into their slots.

Axes: X valid position of the batch, D width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def fill(
    x_XD: torch.Tensor, here_X: torch.Tensor, module: nn.Module, rows: torch.Tensor, at: torch.Tensor
) -> torch.Tensor:
    """Put the embedded rows into their slots. One row of zeros goes along, worth nothing: a rank whose batch lacks
    the modality still touches the module's parameters, without which ZeRO aborts (1, 2) or waits for ever (3)."""
    rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])]).to(x_XD.dtype)
    embedded = module(rows, F.pad(at, (0, 1)))
    if len(rows) == 1:
        return x_XD + 0 * embedded[-1].sum()
    return x_XD.index_copy(0, here_X.nonzero()[:, 0], embedded[:-1]) + 0 * embedded[-1].sum()


class MediaEmbedding(nn.Module):
    """Features of one patch or mel token → one token: a linear map plus a learned place in its picture or sound."""

    def __init__(self, features: int, places: int, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(features, width)
        self.place = nn.Embedding(places, width)

    def forward(self, rows: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return self.project(rows) + self.place(at.clamp_max(self.place.num_embeddings - 1))


class FieldEmbedding(nn.Module):
    """A named number or category → one token: its value times one learned vector, plus another."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.slope = nn.Embedding(rows, width)
        self.place = nn.Embedding(rows, width)

    def forward(self, values: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return self.slope(at) * values + self.place(at)
