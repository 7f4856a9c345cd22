"""SVG → pixels, for drawings that nobody vouches for.

resvg opens any file that `<image>` or `<feImage>` names, and unfolds `<use>` without bound. So the drawing is parsed
here first, checked, and only what was checked is written out again and rendered: no entities, no references outside
the document, no system fonts (text is drawn only when a font is embedded as outlines; results do not depend on the
machine).
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import xml.etree.ElementTree as ET

import numpy as np
import resvg_py
from PIL import Image

from mmlm.features.failures import SampleError
from mmlm.features.svg_work import Work, name_of

MAX_BYTES = 16 << 20
"""Largest SVG document, bytes."""
MAX_EMBEDDED_PIXELS = 16 << 20
"""Pixels of one embedded picture."""

_DATA = re.compile(r"\s*data:image/(png|jpe?g|gif|webp)\s*;\s*base64\s*,", re.IGNORECASE)


def looks_like_svg(data: bytes) -> bool:
    head = data[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()
    return head.startswith(b"<") and (b"<svg" in head or b":svg" in head or b"<!DOCTYPE svg" in head)


def render_svg(data: bytes, side: int) -> np.ndarray:
    """The drawing on white, as large as fits into `side` × `side` pixels: (H, W, 3) uint8.

    Raises SampleError `unreadable_image` or `unsafe_svg`.
    """
    if len(data) > MAX_BYTES:
        raise SampleError("too_large", f"an SVG of {len(data):,} bytes", wanted=f"at most {MAX_BYTES:,}")
    try:
        root = ET.fromstring(data)
    except (ET.ParseError, ValueError, LookupError) as error:
        raise SampleError("unreadable_image", f"the SVG cannot be parsed ({error})") from None
    _check(root)
    try:
        png = resvg_py.svg_to_bytes(
            svg_string=ET.tostring(root, encoding="unicode"),
            background="white", skip_system_fonts=True, width=side, height=side,
            dpi=96,  # its own default, 0, makes every length in pt or mm nothing
        )  # fmt: skip
        with Image.open(io.BytesIO(png), formats=("PNG",)) as picture:
            return np.asarray(picture.convert("RGB"))
    except (ValueError, OSError) as error:
        raise SampleError("unreadable_image", f"the SVG cannot be drawn ({error})") from None


def _check(root: ET.Element) -> None:
    """Raise SampleError `unsafe_svg` when the drawing reaches outside itself or takes too long to draw."""
    pixels: dict[int, int] = {}
    for element in root.iter():
        for key, value in element.attrib.items():
            if key.rpartition("}")[2] == "href" and name_of(element) in ("image", "feImage"):
                pixels[id(element)] = _check_link(value)
    Work(root, pixels).of(root)


def _check_link(link: str) -> int:
    """Pixels of the picture that `link` holds, 0 when it leads elsewhere in the document. Raises SampleError."""
    if link.strip().startswith("#") or not link.strip():
        return 0
    embedded = _DATA.match(link)
    if not embedded:
        raise SampleError(
            "unsafe_svg",
            f"the SVG refers to {link[:60]!r}",
            wanted="pictures embedded as data:image/png;base64",
        )
    try:
        with Image.open(
            io.BytesIO(base64.b64decode(link[embedded.end() :])), formats=("PNG", "JPEG", "GIF", "WEBP")
        ) as picture:
            pixels = picture.width * picture.height
    except Image.DecompressionBombError:
        raise SampleError("bomb", "a picture of over 178 million pixels inside an SVG") from None
    except (OSError, ValueError, SyntaxError, binascii.Error) as error:
        raise SampleError("unreadable_image", f"a picture embedded in the SVG cannot be read ({error})") from None
    if pixels > MAX_EMBEDDED_PIXELS:
        raise SampleError("bomb", f"{pixels:,} pixels inside an SVG", wanted=f"at most {MAX_EMBEDDED_PIXELS:,}")
    return pixels
