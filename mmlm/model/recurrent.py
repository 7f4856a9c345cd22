"""LSTM and GRU over the same sequence as the Transformer's: a baseline for small data, trained and asked alike.

Each layer is x + RNN(norm(x)). The state begins anew with every record, so that records of a packed sequence never
touch. Generation keeps the state of each layer where the Transformer keeps keys and values.

Axes: B record of a generation, G records of a group, L position, X valid position of the batch, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from mmlm.features.spec import FeatureSpec
from mmlm.model.attention import Cache
from mmlm.model.baseline_config import RecurrentConfig
from mmlm.model.config import ModelConfig
from mmlm.model.cross_entropy import AnswerHead
from mmlm.model.embeddings import FieldEmbedding, audio_embedding, image_embedding
from mmlm.model.fusion import Concat
from mmlm.model.heads import EmbeddingHead
from mmlm.model.initialise import start
from mmlm.model.kernels import RMSNorm, rows_of
from mmlm.model.packed import records_of, similar
from mmlm.model.transformer import FusedTransformer, Inputs

Groups = list[torch.Tensor]
"""(G, L) int64 each: which valid positions make up records of similar length, -1 where a record is shorter."""


LINEAR = ModelConfig()
"""The Transformer's linear stems and learned places, which these models share."""


class RecurrentModel(FusedTransformer):
    """Embeddings, heads and loss are the Transformer's; what stands between is not."""

    def __init__(self, config: RecurrentConfig, spec: FeatureSpec, field_rows: int = 0) -> None:
        nn.Module.__init__(self)
        self.config, D = config, config.width  # type: ignore[assignment]
        self.tokens = nn.Embedding(spec.vocab_size, D)
        self.image = image_embedding(LINEAR.model_copy(update={"width": D}), spec)
        self.audio = audio_embedding(LINEAR.model_copy(update={"width": D}), spec)
        self.fields = FieldEmbedding(field_rows, D) if field_rows else None
        self.positions = None  # the order is in the reading
        self.fusion = Reading(config, spec)  # type: ignore[arg-type]
        self.blocks = nn.ModuleList(RecurrentBlock(config) for _ in range(config.layers))
        self.norm = RMSNorm(D)
        self.answer = AnswerHead(D, spec.vocab_size)
        self.label = nn.Linear(D, spec.head_rows)
        self.embedding = EmbeddingHead(D, config.embedding) if config.embedding else None
        _initialise(self)


class Reading(Concat):
    """`concat`, with recurrent blocks: how the model reads, and goes on by a token."""

    def trunk(
        self, model: FusedTransformer, batch: Inputs, read_X: torch.Tensor | None, caches: list[Cache] | None = None
    ) -> torch.Tensor:
        x_XD = model.embed(batch, batch.valid_BT)
        if caches:
            length_B = batch.valid_BT.sum(1)
            rows_BL = _rows(length_B)
            for block, cache in zip(model.blocks, caches, strict=True):
                x_XD = block.read(x_XD, rows_BL, length_B, cache)  # type: ignore[operator]
        else:
            groups = groups_of(batch.segment_BT)
            for n, block in enumerate(model.blocks):
                x_XD = model.recompute.through(n, block, x_XD, groups)
        return model.norm(x_XD if read_X is None or bool(read_X.all()) else rows_of(x_XD, read_X.nonzero()[:, 0]))

    def extend(
        self, model: FusedTransformer, token_B: torch.Tensor, position_B: torch.Tensor, valid_BS: torch.Tensor | None,
        caches: list[Cache],
    ) -> torch.Tensor:  # fmt: skip
        x_BD = model.tokens(token_B)
        for block, cache in zip(model.blocks, caches, strict=True):
            x_BD = block.step(x_BD, cache)  # type: ignore[operator]
        return model.norm(x_BD)


class GroupedLSTM(nn.LSTM):
    """Reads a batch's groups in one call of the module. How many there are differs between ranks, and ZeRO 3 gathers
    the weights from all of them at every call: one a group would leave a rank waiting for the others for ever."""

    def forward(self, x: torch.Tensor, hx: Any = None) -> Any:  # type: ignore[override]
        """With groups for `hx`: (X, D) to (X, D), every record from an empty state. Else as PyTorch's."""
        if not isinstance(hx, list):
            return super().forward(x, hx)
        return _in_groups(super().forward, x, hx)


class GroupedGRU(nn.GRU):
    """As `GroupedLSTM`."""

    def forward(self, x: torch.Tensor, hx: Any = None) -> Any:  # type: ignore[override]
        if not isinstance(hx, list):
            return super().forward(x, hx)
        return _in_groups(super().forward, x, hx)


def _in_groups(
    read: Callable[[torch.Tensor], tuple[torch.Tensor, Any]], x_XD: torch.Tensor, groups: Groups
) -> torch.Tensor:
    """(X, D). What stands behind a shorter record's end is read by nobody."""
    made, places = [], []
    for rows_GL in groups:
        inside = rows_GL >= 0
        made.append(read(x_XD[rows_GL.clamp_min(0)])[0][inside])
        places.append(rows_GL[inside])
    place_X = torch.cat(places)
    back = torch.empty_like(place_X)
    back[place_X] = torch.arange(len(back), device=back.device)
    return torch.cat(made).index_select(0, back)


class RecurrentBlock(nn.Module):
    """x + RNN(norm(x)), with PyTorch's kernels."""

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.width)
        kind = GroupedLSTM if config.kind == "lstm" else GroupedGRU
        self.rnn = kind(config.width, config.width, batch_first=True)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_XD: torch.Tensor, groups: Groups) -> torch.Tensor:
        """Every record from an empty state. What stands behind a shorter record's end is read by nobody."""
        return x_XD + self.dropout(self.rnn(self.norm(x_XD), groups))

    def read(self, x_XD: torch.Tensor, rows_BL: torch.Tensor, length_B: torch.Tensor, cache: Cache) -> torch.Tensor:
        """The same for prompts, whose last state goes into `cache`."""
        padded_BLD = self.norm(x_XD)[rows_BL.clamp_min(0)]
        y, state = self.rnn(pack_padded_sequence(padded_BLD, length_B.cpu(), batch_first=True, enforce_sorted=False))
        y_BLD, _ = nn.utils.rnn.pad_packed_sequence(y, batch_first=True)
        _keep(cache, state)
        return x_XD + y_BLD[rows_BL >= 0]

    def step(self, x_BD: torch.Tensor, cache: Cache) -> torch.Tensor:
        """One more position of each record."""
        state = tuple(cache.aside[name].transpose(0, 1).contiguous() for name in sorted(cache.aside))
        y_B1D, after = self.rnn(self.norm(x_BD)[:, None], state if len(state) > 1 else state[0])
        _keep(cache, after)
        return x_BD + y_B1D[:, 0]


def _keep(cache: Cache, state: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
    """Records first, as all that a cache holds: rows of it leave, and are repeated, with their records."""
    parts = state if isinstance(state, tuple) else (state,)
    cache.aside = {f"state{n}": part.transpose(0, 1) for n, part in enumerate(parts)}
    B = parts[0].shape[1]
    cache.keys = cache.values = parts[0].new_zeros(B, 1, 1, 1)


def groups_of(segment_BT: torch.Tensor) -> Groups:
    """The records of a batch, those of similar length together."""
    starts, lengths = records_of(segment_BT.cpu().numpy())
    groups = []
    for chosen in similar(lengths):
        start_G = torch.from_numpy(starts[chosen]).to(segment_BT.device)
        length_G = torch.from_numpy(lengths[chosen]).to(segment_BT.device)
        groups.append(_rows(length_G, start_G))
    return groups


def _rows(length_G: torch.Tensor, start_G: torch.Tensor | None = None) -> torch.Tensor:
    """(G, L): the positions of each record, -1 behind its end. Records stand one after the other unless told where."""
    start_G = length_G.cumsum(0) - length_G if start_G is None else start_G
    at_L = torch.arange(int(length_G.max()), device=length_G.device)
    return torch.where(at_L < length_G[:, None], start_G[:, None] + at_L, -1)


def _initialise(model: RecurrentModel) -> None:
    """Embeddings and heads as the Transformer's; maps of the state orthogonal (Saxe et al. 2014), and the forget gate
    of an LSTM open: its bias starts at 1 (Jozefowicz et al. 2015)."""
    start(model)
    for module in model.modules():
        if isinstance(module, nn.LSTM | nn.GRU):
            for name, parameter in module.named_parameters():
                if parameter.ndim == 1:
                    nn.init.zeros_(parameter)
                    if isinstance(module, nn.LSTM) and name.startswith("bias_ih"):
                        parameter.data[module.hidden_size : 2 * module.hidden_size] = 1.0
                elif name.startswith("weight_hh"):
                    for gate in parameter.data.split(module.hidden_size):
                        nn.init.orthogonal_(gate)
                else:
                    nn.init.normal_(parameter, std=module.input_size**-0.5)
    for head in (model.answer, model.label, model.embedding):
        if head is not None:
            nn.init.normal_(head.weight, std=0.02)
