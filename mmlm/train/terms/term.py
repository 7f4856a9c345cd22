"""What a term of the loss is: a sum over one micro-batch, whose count over the whole step is known before."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from mmlm.data.collate import Batch
from mmlm.model.transformer import Output


class Term(NamedTuple):
    sum: torch.Tensor
    """Scalar, differentiable: the loss summed over the tokens or records of one micro-batch."""
    weight: float
    each: torch.Tensor | None = None
    """Detached float32 loss of each item: answers in row-major order of their targets, labels in order of records."""


class Part(Protocol):
    """A term that is read off the output of the model for a batch."""

    name: str
    """Of its weight in `loss`, and in `metrics.jsonl` behind `loss_`."""
    weight: float

    def count(self, batch: Batch) -> float:
        """How many records the term of `batch` sums; needs no model."""
        ...

    def term(self, output: Output, batch: Batch, scale: float = 1.0) -> Term: ...

    def led(self, student: Output, teacher: Output, batch: Batch, temperature: float) -> Term:
        """How far the student is from its teacher, over the same records."""
        ...
