"""A CNN that tells classes apart by pictures and sounds: the baseline for small data of that kind.

It reads the same batches as the Transformer: patches are put together to pictures, mel tokens to spectrograms. All
pictures of a record are averaged, and so are its sounds and fields; what is missing adds nothing. The question is not
read, and text is not answered. Nothing of a record depends on its neighbours: norms look at one place only, and what
stands behind the end of a shorter sound is put to zero before every convolution, as behind a picture's edge.

Axes: N picture or sound, C channel, Y row and X column (of a sound: frame and bin), M mel token, P slot, R record, D width;
elsewhere X is a valid position of the batch.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from mmlm.errors import ConfigError
from mmlm.features.spec import AUDIO, FIELDS, IMAGE, FeatureSpec
from mmlm.model.attention import Cache
from mmlm.model.baseline_config import CnnConfig
from mmlm.model.cross_entropy import AnswerLoss, Lead
from mmlm.model.embeddings import FieldEmbedding
from mmlm.model.heads import EmbeddingHead
from mmlm.model.kernels import RMSNorm
from mmlm.model.recompute import Granularity
from mmlm.model.stems import numbered
from mmlm.model.transformer import IGNORE, FusedTransformer, Inputs, Output

GRID = 4
"""Rows and columns to which what the convolutions made of a picture is averaged, at most: where things are counts."""
BINS = 10
"""The same for the pitch of a sound. Time is averaged over."""


class CnnModel(FusedTransformer):
    """Built as a FusedTransformer. Raises ConfigError for a spec that asks for more than classes by picture or sound."""

    generates = False
    reads_text = False

    def __init__(self, config: CnnConfig, spec: FeatureSpec, field_rows: int = 0) -> None:
        nn.Module.__init__(self)
        refuse(spec)
        self.config, self.vocabulary, D = config, spec.vocab_size, config.width  # type: ignore[assignment]
        self.image = Pictures(config, spec) if spec.image else None  # type: ignore[assignment]
        self.audio = Sounds(config, spec) if spec.audio else None  # type: ignore[assignment]
        self.fields = FieldEmbedding(field_rows, D) if field_rows else None
        self.blocks = nn.ModuleList()
        self.mix = nn.Sequential(RMSNorm(D), nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))
        self.norm = RMSNorm(D)
        self.dropout = nn.Dropout(config.dropout)
        self.label = nn.Linear(D, spec.head_rows)
        self.embedding = EmbeddingHead(D, config.embedding) if config.embedding else None
        _initialise(self)

    def set_up(self, *, recompute: int = 0, granularity: Granularity = "full", compiled: bool = False) -> None:
        if recompute or compiled:
            raise ConfigError("recompute or compile for a cnn", wanted="recompute: 0 and compile: false")

    def forward(self, batch: Inputs, z_loss: float | None = None, lead: Lead | None = None) -> Output:
        """There is no head over the vocabulary: the loss of the answers is 0, their logits are all alike."""
        answer_R = (batch.valid_BT.flatten().cumsum(0) - 1)[batch.answer_at_R]
        read_X = torch.zeros(int(batch.valid_BT.sum()), dtype=torch.bool, device=answer_R.device)
        label_RC, embedding_RE = self.classify(self.trunk(batch, read_X.index_fill(0, answer_R, True)))
        A = int((batch.target_BT != IGNORE).sum())
        if z_loss is None:
            return Output(label_RC.new_zeros(A, self.vocabulary), label_RC, None, embedding_RE)
        none_A = label_RC.new_zeros(A, dtype=torch.float32)
        none = AnswerLoss(none_A.sum(), none_A, none_A)
        return Output(label_RC.new_empty(0, self.vocabulary), label_RC, none, embedding_RE)

    def trunk(self, batch: Inputs, read_X: torch.Tensor | None = None) -> torch.Tensor:
        """(U, D): what stands for the record, at each of its positions that `read_X` marks."""
        record_X = records_of(batch.segment_BT)
        x_RD = self.records(batch, record_X)
        return x_RD[record_X if read_X is None else record_X[read_X]]

    def read_prompts(self, batch: Inputs, caches: list[Cache]) -> torch.Tensor:
        return self.records(batch, records_of(batch.segment_BT))

    def records(self, batch: Inputs, record_X: torch.Tensor) -> torch.Tensor:
        """(R, D), in order of sequences and segments."""
        R = int(record_X[-1]) + 1
        tokens_X, prompt_X = batch.tokens_BT[batch.valid_BT], batch.prompt_BT[batch.valid_BT]
        x_RD: torch.Tensor | float = 0.0
        for module, slot, rows, at in (
            (self.image, IMAGE, batch.patches_PD, batch.patch_at_P),
            (self.audio, AUDIO, batch.mels_MD, batch.mel_at_M),
            (self.fields, FIELDS, batch.values_K[:, None], batch.value_at_K),
        ):
            if module is not None:
                record_P = record_X[(tokens_X == slot) & prompt_X]
                x_RD = x_RD + _mean_of(module, rows, at, record_P, R)
        assert isinstance(x_RD, torch.Tensor)
        return self.dropout(self.norm(x_RD + self.mix(x_RD)))


def _mean_of(
    module: nn.Module, rows: torch.Tensor, at: torch.Tensor, record_P: torch.Tensor, records: int
) -> torch.Tensor:
    """(R, D): the mean of what `module` makes of each record's pictures, sounds or fields; 0 where it has none.

    One of zeros goes along, worth nothing: a rank whose batch lacks the modality still touches the parameters.
    """
    dtype = next(module.parameters()).dtype
    rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])]).to(dtype)
    at = F.pad(at, (0, 1))
    number_P = torch.arange(len(at), device=at.device)
    if isinstance(module, Pictures | Sounds):
        number_P = numbered(at, module.most)
    made_ND = module(rows, at)
    record_N = torch.zeros(len(made_ND) - 1, dtype=torch.long, device=at.device)
    record_N[number_P[:-1]] = record_P
    sums_RD = made_ND.new_zeros(records, made_ND.shape[1]).index_add(0, record_N, made_ND[:-1])
    count_R = torch.bincount(record_N, minlength=records).clamp_min(1)
    return sums_RD / count_R[:, None].to(dtype) + 0 * made_ND[-1].sum()


class Pictures(nn.Module):
    """Patches of pictures → (N, D). Patches that are left out are zeros."""

    def __init__(self, config: CnnConfig, spec: FeatureSpec) -> None:
        super().__init__()
        assert spec.image is not None
        self.spec, self.most = spec.image, spec.image.tokens
        self.stages = stages(spec.image.channels, config.channels)
        side = min(GRID, _halved(spec.image.size, len(config.channels)))
        self.grid = nn.AdaptiveAvgPool2d(side)
        self.out = nn.Linear(config.channels[-1] * side * side, config.width)

    def forward(self, rows: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        p, n, C = self.spec.patch, self.spec.size // self.spec.patch, self.spec.channels
        number_P = numbered(at, self.most)
        place_P = number_P * self.most + at % self.most
        whole = rows.new_zeros((int(number_P[-1]) + 1) * self.most, rows.shape[1]).index_copy(0, place_P, rows)
        x_NCYX = whole.view(-1, n, n, p, p, C).permute(0, 5, 1, 3, 2, 4).reshape(-1, C, n * p, n * p)
        for stage in self.stages:
            x_NCYX = stage(x_NCYX, None)
        return self.out(self.grid(x_NCYX).flatten(1))


class Sounds(nn.Module):
    """Mel tokens of whole sounds, of any length → (N, D): mean over time, pitch kept in up to BINS steps."""

    most = None

    def __init__(self, config: CnnConfig, spec: FeatureSpec) -> None:
        super().__init__()
        assert spec.audio is not None
        self.spec = spec.audio
        self.stages = stages(1, config.channels)
        bins = min(BINS, _halved(spec.audio.n_mels, len(config.channels)))
        self.bins = nn.AdaptiveAvgPool1d(bins)
        self.out = nn.Linear(config.channels[-1] * bins, config.width)

    def forward(self, rows: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        length_N = torch.bincount(numbered(at, None))
        M, per, bins = int(length_N.max()), self.spec.frames_per_token, self.spec.n_mels
        inside_NM = torch.arange(M, device=rows.device) < length_N[:, None]
        x_NMD = rows.new_zeros(len(length_N), M, rows.shape[1])
        x_NMD[inside_NM] = rows
        x_NCYX, frames_N = x_NMD.view(-1, 1, M * per, bins), length_N * per
        for stage in self.stages:
            x_NCYX = stage(x_NCYX, frames_N)
            frames_N = (frames_N + 1) // 2
        x_NCX = x_NCYX.sum(2) / frames_N[:, None, None].to(x_NCYX.dtype)
        return self.out(self.bins(x_NCX).flatten(1))


class Stage(nn.Module):
    """Two convolutions of 3 x 3, the second halving rows and columns; each normalised over channels, then GELU."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(before, after, 3, 1, 1), nn.Conv2d(after, after, 3, 2, 1)
        self.first_norm, self.second_norm = nn.LayerNorm(after), nn.LayerNorm(after)

    def forward(self, x_NCYX: torch.Tensor, rows_N: torch.Tensor | None) -> torch.Tensor:
        """`rows_N`: how many rows of each are real; the others hold 0 and give 0."""
        x_NCYX = _only(self._active(self.first(x_NCYX), self.first_norm), rows_N)
        half_N = None if rows_N is None else (rows_N + 1) // 2
        return _only(self._active(self.second(x_NCYX), self.second_norm), half_N)

    def _active(self, x_NCYX: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        return F.gelu(norm(x_NCYX.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def _only(x_NCYX: torch.Tensor, rows_N: torch.Tensor | None) -> torch.Tensor:
    if rows_N is None:
        return x_NCYX
    inside_NY = torch.arange(x_NCYX.shape[2], device=x_NCYX.device) < rows_N[:, None]
    return x_NCYX * inside_NY[:, None, :, None]


def stages(before: int, channels: tuple[int, ...]) -> nn.ModuleList:
    return nn.ModuleList(Stage(a, b) for a, b in zip((before, *channels), channels, strict=False))


def _halved(size: int, times: int) -> int:
    for _ in range(times):
        size = (size + 1) // 2
    return size


def records_of(segment_BT: torch.Tensor) -> torch.Tensor:
    """(X,): the number of each valid position's record."""
    B, T = segment_BT.shape
    number_BT = torch.arange(B, device=segment_BT.device)[:, None] * (T + 1) + segment_BT
    return torch.unique_consecutive(number_BT[segment_BT >= 0], return_inverse=True)[1]


def refuse(spec: FeatureSpec) -> None:
    """Raises ConfigError naming what a CNN cannot do for the records of `spec`."""
    cure = "choose model.kind transformer, lstm or gru"
    if spec.image is None and spec.audio is None:
        raise ConfigError("a cnn for records without pictures and sounds", wanted="one of them", cure=cure)
    if spec.encoder("image") or spec.encoder("audio"):
        raise ConfigError(
            "a cnn for features of a pretrained encoder", wanted="pictures and sounds", cure=f"{cure}, or read: false"
        )
    for task in spec.tasks:
        if task.has_text or not (task.labels or task.number):
            raise ConfigError(
                f"a cnn for the task `{task.name}`, whose answers are texts",
                wanted="tasks with classes only",
                cure=cure,
            )


def _initialise(model: CnnModel) -> None:
    """Variance kept through each GELU (He et al. 2015); embeddings and the head as the Transformer's."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(model.label.weight, std=0.02)
