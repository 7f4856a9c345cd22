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

MAX_OCTAVES = 16
"""Octaves of one noise filter."""

_RULE = re.compile(r"([^{}]*)\{([^{}]*)\}")
_WORD = re.compile(r"[\w-]+|\*")
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
            dpi=96,  # its own default, 0, makes every length in pt or mm nothing
        )  # fmt: skip
        with Image.open(io.BytesIO(png), formats=("PNG",)) as picture:
            return np.asarray(picture.convert("RGB"))
    except (ValueError, OSError) as error:
        raise SampleError("unreadable_image", f"the SVG cannot be drawn ({error})") from None


def _check(root: ET.Element) -> None:
    """Raise SampleError `unsafe_svg` when the drawing reaches outside itself or unfolds to too much."""
    by_id: dict[str, ET.Element] = {}
    rules: list[tuple[set[str], list[str]]] = []
    for element in root.iter():
        if name := element.get("id"):
            by_id.setdefault(name, element)
        for key, value in element.attrib.items():
            if key.rpartition("}")[2] == "href" and _name(element) in ("image", "feImage"):
                _check_link(value)
        if _name(element) == "style":
            rules += _rules("".join(element.itertext()))
        if _name(element) == "feTurbulence" and not _is_small(element.get("numOctaves", "1")):
            raise SampleError(
                "unsafe_svg", f"noise of {element.get('numOctaves')} octaves", wanted=f"at most {MAX_OCTAVES}"
            )
    _weigh(root, by_id, rules, {}, 0)


def _is_small(octaves: str) -> bool:
    try:
        return float(octaves) <= MAX_OCTAVES
    except ValueError:
        return True  # resvg takes the default


def _rules(css: str) -> list[tuple[set[str], list[str]]]:
    """Words of the selector, and the elements referred to, of each rule of a style sheet that refers to any."""
    found = ((set(_WORD.findall(selector)), _REFERENCE.findall(body)) for selector, body in _RULE.findall(css))
    return [(words, targets) for words, targets in found if targets]


def _references(element: ET.Element, rules: list[tuple[set[str], list[str]]]) -> list[str]:
    """Ids that an element refers to by attributes or, at most, by the style sheet."""
    targets = []
    for name, value in element.attrib.items():
        if "url(" in value:
            targets += _REFERENCE.findall(value)
        if name.rpartition("}")[2] == "href" and value.strip().startswith("#"):
            targets.append(value.strip()[1:])
    if rules:
        names = {"*", _name(element), element.get("id", ""), *element.get("class", "").split()}
        targets += [target for words, listed in rules if words & names for target in listed]
    return targets


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
            wanted="pictures embedded as data:image/png;base64",
        )
    try:
        with Image.open(
            io.BytesIO(base64.b64decode(link[embedded.end() :])), formats=("PNG", "JPEG", "GIF", "WEBP")
        ) as picture:
            pixels = picture.width * picture.height
    except (OSError, ValueError, SyntaxError, binascii.Error, Image.DecompressionBombError) as error:
        raise SampleError("unreadable_image", f"a picture embedded in the SVG cannot be read ({error})") from None
    if pixels > MAX_EMBEDDED_PIXELS:
        raise SampleError("bomb", f"{pixels:,} pixels inside an SVG", wanted=f"at most {MAX_EMBEDDED_PIXELS:,}")


def _weigh(
    element: ET.Element, by_id: dict[str, ET.Element], rules: list[tuple[set[str], list[str]]],
    known: dict[int, int], depth: int,
) -> int:  # fmt: skip
    """Elements drawn for `element` when every reference is followed. A circle counts as nothing: resvg breaks it."""
    if depth > MAX_DEPTH:
        raise SampleError("unsafe_svg", f"the SVG is nested deeper than {MAX_DEPTH} elements")
    key = id(element)
    if key not in known:
        known[key] = 0
        followed = [by_id[target] for target in _references(element, rules) if target in by_id]
        weight = 1 + sum(_weigh(other, by_id, rules, known, depth + 1) for other in [*element, *followed])
        if weight > MAX_ELEMENTS:
            raise SampleError("unsafe_svg", f"the SVG unfolds to more than {MAX_ELEMENTS:,} elements")
        known[key] = weight
    return known[key]
