"""Expressions over what strangers wrote: a long input takes no longer than its length, and what they find is what the plain,
slower expressions find that say the same."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from mmlm.config import blank_credentials
from mmlm.corpus.readers.documents import headings_of
from mmlm.features import report, svg_work
from mmlm.features.failures import SampleError
from mmlm.features.image import decode_image
from mmlm.features.report import count_words
from mmlm.features.spec import ImageSpec
from mmlm.stores import answered, blank

LONG = 400_000
"""Characters; the plain expressions take from some minutes to hours for them."""
SECONDS = 2.0
ALONE = report._ALONE


def drawn(style: str) -> None:
    drawing = f'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><style>{style}</style><rect/></svg>'
    decode_image(drawing.encode(), ImageSpec(size=32, patch=8, channels=3))


@pytest.mark.parametrize(
    ("look", "text"),
    [
        pytest.param(drawn, "a" * LONG, id="a style sheet without braces"),
        pytest.param(drawn, "x{" + "a" * LONG, id="a rule without an end"),
        pytest.param(drawn, "x{" + "a" * LONG + "}", id="a property without a value"),
        pytest.param(drawn, "x{" + "a" * 3000 + " " * LONG + "b}", id="blanks behind a property"),
        pytest.param(drawn, "x{fill:url(" + " " * LONG + "}", id="blanks behind url("),
        pytest.param(drawn, "x{fill:" + "url( ' " * (LONG // 7) + "}", id="many references without an end"),
        pytest.param(count_words, "-" * LONG, id="dashes"),
        pytest.param(count_words, "。" * LONG, id="signs of Chinese"),
        pytest.param(lambda text: list(headings_of(text)), "# a" + "#" * LONG + "x", id="signs within a heading"),
        pytest.param(lambda text: list(headings_of(text)), "# a" + " " * LONG + "x", id="blanks within a heading"),
        pytest.param(lambda text: list(headings_of(text)), "#" + " " * LONG, id="a heading of blanks"),
        pytest.param(blank_credentials, "a1" * (LONG // 2), id="a hexadecimal number"),
        pytest.param(blank_credentials, "a://" * (LONG // 4), id="schemes"),
        pytest.param(blank, "https://" * (LONG // 8), id="beginnings of addresses"),
        pytest.param(blank, "https://a?" * (LONG // 10), id="questions in addresses"),
        pytest.param(blank, "https://a?b)" * (LONG // 12), id="addresses in brackets"),
        pytest.param(lambda text: answered(404, text, "http"), "a" * LONG, id="what a store answers"),
    ],
)
def test_a_long_text_takes_no_longer_than_its_length(look: Callable[[str], Any], text: str) -> None:
    started = time.process_time()
    look(text)
    assert time.process_time() - started < SECONDS


def found_plainly(expression: str, flags: int = 0) -> Callable[[str], list[Any]]:
    return re.compile(expression, flags).findall


def plain_headings(text: str) -> list[tuple[int, str]]:
    return [(m.start(), m[1]) for m in re.finditer(r"^#{1,6}[ \t]+(.+?)[ \t#]*$", text, re.M)]


def plain_blank(text: str) -> str:
    return re.sub(r"((?:https?|s3|gs|gcs)://[^\s?'\"<>]+)\?[^\s'\"<>)]*", r"\1?***", blank_credentials(text))


CSS = ["a", "{", "}", " ", "b-", "é", ";", ":", "\n", "url(", "#", "'", '"', ")"]


@pytest.mark.parametrize(
    ("pieces", "ours", "plain"),
    [
        (CSS, svg_work._RULE.findall, found_plainly(r"([^{}]*)\{([^{}]*)\}")),
        (CSS, svg_work._PROPERTY.findall, found_plainly(r"([\w-]+)\s*:\s*([^;]*)")),
        (CSS, svg_work._REFERENCE.findall, found_plainly(r"url\(\s*['\"]?\s*#([^)'\"\s]+)")),
        (["a", "-", "_", " ", "\n", "中", "・", "é", "\u0301", "1", "ｱ"], report._WORDS.findall,
         found_plainly(rf"[{ALONE}]|[^\s{ALONE}]*[^\W{ALONE}][^\s{ALONE}]*")),
        (["#", "a", " ", "\t", "\n", "##", "x", "\r", "\u2028"], lambda text: list(headings_of(text)), plain_headings),
        (["a", "1", "://", "@", "/", " ", "é", "+", ":", "-"], blank_credentials,
         lambda text: re.sub(r"([a-zA-Z][\w+.-]*://)[^/@\s]+@", r"\1***@", text)),
        (["a", "https://", "s3://", "gcs://", "@", "/", " ", "?", "'", ">", ")", "(", "http", "s", "://", "x="], blank,
         plain_blank),
    ],
    ids=["rules", "properties", "references", "words", "headings", "credentials", "queries"],
)  # fmt: skip
def test_what_is_found_is_what_the_plain_expressions_find(
    pieces: list[str], ours: Callable[[str], Any], plain: Callable[[str], Any]
) -> None:
    rng = random.Random(7)
    for _ in range(20_000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(0, 12)))
        assert ours(text) == plain(text), text


def test_words_of_two_scripts_are_told_apart() -> None:
    assert count_words("ab中文cd -- ef") == 5


def test_a_style_sheet_has_an_end() -> None:
    with pytest.raises(SampleError, match="style sheets of 3,000,007 characters") as error:
        drawn("a{b:'" + "c" * 3_000_000 + "'}")
    assert error.value.reason == "unsafe_svg"


@pytest.mark.parametrize(
    ("style", "elements"),
    [
        ("x g g g g{fill:red}", "<g>" * 190 + "</g>" * 190),
        ("g " * 5000 + "g{fill:red}", "<g>" * 190 + "</g>" * 190),
        ("*{fill:red}" * 10_000, "<g/>" * 10_000),
    ],
    ids=["nested", "long", "many"],
)
def test_selectors_that_take_too_long_are_refused(style: str, elements: str) -> None:
    drawing = f'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><style>{style}</style>{elements}</svg>'
    started = time.process_time()
    with pytest.raises(SampleError, match="style sheets of the SVG take too long"):
        decode_image(drawing.encode(), ImageSpec(size=32, patch=8, channels=3))
    assert time.process_time() - started < SECONDS


def test_usual_style_sheets_are_drawn() -> None:
    style = "".join(f".layer .group > .cls-{i} rect, g g g .cls-{i}{{fill:#00f;opacity:1}}" for i in range(500))
    inner = '<g class="cls-7"><rect width="9" height="9"/></g>'
    drawing = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><style>{style}</style>'
        f'<g class="layer"><g class="group">{inner}</g></g></svg>'
    )
    picture_HWC = decode_image(drawing.encode(), ImageSpec(size=32, patch=8, channels=3))
    assert picture_HWC[16, 16].tolist() == [0, 0, 255]
