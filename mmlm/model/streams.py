"""Parts of a batch that are read as if the rest was not there: the text without the pictures, the pictures alone.

Axes: B sequence, T position, X valid position of the batch, Y position of a part, R record (or piece) of the batch,
D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn import functional as F

from mmlm.features.spec import AUDIO, FIELDS, IMAGE
from mmlm.model.attention import Cache
from mmlm.model.kernels import rung
from mmlm.model.packed import Arrangement, arrange, arrange_both_ways

if TYPE_CHECKING:
    from mmlm.model.transformer import Inputs

SLOTS = {"image": IMAGE, "audio": AUDIO, "fields": FIELDS}
"""modality → the token that stands at its positions."""


def part_of(batch: Inputs, keep_BT: torch.Tensor) -> Inputs:
    """The batch as if nothing but these valid positions was there, each at its place in its record. All media are among
    them."""
    segment_BT = batch.segment_BT.masked_fill(~keep_BT, -1)
    return cast("Inputs", replace(cast(Any, batch), valid_BT=keep_BT, segment_BT=segment_BT))


def slots_of(batch: Inputs, modality: str) -> torch.Tensor:
    """(B, T) bool: the positions that hold tokens of `modality`."""
    return (batch.tokens_BT == SLOTS[modality]) & batch.prompt_BT & batch.valid_BT


def without_slots(batch: Inputs, *, but: str = "", tags: bool = False) -> torch.Tensor:
    """(B, T) bool: the valid positions of text, and of the modality `but`. With `tags`, the last position of each run of
    slots stays in the text, as a token that says that something is here (as `<image>` does in Flamingo)."""
    token_BT = batch.tokens_BT.masked_fill(~(batch.prompt_BT & batch.valid_BT), -1)
    slot_BT = torch.zeros_like(batch.valid_BT)
    for name, slot in SLOTS.items():
        if name != but:
            slot_BT |= token_BT == slot
    if tags:
        same = (token_BT[:, 1:] == token_BT[:, :-1]) & (batch.segment_BT[:, 1:] == batch.segment_BT[:, :-1])
        slot_BT &= F.pad(same, (0, 1))
    return batch.valid_BT & ~slot_BT


def records_of(batch: Inputs) -> torch.Tensor:
    """(X,) int64: the record of each valid position, counted through the batch from 0."""
    B, T = batch.segment_BT.shape
    number_BT = torch.arange(B, device=batch.segment_BT.device)[:, None] * (T + 1) + batch.segment_BT
    return torch.unique_consecutive(number_BT[batch.valid_BT], return_inverse=True)[1]


def count_of(record_X: torch.Tensor) -> int:
    """How many records there are."""
    return int(record_X[-1]) + 1 if len(record_X) else 0


def of_records(batch: Inputs, which_R: torch.Tensor, record_X: torch.Tensor) -> torch.Tensor:
    """(B, T) bool: the valid positions of the records that are marked."""
    return torch.zeros_like(batch.valid_BT).masked_scatter(batch.valid_BT, which_R[record_X])


def places_within(group_Y: torch.Tensor) -> torch.Tensor:
    """(Y,) int64: each element's place in its group, from 0. The elements of a group stand side by side."""
    n_Y = torch.arange(len(group_Y), device=group_Y.device)
    begins_Y = group_Y.diff(prepend=group_Y.new_full((1,), -1)) != 0
    return n_Y - torch.where(begins_Y, n_Y, 0).cummax(0).values if len(group_Y) else n_Y


@dataclass(frozen=True)
class Stream:
    """Some of the valid positions of a batch, in order, that attend to each other within their record."""

    keep_BT: torch.Tensor
    keep_X: torch.Tensor
    at_Y: torch.Tensor
    """Which valid position each one is."""
    record_Y: torch.Tensor
    position_Y: torch.Tensor
    """Within the record, counting only what is kept."""
    segment_BT: torch.Tensor
    prompt_BT: torch.Tensor
    absent_BT: torch.Tensor
    """The valid positions that are left out."""

    @classmethod
    def of(cls, batch: Inputs, keep_BT: torch.Tensor, record_X: torch.Tensor) -> Stream:
        keep_X = keep_BT[batch.valid_BT]
        at_Y = keep_X.nonzero()[:, 0]
        record_Y = record_X[at_Y]
        segment_BT = batch.segment_BT.masked_fill(~keep_BT, -1)
        absent_BT = batch.valid_BT & ~keep_BT
        return cls(keep_BT, keep_X, at_Y, record_Y, places_within(record_Y), segment_BT, batch.prompt_BT, absent_BT)

    @classmethod
    def whole(cls, batch: Inputs) -> Stream:
        """All that there is, each at its place."""
        return cls.of(batch, batch.valid_BT, records_of(batch)).in_place(batch)

    def in_place(self, batch: Inputs) -> Stream:
        """With positions within the whole record, whatever is left out."""
        return replace(self, position_Y=batch.position_BT[self.keep_BT])

    def arranged(
        self, *, both_ways: bool = False, prefix: bool = False, dtype: torch.dtype, layers: int = 1
    ) -> Arrangement:
        """`layers` use it."""
        if both_ways:
            return arrange_both_ways(self.segment_BT, dtype=dtype, layers=layers)
        return arrange(self.segment_BT, self.prompt_BT, prefix=prefix, dtype=dtype, layers=layers)

    def padded(self, x_YD: torch.Tensor) -> torch.Tensor:
        """With a row of zeros for the position of nobody, where that is what the stream has."""
        return F.pad(x_YD, (0, 0, 0, len(self.record_Y) - len(x_YD)))

    def rounded(self, x_YD: torch.Tensor) -> Stream:
        """With so many more positions of nobody, a record of their own, that matrix products find a shape they know."""
        more = rung(x_YD, len(self.record_Y)) - len(self.record_Y)
        if not more:
            return self
        T = self.segment_BT.shape[1]
        place = torch.arange(-(-more // T) * T, device=x_YD.device)
        segment = torch.where(place < more, 0, -1).view(-1, T)
        return replace(
            self,
            record_Y=torch.cat([self.record_Y, self.record_Y[-1:].expand(more) + 1]),
            position_Y=torch.cat([self.position_Y, place[:more] % T]),
            segment_BT=torch.cat([self.segment_BT, segment]),
            prompt_BT=torch.cat([self.prompt_BT, segment > 0]),
        )

    def remember(self, cache: Cache) -> None:
        """Keep which positions are left out: those who go on are told of all of them."""
        if bool(self.absent_BT.any()):
            cache.aside["absent"] = self.absent_BT

    def or_nothing(self) -> Stream:
        """Itself; where it is empty, one position of nobody. What reads it then touches its parameters all the same,
        without which ZeRO aborts (1, 2) or waits for ever (3) for the ranks whose stream is not empty."""
        if len(self.at_Y):
            return self
        one = self.record_Y.new_zeros(1)
        return replace(
            self, record_Y=one, position_Y=one, segment_BT=one[None], prompt_BT=torch.ones_like(one[None]).bool()
        )


def chosen(mask_Y: torch.Tensor | None) -> torch.Tensor | None:
    """The numbers of what is marked; None for all."""
    return None if mask_Y is None or bool(mask_Y.all()) else mask_Y.nonzero()[:, 0]


def more_read(x_YD: torch.Tensor, read: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """The numbers to read, and behind them so many others of `length` that matrix products find a shape they know."""
    if read is None:
        return None
    free = torch.ones(length, dtype=torch.bool, device=read.device).index_fill(0, read, False).nonzero()[:, 0]
    more = rung(x_YD, len(read)) - len(read)
    return torch.cat([read, free[:more]]) if 0 < more <= len(free) else read


def means(x_YD: torch.Tensor, group_Y: torch.Tensor, groups: int) -> torch.Tensor:
    """(groups, D): the mean over each group, summed in float32; 0 where it is empty."""
    wide = torch.promote_types(x_YD.dtype, torch.float32)
    total = x_YD.new_zeros(groups, x_YD.shape[1], dtype=wide).index_add(0, group_Y, x_YD.to(wide))
    return (total / torch.bincount(group_Y, minlength=groups).clamp_min(1)[:, None]).to(x_YD.dtype)


def places(wanted_X: torch.Tensor, here_X: torch.Tensor) -> torch.Tensor:
    """The numbers, among all wanted positions, of those of them that are `here`."""
    return (wanted_X.cumsum(0) - 1)[wanted_X & here_X]


def placed(parts: list[tuple[torch.Tensor, torch.Tensor]], length: int) -> torch.Tensor:
    """(length, D): rows that stand at given places, 0 elsewhere. `parts` are (places, rows); no place is named twice."""
    where = torch.cat([at for at, _ in parts])
    rows = torch.cat([rows for _, rows in parts])
    if len(where) == length and bool((where == torch.arange(length, device=where.device)).all()):
        return rows
    return rows.new_zeros(length, rows.shape[1]).index_copy(0, where, rows)
