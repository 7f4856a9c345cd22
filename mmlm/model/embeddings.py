"""Features of pictures, sounds and fields → tokens of the sequence, one contract for all: `module(rows, at)` gives a token
for each row, where `at` says which place in its picture, sound or record the row has; `fill` puts them into their slots.

`at` of a patch is its place in its picture, row by row, and as many more as a picture has places for each picture before it
in its record: so several pictures, or the frames of a video, are told apart. That of a mel token is its number in its sound.

Axes: X valid position of the batch, D width.
"""

from __future__ import annotations

import torch
from torch import nn

from mmlm.features.spec import AudioSpec, EncoderSpec, FeatureSpec, ImageSpec
from mmlm.model.config import ModelConfig
from mmlm.model.hog import HogStem
from mmlm.model.huggingface.stems import PictureEncoder, SoundEncoder
from mmlm.model.kernels import rounded
from mmlm.model.stems import PictureConvolutions, SoundConvolutions


def fill(
    x_XD: torch.Tensor, here_X: torch.Tensor, module: nn.Module, rows: torch.Tensor, at: torch.Tensor
) -> torch.Tensor:
    """Put the embedded rows into their slots. Where there are none, one row of zeros, worth nothing: a rank whose batch
    lacks the modality still touches the module's parameters, without which ZeRO aborts (1, 2) or waits for ever (3)."""
    if len(rows):
        return x_XD.index_copy(0, here_X.nonzero()[:, 0], module(rows.to(x_XD.dtype), at))
    partitioned = any(not p.numel() for p in module.parameters())  # ZeRO 3 empties what lies on other ranks
    if not torch.is_grad_enabled() and not partitioned:
        return x_XD
    return x_XD + 0 * module(x_XD.new_zeros(1, rows.shape[1]), at.new_zeros(1)).sum()


def image_embedding(config: ModelConfig, spec: FeatureSpec) -> MediaEmbedding | None:
    """None where there are no pictures. What a pretrained encoder made of them for the shards goes through a linear
    projector."""
    return _encoded(spec.encoder("image"), config.width, wraps=True) or _pictures(config, spec.image)


def audio_embedding(config: ModelConfig, spec: FeatureSpec) -> MediaEmbedding | None:
    """None where there are no sounds."""
    return _encoded(spec.encoder("audio"), config.width, wraps=False) or _sounds(config, spec.audio)


def _encoded(spec: EncoderSpec | None, D: int, wraps: bool) -> MediaEmbedding | None:
    return MediaEmbedding(Linear(spec.dim, D), Table(spec.tokens, D, wraps)) if spec else None


def _pictures(config: ModelConfig, spec: ImageSpec | None) -> MediaEmbedding | None:
    if spec is None:
        return None
    D = config.width
    match config.image_stem:
        case _ if config.image_encoder:
            stem: nn.Module = PictureEncoder(config.image_encoder, spec, D)
        case "linear":
            stem = Linear(spec.patch_dim, D)
        case "conv":
            stem = PictureConvolutions(spec, D)
        case "hog":
            stem = HogStem(spec, D)
    places = Table(spec.tokens, D) if config.image_places == "table" else Grid(spec.size // spec.patch, D)
    return MediaEmbedding(stem, places)


def _sounds(config: ModelConfig, spec: AudioSpec | None) -> MediaEmbedding | None:
    if spec is None:
        return None
    D = config.width
    if config.audio_encoder:
        stem: nn.Module = SoundEncoder(config.audio_encoder, spec, D)
    else:
        stem = Linear(spec.token_dim, D) if config.audio_stem == "linear" else SoundConvolutions(spec, D)
    return MediaEmbedding(stem, Table(-(-spec.max_frames // spec.frames_per_token) + 1, D, wraps=False))


class MediaEmbedding(nn.Module):
    """Features of one patch or mel token → one token: what a stem makes of them, plus their place."""

    def __init__(self, stem: nn.Module, place: nn.Module) -> None:
        super().__init__()
        self.project, self.place = stem, place

    def forward(self, rows: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return self.project(rows, at) + self.place(at)


class Linear(nn.Linear):
    """The linear stem: each patch (ViT, Dosovitskiy et al. 2021) or stack of mel frames by itself."""

    def forward(self, rows: torch.Tensor, at: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(rounded(rows))[: len(rows)]


class Table(nn.Embedding):
    """A learned vector for each place in a picture, or in a sound, whose last one also stands for all after it."""

    def __init__(self, places: int, width: int, wraps: bool = True) -> None:
        super().__init__(places, width)
        self.wraps = wraps

    def forward(self, at: torch.Tensor) -> torch.Tensor:
        return super().forward(at % self.num_embeddings if self.wraps else at.clamp_max(self.num_embeddings - 1))


class Grid(nn.Module):
    """A learned vector for the row of a patch, one for its column, and a wave for the number of its picture in the record,
    which of a video's frames is their time (Vaswani et al. 2017, section 3.5), with a learned strength."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.side, self.width = side, width
        self.row, self.column = nn.Embedding(side, width), nn.Embedding(side, width)
        self.strength = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, at: torch.Tensor) -> torch.Tensor:
        place = at % self.side**2
        time = at // self.side**2
        frequency = 10000.0 ** (-torch.arange(0, self.width, 2, device=at.device) / self.width)
        angle = time[:, None].float() * frequency
        wave = torch.cat([angle.sin(), angle.cos()], 1)[:, : self.width].to(self.strength.dtype)
        return self.row(place // self.side) + self.column(place % self.side) + self.strength * wave


class FieldEmbedding(nn.Module):
    """A named number or category → one token: its value times one learned vector, plus another."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.slope = nn.Embedding(rows, width)
        self.place = nn.Embedding(rows, width)

    def forward(self, values: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return self.slope(at) * values + self.place(at)
