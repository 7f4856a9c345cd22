"""One class of several: softmax cross-entropy over the classes of the record's own task.

Axes: R record, C row of the head.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from mmlm.data.collate import IGNORE, Batch
from mmlm.features.spec import FeatureSpec
from mmlm.model.transformer import Output
from mmlm.train.terms.term import Term


class OneLabel:
    name = "label"

    def __init__(self, weight: float, spec: FeatureSpec) -> None:
        self.weight, self.allowed = weight, class_masks(spec)

    def count(self, batch: Batch) -> float:
        return float((batch.label_R != IGNORE).sum())

    def term(self, output: Output, batch: Batch, scale: float = 1.0) -> Term:
        logits_RC = own_classes(output.label_RC.float(), batch.task_R, self.allowed)
        each_R = F.cross_entropy(logits_RC, batch.label_R, ignore_index=IGNORE, reduction="none")
        return Term(each_R.sum(), scale * self.weight, each_R.detach())

    def led(self, student: Output, teacher: Output, batch: Batch, temperature: float) -> Term:
        has_label = batch.label_R != IGNORE
        mine, its = (
            own_classes(output.label_RC.float(), batch.task_R, self.allowed)[has_label] for output in (student, teacher)
        )
        return Term(softened_kl(mine, its, temperature), self.weight)


def softened_kl(student_XC: torch.Tensor, teacher_XC: torch.Tensor, temperature: float) -> torch.Tensor:
    """Summed KL(teacher ‖ student) of logits at a temperature, times its square, which keeps the size of the gradient
    (Hinton, Vinyals & Dean 2015, section 2)."""
    T = temperature
    divergence = F.kl_div(
        (student_XC / T).log_softmax(-1), (teacher_XC / T).log_softmax(-1), reduction="sum", log_target=True
    )
    return divergence * T * T


def class_masks(spec: FeatureSpec) -> torch.Tensor:
    """(tasks + 1, C) bool: which rows of the head belong to a task; the last row, for unknown tasks, is all True."""
    offsets = spec.label_offsets()
    masks = torch.ones(len(spec.tasks) + 1, spec.head_rows, dtype=torch.bool)
    for n, task in enumerate(spec.tasks):
        if task.name in offsets:
            first, last = offsets[task.name]
            masks[n] = False
            masks[n, first:last] = True
    return masks


def own_classes(logits_RC: torch.Tensor, task_R: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Logits with the rows of other tasks pushed out of the softmax."""
    return logits_RC.masked_fill(~masks.to(task_R.device)[task_R], -1e9)
