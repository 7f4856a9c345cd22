"""What the head of a model says of one record, as an answer: a class, a set of classes, or a number."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from mmlm.features.spec import FeatureSpec


@dataclass(frozen=True, slots=True)
class Said:
    """`answer` is what is said, as text, `score` its probability (None for a number, which has none)."""

    answer: str
    score: float | None
    label: str | None = None
    label_scores: dict[str, float] = field(default_factory=dict)
    labels: list[str] | None = None
    number: float | None = None


def read_head(head_C: torch.Tensor, task: str, spec: FeatureSpec) -> Said | None:
    """`head_C`: the rows of the head for a record of `task`. None when the task has neither classes nor a number."""
    found = next((t for t in spec.tasks if t.name == task), None)
    if found is None:
        return None
    if found.number:
        mean, deviation = found.number
        number = float(head_C[spec.number_rows()[task]]) * deviation + mean
        return Said(format(number, ".6g"), None, number=number)
    if not found.labels:
        return None
    first, last = spec.label_offsets()[task]
    if found.multiple:
        share = head_C[first:last].sigmoid()
        scores = dict(zip(found.labels, share.tolist(), strict=True))
        held = [label for label, p in scores.items() if p > 0.5]
        # the classes are independent given the record: so is the probability of the whole set
        return Said(", ".join(held), float(torch.maximum(share, 1 - share).prod()), None, scores, held)
    scores = dict(zip(found.labels, head_C[first:last].softmax(-1).tolist(), strict=True))
    label = max(scores, key=lambda k: scores[k])
    return Said(label, scores[label], label, scores)
