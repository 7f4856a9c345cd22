"""Selectors and templates."""

from __future__ import annotations

import pytest

from mmlm.corpus.select import check_selector, check_template, fill, find

ROW = {
    "label": "cat",
    "a.b": "dotted",
    "meta": {"age": 3, "x.y": 4, "gone": None},
    "audio": [{"path": "1.ogg", "lang": "en", "kind": "sound"}, {"path": "2.ogg", "lang": "fr", "kind": "speech"}],
    "pictures": ["p.png", "q.png"],
    "texts": {"zh_CN": "猫"},
}


@pytest.mark.parametrize(
    ("selector", "wanted"),
    [
        ("label", ["cat"]),
        ("a.b", ["dotted"]),
        ("meta.age", [3]),
        ("meta.x.y", [4]),
        ("meta.gone", []),
        ("meta.gone.deeper", []),
        ("audio[0].path", ["1.ogg"]),
        ("audio[-1].path", ["2.ogg"]),
        ("audio[7].path", []),
        ("audio[lang=fr].path", ["2.ogg"]),
        ("audio[kind=speech,lang=fr].path", ["2.ogg"]),
        ("audio[kind=speech,lang=en].path", []),
        ("audio[].path", ["1.ogg", "2.ogg"]),
        ("pictures[1]", ["q.png"]),
        ("pictures", [["p.png", "q.png"]]),
        ("label.deeper", []),
        ("label[0]", []),
        ("nothing", []),
    ],
)
def test_find(selector: str, wanted: list[object]) -> None:
    assert find(ROW, selector) == wanted


def test_fill_puts_values_in_and_says_when_one_is_missing() -> None:
    assert fill("a {label} of {meta.age}", ROW) == "a cat of 3"
    assert fill("a {nothing}", ROW) is None
    assert fill("audio[lang={label}].path", ROW) == "audio[lang=cat].path"


def test_a_value_with_braces_is_not_filled_again() -> None:
    assert fill("{a}", {"a": "{b}", "b": "secret"}) == "{b}"


@pytest.mark.parametrize("text", ["", "a[", "a]b", "a..b", "a[0", "[a"])
def test_bad_selectors_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        check_selector(text)


@pytest.mark.parametrize("text", ["{", "a}", "{}", "{a..b}", "{a{b}}"])
def test_bad_templates_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        check_template(text)
