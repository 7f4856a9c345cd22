"""Grey of more than 8 bits a pixel → 8 bits: which value is white?

16 bits are taken for the full range, whose upper 8 bits are kept. Other ranges only where the file tells of them, since
a dark picture must stay dark: floats of which none is above 1 have their white at 1; a TIFF of 12 bits at 4095; a PNG
whose chunk sBIT names fewer bits at the largest number of so many, unless its values were widened to 16 bits, as the
standard wants (https://www.w3.org/TR/png-3/#11sBIT). Not a number is black.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

_BITS_PER_SAMPLE = 258
_BAND = 1 << 20
"""Pixels that are looked at together."""


def bits_of(picture: Image.Image, data: bytes) -> int:
    """Bits of the values of a loaded picture of mode I or F that was read from `data`: white is the largest such number.

    0: floats up to 1.
    """
    if picture.mode.startswith("F"):
        return 0 if all(np.nanmax(np.append(band, 0)) <= 1 for band in _bands(picture)) else 16
    if picture.format == "TIFF":
        told = getattr(picture, "tag_v2", {}).get(_BITS_PER_SAMPLE)
        return 12 if told in (12, (12,)) else 16
    bits = _significant_bits(data) if picture.format == "PNG" else 16
    if bits == 16 or any(int(band.max()) >> bits for band in _bands(picture)):
        return 16
    return 16 if all(_is_widened(band, bits) for band in _bands(picture)) else bits


def to_eight_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Values as `bits_of` tells of them as uint8; what lies outside of the range is black or white."""
    if values.dtype.kind == "f":
        values = np.nan_to_num(values, nan=0.0, posinf=65535.0, neginf=0.0)
    if bits == 0:
        return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
    whole = np.clip(values, 0, (1 << bits) - 1).astype(np.uint32)
    return (whole << 8 >> bits).astype(np.uint8)


def _bands(picture: Image.Image) -> Iterator[np.ndarray]:
    step = max(1, _BAND // picture.width)
    for top in range(0, picture.height, step):
        yield np.asarray(picture.crop((0, top, picture.width, min(top + step, picture.height))))


def _is_widened(values: np.ndarray, bits: int) -> bool:
    """Whether `values` may be numbers of `bits` bits widened to 16: behind each only zeros, or its own upper bits again."""
    whole, added = values.astype(np.uint32), 16 - bits
    number, behind = whole >> added, whole & ((1 << added) - 1)
    again = number >> (bits - added) if bits >= added else behind
    return bool(((behind == 0) | (behind == again)).all())


def _significant_bits(data: bytes) -> int:
    """What the chunk sBIT of a grey PNG tells; 16 when there is none, or it makes no sense."""
    at = 8
    while at + 12 <= len(data) and (kind := data[at + 4 : at + 8]) != b"IDAT":
        size = int.from_bytes(data[at : at + 4], "big")
        if kind == b"sBIT" and size == 1:
            return data[at + 8] if 1 <= data[at + 8] <= 16 else 16
        at += 12 + size
    return 16
