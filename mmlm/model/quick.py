"""Linear maps for the few rows of a step of generation, in bf16 on a CPU, where reading the weights is all the work.

The library's map lays the weights out anew at every call; here they are laid out once. One core (AVX-512 and AMX, torch
2.13), 2,304 × 768 weights from memory, µs: 1 row 730 by the library's map, 520 here, 554 by a product of matrix and vector; 8
rows 835 and 465. Takes the memory of the weights once more. Products are summed in float32 everywhere; results may differ
in the last bit of bf16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from mmlm.model.cross_entropy import AnswerHead

ROWS = 32
"""More rows than these are the library's business."""
WORTH = 2
"""Uses after which weights are laid out anew, which costs about as much as two of them."""
MOST = 1 << 31
"""Bytes of weights that are laid out anew, at most."""


class _Map:
    """x Wᵀ, in place of a module's forward."""

    def __init__(self, module: nn.Linear) -> None:
        self.weight = module.weight.detach()
        self.uses = 0
        self.packed: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 2 or x.shape[0] > ROWS:
            return F.linear(x, self.weight)
        if self.packed is None:
            self.uses += 1
            if self.uses <= WORTH:
                return F.linear(x, self.weight)
            self.packed = torch.ops.mkldnn._reorder_linear_weight.default(self.weight, x.shape[0])
        return torch.ops.mkldnn._linear_pointwise.default(x, self.packed, None, "none", [], "")


@contextlib.contextmanager
def quick_maps(model: nn.Module) -> Iterator[None]:
    """Within, the linear maps of `model` without a bias work as above, where they can. For inference only."""
    maps = [m for m in model.modules() if isinstance(m, nn.Linear) and type(m) in (nn.Linear, AnswerHead)]
    chosen = [m for m in maps if _may_be_quick(m)]
    if sum(m.weight.nbytes for m in chosen) > MOST:
        chosen = []
    for module in chosen:
        module.forward = _Map(module)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for module in chosen:
            del module.__dict__["forward"]


def _may_be_quick(module: nn.Linear) -> bool:
    weight = module.weight
    return (
        module.bias is None
        and weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and "forward" not in module.__dict__  # another generation of the same model is on its way
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
