"""Convolutional stems: pictures by strided 3 x 3 convolutions, sounds by Whisper's two convolutions.

A convolution is a linear map of windows, and is written so: it decays, is drawn and may be adapted like any other. What
lies outside of a picture or sound is zero, so none sees its neighbours in the batch.

Axes: P patch, M mel token, I picture or sound, D width, C channels, H and W rows and columns, L frames of the longest.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn import functional as F

from mmlm.errors import ConfigError
from mmlm.features.spec import AudioSpec, ImageSpec


class Convolution1d(nn.Module):
    """(I, L, C) → (I, L / stride, width): windows of three frames."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride, self.map = stride, nn.Linear(3 * channels, width)

    def forward(self, x_ILC: torch.Tensor) -> torch.Tensor:
        windows = F.pad(x_ILC, (0, 0, 1, 1)).unfold(1, 3, self.stride)  # (I, L / stride, C, 3)
        return self.map(windows.flatten(2))


class Convolution2d(nn.Module):
    """(I, H, W, C) → (I, H / 2, W / 2, width): windows of three by three pixels, two apart."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.map = nn.Linear(9 * channels, width)

    def forward(self, x_IHWC: torch.Tensor) -> torch.Tensor:
        windows = F.pad(x_IHWC, (0, 0, 1, 1, 1, 1)).unfold(1, 3, 2).unfold(2, 3, 2)  # (I, H / 2, W / 2, C, 3, 3)
        return self.map(windows.flatten(3))


class PictureConvolutions(nn.Module):
    """Patches → tokens by convolutions over the whole picture (Xiao et al. 2021, "Early convolutions help transformers
    see better"), each halving the sides and doubling the channels until a patch is one pixel; then a linear map. There is
    no batch norm, with which a picture would depend on those beside it. Patches that are left out are zeros."""

    def __init__(self, spec: ImageSpec, width: int) -> None:
        super().__init__()
        depth = spec.patch.bit_length() - 1
        if spec.patch != 1 << depth or not depth:
            raise ConfigError(
                f"image_stem conv with patches of {spec.patch} pixels", wanted="a power of two",
                cure="change features.image.patch, or give image_stem: linear",
            )  # fmt: skip
        self.spec = spec
        sizes = channels_of(spec, width)
        self.convolutions = nn.ModuleList(Convolution2d(before, after) for before, after in itertools.pairwise(sizes))
        self.out = nn.Linear(sizes[-1], width)

    def forward(self, rows_PD: torch.Tensor, at_P: torch.Tensor) -> torch.Tensor:
        x_IHWC, place_P = pictures_of(rows_PD, at_P, self.spec)
        for convolution in self.convolutions:
            x_IHWC = F.gelu(convolution(x_IHWC))
        return self.out(x_IHWC.flatten(0, 2)[place_P])


def pictures_of(rows_PD: torch.Tensor, at_P: torch.Tensor, spec: ImageSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """The pictures that patches are of, (I, H, W, C), with zeros for those that are left out; and the number of each patch,
    (P,), when all patches of all pictures are counted."""
    n, p, T = spec.size // spec.patch, spec.patch, spec.tokens
    picture_P = numbered(at_P, T)
    place_P = picture_P * T + at_P % T
    pictures = int(picture_P[-1]) + 1
    grid = rows_PD.new_zeros(pictures * T, rows_PD.shape[1]).index_copy(0, place_P, rows_PD)
    return grid.view(pictures, n, n, p, p, -1).transpose(2, 3).reshape(pictures, n * p, n * p, -1), place_P


def channels_of(spec: ImageSpec, width: int) -> list[int]:
    """Channels of a picture, and after each convolution."""
    depth = spec.patch.bit_length() - 1
    return [spec.channels, *(max(8, width >> (depth - 1 - n)) for n in range(depth))]


def convolution_flops(spec: ImageSpec, width: int) -> tuple[int, int]:
    """Of one picture: of the convolution that reads it, and of all behind, two for each multiplication."""
    sizes, side, found = channels_of(spec, width), spec.size, []
    for before, after in itertools.pairwise(sizes):
        side //= 2
        found.append(2 * side * side * 9 * before * after)
    return found[0], sum(found[1:]) + 2 * side * side * sizes[-1] * width


class SoundConvolutions(nn.Module):
    """Log-mel frames → tokens by two convolutions of three frames, the second with a stride of two, and GELU (Whisper,
    Radford et al. 2022, section 2.2); where a token is more than two frames, a linear map joins what is left of them."""

    def __init__(self, spec: AudioSpec, width: int) -> None:
        super().__init__()
        if spec.frames_per_token % 2:
            raise ConfigError(
                f"audio_stem conv with {spec.frames_per_token} frames a token", wanted="an even number",
                cure="change features.audio.frames_per_token, or give audio_stem: linear",
            )  # fmt: skip
        self.spec = spec
        self.first = Convolution1d(spec.n_mels, width, 1)
        self.second = Convolution1d(width, width, 2)
        halves = spec.frames_per_token // 2
        self.join = nn.Linear(halves * width, width) if halves > 1 else None

    def forward(self, rows_MD: torch.Tensor, at_M: torch.Tensor) -> torch.Tensor:
        frames = self.spec.frames_per_token
        sound_M = numbered(at_M, None)
        sounds, longest = int(sound_M[-1]) + 1, int(at_M.max()) + 1
        place_M = sound_M * longest + at_M
        grid = rows_MD.new_zeros(sounds * longest, rows_MD.shape[1]).index_copy(0, place_M, rows_MD)
        there = rows_MD.new_zeros(sounds * longest, 1).index_fill(0, place_M, 1)
        x_ILC = grid.view(sounds, longest * frames, self.spec.n_mels)
        x_ILC = F.gelu(self.first(x_ILC)) * there.view(sounds, longest, 1).repeat_interleave(frames, 1)
        x_ILC = F.gelu(self.second(x_ILC))
        x_MD = x_ILC.reshape(sounds * longest, -1)[place_M]
        return x_MD if self.join is None else self.join(x_MD)


def numbered(at: torch.Tensor, each: int | None) -> torch.Tensor:
    """The number of the picture or sound of each row: a new one begins where places do not grow, or where `each` places,
    the most of one picture, are over."""
    begins = at[1:] <= at[:-1]
    if each is not None:
        begins = begins | (at[1:] // each != at[:-1] // each)
    return F.pad(begins.long().cumsum(0), (1, 0))
