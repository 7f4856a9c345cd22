"""Selectors: where a value lies in a row of nested mappings and lists.

    label                    a column; a column whose very name is `a.b[0]` wins over the path of that spelling
    meta.features.age        nested keys
    audio[0].path            an item of a list
    audio[lang=fr].path      the items whose `lang` is "fr"; several conditions with commas
    pictures[].file          all items

Templates are texts with selectors in braces: "What is this called in {name}?". Nothing is ever evaluated as code.
"""

from __future__ import annotations

import re
from typing import Any

_STEP = re.compile(r"([^.\[\]]*)((?:\[[^\[\]]*\])*)(?:\.(?=.)|$)")
_BRACKET = re.compile(r"\[([^\[\]]*)\]")
_HOLE = re.compile(r"\{([^{}]+)\}")


def check_selector(text: str) -> str:
    """`text` itself. Raises ValueError when it is no selector (holes of templates are allowed in it)."""
    rest = _HOLE.sub("x", text)
    if not rest:
        raise ValueError("an empty selector")
    while rest:
        match = _STEP.match(rest)
        if not match or not (match[1] or match[2]):
            raise ValueError(
                f"{text!r} is no selector; wanted something like meta.age, audio[0].path, audio[lang=fr].path"
            )
        rest = rest[match.end() :]
    return text


def check_template(text: str) -> str:
    """`text` itself. Raises ValueError when a brace is not closed or a hole holds no selector."""
    if "{" not in text and "}" not in text:
        return check_selector(text)
    if re.search(r"[{}]", _HOLE.sub("", text)):
        raise ValueError(f"{text!r} has a brace without its partner")
    for hole in _HOLE.findall(text):
        check_selector(hole)
    return text


def is_template(text: str) -> bool:
    return "{" in text


def find(value: Any, selector: str) -> list[Any]:
    """All values at `selector`, in order; missing ones and nulls left out."""
    if value is None:
        return []
    if not selector:
        return [value]
    if isinstance(value, dict) and selector in value:
        return [] if value[selector] is None else [value[selector]]
    match = _STEP.match(selector)
    if not match or not (match[1] or match[2]):
        return []
    name, brackets, rest = match[1], match[2], selector[match.end() :]
    if name:
        if not isinstance(value, dict):
            return []
        value = value.get(name)
    found = [value]
    for inside in _BRACKET.findall(brackets):
        found = [item for one in found for item in _inside(one, inside.strip())]
    return [leaf for one in found for leaf in find(one, rest)]


def _inside(value: Any, inside: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        return []
    if inside in ("", "*"):
        return list(value)
    if re.fullmatch(r"-?\d+", inside):
        at = int(inside)
        return [value[at]] if -len(value) <= at < len(value) else []
    conditions = [c.partition("=") for c in inside.split(",")]
    return [
        item
        for item in value
        if isinstance(item, dict)
        and all(sign and _same(item.get(key.strip()), wanted.strip().strip("'\"")) for key, sign, wanted in conditions)
    ]


def _same(value: Any, wanted: str) -> bool:
    return value is not None and str(value) == wanted


def fill(template: str, row: Any) -> str | None:
    """`template` with every hole filled; None when one of them is missing in `row`."""
    missing = False

    def put(match: re.Match[str]) -> str:
        nonlocal missing
        values = find(row, match[1])
        missing = missing or not values
        return str(values[0]) if values else ""

    text = _HOLE.sub(put, template)
    return None if missing else text
