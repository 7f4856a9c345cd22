"""Print the tables of config keys that stand in docs/reference.md, read off the config classes themselves.

python docs/make_reference.py            # print them
python docs/make_reference.py --write    # put them into docs/reference.md, between its two marks
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from mmlm.config import Config
from mmlm.story import VERBS, AboutConfig

PAGE = Path(__file__).with_name("reference.md")
BEGIN, END = "<!-- keys: begin (docs/make_reference.py) -->", "<!-- keys: end -->"
WORDS = {str: "text", int: "whole number", float: "number", bool: "true, false", dict: "mapping", list: "list"}
BOUNDS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}"}

Row = tuple[str, str, str, str]
"""key, type, default, meaning."""


def tables() -> str:
    """A section per file of a story, a table of its keys in each; distill.yaml without what it shares with train.yaml."""
    parts: list[str] = []
    stages: dict[str, type[Config]] = {"story": AboutConfig, **VERBS}
    shared: set[Row] = set()
    for stage, kind in stages.items():
        later: list[tuple[str, type[Config]]] = []
        rows = [row for row in _rows(kind, "", None, later) if stage != "distill" or row not in shared]
        shared = set(rows) if stage == "train" else shared
        parts += [f"### {stage}.yaml", _sentence(kind)]
        parts += ["Every key of train.yaml, with these differences:"] if stage == "distill" else []
        parts.append(_table(rows))
        for prefix, option in later:
            tag = get_args(option.model_fields["kind"].annotation)[0]
            title = f"#### sources of kind `{tag}`" if "[]" in prefix else f"#### `{prefix[:-1]}` of kind `{tag}`"
            parts += [title, _sentence(option), _table(_rows(option, prefix, None, []))]
    return "\n\n".join(part for part in parts if part)


def _sentence(kind: type[Config]) -> str:
    own = kind.__dict__.get("__doc__") or ""
    return " ".join(own.split())


def _table(rows: Iterable[Row]) -> str:
    lines = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for key, values, default, meaning in rows:
        cells = (f"`{key}`", values, default, meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _rows(
    kind: type[Config], prefix: str, defaults: Config | None, later: list[tuple[str, type[Config]]]
) -> Iterator[Row]:
    """The keys of `kind` with those of its sections. Kinds of a list whose items are told apart go to `later`."""
    for name, field in kind.model_fields.items():
        default = getattr(defaults, name) if defaults is not None else field.get_default(call_default_factory=True)
        meaning = " ".join((field.description or "").split())
        sections = _sections(field.annotation)
        many = "list" in _names(field.annotation)
        key = f"{prefix}{name}"
        if not sections:
            yield key, _values(field), _default(field, default), meaning
        elif len(sections) > 1:
            shown = "list of sources" if many else "section"
            yield key, f"{shown}, told apart by `kind`", _default(field, default), meaning
            later += [(f"{key}[]." if many else f"{key}.", section) for section in sections]
        else:
            if many or not isinstance(default, Config):
                shown = "list of sections" if many else "section"
                yield key, shown, _default(field, default), meaning or _sentence(sections[0])
            below = default if isinstance(default, Config) else None
            yield from _rows(sections[0], f"{key}[]." if many else f"{key}.", below, later)


def _sections(annotation: Any) -> list[type[Config]]:
    """The config classes in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [found for inner in _inner(annotation) for found in _sections(inner)]


def _names(annotation: Any) -> set[str]:
    """Names of the generic types on the way, such as `list`."""
    here = getattr(get_origin(annotation), "__name__", "")
    return {here} | {name for inner in _inner(annotation) for name in _names(inner)}


def _inner(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Literal:
        return ()
    inner = get_args(annotation)
    return inner[:1] if get_origin(annotation) is Annotated else inner


def _values(field: FieldInfo) -> str:
    bounds = [
        text.format(v) for m in field.metadata for k, text in BOUNDS.items() if (v := getattr(m, k, None)) is not None
    ]
    return ", ".join([_words(field.annotation), *bounds])


def _words(annotation: Any) -> str:
    """An annotation in words: `Literal["a", "b"] | None` → `a`, `b`."""
    origin = get_origin(annotation)
    if origin is Literal:
        return ", ".join(f"`{v}`" if v != "" else "empty" for v in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(a) for a in get_args(annotation) if a is not type(None)))
    if origin is Annotated:
        return _words(get_args(annotation)[0])
    if origin in (list, tuple):
        inner = get_args(annotation)[0]
        return (
            f"list of lists of {_words(get_args(inner)[0])}"
            if get_origin(inner) is list
            else f"list of {_words(inner)}"
        )
    if origin is dict:
        return f"name → {_words(get_args(annotation)[1])}"
    return WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo, value: Any) -> str:
    if field.is_required():
        return "must be given"
    if value is None:
        return "absent"
    if isinstance(value, Config) and "kind" in type(value).model_fields:
        return f"`kind: {value.kind}`"  # type: ignore[attr-defined]
    if value in ("", [], {}):
        return "empty"
    if isinstance(value, float) and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"`{value:g}`"
    plain = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return f"`{plain}`"


def write() -> None:
    """Put the tables between the marks of docs/reference.md."""
    head, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{PAGE} lacks the marks {BEGIN} and {END}")
    PAGE.write_text(f"{head}{BEGIN}\n\n{tables()}\n\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    write() if sys.argv[1:] == ["--write"] else print(tables())
