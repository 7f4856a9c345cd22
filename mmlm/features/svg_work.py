"""How much work is it to draw an SVG? An estimate from the document alone, before anything is drawn.

The unit is one shape that covers the whole picture (about 0.1 ms at 448 pixels a side with resvg 0.5.0). A document of
a few kilobytes can ask for hours: references that unfold, a marker at every corner of a long path, layers, filters,
dashes without number. The estimate is deterministic, so that a drawing is refused on every machine or on none.
"""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from itertools import pairwise

from mmlm.features.failures import SampleError

MAX_DEPTH = 200
"""Deepest nesting of elements, references followed."""
MAX_WORK = 100_000
"""Units of work of one drawing: below 10 s on a slow core, measured with each kind of element alone."""
MAX_OCTAVES = 16
"""Octaves of one noise filter."""
MAX_KERNEL = 81
"""Values of one convolution filter's matrix."""
MAX_STYLE = 2 << 20
"""Characters of all style sheets; what is longer than some thousand holds fonts or pictures."""
MAX_MATCHES = 50_000_000
"""Looks at one element by all selectors together: below 10 s."""
LAYER = 40
"""A group that is drawn apart and laid over the rest: opacity, masks, clips, blend modes."""
PRIMITIVE = 200
"""One step of a filter; noise costs that per octave."""
PIXELS = 10_000
"""Pixels of an embedded picture decoded in one unit."""
DASHES = 300
"""Dashes drawn in one unit."""
MOST_DASHES = 1_000_000
"""Above this resvg draws no dashes at all."""

# Each looks at a character a few times only, whatever the document holds: none begins within what it has looked through.
_RULE = re.compile(r"(?<![^{}])([^{}]*+)\{([^{}]*+)\}")
_WORD = re.compile(r"[\w-]+|\*")
_REFERENCE = re.compile(r"url\(\s*+(?:['\"]\s*+)?+#([^)'\"\s]+)")
_PROPERTY = re.compile(r"(?<![\w-])([\w-]++)\s*+:\s*+([^;]*+)")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_APART = frozenset(("filter", "mask", "clip-path", "mix-blend-mode", "isolation"))
_TELLING = _APART | {"opacity", "marker", "marker-mid", "stroke-dasharray"}
_SHAPES = frozenset(("path", "polyline", "polygon", "line", "rect", "circle", "ellipse"))

Context = tuple[int, float]
"""What an element inherits: work of the marker at every corner, and the length of dash and gap (0: a whole line)."""


class Work:
    """Adds up the work of a parsed drawing. It and `of` raise SampleError `unsafe_svg` when it is too much."""

    def __init__(self, root: ET.Element, pixels: Mapping[int, int] | None = None) -> None:
        """`pixels`: id() of an element → pixels of the picture embedded in it, which is decoded at every use."""
        self.pixels = pixels or {}
        self.by_id: dict[str, ET.Element] = {}
        self.rules: list[tuple[set[str], dict[str, str], list[str]]] = []
        sheets = []
        for element in root.iter():
            if name := element.get("id"):
                self.by_id.setdefault(name, element)
            if name_of(element) == "style":
                sheets.append("".join(element.itertext()))
        if (size := sum(map(len, sheets))) > MAX_STYLE:
            raise SampleError("unsafe_svg", f"style sheets of {size:,} characters", wanted=f"at most {MAX_STYLE:,}")
        _check_matches(root, sheets)
        for sheet in sheets:
            self.rules += _rules(sheet)
        self.known: dict[tuple[int, Context], int] = {}
        self.visits = 0

    def of(self, element: ET.Element, inherited: Context = (0, 0.0), depth: int = 0) -> int:
        """The work for `element` when every reference is followed. A circle counts as nothing: resvg breaks it."""
        if depth > MAX_DEPTH:
            raise SampleError("unsafe_svg", f"the SVG is nested deeper than {MAX_DEPTH} elements")
        style, targets = self._style(element)
        context = self._context(style, inherited, depth)
        key = (id(element), context)
        if key in self.known:
            return self.known[key]
        self.known[key] = 0
        self.visits += 1
        work = self._own(element, style, context)
        for other in [*element, *(self.by_id[target] for target in targets if target in self.by_id)]:
            work += self.of(other, context, depth + 1)
            if work > MAX_WORK or self.visits > MAX_WORK:
                raise SampleError(
                    "unsafe_svg", "the SVG takes too long to draw", wanted=f"at most the work of {MAX_WORK:,} shapes"
                )
        self.known[key] = work
        return work

    def _style(self, element: ET.Element) -> tuple[dict[str, str], list[str]]:
        """The properties that tell of work, and the ids referred to, by attributes or, at most, by the style sheet."""
        style: dict[str, str] = {}
        targets: list[str] = []
        if self.rules:
            names = {"*", name_of(element), element.get("id", ""), *element.get("class", "").split()}
            for words, properties, found in self.rules:
                if words & names:
                    style |= properties
                    targets += found
        for name, value in element.attrib.items():
            if "url(" in value:
                targets += _REFERENCE.findall(value)
            if name.rpartition("}")[2] == "href" and value.strip().startswith("#"):
                targets.append(value.strip()[1:])
            if name in _TELLING:
                style[name] = value
            elif name == "style":
                style |= _properties(value)
        return style, targets

    def _context(self, style: dict[str, str], inherited: Context, depth: int) -> Context:
        marker, period = inherited
        for name in ("marker", "marker-mid"):
            if name in style:
                found = [self.by_id[i] for i in _REFERENCE.findall(style[name]) if i in self.by_id]
                marker = sum(self.of(one, (0, period), depth + 1) for one in found)
        if dashes := style.get("stroke-dasharray"):
            period = sum(abs(n) for n in _numbers(dashes))
        return marker, period

    def _own(self, element: ET.Element, style: dict[str, str], context: Context) -> int:
        name, work = name_of(element), 1 + self.pixels.get(id(element), 0) // PIXELS
        if name.startswith("fe"):
            return _primitive(element, name)
        if any(style.get(one, "none").strip() not in ("none", "normal", "auto") for one in _APART):
            work += LAYER
        if style.get("opacity", "1").strip() not in ("1", "1.0", "100%"):
            work += LAYER
        marker, period = context
        if name in _SHAPES and (marker or period):
            values = [n for key in ("d", "points") for n in _numbers(element.get(key, ""))]
            work += marker * (len(values) // 2)
            if period:
                values += [
                    n for key in ("width", "height", "r", "rx", "x2", "y2") for n in _numbers(element.get(key, ""))
                ]
                dashes = 4 * sum(map(abs, values)) / period  # coordinates are no less than half the way between them
                work += round(min(dashes, MOST_DASHES) / DASHES)
        return work


def name_of(element: ET.Element) -> str:
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


def _primitive(element: ET.Element, name: str) -> int:
    """The work of one step of a filter. Raises SampleError `unsafe_svg` for one whose work cannot be bounded."""
    if name == "feMorphology" and any(n > 0 for n in _numbers(element.get("radius", ""))):
        # the square of a radius in pixels for every pixel, and transforms make any radius large
        raise SampleError("unsafe_svg", "a filter that thickens or thins (feMorphology)", wanted="a drawing without it")
    if name == "feConvolveMatrix" and len(element.get("kernelMatrix", "").replace(",", " ").split()) > MAX_KERNEL:
        raise SampleError("unsafe_svg", "a convolution of a large matrix", wanted=f"at most {MAX_KERNEL} values")
    if name != "feTurbulence":
        return PRIMITIVE
    octaves = max([1.0, *_numbers(element.get("numOctaves", "1"))[:1]])
    if octaves > MAX_OCTAVES:
        raise SampleError("unsafe_svg", f"noise of {octaves:g} octaves", wanted=f"at most {MAX_OCTAVES}")
    return round(PRIMITIVE * octaves)


def _numbers(value: str) -> list[float]:
    return [float(n) for n in _NUMBER.findall(value)]


def _properties(css: str) -> dict[str, str]:
    return {name: value for name, value in _PROPERTY.findall(css) if name in _TELLING}


def _rules(css: str) -> list[tuple[set[str], dict[str, str], list[str]]]:
    """Words of the selector, telling properties, and the ids referred to, of each rule that has any."""
    found = (
        (set(_WORD.findall(selector)), _properties(body), _REFERENCE.findall(body))
        for selector, body in _RULE.findall(css)
    )
    return [rule for rule in found if rule[1] or rule[2]]


def _check_matches(root: ET.Element, sheets: list[str]) -> None:
    """Raise SampleError `unsafe_svg` when it takes too long to find what the selectors mean.

    resvg tries every choice of ancestors for the words of a selector that stand behind blanks.
    """
    if not any(sheets):
        return
    level, counts = [root], list[int]()
    while level and len(counts) <= MAX_DEPTH:
        counts.append(len(level))
        level = [child for element in level for child in element]
    looks: dict[int, int] = {}
    total = 0
    for selector in (one for sheet in sheets for rule, _ in _RULE.findall(sheet) for one in rule.split(",")):
        words = selector.split()
        steps = sum(before[-1] not in ">+~" and word[0] not in ">+~" for before, word in pairwise(words))
        steps = min(steps, len(counts))
        if steps not in looks:
            looks[steps] = sum(
                count * sum(math.comb(depth, taken) for taken in range(steps + 1)) for depth, count in enumerate(counts)
            )
        total += looks[steps]
    if total > MAX_MATCHES:
        raise SampleError(
            "unsafe_svg",
            "the style sheets of the SVG take too long",
            wanted=f"at most {MAX_MATCHES:,} looks at an element",
        )
