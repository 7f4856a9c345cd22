"""Layouts other than decoder-only: an encoder that answers by class, and an encoder-decoder (Vaswani et al. 2017).

| `layout` | read in both directions | written from left to right |
|---|---|---|
| `decoder` | with `attention: prefix`, the prompt | everything else |
| `encoder` | the prompt up to and with `<answer>`, as BERT reads up to `[CLS]` (Devlin et al. 2019) | nothing |
| `encoder_decoder` | the prompt up to `<answer>` | `<answer>` and the answer; in a piece of a long record, its text |

A layout says what is read and by which blocks, a fusion (fusion.py) how: what is read is a batch of its own, in which there
is nothing else (`part_of`). A record keeps one clock where all of it is one sequence (concat, adversarial): positions of the
decoder go on from those of the encoder. In the other fusions the encoder counts what it reads, the decoder the whole record.
Classes are read at `<answer>`.

Axes: B sequence, T position, X valid position of the batch, S position of the encoder, M position that a decoder asks, Y
position of the decoder, U position that is read, R record, D width, F width of what the heads read, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from mmlm.errors import ConfigError
from mmlm.features.spec import FeatureSpec
from mmlm.model.across import CrossAttention, Crossing, Remembered, Remembering, cross
from mmlm.model.adversary import Guess
from mmlm.model.attention import Cache, Filling, Step, Table
from mmlm.model.block import Block, Reader
from mmlm.model.classic import last_norm_of, norm_of
from mmlm.model.config import ModelConfig
from mmlm.model.cross_entropy import AnswerLoss, Lead
from mmlm.model.kernels import rows_of
from mmlm.model.packed import Arrangement, arrange
from mmlm.model.streams import Stream, chosen, count_of, of_records, part_of, placed, places, records_of
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

    @property
    def reader(self) -> Reader:
        return Reader(self.blocks, self.norm, both_ways=True)

    def forward(self, batch: Inputs, z_loss: float | None = None, lead: Lead | None = None) -> Output:
        """The words of an answer count nothing: their loss is 0, their logits are all the same."""
        answer_R = (batch.valid_BT.flatten().cumsum(0) - 1)[batch.answer_at_R]
        read_X = torch.zeros_like(batch.valid_BT[batch.valid_BT]).index_fill(0, answer_R, True)
        x_RF, guess = self.read(batch, read_X)
        label_RC, embedding_RE = self.classify(x_RF)
        words = int((batch.target_BT[batch.valid_BT] != IGNORE).sum())
        if z_loss is None:
            return Output(x_RF.new_zeros(words, self.vocabulary) + 0 * x_RF.sum(), label_RC, None, embedding_RE, guess)
        none_A = torch.zeros(words, device=x_RF.device)
        none = AnswerLoss(0 * x_RF.sum().float(), none_A, none_A)
        return Output(x_RF.new_empty(0, self.vocabulary), label_RC, none, embedding_RE, guess)

    def read(self, batch: Inputs, read_X: torch.Tensor | None) -> tuple[torch.Tensor, Guess | None]:
        """0 for the positions of answers, which it does not read."""
        keep_BT = read_by("encoder", batch)
        keep_X = keep_BT[batch.valid_BT]
        wanted_X = torch.ones_like(keep_X) if read_X is None else read_X
        x_UF, guess = self.fusion.read(self, part_of(batch, keep_BT), wanted_X[keep_X])
        return placed([(places(wanted_X, keep_X), x_UF)], int(wanted_X.sum())), guess

    def read_prompts(self, batch: Inputs, caches: list[Cache]) -> torch.Tensor:
        last_B = batch.valid_BT.sum(1).cumsum(0) - 1
        return self.trunk(batch)[last_B]

    def extend(
        self, token_B: torch.Tensor, position_B: torch.Tensor, valid_BS: torch.Tensor | None, caches: list[Cache]
    ) -> torch.Tensor:
        raise ConfigError("layout encoder was asked for the words of an answer", wanted="a decoder")


class Memory(NamedTuple):
    """What a decoder asks: what the encoder has read, of all experts or of its own."""

    states_MD: torch.Tensor
    record_M: torch.Tensor

    def asked(self, records: int) -> torch.Tensor:
        """(R,): positions of each record."""
        return torch.bincount(self.record_M, minlength=records)


class EncoderDecoder(FusedTransformer):
    """`config.encoder_layers` blocks read, `config.layers` write; each of these also asks what was read. With fusion late,
    each expert is such a pair, and writes only where it has something to say: of records that have its modality."""

    def add_blocks(self, config: ModelConfig) -> None:
        trunks = self.fusion.trunks
        self.encoder = nn.ModuleList(Block(config) for _ in range(config.reading_layers * trunks))
        self.encoder_norm = last_norm_of(config)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.layers * trunks))
        self.norms = nn.ModuleList(last_norm_of(config) for _ in range(trunks - 1))

    @property
    def reader(self) -> Reader:
        return Reader(self.encoder, self.encoder_norm, both_ways=True)

    @property
    def writers(self) -> list[tuple[list[DecoderBlock], nn.Module]]:
        """The decoder of each expert, and the norm behind it."""
        L, blocks = self.config.layers, list(self.blocks)
        return [(blocks[n * L : n * L + L], norm) for n, norm in enumerate((self.norm, *self.norms))]  # type: ignore[misc]

    @property
    def stacks(self) -> list[Sequence[nn.Module]]:
        return [*super().stacks, *(blocks for blocks, _ in self.writers)]

    def read(self, batch: Inputs, read_X: torch.Tensor | None) -> tuple[torch.Tensor, Guess | None]:
        source_BT, record_X = source_of(batch), records_of(batch)
        source_X = source_BT[batch.valid_BT]
        wanted_X, parts = torch.ones_like(source_X) if read_X is None else read_X, []
        x_SF, guess = self.fusion.read(self, part_of(batch, source_BT), None)
        memories, read = self._memories(batch, source_BT, x_SF), x_SF[wanted_X[source_X]].chunk(len(self.writers), -1)
        for n, (memory, x_UD) in enumerate(zip(memories, read, strict=True)):
            keep_BT, asked_R = batch.valid_BT & ~source_BT, memory.asked(count_of(record_X))
            if n:
                keep_BT &= of_records(batch, asked_R > 0, record_X)
            stream = Stream.of(batch, keep_BT, record_X).in_place(batch)
            y_UD = self._written(n, self.embed(batch, keep_BT, ()), stream, wanted_X[stream.at_Y], memory, asked_R)
            both = [(places(wanted_X, stream.keep_X), y_UD), (places(wanted_X, source_X), x_UD)]
            parts.append(placed(both, int(wanted_X.sum())))
        return torch.cat(parts, -1), guess

    def _memories(self, batch: Inputs, source_BT: torch.Tensor, x_SF: torch.Tensor) -> list[Memory]:
        """Of each expert; of one position, which is nobody's, where there is nothing."""
        source, record_S, made = part_of(batch, source_BT), records_of(batch)[source_BT[batch.valid_BT]], []
        sequences = self.fusion.sequences(source)
        for keep_BT, x_SD in zip(sequences, x_SF.chunk(len(sequences), -1), strict=True):
            keep_S = keep_BT[source_BT]
            kept = chosen(keep_S)
            x_MD = x_SD if kept is None else rows_of(x_SD, kept)
            made.append(Memory(x_MD if len(x_MD) else F.pad(x_MD, (0, 0, 0, 1)), record_S[keep_S]))
        return made

    def _written(
        self, n: int, x_YD: torch.Tensor, stream: Stream, wanted_Y: torch.Tensor, memory: Memory, asked_R: torch.Tensor
    ) -> torch.Tensor:
        """Normalised hidden states (U, D) of the wanted positions of expert n's decoder."""
        (blocks, norm), some = self.writers[n], stream.or_nothing()
        x_YD = some.padded(x_YD)
        seen = some.arranged(dtype=x_YD.dtype, layers=len(blocks))
        crossing = cross(torch.bincount(stream.record_Y, minlength=len(asked_R)), asked_R, x_YD.dtype)
        table = self._rotary(some.position_Y, x_YD.dtype)
        for number, block in enumerate(blocks):
            read = chosen(wanted_Y) if number == len(blocks) - 1 else None
            x_YD = self.recompute.through(number, block, x_YD, table, seen, read, memory.states_MD, crossing)
        return norm(x_YD)[: int(wanted_Y.sum())]

    def read_prompts(self, batch: Inputs, caches: list[Cache]) -> torch.Tensor:
        """The prompts all end with `<answer>`, which is where the decoder begins."""
        source_BT, one_B1 = source_of(batch), torch.ones_like(batch.valid_BT[:, -1:])
        x_SF = self.fusion.trunk(self, part_of(batch, source_BT), None)
        memories = self._memories(batch, source_BT, x_SF)
        asked = [memory.asked(len(one_B1)) for memory in memories]
        last_BT = batch.valid_BT & (batch.valid_BT.flip(1).cumsum(1).flip(1) == 1)  # on whichever side padding is
        x_BD = self.embed(batch, last_BT, ())
        seen = arrange(one_B1.long() - 1, one_B1, prefix=False, dtype=x_BD.dtype)
        filling = [Filling(cache, one_B1, seen) for cache in caches]
        remembering = [Remembering(cache, asked[n // self.config.layers]) for n, cache in enumerate(caches)]
        return self._next(x_BD, batch.position_BT[:, -1], filling, memories, remembering)

    def extend(
        self, token_B: torch.Tensor, position_B: torch.Tensor, valid_BS: torch.Tensor | None, caches: list[Cache]
    ) -> torch.Tensor:
        """`valid_BS` counts what the encoder read; the decoder sees no padding."""
        x_BD = self._placed(self.tokens(token_B), position_B)
        return self._next(x_BD, position_B, Step.of(caches, None), None, [Remembered(cache) for cache in caches])

    def _next(
        self, x_BD: torch.Tensor, position_B: torch.Tensor, seen: list[Filling] | list[Step],
        memories: list[Memory] | None, crossings: list[Remembering] | list[Remembered],
    ) -> torch.Tensor:  # fmt: skip
        """Normalised hidden states (B, F) of one token of each record, by all experts."""
        table, parts = self._rotary(position_B, x_BD.dtype), []
        for n, (blocks, norm) in enumerate(self.writers):
            y_BD, states_MD = x_BD, memories[n].states_MD if memories else None
            mine = slice(n * len(blocks), (n + 1) * len(blocks))
            for block, one, crossing in zip(blocks, seen[mine], crossings[mine], strict=True):
                y_BD = block(y_BD, table, one, None, states_MD, crossing)
            y_BD = norm(y_BD)
            if n:  # no factor of records that lack its modality
                y_BD = y_BD * crossings[mine][0].cache.aside["asked"].any(1)[:, None]
            parts.append(y_BD)
        return torch.cat(parts, -1)


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


def read_by(layout: str, batch: Inputs) -> torch.Tensor:
    """(B, T) bool: what the blocks in which modalities meet read."""
    if layout == "encoder":
        return batch.prompt_BT & batch.valid_BT
    return source_of(batch) if layout == "encoder_decoder" else batch.valid_BT


def source_of(batch: Inputs) -> torch.Tensor:
    """(B, T) bool: what an encoder reads of a record that is answered: all before `<answer>`; of a piece, its media."""
    prompt_N = (batch.prompt_BT & batch.valid_BT).flatten()
    return prompt_N.index_fill(0, batch.answer_at_R, False).view(batch.valid_BT.shape)
