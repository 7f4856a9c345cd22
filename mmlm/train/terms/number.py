"""A number: squared or Huber error of what the head says, in standard deviations of the training split.

Axes: R record, C row of the head, N task with a number.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional as F

from mmlm.data.collate import Batch
from mmlm.features.spec import FeatureSpec
from mmlm.model.transformer import Output
from mmlm.train.terms.term import Term


class Number:
    """Half the squared error; with `huber`, beyond one standard deviation the error itself less a half (Huber 1964), so
    that a few wild targets do not lead."""

    name = "number"

    def __init__(self, weight: float, error: Literal["huber", "squared"], spec: FeatureSpec) -> None:
        self.weight, self.error = weight, error
        rows = spec.number_rows()
        self.row_T = torch.tensor([rows.get(task.name, 0) for task in spec.tasks])
        """The row of the head of each task; 0, which is then not read, for one without a number."""

    def count(self, batch: Batch) -> float:
        return float((~batch.number_R.isnan()).sum())

    def term(self, output: Output, batch: Batch, scale: float = 1.0) -> Term:
        return self._against(output, batch.number_R.nan_to_num(0.0), batch, scale)

    def led(self, student: Output, teacher: Output, batch: Batch, temperature: float) -> Term:
        """The same error against the teacher's number; a temperature means nothing here."""
        return self._against(student, self._read(teacher, batch), batch, 1.0)

    def _read(self, output: Output, batch: Batch) -> torch.Tensor:
        row_R = self.row_T.to(batch.task_R.device)[batch.task_R]
        return output.label_RC.float().gather(1, row_R[:, None])[:, 0]

    def _against(self, output: Output, wanted_R: torch.Tensor, batch: Batch, scale: float) -> Term:
        said_R = self._read(output, batch)
        if self.error == "huber":
            each_R = F.huber_loss(said_R, wanted_R, reduction="none")
        else:
            each_R = (said_R - wanted_R).square() / 2
        each_R = torch.where(batch.number_R.isnan(), 0.0, each_R)
        return Term(each_R.sum(), scale * self.weight, each_R.detach())
