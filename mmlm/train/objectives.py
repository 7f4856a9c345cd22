"""Objectives: what a step minimises. A term of the loss is its sum over all micro-batches and ranks divided by its count
over all of them, so that the loss does not depend on how a batch is cut. The counts are known before the first forward
pass; then every micro-batch adds its part to the gradient and is forgotten."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch.nn import functional as F

from mmlm.data.collate import IGNORE, Batch
from mmlm.features.spec import FeatureSpec
from mmlm.model.transformer import FusedTransformer, Output
from mmlm.train.config import LossConfig


class Term(NamedTuple):
    sum: torch.Tensor
    """Scalar, differentiable: the loss summed over the tokens or records of one micro-batch."""
    weight: float
    each: torch.Tensor | None = None
    """Detached float32 loss of each item: answers in row-major order of their targets, labels in order of records."""


class Objective(Protocol):
    names: tuple[str, ...]

    def counts(self, batch: Batch) -> dict[str, float]:
        """How many tokens or records each term of `batch` sums; needs no model."""
        ...

    def __call__(self, model: torch.nn.Module, batch: Batch) -> dict[str, Term]: ...


def loss_of(terms: dict[str, Term], counts: dict[str, float]) -> torch.Tensor:
    """Weighted sum of the terms, each divided by its `counts` over the whole step (a term without any is 0)."""
    return torch.stack([t.sum * (t.weight / max(counts[n], 1.0)) for n, t in terms.items()]).sum()


class Answering:
    """Next token on the answers, and the class head on labelled records; with `loss.z`, also the z-loss."""

    names: tuple[str, ...] = ("answer", "label")

    def __init__(self, config: LossConfig, spec: FeatureSpec) -> None:
        self.config = config
        if config.z:
            self.names = (*self.names, "z")
        self.allowed = class_masks(spec)

    def counts(self, batch: Batch) -> dict[str, float]:
        answers, labels = float((batch.target_BT != IGNORE).sum()), float((batch.label_R != IGNORE).sum())
        return {name: labels if name == "label" else answers for name in self.names}

    def __call__(self, model: torch.nn.Module, batch: Batch) -> dict[str, Term]:
        return self.terms(model(batch, z_loss=self.z_share), batch)

    @property
    def z_share(self) -> float | None:
        """The z-loss relative to the cross-entropy, with which it is computed together; None where it stands alone."""
        return self.config.z / self.config.answer if self.config.answer else None if self.config.z else 0.0

    def terms(self, output: Output, batch: Batch, scale: float = 1.0) -> dict[str, Term]:
        """Logits are taken to float32 first: bf16 log-softmax loses three digits."""
        logits_RC = own_classes(output.label_RC.float(), batch.task_R, self.allowed)
        label_R = F.cross_entropy(logits_RC, batch.label_R, ignore_index=IGNORE, reduction="none")
        answer, each_A, square = self._answers(output, batch)
        terms = {
            "answer": Term(answer, scale * self.config.answer, each_A),
            "label": Term(label_R.sum(), scale * self.config.label, label_R.detach()),
        }
        if self.config.z:
            terms["z"] = Term(square, scale * self.config.z)
        return terms

    def _answers(self, output: Output, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Summed cross-entropy, that of each token, and the summed squares of log Σexp."""
        if output.answer is not None:
            square = output.answer.log_z_A.square().sum()
            # the gradient of the z-loss came with that of the cross-entropy; here the two values are told apart
            return output.answer.sum - (self.z_share or 0.0) * square, output.answer.each_A, square
        logits_AV = output.answer_AV.float()
        answer_A = F.cross_entropy(logits_AV, batch.target_BT[batch.target_BT != IGNORE], reduction="none")
        return answer_A.sum(), answer_A.detach(), logits_AV.logsumexp(-1).square().sum()


class Distilling:
    """KL(teacher ‖ student) at a temperature, on answer tokens and on the class head, plus the task's own terms
    (Hinton, Vinyals & Dean 2015, section 2)."""

    def __init__(
        self, config: LossConfig, spec: FeatureSpec, teacher: FusedTransformer, temperature: float, task: float
    ) -> None:
        self.answering, self.teacher = Answering(config, spec), teacher
        self.names: tuple[str, ...] = (*self.answering.names, "answer_kl", "label_kl")
        self.temperature, self.task = temperature, task

    def counts(self, batch: Batch) -> dict[str, float]:
        counts = self.answering.counts(batch)
        return {**counts, "answer_kl": counts["answer"], "label_kl": counts["label"]}

    def __call__(self, model: torch.nn.Module, batch: Batch) -> dict[str, Term]:
        student: Output = model(batch)
        with torch.no_grad():
            teacher: Output = self.teacher(batch)
        terms = self.answering.terms(student, batch, self.task)
        loss = self.answering.config
        answer_kl = self._kl(student.answer_AV.float(), teacher.answer_AV.float())
        has_label = batch.label_R != IGNORE
        allowed = self.answering.allowed
        label_kl = self._kl(
            own_classes(student.label_RC.float(), batch.task_R, allowed)[has_label],
            own_classes(teacher.label_RC.float(), batch.task_R, allowed)[has_label],
        )
        terms["answer_kl"] = Term(answer_kl, loss.answer)
        terms["label_kl"] = Term(label_kl, loss.label)
        return terms

    def _kl(self, student_XC: torch.Tensor, teacher_XC: torch.Tensor) -> torch.Tensor:
        T = self.temperature
        divergence = F.kl_div(
            (student_XC / T).log_softmax(-1), (teacher_XC / T).log_softmax(-1), reduction="sum", log_target=True
        )
        return divergence * T * T


def class_masks(spec: FeatureSpec) -> torch.Tensor:
    """(tasks + 1, classes) bool: which rows of the head belong to a task; the last row, for unknown tasks, is all True."""
    offsets = spec.label_offsets()
    classes = max((last for _, last in offsets.values()), default=1)
    masks = torch.ones(len(spec.tasks) + 1, classes, dtype=torch.bool)
    for n, task in enumerate(spec.tasks):
        if task.name in offsets:
            first, last = offsets[task.name]
            masks[n] = False
            masks[n, first:last] = True
    return masks


def own_classes(logits_RC: torch.Tensor, task_R: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Logits with the classes of other tasks pushed out of the softmax."""
    return logits_RC.masked_fill(~masks.to(task_R.device)[task_R], -1e9)
