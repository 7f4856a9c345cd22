"""Which patches of a picture become tokens, where the padding of `resize: pad` is to be left out."""

from __future__ import annotations

import numpy as np

from mmlm.features.spec import ImageSpec

SAME = 6
"""Values that a pixel may differ by and still be of the corner's colour: JPEG at quality 90 leaves up to 4 on white."""


def kept_patches(x_HWC: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """Places of the patches that stay, in order. Rows of patches go in pairs, one at the top and one at the bottom, as
    columns do, since `pad` puts a picture into the middle; at least one row and one column stay."""
    n = spec.size // spec.patch
    places = np.arange(spec.tokens)
    if spec.padding == "keep":
        return places
    differs = np.abs(x_HWC.astype(np.int16) - x_HWC[0, 0].astype(np.int16)).max(-1) > SAME
    drawn_NN = differs.reshape(n, spec.patch, n, spec.patch).any((1, 3))
    rows, columns = (_pairs(drawn_NN.any(axis)) for axis in (1, 0))
    stays = np.zeros((n, n), bool)
    stays[rows : n - rows, columns : n - columns] = True
    return places[stays.ravel()]


def _pairs(drawn_N: np.ndarray) -> int:
    """How many rows at either end hold nothing."""
    most = (len(drawn_N) - 1) // 2
    empty = ~(drawn_N | drawn_N[::-1])[:most]
    return int(empty.argmin()) if not empty.all() else most
