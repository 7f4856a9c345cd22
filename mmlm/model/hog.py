"""A stem for few pictures: what a patch's edges and colours are is computed, and only what they mean is learnt.

Histograms of oriented gradients (Dalal & Triggs 2005) and of colours were the features of the linear classifiers that came
before learnt ones, and still are what some hundred pictures suffice for. Here they are what a patch says of itself.

Axes: P patch, I picture, H and W rows and columns, C channels, B bins, N rows and columns of cells, D width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from mmlm.errors import ConfigError
from mmlm.features.spec import ImageSpec
from mmlm.model.stems import pictures_of

ORIENTATIONS = 9
"""Of edges, without their direction, over half a turn (section 6.3 of the paper)."""
CELL = 8
"""Side of a cell, pixels, at most (section 6.4); one that divides the patch."""
LEAST = 4
"""Side of a cell, pixels, below which a patch is not cut: with a prime number of pixels it would be one cell for each."""
CLIP = 0.3
"""What one orientation of a cell counts at most, of a neighbourhood's length 1 (as section 6.4 clips, there at 0.2)."""
LEVELS = (-1.5, -0.5, 0.5, 1.5)
"""Of a channel, on either scale of pictures: so many to the power of the channels colours."""
FAINT = 1e-2
"""Keeps the noise of plain areas from being scaled up to edges, and the roots of rare colours from being steep."""


class HogStem(nn.Module):
    """Patches → tokens: histograms of the orientations of edges, normalised by their neighbourhood, of colours, and the
    mean of each channel, for each cell of a patch; then a linear map. What is computed has no parameters, is continuous
    in the pixels, and knows nothing of other pictures. Patches that are left out have no edges, nor does their border."""

    def __init__(self, spec: ImageSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.cell = cell_of(spec)
        self.out = nn.Linear(features_of(spec), width)

    def forward(self, rows_PD: torch.Tensor, at_P: torch.Tensor) -> torch.Tensor:
        x_IHWC, place_P = pictures_of(rows_PD.float(), at_P, self.spec)
        there_IHW1 = pictures_of(torch.ones_like(rows_PD, dtype=torch.float32), at_P, self.spec)[0][..., :1]
        cells = [
            edges(x_IHWC, self.cell, there_IHW1), colours(x_IHWC, self.cell).add(FAINT).sqrt(), means(x_IHWC, self.cell)
        ]  # fmt: skip
        n, k = self.spec.size // self.spec.patch, self.spec.patch // self.cell
        features_INND = torch.cat(cells, -1)
        features_PD = (
            features_INND.unflatten(2, (n, k)).unflatten(1, (n, k)).transpose(2, 3).reshape(len(x_IHWC) * n * n, -1)
        )
        features_PD = F.layer_norm(features_PD[place_P], features_PD.shape[1:])
        return self.out(features_PD.to(rows_PD.dtype))


def means(x_IHWC: torch.Tensor, cell: int) -> torch.Tensor:
    """Of each cell of `cell` pixels a side, (I, N, N, channels)."""
    return F.avg_pool2d(x_IHWC.movedim(-1, 1), cell).movedim(1, -1)


def edges(x_IHWC: torch.Tensor, cell: int, there_IHW1: torch.Tensor | None = None) -> torch.Tensor:
    """(I, N, N, ORIENTATIONS) of pictures on either scale: every channel's gradient votes, by its length, for the two
    orientations nearest. `there_IHW1`: 0 for pixels that are left out; None: there are none."""
    down, right = _slope(x_IHWC, there_IHW1, 1), _slope(x_IHWC, there_IHW1, 2)
    length = (down.square() + right.square() + 1e-12).sqrt() - 1e-6  # smooth, and exactly 0 where nothing changes
    at = torch.atan2(down, right + 1e-12 * (down == 0)) % torch.pi * (ORIENTATIONS / torch.pi)
    away = (at[..., None] - torch.arange(ORIENTATIONS, device=at.device)).abs()
    near = 1 - torch.minimum(away, ORIENTATIONS - away)
    votes_INNB = means((near.clamp_min(0) * length[..., None]).sum(-2), cell)
    energy_INN1 = _around(votes_INNB.square().sum(-1, keepdim=True))
    return (votes_INNB / (energy_INN1 + FAINT**2).sqrt()).clamp_max(CLIP) / CLIP


def colours(x_IHWC: torch.Tensor, cell: int) -> torch.Tensor:
    """(I, N, N, levels to the power of the channels): shares of a cell's pixels, each between its nearest levels."""
    levels = torch.tensor(LEVELS, device=x_IHWC.device)
    share = (1 - (x_IHWC.clamp(LEVELS[0], LEVELS[-1])[..., None] - levels).abs()).clamp_min(0)
    joint = share[..., 0, :]
    for c in range(1, x_IHWC.shape[-1]):
        joint = (joint[..., :, None] * share[..., None, c, :]).flatten(-2)
    return means(joint, cell)


def _around(x_INN1: torch.Tensor) -> torch.Tensor:
    """The sum of a cell and its eight neighbours."""
    return 9 * F.avg_pool2d(x_INN1.movedim(-1, 1), 3, 1, 1).movedim(1, -1)


def _slope(x_IHWC: torch.Tensor, there_IHW1: torch.Tensor | None, along: int) -> torch.Tensor:
    """Half the difference of the two neighbours of a pixel; 0 where one of them is not there."""
    size = x_IHWC.shape[along]
    after, before = x_IHWC.narrow(along, 2, size - 2), x_IHWC.narrow(along, 0, size - 2)
    found = (after - before) / 2
    if there_IHW1 is not None:
        found = found * there_IHW1.narrow(along, 2, size - 2) * there_IHW1.narrow(along, 0, size - 2)
    padding = [0, 0, 0, 0, 0, 0]
    padding[2 * (3 - along)] = padding[2 * (3 - along) + 1] = 1
    return F.pad(found, padding)


def features_of(spec: ImageSpec) -> int:
    """What a patch says of itself, numbers."""
    each = ORIENTATIONS + len(LEVELS) ** spec.channels + spec.channels
    return (spec.patch // cell_of(spec)) ** 2 * each


def cell_of(spec: ImageSpec) -> int:
    """Side of a cell, pixels. Raises ConfigError where patches are larger, and cells of less than LEAST alone divide them."""
    side = _cell(spec.patch)
    if not takes(spec.patch):
        fitting = [p for p in range(1, spec.size + 1) if not spec.size % p and takes(p)]
        raise ConfigError(
            f"image_stem hog with patches of {spec.patch} pixels, whose cells would have {side}",
            wanted=f"patches of up to {CELL}, or that {LEAST} to {CELL} divide",
            cure=f"give features.image.patch one of {', '.join(map(str, fitting))}, or image_stem: linear",
        )
    return side


def takes(patch: int) -> bool:
    """Whether patches of so many pixels a side are one cell, or cut into cells of LEAST at least."""
    return _cell(patch) >= min(LEAST, patch)


def _cell(patch: int) -> int:
    return next(side for side in range(min(CELL, patch), 0, -1) if not patch % side)


def moved_bytes(spec: ImageSpec) -> int:
    """Bytes that are read and written for the histograms of one picture, operation by operation: no product of matrices, but
    what they take time for. By channels C, orientations 9 and levels 4, in float32."""
    C, joint = spec.channels, len(LEVELS) ** spec.channels
    slopes = C * (2 * 15 + 13 + 12)  # both differences, their length, and their angle
    votes = C * ORIENTATIONS * 15 + 3 * ORIENTATIONS  # shares of an angle among orientations, their sum, and its mean
    shades = C * (len(LEVELS) * 7 + 7) + 4 * sum(len(LEVELS) ** c for c in range(2, spec.channels + 1)) // 2 + 3 * joint
    return 4 * spec.size**2 * (slopes + votes + shades)
