"""The fused Transformer: text, patches and mel frames in one sequence, answered by the next token and by a class head.

Departures from Vaswani et al. 2017, each of which `ModelConfig` can take back (classic.py, layouts.py): decoder only;
RMSNorm before each sub-layer and no biases (LLaMA, Touvron et al. 2023); rotary positions instead of added ones (Su et
al. 2021); SwiGLU feed-forward (Shazeer 2020); half as many key-value heads (Ainslie et al. 2023); normalised queries and
keys (Dehghani et al. 2023). Beyond it, media enter as tokens through one linear map each (ViT, Dosovitskiy et al. 2021),
and optionally the prompt attends in both directions (prefix-LM, Raffel et al. 2020). A missing modality is just fewer
tokens. A sequence may hold several records: none sees another.

Departures from the usual layout: padding is dropped at the door, so that every map works on the X valid positions of the
batch, one after the other; the last feed-forward works only on positions that a head reads; and the loss of the answers
is computed piece by piece, so that the logits of a large vocabulary never exist whole.

Axes: B sequence, T position, X valid position of the batch, R record, D width, V vocabulary, C classes of all tasks,
A answer positions, U positions that a head reads.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import nn

from mmlm.features.spec import FeatureSpec
from mmlm.model.across import CrossGrouped
from mmlm.model.adversary import Guess
from mmlm.model.attention import Cache, Table, rotary
from mmlm.model.block import Block, Reader
from mmlm.model.classic import added_positions, last_norm_of
from mmlm.model.config import ModelConfig
from mmlm.model.cross_entropy import AnswerHead, AnswerLoss, Lead
from mmlm.model.embeddings import FieldEmbedding, audio_embedding, fill, image_embedding
from mmlm.model.fusion import build_fusion
from mmlm.model.heads import EmbeddingHead, unit
from mmlm.model.huggingface.stems import Encoder
from mmlm.model.initialise import initialise
from mmlm.model.kernels import rounded, rows_of
from mmlm.model.packed import Grouped, hide_from_compiler
from mmlm.model.recompute import NONE, Granularity, Recompute
from mmlm.model.streams import SLOTS

IGNORE = -100


class Inputs(Protocol):
    """What the model reads: a dataclass; `mmlm.data.collate.Batch` is one."""

    tokens_BT: torch.Tensor
    valid_BT: torch.Tensor
    prompt_BT: torch.Tensor
    target_BT: torch.Tensor
    segment_BT: torch.Tensor
    position_BT: torch.Tensor
    answer_at_R: torch.Tensor
    patches_PD: torch.Tensor
    patch_at_P: torch.Tensor
    mels_MD: torch.Tensor
    mel_at_M: torch.Tensor
    values_K: torch.Tensor
    value_at_K: torch.Tensor


class Output(NamedTuple):
    answer_AV: torch.Tensor
    """Logits of the positions whose target is not IGNORE, row by row; of none when their loss was asked for."""
    label_RC: torch.Tensor
    """What the head says of each record, read at its `<answer>`: logits of the classes, then numbers, of all tasks."""
    answer: AnswerLoss | None = None
    """The loss of the same positions, when it was asked for."""
    embedding_RE: torch.Tensor | None = None
    """A vector of length 1 for each record, read at its `<answer>`; where the model has an embedding head."""
    modality: Guess | None = None
    """What the discriminator of adversarial fusion says."""


class FusedTransformer(nn.Module):
    """Built from a ModelConfig and the FeatureSpec of the shards that it reads."""

    generates = True
    """Whether it has words for an answer, not only classes."""
    reads_text = True
    """Whether texts change what it makes of a record."""
    recompute = NONE
    """Which blocks are run again in the backward pass. Costs time, saves memory, changes no number."""
    progress = 0.0
    """Share of the training's steps that are done, by which adversarial fusion grows."""

    def __init__(self, config: ModelConfig, spec: FeatureSpec, field_rows: int = 0) -> None:
        super().__init__()
        self.config, D = config, config.width
        self.tokens = nn.Embedding(spec.vocab_size, D)
        self.image = image_embedding(config, spec)
        self.audio = audio_embedding(config, spec)
        self.fields = FieldEmbedding(field_rows, D) if field_rows else None
        self.positions = added_positions(config, spec.max_len)
        self.fusion = build_fusion(config, spec)
        self.add_blocks(config)
        self.norm = last_norm_of(config)
        self.answer = AnswerHead(self.fusion.width, spec.vocab_size)
        self.label = nn.Linear(self.fusion.width, spec.head_rows)
        self.embedding = EmbeddingHead(self.fusion.width, config.embedding) if config.embedding else None
        if config.tied:
            self.answer.weight = self.tokens.weight
        initialise(self)

    def add_blocks(self, config: ModelConfig) -> None:
        """What other layouts (layouts.py) have more of."""
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers * self.fusion.trunks))

    @property
    def reader(self) -> Reader:
        """The blocks in which modalities meet."""
        return Reader(self.blocks, self.norm)

    @property
    def stacks(self) -> list[Sequence[nn.Module]]:
        """Blocks that follow each other."""
        return self.fusion.stacks(self)

    def set_up(self, *, recompute: int = 0, granularity: Granularity = "full", compiled: bool = False) -> None:
        """How training is to be carried out; changes no number."""
        self.recompute = Recompute(recompute, granularity)
        for module in self.modules():
            if recompute and isinstance(module, Encoder):
                module.recompute()
        if compiled:
            for kind in (Grouped, CrossGrouped):
                hide_from_compiler(kind)
            for module in self.modules():
                if isinstance(module, Block):
                    module.compile()

    def forward(self, batch: Inputs, z_loss: float | None = None, lead: Lead | None = None) -> Output:
        """With a `z_loss` (0 for none), the loss of the answers takes the place of their logits; with a `lead`, it is what
        a teacher's word on the same batch makes of it."""
        x_AD, target_A, output = self._answered(batch)
        if z_loss is None:
            return output._replace(answer_AV=self.answer(x_AD))
        return output._replace(answer=self.answer(x_AD, target_A, z_loss, lead=lead))

    def lead(self, batch: Inputs, temperature: float, task: float) -> tuple[Output, Lead | None]:
        """What a student of this model is led by: what the heads say of the records, without logits of answers, and what
        makes these piece by piece; None for a model without words."""
        if not self.generates:
            return self(batch, z_loss=0.0), None
        x_AD, _, output = self._answered(batch)
        return output, Lead(x_AD, self.answer, temperature, task)

    def _answered(self, batch: Inputs) -> tuple[torch.Tensor, torch.Tensor, Output]:
        """What the head over the vocabulary reads, its targets, and all that the other heads say."""
        target_X = batch.target_BT[batch.valid_BT]
        answer_R = (batch.valid_BT.flatten().cumsum(0) - 1)[batch.answer_at_R]
        read_X = (target_X != IGNORE).index_fill(0, answer_R, True)
        x_UD, guess = self.read(batch, read_X)
        target_U = target_X[read_X]
        x_AD, target_A = x_UD, target_U
        if bool((target_U == IGNORE).any()):
            answered = (target_U != IGNORE).nonzero()[:, 0]
            x_AD, target_A = rows_of(x_UD, answered), target_U[answered]
        label_RC, embedding_RE = self.classify(x_UD[(read_X.cumsum(0) - 1)[answer_R]])
        nothing = x_AD.new_empty(0, self.answer.out_features)
        return x_AD, target_A, Output(nothing, label_RC, None, embedding_RE, guess)

    def classify(self, x_RD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits over the classes of all tasks, and with an embedding head, (R, E) vectors of length 1."""
        label_RC = self.label(rounded(x_RD))[: len(x_RD)]
        if self.embedding is None:
            return label_RC, None
        embedding_RE = unit(self.embedding(x_RD))
        # the head has a gradient also where nothing is learnt from it
        return label_RC + (0 * embedding_RE.sum()).to(label_RC.dtype), embedding_RE

    def read(self, batch: Inputs, read_X: torch.Tensor | None) -> tuple[torch.Tensor, Guess | None]:
        """What `trunk` gives, and what a discriminator says, where there is one."""
        return self.fusion.read(self, batch, read_X)

    def trunk(self, batch: Inputs, read_X: torch.Tensor | None = None) -> torch.Tensor:
        """Normalised hidden states, (U, F), of the valid positions that `read_X` marks, by default of all of them."""
        return self.read(batch, read_X)[0]

    def read_prompts(self, batch: Inputs, caches: list[Cache]) -> torch.Tensor:
        """Normalised hidden states (B, F) of the last column of left-padded prompts; fills `caches`, one a block."""
        last_B = batch.valid_BT.sum(1).cumsum(0) - 1
        read_X = batch.valid_BT.new_zeros(int(last_B[-1]) + 1).index_fill(0, last_B, True)
        return self.fusion.trunk(self, batch, read_X, caches)

    def extend(
        self, token_B: torch.Tensor, position_B: torch.Tensor, valid_BS: torch.Tensor | None, caches: list[Cache]
    ) -> torch.Tensor:
        """Normalised hidden states (B, F) of one more token per record, which sees every valid position before it and
        itself; all of them where `valid_BS` is None."""
        return self.fusion.extend(self, token_B, position_B, valid_BS, caches)

    def _placed(self, x_XD: torch.Tensor, position_X: torch.Tensor) -> torch.Tensor:
        """With what stands for the positions added, unless that is a rotation of queries and keys."""
        return x_XD if self.positions is None else x_XD + self.positions(position_X).to(x_XD.dtype)

    def _rotary(self, position_X: torch.Tensor, dtype: torch.dtype) -> Table | None:
        """The rotation for the positions, once for all layers; None where something is added for them instead."""
        if self.positions is not None:
            return None
        return rotary(position_X, self.config.head_width, self.config.rope_theta, dtype, self.config.rope_scaling)

    def embed(
        self, batch: Inputs, keep_BT: torch.Tensor, media: Collection[str] = tuple(SLOTS),
        position_X: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """(X, D) of the positions to keep: token embeddings, with the slots of `media` filled from their own embeddings,
        and what stands for the positions added, unless that is rotary. All slots of a modality of `media` are kept.
        `position_X`: places in the record, by default the batch's.
        """
        tokens_X, prompt_X = batch.tokens_BT[keep_BT], batch.prompt_BT[keep_BT]
        x_XD = self.tokens(tokens_X)
        for name, rows, at in (
            ("image", batch.patches_PD, batch.patch_at_P),
            ("audio", batch.mels_MD, batch.mel_at_M),
            ("fields", batch.values_K[:, None], batch.value_at_K),
        ):
            module = getattr(self, name)
            if module is not None and name in media:
                x_XD = fill(x_XD, (tokens_X == SLOTS[name]) & prompt_X, module, rows, at)
        return self._placed(x_XD, batch.position_BT[keep_BT] if position_X is None else position_X)


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
