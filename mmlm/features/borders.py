"""Which patches of a picture become tokens, where the padding of `resize: pad` is to be left out.

It is found once, in the picture before it is stored, and kept with the sample: lengths are then known without decoding, and
what is done to a picture while training does not bring back patches that an evaluation never sees.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mmlm.features.sample import Sample
from mmlm.features.spec import FeatureSpec, ImageSpec

SAME = 6
"""Values that a pixel may differ by and still be of the corner's colour: JPEG at quality 90 leaves up to 4 on white."""
Border = tuple[int, int]
"""Rows of patches at the top, and as many at the bottom, that become no tokens; columns likewise."""


def border_of(x_HWC: np.ndarray, spec: ImageSpec) -> Border:
    """What of a picture is left out. Rows of patches go in pairs, one at the top and one at the bottom, as columns do, since
    `pad` puts a picture into the middle; at least one row and one column stay."""
    if spec.padding == "keep":
        return 0, 0
    n = spec.size // spec.patch
    differs = np.abs(x_HWC.astype(np.int16) - x_HWC[0, 0].astype(np.int16)).max(-1) > SAME
    drawn_NN = differs.reshape(n, spec.patch, n, spec.patch).any((1, 3))
    return _pairs(drawn_NN.any(1)), _pairs(drawn_NN.any(0))


def _pairs(drawn_N: np.ndarray) -> int:
    """How many rows at either end hold nothing."""
    most = (len(drawn_N) - 1) // 2
    empty = ~(drawn_N | drawn_N[::-1])[:most]
    return int(empty.argmin()) if not empty.all() else most


def kept_patches(sample: Sample, spec: ImageSpec) -> list[np.ndarray]:
    """Of each picture the places of the patches that stay, in order: as the sample says, or else as its pictures look."""
    if spec.padding == "keep":
        return [np.arange(spec.tokens)] * len(sample.images)
    told = len(sample.borders) == len(sample.images)
    borders = sample.borders if told else [border_of(x, spec) for x in sample.images]
    n = spec.size // spec.patch
    places_NN = np.arange(spec.tokens).reshape(n, n)
    return [places_NN[rows : n - rows, columns : n - columns].ravel() for rows, columns in borders]


def kept_positions(border: Border, spec: ImageSpec) -> int:
    """Positions that a picture with this border takes up."""
    n = spec.size // spec.patch
    return max(0, n - 2 * border[0]) * max(0, n - 2 * border[1])


def with_borders(sample: Sample, spec: FeatureSpec) -> Sample:
    """`sample`, told of its borders where shards that are older than they are did not store them."""
    if spec.image is None or spec.image.padding == "keep" or len(sample.borders) == len(sample.images):
        return sample
    return dataclasses.replace(sample, borders=[border_of(x, spec.image) for x in sample.images])


def picture_positions(sample: Sample, spec: FeatureSpec) -> int:
    """Positions that all pictures of a sample take up; at most, where an encoder's features are read or borders were not
    stored."""
    if spec.image and spec.image.padding == "drop" and sample.borders and not spec.encoder("image"):
        return sum(kept_positions(border, spec.image) for border in sample.borders)
    return spec.image_positions(len(sample.images))
