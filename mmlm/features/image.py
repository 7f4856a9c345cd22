"""Picture → pixels: PNG, JPEG, WebP, GIF (first frame), BMP, TIFF and SVG become (size, size, channels) uint8.

One rule for what has no colour: the paper is white. Transparent pixels are laid on white, and `pad` fills up with it.
Sizes are read from the header before anything is decoded. Two ways lead to the same picture: plain JPEG, PNG and WebP
are decoded by libjpeg-turbo and OpenCV; what is odd (palette, alpha, 16 bits, CMYK, broken …) by Pillow, which also has the
last word on whether a file can be read. Both shrink by the average over the pixels that fall together, so nothing
aliases and noise is least. What is large goes first by a whole number to twice the wanted size or a little more: a JPEG is
decoded at a half, a quarter or an eighth; the rest in bands, so that beside the decoded picture there is none of its size.
"""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mmlm.features import colour, depth
from mmlm.features.failures import SampleError
from mmlm.features.image_header import read_jpeg, read_png, read_webp
from mmlm.features.png import made_over
from mmlm.features.spec import ImageSpec
from mmlm.features.svg import looks_like_svg, render_svg

MAX_PIXELS = 64_000_000
"""Largest picture that is decoded."""
MAX_SCANNED = 2_000_000_000
"""Pixels × scans of a progressive JPEG: each scan goes over the whole picture, and a small file may hold thousands."""
BAND = 2 << 20
"""Pixels of a large picture that are flattened and shrunk together."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_ORIENTATION = 0x0112

# Pillow warns above 89 M pixels and raises above 179 M; ours is the lower limit and gives a typed reason.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(slots=True)
class _Decoded:
    """Pixels as they lie in the file, perhaps at reduced size: (H, W) grey, (H, W, 3) RGB or (H, W, 4) CMYK uint8."""

    pixels: np.ndarray
    orientation: int = 1
    profile: bytes | None = None

    @property
    def mode(self) -> str:
        return "L" if self.pixels.ndim == 2 else "RGB" if self.pixels.shape[2] == 3 else "CMYK"


def decode_image(data: bytes, spec: ImageSpec) -> np.ndarray:
    """The picture as (size, size, channels) uint8.

    Raises SampleError: `unreadable_image`, `bomb`, `unsafe_svg`, `too_large`.
    """
    if data.startswith(b"\xff\xd8"):
        decoded = _fast_jpeg(data, spec)
    elif data.startswith(b"\x89PNG"):
        decoded = _fast_png(data)
    elif data.startswith(b"RIFF"):
        decoded = _fast_webp(data, spec)
    elif looks_like_svg(data):
        return _finish(_Decoded(render_svg(data, 2 * spec.size)), spec)
    else:
        decoded = None
    return _finish(decoded, spec) if decoded else decode_by_pillow(data, spec)


def fit_pixels(pixels: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """(H, W, 3) uint8 RGB, such as a frame of a video, as (size, size, channels) uint8."""
    return _finish(_Decoded(pixels), spec)


def _finish(decoded: _Decoded, spec: ImageSpec) -> np.ndarray:
    """Upright, of the spec's size, in sRGB, on white.

    The profile is applied to the few pixels that are kept, not to the many that were read.
    """
    mode = decoded.mode
    transform = colour.to_srgb(decoded.profile, mode)
    pixels, (height, width) = decoded.pixels, decoded.pixels.shape[:2]
    if (by := _reduction(width, height, decoded.orientation, spec)) > 1:
        pixels = _in_bands(lambda top, bottom: decoded.pixels[top:bottom], width, height, by)
    if transform is None:
        pixels = _plain(pixels, mode, spec.channels)
    pixels = _resize(_upright(pixels, decoded.orientation), spec)
    if transform is not None:
        pixels = _plain(colour.apply(transform, np.ascontiguousarray(pixels), mode), "RGB", spec.channels)
    return _square(pixels, spec)


def _plain(pixels: np.ndarray, mode: str, channels: int) -> np.ndarray:
    """Grey or RGB, as wanted; grey is the luma of ITU-R BT.601."""
    wanted = "L" if channels == 1 else "RGB"
    if mode == wanted:
        return pixels
    picture = Image.fromarray(pixels, "CMYK") if mode == "CMYK" else Image.fromarray(pixels)
    return np.asarray(picture.convert(wanted))


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo how the camera was held; `orientation` as in EXIF 2.32."""
    if orientation in (2, 4):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4):
        pixels = pixels[::-1, ::-1]
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
        if orientation in (6, 7):
            pixels = pixels[:, ::-1]
        if orientation in (7, 8):
            pixels = pixels[::-1]
    return pixels


def _inner_size(width: int, height: int, spec: ImageSpec) -> tuple[int, int]:
    """Width and height that a whole upright picture is scaled to."""
    if spec.resize == "stretch":
        return spec.size, spec.size
    pick = min if spec.resize == "pad" else max
    scale = pick(spec.size / width, spec.size / height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _resize(pixels: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """`pad` keeps all of it, `crop` the middle square, `stretch` all but its shape."""
    height, width = pixels.shape[:2]
    if spec.resize == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return _scale(pixels[top : top + side, left : left + side], spec.size, spec.size)
    return _scale(pixels, *_inner_size(width, height, spec))


def _square(pixels: np.ndarray, spec: ImageSpec) -> np.ndarray:
    size, (height, width) = spec.size, pixels.shape[:2]
    if (height, width) != (size, size):
        square = np.full((size, size, *pixels.shape[2:]), 255, np.uint8)
        top, left = (size - height) // 2, (size - width) // 2
        square[top : top + height, left : left + width] = pixels
        pixels = square
    return np.ascontiguousarray(pixels).reshape(size, size, spec.channels)


def _scale(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Each axis that shrinks by averaging, each that grows by cubic interpolation.

    Averaging over whole pixels takes a fifth of the time of averaging over parts of them. So an axis that shrinks to less
    than half is first brought, linearly, to a whole multiple of its new length.
    """
    cv2 = opencv()
    pixels = np.ascontiguousarray(pixels)
    have_height, have_width = pixels.shape[:2]
    wide, high = min(width, have_width), min(height, have_height)
    multiple = (_multiple(have_width, wide), _multiple(have_height, high))
    if multiple != (have_width, have_height):
        pixels = cv2.resize(pixels, multiple, interpolation=cv2.INTER_LINEAR)
    if multiple != (wide, high):
        pixels = cv2.resize(pixels, (wide, high), interpolation=cv2.INTER_AREA)
    if (wide, high) != (width, height):
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_CUBIC)
    return pixels


def _multiple(have: int, wanted: int) -> int:
    """The largest multiple of `wanted` up to `have`, where that is at least twice as much; else `have`."""
    return have // wanted * wanted if have >= 2 * wanted else have


def _in_bands(rows: Callable[[int, int], np.ndarray], width: int, height: int, by: int) -> np.ndarray:
    """The picture shrunk to one `by`-th by averages; `rows(top, bottom)` gives a band of it.

    Where `by` does not divide a side, its last pixels count several times, as in a JPEG that is decoded smaller.
    """
    cv2, bands = opencv(), []
    step = by * max(1, BAND // (by * width))
    for top in range(0, height, step):
        band = rows(top, min(top + step, height))
        right, below = -width % by, -len(band) % by
        if right or below:
            band = cv2.copyMakeBorder(band, 0, below, 0, right, cv2.BORDER_REPLICATE)
        size = (band.shape[1] // by, band.shape[0] // by)
        bands.append(cv2.resize(np.ascontiguousarray(band), size, interpolation=cv2.INTER_AREA))
    return np.concatenate(bands)


@functools.cache
def opencv() -> Any:
    """The module, told to use this thread only: workers are the parallelism, and the bytes must not depend on it."""
    import cv2

    cv2.setNumThreads(1)
    cv2.ocl.setUseOpenCL(False)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # broken files are Pillow's to report
    return cv2


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise SampleError("bomb", f"a picture of {width} × {height} pixels", wanted=f"at most {MAX_PIXELS:,} pixels")


def _reduction(width: int, height: int, orientation: int, spec: ImageSpec) -> int:
    """How many times smaller a picture may be made so that twice the wanted size is left; at least 1."""
    if orientation > 4:
        width, height = height, width
    wanted = _inner_size(width, height, spec)
    return max(1, min(width // (2 * wanted[0]), height // (2 * wanted[1])))


def _jpeg_reduction(width: int, height: int, orientation: int, spec: ImageSpec) -> int:
    """1, 2, 4 or 8: the same for the decoder of JPEG."""
    most = _reduction(width, height, orientation, spec)
    return next(by for by in (8, 4, 2, 1) if by <= most)


def _fast_jpeg(data: bytes, spec: ImageSpec) -> _Decoded | None:
    """A JPEG of 8-bit YCbCr or grey; None when it is odd or broken."""
    import simplejpeg

    header = read_jpeg(data)
    if header is None or header.components not in (1, 3) or (header.components == 3 and header.adobe == 0):
        return None
    _check_size(header.width, header.height)
    if header.progressive:
        _check_scans(data, header.width * header.height)
    by = _jpeg_reduction(header.width, header.height, header.orientation, spec)
    grey = header.components == 1 or (spec.channels == 1 and not header.profile)
    try:
        pixels = simplejpeg.decode_jpeg(
            data, "GRAY" if grey else "RGB",
            min_width=-(-header.width // by), min_height=-(-header.height // by), min_factor=by,
        )  # fmt: skip
    except ValueError:
        return None
    return _Decoded(pixels[..., 0] if grey else pixels, header.orientation, header.profile)


def _check_scans(data: bytes, pixels: int) -> None:
    scans = data.count(b"\xff\xda")
    if scans * pixels > MAX_SCANNED:
        raise SampleError(
            "bomb", f"a progressive JPEG of {pixels:,} pixels in {scans:,} scans",
            wanted=f"at most {MAX_SCANNED:,} pixels times scans",
        )  # fmt: skip


def _fast_png(data: bytes) -> _Decoded | None:
    """A whole PNG of 8-bit grey or RGB; None when it is odd or broken."""
    header = read_png(data)
    if header is None:
        return None
    _check_size(header.width, header.height)
    whole = made_over(data, header)
    if whole is None:
        return None
    cv2 = opencv()
    kind = cv2.IMREAD_GRAYSCALE if header.channels == 1 else cv2.IMREAD_COLOR_RGB
    return _by_opencv(whole, kind | cv2.IMREAD_IGNORE_ORIENTATION, (header.height, header.width))


def _fast_webp(data: bytes, spec: ImageSpec) -> _Decoded | None:
    """A WebP of one picture, without profile or EXIF; None when it is odd or broken.

    Pillow holds one with alpha four times while it decodes it, a GB for the largest; OpenCV twice.
    """
    header = read_webp(data)
    if header is None:
        return None
    _check_size(header.width, header.height)
    cv2 = opencv()
    flags = cv2.IMREAD_UNCHANGED if header.alpha else cv2.IMREAD_COLOR_RGB
    decoded = _by_opencv(data, flags, (header.height, header.width))
    if decoded is None or decoded.pixels.shape[2] == 3:
        return decoded and _Decoded(decoded.pixels[..., ::-1] if header.alpha else decoded.pixels)
    bgra = decoded.pixels

    def on_white(top: int, bottom: int) -> np.ndarray:
        return _flatten(Image.fromarray(cv2.cvtColor(bgra[top:bottom], cv2.COLOR_BGRA2RGBA)))

    by = _reduction(header.width, header.height, 1, spec)
    return _Decoded(_in_bands(on_white, header.width, header.height, by) if by > 1 else on_white(0, header.height))


def _by_opencv(data: bytes, flags: int, shape: tuple[int, int]) -> _Decoded | None:
    cv2 = opencv()
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None
    return _Decoded(pixels) if pixels is not None and pixels.shape[:2] == shape else None


def decode_by_pillow(data: bytes, spec: ImageSpec) -> np.ndarray:
    """As `decode_image` for all but SVG, by Pillow alone: slower, for pictures of any kind."""
    picture = _open(data)
    try:
        profile = picture.info.get("icc_profile")
        if picture.format == "JPEG":
            by = _jpeg_reduction(picture.width, picture.height, _orientation(picture), spec)
            picture.draft("RGB" if profile or spec.channels == 3 else "L", (picture.width // by, picture.height // by))
        picture.load()  # also turns a TIFF upright, and finds what a PNG says behind its pixels
        orientation, (width, height) = _orientation(picture), picture.size
        bits = depth.bits_of(picture, data) if picture.mode.startswith(("I", "F")) else 8
        if (by := _reduction(width, height, orientation, spec)) > 1:
            band = functools.partial(_flat_band, picture, bits)
            pixels = _in_bands(band, width, height, by)
        else:
            pixels = _flatten(picture, bits)
        return _finish(_Decoded(pixels, orientation, profile), spec)
    except (MemoryError, SampleError):
        raise
    except Exception as error:  # decoders meet hostile bytes in more ways than they name
        raise SampleError(
            "unreadable_image",
            f"the picture cannot be decoded ({type(error).__name__}: {error})",
            cure="is the file complete?",
        ) from None


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
    _check_size(*picture.size)
    if picture.format == "JPEG":
        _check_scans(data, picture.width * picture.height)
    return picture


def _orientation(picture: Image.Image) -> int:
    try:
        value = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # a broken EXIF block is no reason to lose the picture
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _flat_band(picture: Image.Image, bits: int, top: int, bottom: int) -> np.ndarray:
    return _flatten(picture.crop((0, top, picture.width, bottom)), bits)


def _flatten(picture: Image.Image, bits: int = 16) -> np.ndarray:
    """Palette, alpha and `bits` of grey (`depth.bits_of`) as plain 8-bit grey, RGB or CMYK; transparent pixels on white."""
    if picture.mode.startswith(("I", "F")):
        return depth.to_eight_bits(np.asarray(picture), bits)
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        paper = Image.new("RGBA", rgba.size, "white")
        paper.alpha_composite(rgba)
        return np.asarray(paper.convert("L" if picture.mode in ("LA", "La", "L", "1") else "RGB"))
    if picture.mode not in ("L", "RGB", "CMYK"):
        picture = picture.convert("L" if picture.mode == "1" else "RGB")
    return np.asarray(picture)
