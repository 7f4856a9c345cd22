"""Attention roll-out (Abnar & Zuidema 2020): how much of each position is left at another after all layers.

The probabilities of attention exist nowhere in the training path, whose kernels never keep them. Here they are asked for
in a pass of their own: attention over values that are one-hot, position by position, gives the probabilities themselves,
whichever kernel and mask the model uses.
"""

from __future__ import annotations

from typing import Any

import torch

from mmlm.model.attention import Attention
from mmlm.model.packed import Arrangement
from mmlm.model.transformer import Inputs


class _Recorder:
    """An arrangement that notes the probabilities of the one that it stands for."""

    def __init__(self, inner: Arrangement, found: list[torch.Tensor]) -> None:
        self.inner, self.found = inner, found

    def attend(self, q_XNH: torch.Tensor, k_XKH: torch.Tensor, v_XKH: torch.Tensor) -> torch.Tensor:
        self.found.append(attention_XNS(self.inner, q_XNH, k_XKH, v_XKH))
        return self.inner.attend(q_XNH, k_XKH, v_XKH)


def attention_XNS(inner: Arrangement, q_XNH: torch.Tensor, k_XKH: torch.Tensor, v_XKH: torch.Tensor) -> torch.Tensor:  # noqa: N802
    """Probabilities (positions, heads, positions)."""
    X, K, H = v_XKH.shape
    one_XX = torch.eye(X, -(-X // H) * H, dtype=v_XKH.dtype, device=v_XKH.device)
    pieces = [inner.attend(q_XNH, k_XKH, piece[:, None].repeat(1, K, 1)) for piece in one_XX.split(H, 1)]
    return torch.cat(pieces, 2)[..., :X]


def probabilities(model: torch.nn.Module, batch: Inputs) -> list[torch.Tensor]:
    """Of each attention of the model, in order: (positions, heads, positions)."""
    found: list[torch.Tensor] = []

    def record(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(_Recorder(a, found) if hasattr(a, "attend") else a for a in args)

    handles = [m.register_forward_pre_hook(record) for m in model.modules() if isinstance(m, Attention)]
    try:
        model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def roll_out(model: torch.nn.Module, one: Inputs) -> torch.Tensor | None:
    """(L, L) on the CPU: row i says how much of each position is in position i after the last layer; rows sum to 1.

    `one` is a batch of one record. A residual connection counts as much as its attention, heads are averaged (section 3).
    None for a model without such attention.
    """
    layers = [p.float().mean(1).cpu() for p in probabilities(model, one)]
    L = int(one.valid_BT.sum())
    if not layers or any(a_LL.shape != (L, L) for a_LL in layers):
        return None
    whole = torch.eye(L)
    for a_LL in layers:
        whole = (0.5 * a_LL + 0.5 * torch.eye(L)) @ whole
    return whole
