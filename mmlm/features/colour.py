"""Embedded colour profiles → sRGB, by LittleCMS (in Pillow).

Relative colorimetric with black point compensation, as viewers of photographs do: white stays white. A profile that is
broken, too large or made for another kind of picture is ignored, and so is one that says what sRGB says.
"""

from __future__ import annotations

import functools
import io
from typing import Any

import numpy as np
from PIL import Image, ImageCms

MAX_PROFILE = 4 << 20
"""Largest profile that is read, bytes; those of presses have up to 2 MB."""
SAME = 2
"""A profile that moves no colour by more than this (of 255) is taken for sRGB."""
_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}


def to_srgb(profile: bytes | None, mode: str) -> Any | None:
    """The transform from pictures of `mode` (L, RGB or CMYK) to RGB, or None when there is nothing to do."""
    if not profile or len(profile) > MAX_PROFILE or mode not in _SPACES:
        return None
    return _transform(profile, mode)


@functools.lru_cache(8)
def _transform(profile: bytes, mode: str) -> Any | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(
            source, ImageCms.createProfile("sRGB"), mode, "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )  # fmt: skip
        if mode != "CMYK":
            probe = _probe(mode)
            moved = np.asarray(ImageCms.applyTransform(probe, transform)).astype(int) - np.asarray(probe.convert("RGB"))
            if abs(moved).max() <= SAME:
                return None
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, AttributeError):
        return None
    return transform


def _probe(mode: str) -> Image.Image:
    """Every grey, or a cube of colours."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(steps, steps, steps), -1).reshape(27, 27, 3))


def apply(transform: Any, pixels: np.ndarray, mode: str) -> np.ndarray:
    """(H, W) or (H, W, C) uint8 of `mode` → (H, W, 3) uint8 sRGB."""
    picture = Image.fromarray(pixels, "CMYK") if mode == "CMYK" else Image.fromarray(pixels)
    return np.asarray(ImageCms.applyTransform(picture, transform))
