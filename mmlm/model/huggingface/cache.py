"""What the exported model keeps of its sequences between two steps of `generate`: the caches of mmlm as a Cache of transformers.

One more token for each sequence is read with keys and values (or states) that are kept. Everything else that transformers
does with a cache (several tokens at once, crop, another mask) reads the whole sequences again, which are kept, too.

Axes: B sequence, S position so far, N new position, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers import Cache

from mmlm.features.spec import ANSWER, AUDIO, FIELDS, IMAGE
from mmlm.model.attention import Cache as BlockCache
from mmlm.model.transformer import FusedTransformer

MEDIA = {"patches": IMAGE, "patch_at": IMAGE, "mels": AUDIO, "mel_at": AUDIO, "values": FIELDS, "value_at": FIELDS}
"""Features of media → the token that stands in their slots."""
Media = dict[str, torch.Tensor]
"""By name, those that are given: slot by slot, sequence by sequence."""


class Sequences(NamedTuple):
    """What is read."""

    ids: torch.Tensor
    """(B, S) int64."""
    valid: torch.Tensor
    """(B, S) bool: False where a sequence is padded."""
    media: Media


class MmlmCache(Cache):
    """Empty until a pass fills it. `generate` makes one by itself; `model(..., use_cache=True)` gives one."""

    _is_user_defined = False
    """Set by `generate` where the cache was given to it, and outlives it."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.read: Sequences | None = None
        self.blocks: list[BlockCache] = []
        """One a block; none where the next step has to read the whole sequences again."""

    def empty_blocks(self, net: FusedTransformer) -> list[BlockCache]:
        """One a block, which a pass over whole sequences is to fill."""
        return [BlockCache() for _ in net.blocks]

    def keep(self, read: Sequences, blocks: list[BlockCache]) -> None:
        """What has been read, and what the blocks keep of it."""
        self.read, self.blocks = read, blocks

    def extend(self, net: FusedTransformer, ids_BN: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Normalised hidden states (B, F) of one more token of each sequence. None, with nothing done, where that is not what
        is asked for or not what the blocks can go on with."""
        whole = self.with_more(ids_BN, mask)
        assert self.read is not None
        if not self.blocks or ids_BN.shape[1] != 1 or not bool(whole.valid[:, -1].all()):
            return None
        if not torch.equal(whole.valid[:, :-1], self.read.valid):
            return None
        if getattr(net.config, "attention", "") == "prefix" and bool((ids_BN == ANSWER).any()):
            return None  # with its <answer> a question is read in both directions
        valid_BS = None if bool(whole.valid.all()) else whole.valid
        x_BD = net.extend(ids_BN[:, 0], self.read.valid.sum(1), valid_BS, self.blocks)
        self.read = whole
        return x_BD

    def with_more(self, ids_BN: torch.Tensor, mask: torch.Tensor | None) -> Sequences:
        """All that was read and what is new. `mask` is that of all positions or of the new ones. Raises ValueError where it is
        neither, or the sequences are not as many."""
        assert self.read is not None
        B, S, N = *self.read.ids.shape, ids_BN.shape[1]
        if len(ids_BN) != B:
            raise ValueError(f"{len(ids_BN)} sequences go on from a cache of {B}; wanted as many")
        if mask is None:
            valid_BS = F.pad(self.read.valid, (0, N), value=True)
        elif mask.shape[1] in (N, S + N):
            valid_BS = torch.cat([self.read.valid, mask.bool()], 1) if mask.shape[1] == N else mask.bool()
        else:
            raise ValueError(
                f"an attention_mask of {mask.shape[1]} positions for {S} that are cached and {N} new ones; wanted {S + N}"
            )
        return Sequences(torch.cat([self.read.ids, ids_BN], 1), valid_BS, self.read.media)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.read is None else self.read.ids.shape[1]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        return -1 if self.read is None else len(self.read.ids)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Sequence n becomes what `indices[n]` was."""
        if self.read is None:
            return
        rows = torch.arange(self.batch_size)[indices.cpu()].tolist()
        if rows == list(range(self.batch_size)):
            return
        self.read = chosen(self.read, rows)
        for block in self.blocks:
            block.keep(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -`tokens_to_remove` positions. The next step reads what is left again."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}); wanted 0, or a negative number: how many positions to remove")
        if tokens_to_remove and self.read is not None:
            read = self.read
            self.read, self.blocks = (
                Sequences(read.ids[:, :tokens_to_remove], read.valid[:, :tokens_to_remove], read.media),
                [],
            )


def prompts_of(ids_BS: torch.Tensor, valid_BS: torch.Tensor) -> torch.Tensor:
    """(B, S) bool: the question up to and with its `<answer>`; of a sequence without one, the slots of its media."""
    answers_BS = (ids_BS == ANSWER) & valid_BS
    slot_BS = (ids_BS == IMAGE) | (ids_BS == AUDIO) | (ids_BS == FIELDS)
    answered_B1 = answers_BS.any(1, keepdim=True)
    return torch.where(answered_B1, answers_BS.cumsum(1) - answers_BS.int() == 0, slot_BS) & valid_BS


def chosen(read: Sequences, rows: list[int]) -> Sequences:
    """Some sequences with their media, in this order; some may come several times. Raises ValueError where there are not as
    many features as slots."""
    at = torch.tensor(rows, device=read.ids.device)
    media: Media = {}
    prompt_BS = prompts_of(read.ids, read.valid)
    for name, features in read.media.items():
        count_B = ((read.ids == MEDIA[name]) & prompt_BS).sum(1)
        if int(count_B.sum()) != len(features):
            raise ValueError(f"{len(features)} rows of {name} for {int(count_B.sum())} slots; wanted one for each")
        parts = features.split(count_B.tolist())
        media[name] = torch.cat([parts[row] for row in rows])
    return Sequences(read.ids[at], read.valid[at], media)
