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

MAX_BYTES = 16 << 20
"""Largest SVG document, bytes."""
MAX_DEPTH = 200
"""Deepest nesting of elements, `<use>` followed."""
MAX_ELEMENTS = 200_000
"""Elements to draw, `<use>`, patterns, masks and the like followed."""
MAX_EMBEDDED_PIXELS = 16 << 20
"""Pixels of one embedded picture."""

_REFERENCE = re.compile(r"url\(\s*['\"]?\s*#([^)'\"\s]+)")
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
        )  # fmt: skip
        with Image.open(io.BytesIO(png), formats=("PNG",)) as picture:
            return np.asarray(picture.convert("RGB"))
    except (ValueError, OSError) as error:
        raise SampleError("unreadable_image", f"the SVG cannot be drawn ({error})") from None


def _check(root: ET.Element) -> None:
    """Raise SampleError `unsafe_svg` when the drawing reaches outside itself or unfolds to too much."""
    by_id: dict[str, ET.Element] = {}
    for element in root.iter():
        if name := element.get("id"):
            by_id.setdefault(name, element)
        for key, value in element.attrib.items():
            if key.rpartition("}")[2] == "href" and _name(element) in ("image", "feImage"):
                _check_link(value)
    _weigh(root, by_id, {}, 0)


def _name(element: ET.Element) -> str:
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


def _check_link(link: str) -> None:
    if link.strip().startswith("#") or not link.strip():
        return
    embedded = _DATA.match(link)
    if not embedded:
        raise SampleError(
            "unsafe_svg",
            f"the SVG refers to {link[:60]!r}",
            wanted="a picture embedded as data:image/png;base64 or the like",
        )
    try:
        with Image.open(
            io.BytesIO(base64.b64decode(link[embedded.end() :])), formats=("PNG", "JPEG", "GIF", "WEBP")
        ) as picture:
            pixels = picture.width * picture.height
    except (OSError, ValueError, SyntaxError, binascii.Error, Image.DecompressionBombError) as error:
        raise SampleError("unreadable_image", f"a picture embedded in the SVG cannot be read ({error})") from None
    if pixels > MAX_EMBEDDED_PIXELS:
        raise SampleError(
            "bomb", f"a picture of {pixels:,} pixels in an SVG", wanted=f"at most {MAX_EMBEDDED_PIXELS:,}"
        )


def _weigh(element: ET.Element, by_id: dict[str, ET.Element], known: dict[int, int], depth: int) -> int:
    """Elements drawn for `element` when every reference is followed. A circle counts as nothing: resvg breaks it."""
    if depth > MAX_DEPTH:
        raise SampleError("unsafe_svg", f"the SVG is nested deeper than {MAX_DEPTH} elements")
    key = id(element)
    if key in known:
        return known[key]
    known[key] = 0
    weight = 1
    for child in element:
        weight += _weigh(child, by_id, known, depth + 1)
    for name, value in element.attrib.items():
        targets = _REFERENCE.findall(value) if "url(" in value else []
        if name.rpartition("}")[2] == "href" and value.strip().startswith("#"):
            targets.append(value.strip()[1:])
        for target in targets:
            if target in by_id:
                weight += _weigh(by_id[target], by_id, known, depth + 1)
    if weight > MAX_ELEMENTS:
        raise SampleError("unsafe_svg", f"the SVG unfolds to more than {MAX_ELEMENTS:,} elements")
    known[key] = weight
    return weight
