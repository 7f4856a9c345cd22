"""Objectives: what a step minimises. A term of the loss is its sum over all micro-batches and ranks divided by its count
over all of them, so that the loss does not depend on how a batch is cut. The counts are known before the first forward
pass; then every micro-batch adds its part to the gradient and is forgotten."""

from __future__ import annotations

import copy
from typing import Protocol

import torch
from torch.nn import functional as F

from mmlm.data.collate import IGNORE, Batch
from mmlm.features.spec import FeatureSpec
from mmlm.model.baseline_config import AnyModelConfig
from mmlm.model.config import ModelConfig
from mmlm.model.flops import Shape
from mmlm.model.transformer import FusedTransformer, Output
from mmlm.train.config import LossConfig
from mmlm.train.terms.contrast import Contrast
from mmlm.train.terms.many_labels import ManyLabels
from mmlm.train.terms.modality import Modality
from mmlm.train.terms.number import Number
from mmlm.train.terms.one_label import OneLabel
from mmlm.train.terms.term import Part, Term


class Objective(Protocol):
    names: tuple[str, ...]

    def counts(self, batch: Batch) -> dict[str, float]:
        """How many tokens or records each term of `batch` sums; needs no model."""
        ...

    def shape(self, batch: Batch) -> Shape:
        """What a forward pass of `batch` asks of the model, in numbers; needs no model. Of a batch that is on the CPU."""
        ...

    def prepare(self, model: torch.nn.Module, batches: list[Batch], device: torch.device) -> None:
        """What must be known of all micro-batches of a step before the first of them is worked on."""
        ...

    def alone(self) -> Objective:
        """The same, for a batch that every rank has whole: nothing is gathered from the others."""
        ...

    def __call__(self, model: torch.nn.Module, batch: Batch) -> dict[str, Term]: ...


def loss_of(terms: dict[str, Term], counts: dict[str, float]) -> torch.Tensor:
    """Weighted sum of the terms, each divided by its `counts` over the whole step (a term without any is 0)."""
    return torch.stack([t.sum * (t.weight / max(counts[n], 1.0)) for n, t in terms.items()]).sum()


class Answering:
    """Next token on the answers, and what the head says of the records: one class, several, or a number, where the spec
    has such tasks; with `loss.z`, also the z-loss; with an adversarial `model`, what its discriminator pays."""

    def __init__(
        self, config: LossConfig, spec: FeatureSpec, model: AnyModelConfig | None = None, across_ranks: bool = True
    ) -> None:
        """`across_ranks`: all ranks work on the same step at the same time, and may be waited for."""
        self.config = config
        self.label = OneLabel(config.label, spec)
        self.parts: list[Part] = [self.label]
        if any(task.multiple for task in spec.tasks):
            self.parts.append(ManyLabels(config.labels, spec))
        if any(task.number for task in spec.tasks):
            self.parts.append(Number(config.number, config.number_error, spec))
        self.contrast = Contrast(config.contrastive, across_ranks) if config.contrastive else None
        self.weights = {"answer": config.answer, **{part.name: part.weight for part in self.parts}}
        if self.contrast:
            self.weights["contrastive"] = self.contrast.weight
        if config.z:
            self.weights["z"] = config.z
        self.modality = Modality.of(model, spec) if isinstance(model, ModelConfig) else None
        if self.modality:
            self.weights["modality"] = self.modality.weight
        self.names: tuple[str, ...] = tuple(self.weights)

    def counts(self, batch: Batch) -> dict[str, float]:
        answers = float((batch.target_BT != IGNORE).sum())
        counts = {name: answers for name in self.names if name in ("answer", "z")}
        counts |= {part.name: part.count(batch) for part in self.parts}
        if self.modality:
            counts["modality"] = self.modality.count(self.contrast.widen(batch) if self.contrast else batch)
        return counts | ({"contrastive": self.contrast.count(batch)} if self.contrast else {})

    def shape(self, batch: Batch) -> Shape:
        return self.contrast.shape(batch) if self.contrast else Shape.of(batch)

    def prepare(self, model: torch.nn.Module, batches: list[Batch], device: torch.device) -> None:
        if self.contrast:
            self.contrast.prepare(model, batches, device)

    def alone(self) -> Answering:
        other = copy.copy(self)
        if self.contrast:
            other.contrast = Contrast(self.contrast.config, across_ranks=False)
        return other

    def __call__(self, model: torch.nn.Module, batch: Batch) -> dict[str, Term]:
        if not self.contrast:
            return self.terms(model(batch, z_loss=self.z_share), batch)
        wide = self.contrast.widen(batch)
        output: Output = model(wide, z_loss=self.z_share)
        assert output.embedding_RE is not None
        return {**self.terms(output, wide), "contrastive": self.contrast.term(output.embedding_RE, batch)}

    @property
    def z_share(self) -> float | None:
        """The z-loss relative to the cross-entropy, with which it is computed together; None where it stands alone."""
        return self.config.z / self.config.answer if self.config.answer else None if self.config.z else 0.0

    def terms(self, output: Output, batch: Batch, scale: float = 1.0) -> dict[str, Term]:
        """Logits are taken to float32 first: bf16 log-softmax loses three digits."""
        answer, each_A, square = self._answers(output, batch)
        terms = {"answer": Term(answer, scale * self.config.answer, each_A)}
        terms |= {part.name: part.term(output, batch, scale) for part in self.parts}
        if self.config.z:
            terms["z"] = Term(square, scale * self.config.z)
        if self.modality:
            terms["modality"] = self.modality.term(output, batch)
        return terms

    def _answers(self, output: Output, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Summed cross-entropy, that of each token, and the summed squares of log Σexp."""
        if output.answer is not None:
            square = output.answer.log_z_A.square().sum()
            if output.answer.kl is not None:  # the gradient of all three came with that of the teacher's word
                return output.answer.each_A.sum(), output.answer.each_A, square
            # the gradient of the z-loss came with that of the cross-entropy; here the two values are told apart
            return output.answer.sum - (self.z_share or 0.0) * square, output.answer.each_A, square
        logits_AV = output.answer_AV.float()
        answer_A = F.cross_entropy(logits_AV, batch.target_BT[batch.target_BT != IGNORE], reduction="none")
        return answer_A.sum(), answer_A.detach(), logits_AV.logsumexp(-1).square().sum()


class Distilling:
    """KL(teacher ‖ student) at a temperature on answer tokens, the teacher's word on what the head says, plus the task's
    own terms (Hinton, Vinyals & Dean 2015, section 2)."""

    def __init__(
        self, config: LossConfig, spec: FeatureSpec, teacher: FusedTransformer, temperature: float, task: float,
        model: AnyModelConfig | None = None,
    ) -> None:  # fmt: skip
        """`model`: the student. Embeddings are not distilled."""
        self.answering = Answering(config.model_copy(update={"contrastive": None}), spec, model)
        self.teacher = teacher
        led = ("answer", *(part.name for part in self.answering.parts))
        self.names: tuple[str, ...] = (*self.answering.names, *(f"{name}_kl" for name in led))
        self.temperature, self.task = temperature, task

    def counts(self, batch: Batch) -> dict[str, float]:
        counts = self.answering.counts(batch)
        return {**counts, **{name: counts[name.removesuffix("_kl")] for name in self.names if name.endswith("_kl")}}

    def shape(self, batch: Batch) -> Shape:
        return self.answering.shape(batch)

    def prepare(self, model: torch.nn.Module, batches: list[Batch], device: torch.device) -> None:
        self.answering.prepare(model, batches, device)

    def alone(self) -> Distilling:
        return self

    def __call__(self, model: torch.nn.Module, batch: Batch) -> dict[str, Term]:
        z = self.answering.z_share
        with torch.no_grad():
            teacher, lead = self.teacher.lead(batch, self.temperature, self.task)
        # the weight of the whole is that of the teacher's word, beside which the task's own terms count less
        student: Output = model(batch, z_loss=self.task * z if z and lead else z, lead=lead)
        terms = self.answering.terms(student, batch, self.task)
        terms["answer_kl"] = Term(_divergence(student), self.answering.config.answer)
        for part in self.answering.parts:
            terms[f"{part.name}_kl"] = part.led(student, teacher, batch, self.temperature)
        return terms


def _divergence(student: Output) -> torch.Tensor:
    """Its distance to the teacher's words, with the gradients of the task's own terms, which were made along with it; 0 where
    one of the two has no words, or they count nothing."""
    if student.answer is None or student.answer.kl is None:
        return torch.zeros((), device=student.label_RC.device)
    return student.answer.kl + (student.answer.sum - student.answer.sum.detach())
