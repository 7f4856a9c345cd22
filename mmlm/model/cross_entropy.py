"""The head over the vocabulary, and its loss without the logits of all positions at once.

Axes: A answer position, C position of a piece, D width, E width of a teacher, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from mmlm.model.kernels import rounded

LOGITS = 1 << 24
"""Logits that exist at a time, at most (64 MB in float32), unless one position alone has more."""


class Lead(NamedTuple):
    """A teacher's word on the same positions, from which a head makes logits piece by piece as well."""

    states_AE: torch.Tensor
    head: Callable[[torch.Tensor], torch.Tensor]
    """(C, E) → logits (C, V)."""
    temperature: float
    task: float
    """Weight of the cross-entropy beside KL(teacher ‖ student)."""


class AnswerLoss(NamedTuple):
    sum: torch.Tensor
    """Scalar float32, differentiable: cross-entropy, plus z · log²Σexp where a z-loss was asked for (PaLM, Chowdhery et
    al. 2022, section 5), summed over all positions. With a lead, task · cross-entropy + z · log²Σexp + KL."""
    each_A: torch.Tensor
    """Cross-entropy of each position, float32, not differentiable."""
    log_z_A: torch.Tensor
    """log Σexp of each position's logits, float32, not differentiable."""
    kl: torch.Tensor | None = None
    """With a lead, Σ KL(teacher ‖ student) at its temperature T, times T² (Hinton, Vinyals & Dean 2015, section 2); scalar
    float32, not differentiable."""


class AnswerHead(nn.Linear):
    """Logits, or with targets their loss."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__(width, vocabulary, bias=False)

    def forward(  # type: ignore[override]
        self,
        x_AD: torch.Tensor,
        target_A: torch.Tensor | None = None,
        z: float = 0.0,
        delta_VD: torch.Tensor | None = None,
        lead: Lead | None = None,
    ) -> torch.Tensor | AnswerLoss:
        """`delta_VD` is added to the weights: what an adapter has learnt. `lead`: a teacher to follow."""
        weight_VD = self.weight if delta_VD is None else self.weight + delta_VD
        if target_A is None:
            return F.linear(x_AD, weight_VD)
        if not torch.is_grad_enabled():  # the Function would still be told that the weights need a gradient
            return AnswerLoss(*_CrossEntropy.apply(x_AD.detach(), weight_VD.detach(), target_A, z, LOGITS, lead))
        return AnswerLoss(*_CrossEntropy.apply(x_AD, weight_VD, target_A, z, LOGITS, lead))


class _CrossEntropy(torch.autograd.Function):
    """The gradients are made along with the loss, piece by piece: nothing but them is kept for the backward pass.

    In a piece, ∂/∂logit = p (1 + 2 z log Z) - [target], in float32, then rounded to the type of the weights, as the
    gradient of plain logits would be. Pieces are summed in float32. With a lead, p (task + 2 z log Z) - task [target] +
    T (p' - q'), where p' and q' are the student's and the teacher's probabilities at the temperature T.
    """

    @staticmethod
    def forward(
        ctx: Any, x_AD: torch.Tensor, weight_VD: torch.Tensor, target_A: torch.Tensor, z: float, limit: int,
        lead: Lead | None,
    ) -> Any:  # fmt: skip
        rows = max(1, limit // len(weight_VD) // (4 if lead else 1))
        task = lead.task if lead else 1.0
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(x_AD.dtype, torch.float32)
        each_A, log_z_A = (torch.empty(len(x_AD), dtype=wide, device=x_AD.device) for _ in range(2))
        kl = torch.zeros((), dtype=wide, device=x_AD.device) if lead else None
        dx_AD = torch.empty_like(x_AD) if needs_x else None
        dweight_VD = None
        for first in range(0, len(x_AD), rows):
            here = slice(first, first + rows)
            count = len(x_AD[here])
            x_CD = rounded(x_AD[here])
            target_C1 = F.pad(target_A[here], (0, len(x_CD) - count))[:, None]
            logits_CV = x_CD @ weight_VD.T
            log_p_CV = logits_CV.log_softmax(-1, dtype=wide)
            chosen_C1 = log_p_CV.gather(1, target_C1)
            log_z_C1 = logits_CV.gather(1, target_C1) - chosen_C1
            each_A[here], log_z_A[here] = -chosen_C1[:count, 0], log_z_C1[:count, 0]
            towards_CV = None
            if lead and kl is not None:
                divergence, towards_CV = _led(logits_CV[:count].to(wide), lead, here)
                kl += divergence
            if not needs_x and not needs_weight:
                continue
            d_CV = log_p_CV.exp_()
            if z or task != 1:
                d_CV *= task + 2 * z * log_z_C1
            d_CV.scatter_add_(1, target_C1, torch.full_like(chosen_C1, -task))
            if towards_CV is not None:
                d_CV[:count] += towards_CV
            d_CV[count:] = 0
            d_CV = d_CV.to(x_AD.dtype)
            if dx_AD is not None:
                dx_AD[here] = (d_CV @ weight_VD)[:count]
            if needs_weight:
                made = d_CV.T @ x_CD
                if dweight_VD is None:
                    dweight_VD = made if rows >= len(x_AD) else made.to(wide)
                else:
                    dweight_VD += made
        if needs_weight and dweight_VD is None:
            dweight_VD = torch.zeros_like(weight_VD)
        ctx.save_for_backward(dx_AD, None if dweight_VD is None else dweight_VD.to(weight_VD.dtype))
        ctx.mark_non_differentiable(each_A, log_z_A, *([] if kl is None else [kl]))
        whole = (task * each_A + z * log_z_A.square()).sum()
        return (whole if kl is None else whole + kl), each_A, log_z_A, kl

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        dx_AD, dweight_VD = (None if d is None else d * gradients[0].to(d.dtype) for d in ctx.saved_tensors)
        return dx_AD, dweight_VD, None, None, None, None


def _led(logits_CV: torch.Tensor, lead: Lead, here: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed KL(teacher ‖ student) · T² of a piece, and its gradient by the student's logits."""
    T, states_CE = lead.temperature, lead.states_AE[here]
    log_p_CV = (logits_CV / T).log_softmax(-1)
    log_q_CV = (lead.head(rounded(states_CE))[: len(states_CE)].to(logits_CV.dtype) / T).log_softmax(-1)
    q_CV = log_q_CV.exp()
    divergence = (q_CV * (log_q_CV - log_p_CV)).sum() * T * T
    return divergence, (log_p_CV.exp_() - q_CV).mul_(T)
