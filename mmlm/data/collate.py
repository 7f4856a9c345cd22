"""Samples → one Batch of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from mmlm.data.arrays import IGNORE, assemble, field_rows, mel_tokens
from mmlm.features.sample import Sample
from mmlm.features.spec import FeatureSpec

__all__ = ["IGNORE", "Batch", "as_batch", "collate", "field_rows", "mel_tokens", "pack"]


@dataclass
class Batch:
    """B sequences of T positions hold R records; P patches, M mel tokens and K field values stand in order of their
    slots, sequence by sequence. Attention and positions never cross records.

    Axes: B sequence, T position, R record with an `<answer>`, L class of which several may hold, P patch, M mel token,
    K field value, D features.
    """

    tokens_BT: torch.Tensor
    """int64; IMAGE, AUDIO and FIELDS mark the positions that take the rows of the tensors below."""
    valid_BT: torch.Tensor
    """bool; False where a sequence is padded."""
    prompt_BT: torch.Tensor
    """bool; True from the beginning of a record up to and including its `<answer>`; in a piece only at media slots."""
    target_BT: torch.Tensor
    """int64; the next token of the answer (in a piece: of the text), IGNORE elsewhere."""
    segment_BT: torch.Tensor
    """int64; the number of the record within its sequence, from 0; -1 where padded."""
    context_BT: torch.Tensor
    """bool; True where a text stands beside the question, its mark included."""
    position_BT: torch.Tensor
    """int64; the position within its record, from 0."""
    answer_at_R: torch.Tensor
    """int64; where each record's `<answer>` stands, as b * T + t."""
    label_R: torch.Tensor
    """int64; the row of the record's class in the classification head, IGNORE without one."""
    labels_RL: torch.Tensor
    """int8 over the classes of tasks of which several hold at once: 1 holds, 0 does not, -1 was not asked."""
    number_R: torch.Tensor
    """float32; the standardised number to be answered, NaN without one."""
    group_R: torch.Tensor
    """int64; the same in records of one group, by a hash of its name."""
    task_R: torch.Tensor
    """int64; the number of the record's task in the spec, -1 when unknown."""
    patches_PD: torch.Tensor
    """float32; flattened patches of standardised pictures."""
    patch_at_P: torch.Tensor
    """int64; the place of the patch in its picture, row by row, and `tokens` of a picture more for each before it in its
    record."""
    mels_MD: torch.Tensor
    """float32; `frames_per_token` log-mel frames in a row."""
    mel_at_M: torch.Tensor
    """int64; the number of the mel token in its sound."""
    values_K: torch.Tensor
    """float32; standardised number, or 1 for the category that is present, 0 when missing."""
    value_at_K: torch.Tensor
    """int64; which number, category or missing mark (`field_rows`)."""
    ids: tuple[str, ...] = ()
    """Ids of all records and pieces, in order of sequences and segments."""

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`; from pinned memory the copy runs beside the computation."""
        return self._each(lambda t: t.to(device, non_blocking=True))

    def pin(self) -> Batch:
        """The batch in page-locked memory, which a GPU copies from on its own; without a GPU, the batch as it is."""
        if not torch.cuda.is_available():
            return self
        return self._each(lambda t: t.pin_memory())

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        changed = {f.name: change(getattr(self, f.name)) for f in fields(self) if f.name != "ids"}
        return replace(self, **changed)  # type: ignore[arg-type]


def as_batch(arrays: Mapping[str, np.ndarray], ids: Sequence[str]) -> Batch:
    """The arrays of `assemble` as tensors, which share their memory."""
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Batch(**tensors, ids=tuple(ids))  # type: ignore[arg-type]


def collate(samples: Sequence[Sample], spec: FeatureSpec, *, pad_left: bool = False, with_answer: bool = True) -> Batch:
    """One Batch of a sequence per sample. `pad_left` puts all `<answer>` marks into the last column, for generation."""
    return as_batch(assemble([[s] for s in samples], spec, None, pad_left, with_answer), [s.id for s in samples])


def pack(sequences: Sequence[Sequence[Sample]], spec: FeatureSpec, length: int | None = None) -> Batch:
    """One Batch of a row per sequence, each holding its samples one after the other.

    `length` is T; by default the longest sequence's. Raises DataError when a sequence is longer. A sample with
    `answer_at` -1 is a piece of a long record: each of its tokens is the target of the one before it, except slots,
    and it has no row in R.
    """
    return as_batch(assemble(sequences, spec, length), [s.id for samples in sequences for s in samples])
