"""The parts of adversarial fusion: what the discriminator is asked, and the reversal of its gradient.

Axes: B sequence, T position, X valid position of the batch, Z modality of a record.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mmlm.model.streams import slots_of

if TYPE_CHECKING:
    from mmlm.model.transformer import Inputs


class Guess(NamedTuple):
    """What a discriminator takes each modality of each record for, and what it is."""

    logits: torch.Tensor
    """(Z, kinds)."""
    kind_Z: torch.Tensor


def modality_pairs(batch: Inputs, modalities: Sequence[str], record_X: torch.Tensor) -> torch.Tensor:
    """(X,) int64: a number for the record and modality of each valid position; text is 0 of each record."""
    kind_BT = torch.zeros_like(batch.tokens_BT)
    for n, name in enumerate(modalities, 1):
        kind_BT = kind_BT.masked_fill(slots_of(batch, name), n)
    return record_X * (1 + len(modalities)) + kind_BT[batch.valid_BT]


def reversal(progress: float, ramp: float) -> float:
    """λ of Ganin & Lempitsky 2015, section 4.1: from 0 at the beginning to nearly 1."""
    return 2 / (1 + math.exp(-ramp * progress)) - 1


def reverse(x: torch.Tensor, strength: float) -> torch.Tensor:
    """`x`; its gradient is turned round and multiplied by `strength` (Ganin & Lempitsky 2015, eq. 10 and 11)."""
    return _Reverse.apply(x, strength)


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, strength: float) -> torch.Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return -ctx.strength * gradients[0], None
