"""Layouts other than decoder-only: an encoder that answers by class, and an encoder-decoder (Vaswani et al. 2017).

| `layout` | read in both directions | written from left to right |
|---|---|---|
| `decoder` | with `attention: prefix`, the prompt | everything else |
| `encoder` | the prompt up to and with `<answer>`, as BERT reads up to `[CLS]` (Devlin et al. 2019) | nothing |
| `encoder_decoder` | the prompt up to `<answer>` | `<answer>` and the answer; in a piece of a long record, its text |

A record keeps one clock: positions of the decoder go on from those of the encoder. Classes are read at `<answer>`.

Axes: B sequence, T position, X valid position of the batch, S position of the encoder, Y position of the decoder, U
position that is read, R record, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mmlm.errors import ConfigError
from mmlm.features.spec import FeatureSpec
from mmlm.model.across import CrossAttention, Crossing, Remembered, Remembering, cross
from mmlm.model.attention import Cache, Filling, Step, Table
from mmlm.model.block import Block, run
from mmlm.model.classic import last_norm_of, norm_of
from mmlm.model.config import ModelConfig
from mmlm.model.cross_entropy import AnswerLoss, Lead
from mmlm.model.kernels import rows_of
from mmlm.model.packed import Arrangement, arrange, arrange_both_ways, numbered
from mmlm.model.transformer import IGNORE, FusedTransformer, Inputs, Output


def build_model(config: ModelConfig, spec: FeatureSpec, field_rows: int = 0) -> FusedTransformer:
    """The model of a layout. Raises ConfigError when it cannot do what the tasks of `spec` ask."""
    kinds = {"decoder": FusedTransformer, "encoder": Encoder, "encoder_decoder": EncoderDecoder}
    return kinds[config.layout](config, spec, field_rows)


def require_classes(spec: FeatureSpec) -> None:
    """Raise ConfigError where an encoder has nothing to answer with."""
    wordy = [task.name for task in spec.tasks if not task.labels and task.number is None]
    if wordy or not spec.tasks:
        raise ConfigError(
            f"layout encoder with {', '.join(map(repr, wordy)) or 'no task at all'}, which asks for text",
            wanted="tasks with classes or a number: an encoder writes nothing",
            cure="give layout decoder or encoder_decoder",
        )


class Encoder(FusedTransformer):
    """Everything up to `<answer>` sees everything of its record, and the class is read there. Answers are not read."""

    generates = False

    def __init__(self, config: ModelConfig, spec: FeatureSpec, field_rows: int = 0) -> None:
        require_classes(spec)
        super().__init__(config, spec, field_rows)
        self.answer = nn.Identity()  # type: ignore[assignment]
        self.vocabulary = spec.vocab_size

    def forward(self, batch: Inputs, z_loss: float | None = None, lead: Lead | None = None) -> Output:
        """The words of an answer count nothing: their loss is 0, their logits are all the same."""
        answer_R = (batch.valid_BT.flatten().cumsum(0) - 1)[batch.answer_at_R]
        read_X = torch.zeros_like(batch.valid_BT[batch.valid_BT]).index_fill(0, answer_R, True)
        x_RD = self.trunk(batch, read_X)
        label_RC, embedding_RE = self.classify(x_RD)
        words = int((batch.target_BT[batch.valid_BT] != IGNORE).sum())
        if z_loss is None:
            return Output(x_RD.new_zeros(words, self.vocabulary) + 0 * x_RD.sum(), label_RC, None, embedding_RE)
        none_A = torch.zeros(words, device=x_RD.device)
        none = AnswerLoss(0 * x_RD.sum().float(), none_A, none_A)
        return Output(x_RD.new_empty(0, self.vocabulary), label_RC, none, embedding_RE)

    def trunk(self, batch: Inputs, read_X: torch.Tensor | None = None) -> torch.Tensor:
        """Normalised hidden states, (U, D), of the valid positions that `read_X` marks, by default of all of them; 0 for
        those of answers, which it does not read."""
        keep_BT = or_one(batch.prompt_BT & batch.valid_BT, batch.valid_BT)
        keep_X = keep_BT[batch.valid_BT]
        wanted_X = torch.ones_like(keep_X) if read_X is None else read_X
        wanted_S = wanted_X[keep_X]
        read = None if bool(wanted_S.all()) else wanted_S.nonzero()[:, 0]
        x_SD = self.norm(encode(self, self.blocks, self.embed(batch, keep_BT), batch, keep_BT, read))
        return x_SD if bool(keep_X[wanted_X].all()) else placed([(x_SD, keep_X & wanted_X)], wanted_X)

    def read_prompts(self, batch: Inputs, caches: list[Cache]) -> torch.Tensor:
        last_B = batch.valid_BT.sum(1).cumsum(0) - 1
        return self.trunk(batch)[last_B]

    def extend(
        self, token_B: torch.Tensor, position_B: torch.Tensor, valid_BS: torch.Tensor | None, caches: list[Cache]
    ) -> torch.Tensor:
        raise ConfigError("layout encoder was asked for the words of an answer", wanted="a decoder")


class EncoderDecoder(FusedTransformer):
    """`config.encoder_layers` blocks read, `config.layers` write; each of these also asks what was read."""

    def add_blocks(self, config: ModelConfig) -> None:
        self.encoder = nn.ModuleList(Block(config) for _ in range(config.encoder_layers or config.layers))
        self.encoder_norm = last_norm_of(config)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.layers))

    @property
    def stacks(self) -> list[Sequence[nn.Module]]:
        return [list(self.encoder), list(self.blocks)]

    def read(self, batch: Inputs, read_X: torch.Tensor | None) -> tuple[torch.Tensor, None]:
        return self.trunk(batch, read_X), None

    def trunk(self, batch: Inputs, read_X: torch.Tensor | None = None) -> torch.Tensor:
        source_BT = source_of(batch)
        source_X = source_BT[batch.valid_BT]
        x_XD = self.embed(batch, batch.valid_BT)
        source_SD = self.encode(x_XD, batch, source_BT)
        record_X = numbered(batch.segment_BT)
        R = int(record_X[-1]) + 1
        asking_R, asked_R = (torch.bincount(record_X[part_X], minlength=R) for part_X in (~source_X, source_X))
        crossing = cross(asking_R, asked_R, x_XD.dtype)
        segment_BT = batch.segment_BT.masked_fill(source_BT, -1)
        seen = arrange(segment_BT, batch.prompt_BT, prefix=False, dtype=x_XD.dtype, layers=len(self.blocks))
        wanted_X = torch.ones_like(source_X) if read_X is None else read_X
        wanted_Y = wanted_X[~source_X]
        read = None if bool(wanted_Y.all()) else wanted_Y.nonzero()[:, 0]
        table = self._rotary(batch.position_BT[batch.valid_BT][~source_X], x_XD.dtype)
        y_YD = x_XD[~source_X]
        for n, block in enumerate(self.blocks):
            chosen = read if n == len(self.blocks) - 1 else None
            y_YD = self.recompute.through(n, block, y_YD, table, seen, chosen, source_SD, crossing)
        y_UD = self.norm(y_YD)
        if not bool((wanted_X & source_X).any()):
            return y_UD
        written = torch.zeros_like(source_X).masked_scatter(~source_X, wanted_Y)
        return placed([(y_UD, written), (source_SD, source_X)], wanted_X)

    def encode(self, x_XD: torch.Tensor, batch: Inputs, source_BT: torch.Tensor) -> torch.Tensor:
        """Normalised hidden states, (S, D), of the source; of one position that nobody asks, where there is none."""
        keep_BT = or_one(source_BT, batch.valid_BT)
        x_SD = x_XD[keep_BT[batch.valid_BT]]
        return self.encoder_norm(encode(self, self.encoder, x_SD, batch, keep_BT))

    def read_prompts(self, batch: Inputs, caches: list[Cache]) -> torch.Tensor:
        """The prompts all end with `<answer>`, which is where the decoder begins."""
        source_BT = source_of(batch)
        x_XD = self.embed(batch, batch.valid_BT)
        source_SD = self.encode(x_XD, batch, source_BT)
        last_B = batch.valid_BT.sum(1).cumsum(0) - 1
        one_B1 = torch.ones_like(batch.valid_BT[:, -1:])
        seen = arrange(one_B1.long() - 1, one_B1, prefix=False, dtype=x_XD.dtype)
        filling = [Filling(cache, one_B1, seen) for cache in caches]
        remembering = [Remembering(cache, source_BT.sum(1)) for cache in caches]
        return self._write(x_XD[last_B], batch.position_BT[:, -1], filling, source_SD, remembering)

    def extend(
        self, token_B: torch.Tensor, position_B: torch.Tensor, valid_BS: torch.Tensor | None, caches: list[Cache]
    ) -> torch.Tensor:
        """`valid_BS` counts what the encoder read; the decoder sees no padding."""
        x_BD = self._placed(self.tokens(token_B), position_B)
        return self._write(x_BD, position_B, Step.of(caches, None), None, [Remembered(cache) for cache in caches])

    def _write(
        self, x_BD: torch.Tensor, position_B: torch.Tensor, seen: list[Filling] | list[Step],
        source_SD: torch.Tensor | None, crossings: list[Remembering] | list[Remembered],
    ) -> torch.Tensor:  # fmt: skip
        table = self._rotary(position_B, x_BD.dtype)
        for block, one, crossing in zip(self.blocks, seen, crossings, strict=True):
            x_BD = block(x_BD, table, one, None, source_SD, crossing)
        return self.norm(x_BD)


class DecoderBlock(Block):
    """A Block that, between its two sub-layers, asks what the encoder read."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.across_norm = norm_of(config)
        self.across = CrossAttention(config)

    def writers(self) -> list[nn.Linear]:
        return [*super().writers(), self.across.out]

    def forward(  # type: ignore[override]
        self, x_YD: torch.Tensor, table: Table | None, seen: Arrangement, read: torch.Tensor | None,
        source_SD: torch.Tensor | None, crossing: Crossing,
    ) -> torch.Tensor:  # fmt: skip
        x_YD = self.add(x_YD, self.attention_norm, lambda y: self.attention(y, table, seen))
        x_YD = self.add(x_YD, self.across_norm, lambda y: self.across(y, source_SD, crossing))
        if read is not None:
            x_YD = rows_of(x_YD, read)
        return self.add(x_YD, self.feed_forward_norm, self.feed_forward)


def encode(
    model: FusedTransformer, blocks: nn.ModuleList, x_SD: torch.Tensor, batch: Inputs, keep_BT: torch.Tensor,
    read: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Through blocks in which the kept positions of a record all see each other; those that are `read`, by default all."""
    segment_BT = batch.segment_BT.masked_fill(~keep_BT, -1)
    seen = arrange_both_ways(segment_BT, dtype=x_SD.dtype, layers=len(blocks))
    table = model._rotary(batch.position_BT[keep_BT], x_SD.dtype)
    return run(blocks, x_SD, table, seen, read, recompute=model.recompute)


def source_of(batch: Inputs) -> torch.Tensor:
    """(B, T) bool: what an encoder reads of a record that is answered: all before `<answer>`; of a piece, its media."""
    prompt_N = (batch.prompt_BT & batch.valid_BT).flatten()
    return prompt_N.index_fill(0, batch.answer_at_R, False).view(batch.valid_BT.shape)


def or_one(keep_BT: torch.Tensor, valid_BT: torch.Tensor) -> torch.Tensor:
    """Itself; where it is empty, the first valid position: a rank that has nothing to encode touches the parameters all
    the same, without which ZeRO aborts (1, 2) or waits for ever (3)."""
    if bool(keep_BT.any()):
        return keep_BT
    first = valid_BT.flatten().long().argmax()
    return keep_BT.flatten().index_fill(0, first, True).view(keep_BT.shape)


def placed(parts: list[tuple[torch.Tensor, torch.Tensor]], wanted_X: torch.Tensor) -> torch.Tensor:
    """(U, D): of the wanted positions, in order. A part is rows, and a mark on each valid position that has one; where no
    part has any, 0."""
    rows = torch.cat([rows for rows, _ in parts])
    x_XD = rows.new_zeros(len(wanted_X), rows.shape[1])
    x_XD = x_XD.index_copy(0, torch.cat([here_X.nonzero()[:, 0] for _, here_X in parts]), rows)
    return x_XD[wanted_X]
