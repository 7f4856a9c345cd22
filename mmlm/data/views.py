"""Views: each record of a batch with one modality alone, as further sequences of the same batch.

A view is `<bos>`, what the modality takes up, and `<answer>`, where the embedding is read. The question is not in it: the
views of one record share it, and would find each other by it.

Axes: B sequence, T position, R record, V view, S segment of a sequence, P patch, M mel token, K field value.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch.nn import functional as F

from mmlm.data.collate import IGNORE, Batch
from mmlm.features.spec import AUDIO, FIELDS, IMAGE

_SLOTS = {"image": IMAGE, "audio": AUDIO, "fields": FIELDS}


class View(NamedTuple):
    """Which records of a batch have a modality, and where each one's positions with it alone are."""

    record_V: torch.Tensor
    """int64; the numbers of the records."""
    keep_BT: torch.Tensor
    """bool."""


def view(batch: Batch, modality: str) -> View:
    """`modality`: image, audio, fields or context. Pieces of records have no views."""
    record_BT = records_of(batch)
    if modality == "context":
        own_BT = batch.context_BT
    else:
        own_BT = (batch.tokens_BT == _SLOTS[modality]) & batch.prompt_BT
    own_BT = own_BT & (record_BT >= 0)
    has_R = torch.zeros(len(batch.answer_at_R), dtype=torch.bool, device=own_BT.device)
    has_R[record_BT[own_BT]] = True
    ends_BT = batch.position_BT == 0
    ends_BT = ends_BT.flatten().index_fill(0, batch.answer_at_R, True).view_as(ends_BT) & (record_BT >= 0)
    chosen_BT = (own_BT | ends_BT) & has_R[record_BT.clamp_min(0)] if len(has_R) else own_BT
    return View(has_R.nonzero()[:, 0], chosen_BT)


def records_of(batch: Batch) -> torch.Tensor:
    """(B, T) int64: the number of the record that a position belongs to; -1 in padding and in pieces."""
    B, T = batch.segment_BT.shape
    S = int(batch.segment_BT.max()) + 1 if batch.segment_BT.numel() else 1
    number_BS = batch.segment_BT.new_full((B, S + 1), -1)  # the last column stands for padding, segment -1
    b_R = batch.answer_at_R // T
    number_BS[b_R, batch.segment_BT.flatten()[batch.answer_at_R]] = torch.arange(len(b_R), device=b_R.device)
    return number_BS.gather(1, batch.segment_BT.remainder(S + 1))


def with_views(batch: Batch, views: list[View]) -> Batch:
    """`batch` and after it the sequences of `views`, in their order; nothing in them is a target."""
    return _joined([batch, *(_alone(batch, one) for one in views)])


def only_views(batch: Batch, views: list[View]) -> Batch:
    """The sequences of `views` without those of `batch`; `batch` itself where no record has any."""
    found = [_alone(batch, one) for one in views if len(one.record_V)]
    return _joined(found) if found else batch


def _alone(batch: Batch, one: View) -> Batch:
    keep_BT, record_V = one.keep_BT, one.record_V
    rows_B = keep_BT.any(1)
    row_B = rows_B.cumsum(0) - 1
    T = keep_BT.shape[1]
    at_V = batch.answer_at_R[record_V]
    keep = keep_BT[rows_B]
    segment = torch.where(keep, batch.segment_BT[rows_B], -1)
    # positions are counted anew, as they are when the modality is all that there is
    counted = keep.long().cumsum(1) - 1
    begins = keep & (batch.position_BT[rows_B] == 0)
    first = torch.where(begins, counted, 0).cummax(1).values
    tokens = batch.tokens_BT[rows_B]
    rows = {slot: keep_BT[(batch.tokens_BT == slot) & batch.prompt_BT] for slot in _SLOTS.values()}
    return replace(
        batch,
        tokens_BT=tokens, valid_BT=keep, prompt_BT=keep, segment_BT=segment, context_BT=batch.context_BT[rows_B] & keep,
        target_BT=torch.full_like(tokens, IGNORE), position_BT=torch.where(keep, counted - first, 0),
        answer_at_R=row_B[at_V // T] * T + at_V % T,
        label_R=torch.full_like(record_V, IGNORE), task_R=batch.task_R[record_V], group_R=batch.group_R[record_V],
        labels_RL=torch.full_like(batch.labels_RL[record_V], -1), number_R=torch.full_like(batch.number_R[record_V], torch.nan),
        patches_PD=batch.patches_PD[rows[IMAGE]], patch_at_P=batch.patch_at_P[rows[IMAGE]],
        mels_MD=batch.mels_MD[rows[AUDIO]], mel_at_M=batch.mel_at_M[rows[AUDIO]],
        values_K=batch.values_K[rows[FIELDS]], value_at_K=batch.value_at_K[rows[FIELDS]], ids=(),
    )  # fmt: skip


def _joined(batches: list[Batch]) -> Batch:
    """Batches of one T below each other."""
    T = batches[0].tokens_BT.shape[1]
    rows = [0, *torch.tensor([len(b.tokens_BT) for b in batches]).cumsum(0).tolist()]
    joined = {
        name: torch.cat([getattr(b, name) for b in batches])
        for name in vars(batches[0])
        if name not in ("ids", "answer_at_R")
    }
    answers = [b.answer_at_R + first * T for b, first in zip(batches, rows, strict=False)]
    return Batch(**joined, answer_at_R=torch.cat(answers), ids=batches[0].ids)


def pad_rows(x_ND: torch.Tensor, rows: int) -> torch.Tensor:
    return F.pad(x_ND, (0, 0, 0, rows - len(x_ND)))
