"""The forms of Vaswani et al. 2017 and their kin, as choices of ModelConfig: norms, feed-forward, added positions.

Axes: X valid position of the batch, D width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from mmlm.model.config import ModelConfig
from mmlm.model.kernels import RMSNorm


def norm_of(config: ModelConfig) -> nn.Module:
    """The norm of a sub-layer: RMSNorm, or (x - mean) / √(variance + ε) · w + b (Ba et al. 2016, eq. 4)."""
    if config.norm == "rms":
        return RMSNorm(config.width, config.norm_epsilon)
    return nn.LayerNorm(config.width, config.norm_epsilon)


def last_norm_of(config: ModelConfig) -> nn.Module:
    """The norm before the heads. Where every sub-layer ends with one, there is none left to do."""
    return nn.Identity() if config.norm_at == "after" else norm_of(config)


class Perceptron(nn.Module):
    """max(0, x W₁ + b₁) W₂ + b₂ (Vaswani et al. 2017, eq. 2), or GELU (Hendrycks & Gimpel 2016) for the maximum."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.feed_forward)
        self.activation = F.relu if config.mlp == "relu" else F.gelu
        self.out = nn.Linear(config.feed_forward, config.width)

    def forward(self, x_XD: torch.Tensor) -> torch.Tensor:
        return self.out(self.activation(self.up(x_XD)))


class LearnedPositions(nn.Module):
    """A learned vector for each position of a record; positions past the last share its vector."""

    def __init__(self, longest: int, width: int) -> None:
        super().__init__()
        self.place = nn.Embedding(longest, width)

    def forward(self, position_X: torch.Tensor) -> torch.Tensor:
        return self.place(position_X.clamp_max(self.place.num_embeddings - 1))


class SinusoidalPositions(nn.Module):
    """sin(t / 10000^(2i/D)) in the even places of a vector, cos of the same in the odd ones (Vaswani et al. 2017,
    section 3.5); made in float32 when asked for, so that there is no longest record."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, position_X: torch.Tensor) -> torch.Tensor:
        pair = torch.arange(0, self.width, 2, device=position_X.device, dtype=torch.float32)
        angle = position_X[:, None].float() * 10000.0 ** (-pair / self.width)
        return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, : self.width]


def added_positions(config: ModelConfig, longest: int) -> nn.Module | None:
    """What is added to the embeddings, if anything is. `longest` record, positions."""
    if config.positions == "rotary":
        return None
    return (
        LearnedPositions(longest, config.width) if config.positions == "learned" else SinusoidalPositions(config.width)
    )
