"""Any number of classes at once: a sigmoid each, and the negative log-probability of the whole set, which is the sum of
binary cross-entropies over the classes of the record's task.

Axes: R record, L class of a task of which several may hold, C row of the head.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from mmlm.data.collate import Batch
from mmlm.features.spec import FeatureSpec
from mmlm.model.transformer import Output
from mmlm.train.terms.term import Term


class ManyLabels:
    name = "labels"

    def __init__(self, weight: float, spec: FeatureSpec) -> None:
        self.weight = weight
        offsets = spec.label_offsets()
        self.rows_L = torch.tensor([c for t in spec.tasks if t.multiple for c in range(*offsets[t.name])])
        """The row of the head of each column of `batch.labels_RL`."""

    def count(self, batch: Batch) -> float:
        return float((batch.labels_RL >= 0).any(1).sum())

    def term(self, output: Output, batch: Batch, scale: float = 1.0) -> Term:
        return self._against(self._logits(output), batch.labels_RL.clamp_min(0).float(), batch, scale)

    def led(self, student: Output, teacher: Output, batch: Batch, temperature: float) -> Term:
        """KL of each class's two probabilities at the temperature, times its square, as for one label."""
        T = temperature
        its_RL = (self._logits(teacher) / T).sigmoid()
        entropy_RL = F.binary_cross_entropy(its_RL, its_RL, reduction="none")
        term = self._against(self._logits(student) / T, its_RL, batch, 1.0)
        entropy = torch.where(batch.labels_RL >= 0, entropy_RL, 0.0).sum()
        return Term((term.sum - entropy) * T * T, self.weight)

    def _logits(self, output: Output) -> torch.Tensor:
        return output.label_RC.float()[:, self.rows_L.to(output.label_RC.device)]

    def _against(self, logits_RL: torch.Tensor, wanted_RL: torch.Tensor, batch: Batch, scale: float) -> Term:
        each_RL = F.binary_cross_entropy_with_logits(logits_RL, wanted_RL, reduction="none")
        each_R = torch.where(batch.labels_RL >= 0, each_RL, 0.0).sum(1)
        return Term(each_R.sum(), scale * self.weight, each_R.detach())
