"""Picture → pixels: PNG, JPEG, WebP, GIF (first frame), BMP and SVG become (size, size, channels) uint8.

One rule for what has no colour: the paper is white. Transparent pixels are laid on white, and `pad` fills up with it.
Sizes are read from the header before anything is decoded.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from mmlm.features.failures import SampleError
from mmlm.features.spec import ImageSpec
from mmlm.features.svg import looks_like_svg, render_svg

MAX_PIXELS = 64_000_000
"""Largest picture that is decoded."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")

# Pillow warns above 89 M pixels and raises above 179 M; ours is the lower limit and gives a typed reason.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode_image(data: bytes, spec: ImageSpec) -> np.ndarray:
    """The picture as (size, size, channels) uint8.

    Raises SampleError: `unreadable_image`, `bomb`, `unsafe_svg`, `too_large`.
    """
    if looks_like_svg(data):
        picture = Image.fromarray(render_svg(data, 2 * spec.size))
        return _fit(picture.convert(_mode(spec)), spec)
    picture = _open(data)
    try:
        if picture.format == "JPEG":  # decodes at an eighth, a quarter or half size where that is large enough
            picture.draft(_mode(spec), (2 * spec.size, 2 * spec.size))
        picture.load()
        return _fit(_flatten(ImageOps.exif_transpose(picture), spec), spec)
    except MemoryError:
        raise
    except Exception as error:  # decoders meet hostile bytes in more ways than they name
        raise SampleError(
            "unreadable_image",
            f"the picture cannot be decoded ({type(error).__name__}: {error})",
            cure="is the file complete?",
        ) from None


def _mode(spec: ImageSpec) -> str:
    return "L" if spec.channels == 1 else "RGB"


def _open(data: bytes) -> Image.Image:
    """The picture with only its header read, its size checked."""
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise SampleError("bomb", "a picture of over 178 million pixels", wanted=f"at most {MAX_PIXELS:,}") from None
    except MemoryError:
        raise
    except Exception as error:
        what = "the file is empty" if not data else "the file is no picture that can be read"
        detail = "" if isinstance(error, Image.UnidentifiedImageError) else f" ({error})"
        raise SampleError("unreadable_image", what + detail, wanted="PNG, JPEG, WebP, GIF, BMP or SVG") from None
    if picture.width * picture.height > MAX_PIXELS:
        raise SampleError(
            "bomb", f"a picture of {picture.width} × {picture.height} pixels", wanted=f"at most {MAX_PIXELS:,} pixels"
        )
    return picture


def _flatten(picture: Image.Image, spec: ImageSpec) -> Image.Image:
    """Palette, alpha, 16 bit and CMYK as plain 8-bit grey or RGB; transparent pixels on white."""
    if picture.mode.startswith(("I", "F")):  # 16 bits a pixel: the upper 8 of them
        values = np.asarray(picture).astype(np.int64)
        picture = Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        paper = Image.new("RGBA", rgba.size, "white")
        paper.alpha_composite(rgba)
        picture = paper
    return picture.convert("RGB").convert(_mode(spec)) if picture.mode == "P" else picture.convert(_mode(spec))


def _fit(picture: Image.Image, spec: ImageSpec) -> np.ndarray:
    """Resize to the spec's square: `pad` keeps all of it, `crop` the middle, `stretch` its shape not."""
    size = spec.size
    if picture.size != (size, size):
        if spec.resize == "stretch":
            picture = _scale(picture, (size, size))
        else:
            pick = min if spec.resize == "pad" else max
            scale = pick(size / picture.width, size / picture.height)
            width, height = (max(1, round(side * scale)) for side in picture.size)
            picture = _scale(picture, (width, height))
            square = Image.new(picture.mode, (size, size), "white")
            square.paste(picture, ((size - width) // 2, (size - height) // 2))
            picture = square
    pixels = np.asarray(picture)
    return pixels.reshape(size, size, spec.channels)


def _scale(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Shrink by averaging over the pixels that fall together (no aliasing, least noise), enlarge smoothly."""
    if picture.size == size:
        return picture
    shrink = size[0] <= picture.width and size[1] <= picture.height
    if shrink and picture.width % size[0] == 0 and picture.height % size[1] == 0:
        return picture.resize(size, Image.Resampling.BOX)  # whole factor: the exact average of each block
    return picture.resize(size, Image.Resampling.HAMMING if shrink else Image.Resampling.BICUBIC, reducing_gap=3.0)
