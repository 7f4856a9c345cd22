"""How modalities meet: five answers to one question, each a few lines apart from the next.

| `fusion` | tokens of the sequence | where modalities meet |
|---|---|---|
| `concat` 拼接 | text, patches, mel tokens, fields | in the attention of every layer |
| `add` 叠加 | text | at the door: the mean of each encoded modality is added to the text |
| `cross_attention` | text | in gated layers, where the text asks what the encoders have read |
| `adversarial` 对抗训练 | as `concat` | as `concat`, made so alike that nobody can tell them apart |
| `late` | each expert its own | in the answer only: the experts' probabilities are multiplied |

A fusion makes hidden states from what a layout (layouts.py) gives it to read, by the blocks that are its `reader`. It is
asked in two ways: `trunk` reads a batch (packed records; or prompts, whose keys and values it keeps), `extend` goes on by
one token of each record. A modality that a record lacks is a stream with fewer positions, never a special value; a batch
that lacks it touches its parameters all the same (`Stream.or_nothing`).

Axes: B sequence, T position, S position seen so far, X valid position of the batch, Y position of a stream, M position of
one modality, U position that is read, R record, Z modality of a record, D width, F width of what is read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from mmlm.features.spec import FeatureSpec
from mmlm.model.across import GatedLayer, Keeping, Remembered, cross
from mmlm.model.adversary import Guess, modality_pairs, reversal, reverse
from mmlm.model.attention import Cache, Filling, Step
from mmlm.model.block import Block, run
from mmlm.model.classic import last_norm_of
from mmlm.model.config import ModelConfig
from mmlm.model.fusion_config import AddConfig, AdversarialConfig, CrossAttentionConfig, LateConfig
from mmlm.model.packed import Arrangement
from mmlm.model.streams import (
    SLOTS,
    Stream,
    chosen,
    count_of,
    means,
    more_read,
    of_records,
    placed,
    records_of,
    slots_of,
    without_slots,
)

if TYPE_CHECKING:
    from mmlm.model.transformer import FusedTransformer, Inputs

Before = Callable[[int, torch.Tensor], torch.Tensor]
"""What happens to the residual stream before block n."""


def build_fusion(config: ModelConfig, spec: FeatureSpec) -> Concat:
    match config.fusion:
        case AddConfig() as kind:
            return Add(config, spec, kind.layers)
        case CrossAttentionConfig() as kind:
            return GatedCross(config, spec, kind)
        case AdversarialConfig() as kind:
            return Adversarial(config, spec, kind)
        case LateConfig():
            return Late(config, spec)
        case _:
            return Concat(config, spec)


class Concat(nn.Module):
    """拼接: the tokens of all modalities are one sequence, and every layer's attention joins them (as in PaLM-E, Driess et
    al. 2023, section 3)."""

    trunks = 1
    """How many times the blocks of a model are needed."""

    def __init__(self, config: ModelConfig, spec: FeatureSpec) -> None:
        super().__init__()
        self.config, self.modalities = config, spec.modalities
        self.width = config.width
        """F: of the hidden states that the heads read."""

    def stacks(self, model: FusedTransformer) -> list[Sequence[nn.Module]]:
        """Blocks that follow each other."""
        return [list(model.reader.blocks)]

    def sequences(self, batch: Inputs) -> list[torch.Tensor]:
        """(B, T) each: what goes through the blocks; of several experts, whose hidden states stand side by side, what each
        one reads."""
        return [batch.valid_BT]

    def read(
        self, model: FusedTransformer, batch: Inputs, read_X: torch.Tensor | None
    ) -> tuple[torch.Tensor, Guess | None]:
        """What `trunk` gives, and what a discriminator says, where there is one."""
        return self.trunk(model, batch, read_X), None

    def trunk(
        self, model: FusedTransformer, batch: Inputs, read_X: torch.Tensor | None, caches: list[Cache] | None = None
    ) -> torch.Tensor:
        """Normalised hidden states, (U, F), of the valid positions that `read_X` marks, by default of all of them.

        Given `caches`, one a block, they are filled for `extend`; each row of the batch is one record then.
        """
        x_XD, (blocks, norm, _) = model.embed(batch, batch.valid_BT), model.reader
        return norm(self._through(model, blocks, x_XD, Stream.whole(batch), chosen(read_X), caches))

    def extend(
        self, model: FusedTransformer, token_B: torch.Tensor, position_B: torch.Tensor, valid_BS: torch.Tensor | None,
        caches: list[Cache],
    ) -> torch.Tensor:  # fmt: skip
        """Normalised hidden states (B, F) of one more token per record, which sees every valid position before it."""
        return model.norm(self._one_more(model, model.blocks, model.tokens(token_B), position_B, valid_BS, caches))

    def _through(
        self, model: FusedTransformer, blocks: Sequence[nn.Module] | nn.ModuleList, x_YD: torch.Tensor, stream: Stream,
        read: torch.Tensor | None, caches: list[Cache] | None, before: Before | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Through all of these blocks. `read` numbers positions of the stream."""
        count, stream = len(x_YD if read is None else read), stream.or_nothing()
        if not caches and before is None:
            stream = stream.rounded(x_YD)
            read = more_read(x_YD, read, len(stream.record_Y))
        x_YD, prefix = stream.padded(x_YD), self.config.attention == "prefix"
        arranged = stream.arranged(
            both_ways=model.reader.both_ways, prefix=prefix, dtype=x_YD.dtype, layers=len(blocks)
        )
        seen: Arrangement | list[Filling] = arranged
        if caches:
            seen = [Filling(cache, stream.keep_BT, arranged) for cache in caches]
            stream.remember(caches[0])
        table = model._rotary(stream.position_Y, x_YD.dtype)
        made = run(blocks, x_YD, table, seen, read, recompute=model.recompute, before=before)
        return made[:count]

    def _one_more(
        self, model: FusedTransformer, blocks: Sequence[nn.Module] | nn.ModuleList, x_BD: torch.Tensor,
        position_B: torch.Tensor, valid_BS: torch.Tensor | None, caches: list[Cache], before: Before | None = None,
    ) -> torch.Tensor:  # fmt: skip
        position_B, valid_BS = _seen_so_far(position_B, valid_BS, caches[0])
        table = model._rotary(position_B, x_BD.dtype)
        steps = Step.of(caches, valid_BS)
        return run(blocks, model._placed(x_BD, position_B), table, steps, before=before)


def _seen_so_far(
    position_B: torch.Tensor, valid_BS: torch.Tensor | None, cache: Cache
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Position and past of one more token, without the positions of the prompt that its stream leaves out."""
    absent_BT = cache.aside.get("absent")
    if absent_BT is None:
        return position_B, valid_BS
    absent_BS = F.pad(absent_BT, (0, cache.length + 1 - absent_BT.shape[1]))
    return position_B - absent_BT.sum(1), ~absent_BS if valid_BS is None else valid_BS & ~absent_BS


# adversarial


class Adversarial(Concat):
    """对抗训练: `concat`, whose blocks learn to make the modalities indistinguishable to a discriminator that learns to
    tell them apart (Ganin & Lempitsky 2015, section 3; between modalities as in ACMR, Wang et al. 2017).

    It sees what enters the last block, since that is the last place where media are still read by others: the mean over
    the text, the picture, the sound and the fields of each record. Its cross-entropy is a term of the loss, averaged over
    all modalities of all records of a step; on its way back the gradient is turned round, and multiplied by
    2 / (1 + exp(-γ p)) - 1 at the share p of the training (`model.progress`), so that a discriminator that knows nothing
    yet does not disturb.
    """

    def __init__(self, config: ModelConfig, spec: FeatureSpec, kind: AdversarialConfig) -> None:
        super().__init__(config, spec)
        self.ramp = kind.ramp
        self.discriminator = nn.Sequential(
            nn.Linear(config.width, kind.width), nn.ReLU(), nn.Linear(kind.width, 1 + len(self.modalities))
        )

    def read(
        self, model: FusedTransformer, batch: Inputs, read_X: torch.Tensor | None
    ) -> tuple[torch.Tensor, Guess | None]:
        (blocks, norm, _), stream = model.reader, Stream.whole(batch)
        guesses: list[Guess] = []

        def look(n: int, x_XD: torch.Tensor) -> torch.Tensor:
            if n == len(blocks) - 1:
                guesses.append(self._guess(batch, x_XD, stream.record_Y, reversal(model.progress, self.ramp)))
            return x_XD

        x_XD = model.embed(batch, batch.valid_BT)
        x_UD = norm(self._through(model, blocks, x_XD, stream, chosen(read_X), None, look))
        return x_UD, guesses[0]

    def _guess(self, batch: Inputs, x_XD: torch.Tensor, record_X: torch.Tensor, strength: float) -> Guess:
        pair_X = modality_pairs(batch, self.modalities, record_X)
        pairs, number_X = torch.unique(pair_X, return_inverse=True)
        mean_ZD = means(x_XD[: len(pair_X)], number_X, len(pairs))
        return Guess(self.discriminator(reverse(mean_ZD, strength)), pairs % (1 + len(self.modalities)))


# add and cross_attention


class Encoder(nn.Module):
    """The tokens of one modality of each record among themselves, in both directions."""

    def __init__(self, config: ModelConfig, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(layers))
        self.norm = last_norm_of(config)

    def forward(self, model: FusedTransformer, x_MD: torch.Tensor, stream: Stream) -> torch.Tensor:
        """Normalised hidden states, (M, D)."""
        some = stream.or_nothing()
        x_MD = some.padded(x_MD)
        seen = some.arranged(both_ways=True, dtype=x_MD.dtype, layers=len(self.blocks))
        table = model._rotary(some.position_Y, x_MD.dtype)
        return self.norm(run(self.blocks, x_MD, table, seen, recompute=model.recompute))[: len(stream.at_Y)]


class Encoded(NamedTuple):
    """One modality of a batch, read by its encoder."""

    stream: Stream
    states_MD: torch.Tensor


class WithEncoders(Concat, ABC):
    """The text is the sequence; pictures, sounds and fields come to it from encoders, and where they stood it keeps one
    token as a tag. All text of a record knows of all its media, also the text before them in a piece of a long one."""

    def __init__(self, config: ModelConfig, spec: FeatureSpec, layers: int) -> None:
        super().__init__(config, spec)
        self.encoders = nn.ModuleDict({name: Encoder(config, layers) for name in self.modalities})

    def stacks(self, model: FusedTransformer) -> list[Sequence[nn.Module]]:
        return [*super().stacks(model), *(list(encoder.blocks) for encoder in self.encoders.values())]  # type: ignore

    def sequences(self, batch: Inputs) -> list[torch.Tensor]:
        return [without_slots(batch, tags=True)]

    def trunk(
        self, model: FusedTransformer, batch: Inputs, read_X: torch.Tensor | None, caches: list[Cache] | None = None
    ) -> torch.Tensor:
        record_X = records_of(batch)
        text = Stream.of(batch, self.sequences(batch)[0], record_X)
        media = [self._encoded(model, batch, name, record_X) for name in self.modalities]
        wanted_X = torch.ones_like(text.keep_X) if read_X is None else read_X
        wanted_Y, place_X = wanted_X[text.at_Y], wanted_X.cumsum(0) - 1
        x_YD = model.embed(batch, text.keep_BT, (), text.position_Y)
        x_UD = model.reader.norm(self._joined(model, x_YD, text, media, chosen(wanted_Y), caches))
        parts = [(place_X[text.at_Y[wanted_Y]], x_UD)]
        for stream, states_MD in media:  # where a medium's own position is read, its encoder answers
            wanted_M = (wanted_X & ~text.keep_X)[stream.at_Y]
            parts.append((place_X[stream.at_Y[wanted_M]], states_MD[wanted_M]))
        return placed(parts, int(wanted_X.sum()))

    def _encoded(self, model: FusedTransformer, batch: Inputs, name: str, record_X: torch.Tensor) -> Encoded:
        stream = Stream.of(batch, slots_of(batch, name), record_X)
        x_MD = model.embed(batch, stream.keep_BT, (name,), stream.position_Y)
        return Encoded(stream, self.encoders[name](model, x_MD, stream))

    @abstractmethod
    def _joined(
        self, model: FusedTransformer, x_YD: torch.Tensor, text: Stream, media: list[Encoded],
        read: torch.Tensor | None, caches: list[Cache] | None,
    ) -> torch.Tensor:  # fmt: skip
        """The text through all blocks, with what the encoders have read."""


class Add(WithEncoders):
    """叠加: the mean of each encoded modality of a record is added to every token of its text (the shift of FiLM, Perez et
    al. 2018, eq. 2, without its scale)."""

    def _joined(
        self, model: FusedTransformer, x_YD: torch.Tensor, text: Stream, media: list[Encoded],
        read: torch.Tensor | None, caches: list[Cache] | None,
    ) -> torch.Tensor:  # fmt: skip
        R = count_of(text.record_Y)
        added_RD = x_YD.new_zeros(R, x_YD.shape[1])
        for stream, states_MD in media:
            added_RD = added_RD + means(states_MD, stream.record_Y, R)
        if caches:
            caches[0].aside["added"] = added_RD
        return self._through(model, model.reader.blocks, x_YD + added_RD[text.record_Y], text, read, caches)

    def extend(
        self, model: FusedTransformer, token_B: torch.Tensor, position_B: torch.Tensor, valid_BS: torch.Tensor | None,
        caches: list[Cache],
    ) -> torch.Tensor:  # fmt: skip
        x_BD = model.tokens(token_B) + caches[0].aside["added"]
        return model.norm(self._one_more(model, model.blocks, x_BD, position_B, valid_BS, caches))


class GatedCross(WithEncoders):
    """The text asks, in gated layers before its blocks, all that the encoders have read of its record (Flamingo, Alayrac et
    al. 2022, section 2.2, where a text asks only the last picture before it). Where there is nothing to ask, the attention
    gives 0."""

    def __init__(self, config: ModelConfig, spec: FeatureSpec, kind: CrossAttentionConfig) -> None:
        super().__init__(config, spec, kind.layers)
        self.every = kind.every
        self.layers = nn.ModuleList(GatedLayer(config, kind.gate) for _ in range(0, config.reading_layers, kind.every))

    def _joined(
        self, model: FusedTransformer, x_YD: torch.Tensor, text: Stream, media: list[Encoded],
        read: torch.Tensor | None, caches: list[Cache] | None,
    ) -> torch.Tensor:  # fmt: skip
        record_M = torch.cat([text.record_Y[:0], *(stream.record_Y for stream, _ in media)])
        by_record = record_M.argsort(stable=True)
        memory_MD = torch.cat([x_YD[:0], *(states_MD for _, states_MD in media)])[by_record]
        asking_R = torch.bincount(text.record_Y)
        asked_R = torch.bincount(record_M, minlength=len(asking_R))
        crossing = cross(asking_R, asked_R, x_YD.dtype)

        def ask(n: int, x_YD: torch.Tensor) -> torch.Tensor:
            if n % self.every:
                return x_YD
            kept = Keeping(caches[n], asked_R, crossing) if caches else crossing
            return self.layers[n // self.every](x_YD, memory_MD, kept)

        return self._through(model, model.reader.blocks, x_YD, text, read, caches, ask)

    def extend(
        self, model: FusedTransformer, token_B: torch.Tensor, position_B: torch.Tensor, valid_BS: torch.Tensor | None,
        caches: list[Cache],
    ) -> torch.Tensor:  # fmt: skip
        def ask(n: int, x_BD: torch.Tensor) -> torch.Tensor:
            return x_BD if n % self.every else self.layers[n // self.every](x_BD, None, Remembered(caches[n]))

        x_BD = model.tokens(token_B)
        return model.norm(self._one_more(model, model.blocks, x_BD, position_B, valid_BS, caches, ask))


# late


class Late(Concat):
    """A product of experts (Hinton 2002, eq. 1): p(y | text, picture, sound) = Π p_m(y | text, m) / Σ_y Π p_m(y | text, m).

    One expert, with blocks of its own, reads the text alone, one the text and the pictures, one the text and the sounds;
    words and the heads' bias are shared. What is no expert of a record (it has no sound) is no factor. Each expert's
    logits are a linear map of its hidden state h_m, and the logarithm of a product of softmaxes is, up to its denominator,
    the sum of their logits, Σ W_m h_m: one linear head [W_1 W_2 …] over the hidden states side by side, 0 for those that
    are no factor. So every head, for classes as for the next token of an answer, multiplies experts when it reads them.

    The honest baseline: whatever another fusion gains over it, it gains from letting modalities meet before the answer.
    """

    def __init__(self, config: ModelConfig, spec: FeatureSpec) -> None:
        super().__init__(config, spec)
        self.experts = ("text", *self.modalities)
        self.trunks = len(self.experts)
        self.width = self.trunks * config.width
        self.norms = nn.ModuleList(last_norm_of(config) for _ in self.modalities)

    def stacks(self, model: FusedTransformer) -> list[Sequence[nn.Module]]:
        L, blocks = self.config.reading_layers, list(model.reader.blocks)
        return [blocks[n : n + L] for n in range(0, len(blocks), L)]

    def sequences(self, batch: Inputs) -> list[torch.Tensor]:
        record_X = records_of(batch)
        return [self._seen_by(name, batch, record_X) for name in self.experts]

    def trunk(
        self, model: FusedTransformer, batch: Inputs, read_X: torch.Tensor | None, caches: list[Cache] | None = None
    ) -> torch.Tensor:
        record_X, stacks, L = records_of(batch), self.stacks(model), self.config.layers
        wanted_X = torch.ones_like(record_X, dtype=torch.bool) if read_X is None else read_X
        place_X, parts, norms = wanted_X.cumsum(0) - 1, [], (model.reader.norm, *self.norms)
        for n, (name, keep_BT) in enumerate(zip(self.experts, self.sequences(batch), strict=True)):
            stream = Stream.of(batch, keep_BT, record_X)
            wanted_Y = wanted_X[stream.at_Y]
            x_YD = model.embed(batch, keep_BT, (name,) if name in SLOTS else (), stream.position_Y)
            mine = caches[n * L : n * L + L] if caches else None
            if mine:
                mine[0].aside["factor"] = keep_BT.any(1)
            y_UD = norms[n](self._through(model, stacks[n], x_YD, stream, chosen(wanted_Y), mine))
            parts.append(placed([(place_X[stream.at_Y[wanted_Y]], y_UD)], int(wanted_X.sum())))
        return torch.cat(parts, -1)

    def _seen_by(self, name: str, batch: Inputs, record_X: torch.Tensor) -> torch.Tensor:
        """(B, T): the text and the modality `name` of the records that have it."""
        keep_BT = without_slots(batch, but=name)
        if name == "text":
            return keep_BT
        has_R = torch.zeros_like(record_X[: count_of(record_X)], dtype=torch.bool)
        has_R[record_X[slots_of(batch, name)[batch.valid_BT]]] = True
        return keep_BT & of_records(batch, has_R, record_X)

    def extend(
        self, model: FusedTransformer, token_B: torch.Tensor, position_B: torch.Tensor, valid_BS: torch.Tensor | None,
        caches: list[Cache],
    ) -> torch.Tensor:  # fmt: skip
        x_BD, L, parts = model.tokens(token_B), self.config.layers, []
        for n, (blocks, norm) in enumerate(zip(self.stacks(model), (model.norm, *self.norms), strict=True)):
            mine = caches[n * L : n * L + L]
            y_BD = norm(self._one_more(model, blocks, x_BD, position_B, valid_BS, mine))
            parts.append(y_BD * mine[0].aside["factor"][:, None])
        return torch.cat(parts, -1)
