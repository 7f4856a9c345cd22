"""Tables → drafts: columns by selectors, one record per question asked of a row."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mmlm.corpus.config import Ask, TableSource
from mmlm.corpus.drafts import (
    Draft,
    Outcomes,
    Refusal,
    RefuseError,
    as_field,
    as_label,
    as_labels,
    as_number,
    as_split,
    as_text,
    media_part,
    media_root,
    pick_wording,
)
from mmlm.corpus.readers.rows import Row, read_rows
from mmlm.corpus.records import Part, Record, Target
from mmlm.corpus.select import fill, find, is_template
from mmlm.errors import DataError
from mmlm.storage import sha256_bytes, sha256_json

_HALF = "a text with half a surrogate pair in it"


def read_table(
    source: TableSource, files: Iterable[tuple[str, Path]], data: str, repeats: dict[int, int] | None = None
) -> Outcomes:
    """Drafts of every row of `files` ((name shown, path)), every question of `source.ask` counted. `repeats`: see `read_asked`.

    Raises DataError when a column that the map or a question names is in no row at all.
    """
    rows = ((shown, row, "") for shown, path in files for row in read_rows(path, shown))
    yield from read_asked(source, rows, data, repeats=repeats)


def read_asked(
    source: TableSource,
    rows: Iterable[tuple[str, Row | Refusal, str]],
    data: str,
    by_content: bool = False,
    repeats: dict[int, int] | None = None,
) -> Outcomes:
    """Drafts of `rows` ((source shown, row, its split or "")), as the map and the questions of `source` say.

    `repeats`: how often each row without an id was seen, to be shared among sources: else their equal rows have one id.
    `by_content`: a row without a group is grouped by the content of its media, as long as one record is made of it.
    Raises DataError when a column that the map or a question names is in no row at all.
    """
    reader = _Reader(source, data, by_content, {} if repeats is None else repeats)
    shown: dict[str, None] = {}
    for name, row, split in rows:
        if len(shown) < 3:
            shown[name] = None
        if isinstance(row, Refusal):
            yield row
        else:
            yield from reader.row(name, *row, split)
    reader.require_columns([*shown])


class _Reader:
    """Reads rows; remembers which selectors ever found something, and how often each id-less row was seen."""

    def __init__(self, source: TableSource, data: str, by_content: bool, repeats: dict[int, int]) -> None:
        self.source, self.data, self.root = source, data, source.root
        self.unseen = {s: s for s in _columns(source)}
        self.rows, self.columns = 0, set[str]()
        self.repeats = repeats
        names = [ask.task for ask in source.ask]
        alone = len(source.ask) == 1 and source.ask[0].each is None
        self.by_content = by_content and alone
        self.suffixes = [
            "" if alone else f"#{ask.task}" if names.count(ask.task) == 1 else f"#{ask.task}-{i + 1}"
            for i, ask in enumerate(source.ask)
        ]

    def row(self, shown: str, where: str, row: Any, split: str = "") -> Outcomes:
        if not isinstance(row, dict):
            yield Refusal(where, "", "bad_row", f"a {type(row).__name__} where a mapping of columns is wanted")
            return
        self.rows += 1
        self.root = media_root(self.source.root, shown)
        if len(self.columns) < 1000:
            self.columns.update(str(k) for k in row)
        for selector in [s for s in self.unseen if find(row, s)]:
            del self.unseen[selector]
        try:
            base = self.base(shown, row, split)
        except RefuseError as error:
            yield Refusal(where, "", error.reason, error.detail)
            return
        except RecursionError:
            yield Refusal(where, "", "bad_json", "nested too deeply")
            return
        except UnicodeEncodeError:
            yield Refusal(where, "", "bad_encoding", _HALF)
            return
        for ask, suffix in zip(self.source.ask, self.suffixes, strict=True):
            for key, scope in _entries(ask, row):
                name = base.id + suffix + (f".{key}" if key else "")
                try:
                    if scope is None:
                        raise RefuseError("no_target", f"nothing to ask in `{ask.each}`")
                    yield Draft(self.ask(ask, base, name, row, scope), where)
                except RefuseError as error:
                    yield Refusal(where, name, error.reason, error.detail)
                except UnicodeEncodeError:
                    yield Refusal(where, name, "bad_encoding", _HALF)

    def base(self, shown: str, row: dict[str, Any], given: str = "") -> Record:
        """What all questions of a row share. `given` is the split of its file."""
        columns = self.source.map

        def cell(selector: str | None) -> str | None:
            return as_text(next(iter(find(row, selector)), None)) if selector else None

        identity = cell(columns.id)
        group = cell(columns.group)
        if identity is None:
            identity = sha256_json(_plain(row))[:20]
            group = group or ("" if self.by_content else identity)
            seen = self.repeats.get(int(identity, 16), 0)
            self.repeats[int(identity, 16)] = seen + 1
            identity += f"-{seen + 1}" if seen else ""
        split = as_split(next(iter(find(row, columns.split)), None)) if columns.split else ""
        group = group or ("" if self.by_content else identity)
        return Record(
            identity, (), split=split or self.source.split or given, group=group, lang=cell(columns.lang) or "",
            source=cell(columns.source) or shown, license=cell(columns.license) or self.source.license,
        )  # fmt: skip

    def ask(self, ask: Ask, base: Record, name: str, row: dict[str, Any], scope: dict[str, Any]) -> Record:
        lang = (_value_text(ask.lang, scope, literal=True) if ask.lang else None) or base.lang or self.source.lang
        number = int(sha256_bytes(base.id.encode())[:8], 16)
        target = _target(ask, scope)
        wording, lang = pick_wording(ask.question, lang, number, target.text)
        question = fill(wording, scope)
        if question is None:
            raise RefuseError("no_question", f"a hole of {wording[:60]!r} is empty")
        text = as_text(next(iter(find(scope, ask.text)), None)) if ask.text else None
        parts = [
            *self.media("image", ask.image, scope),
            *self.media("audio", ask.audio, scope),
            *self.media("video", ask.video, scope),
            *self.fields(row),
        ]
        context = _value_text(ask.context, scope) if ask.context else None
        if context:
            parts.append(Part("text", "context", context))
        parts += [Part("text", text=t) for t in (text, question) if t]
        told = text is not None or question != wording or any(p.modality != "text" for p in parts)
        if not told:
            raise RefuseError("no_parts", "neither text, picture, sound, video nor fields in this row")
        return Record(
            name, tuple(parts), ask.task, target, base.split, base.group, lang, base.source, base.license
        )  # fmt: skip

    def media(self, kind: str, own: list[str] | None, scope: dict[str, Any]) -> Iterator[Part]:
        columns = self.source.map
        for selector in own if own is not None else getattr(columns, kind):
            filled = fill(selector, scope) if is_template(selector) else selector
            found = [
                v for one in (find(scope, filled) if filled else []) for v in (one if isinstance(one, list) else [one])
            ]
            found = [v for v in found if v not in ("", None)]
            if found:
                for value in found if columns.many == "all" else found[:1]:
                    yield media_part(kind, value, self.root, self.data)
                return

    def fields(self, row: dict[str, Any]) -> Iterator[Part]:
        columns = self.source.map
        if isinstance(columns.fields, str):
            found = next(iter(find(row, columns.fields)), None)
            named = found if isinstance(found, dict) else {}
        else:
            named = {name: next(iter(find(row, s)), None) for name, s in columns.fields.items()}
        values = {name: as_field(value, name in columns.categories) for name, value in named.items()}
        if any(v is not None for v in values.values()):
            yield Part("fields", fields=values)

    def require_columns(self, shown: list[str]) -> None:
        if not self.rows or not self.unseen:
            return
        missing = sorted(self.unseen)
        close = difflib.get_close_matches(missing[0], sorted(self.columns), 1, 0.5)
        raise DataError(
            f"no row of {', '.join(shown[:3])} has anything at `{'`, `'.join(missing)}`",
            wanted=f"one of its columns: {', '.join(sorted(self.columns)[:20])}",
            cure=(f"did you mean `{close[0]}`? " if close else "") + "change `map` or `ask` in scan.yaml",
        )


def _columns(source: TableSource) -> set[str]:
    """Selectors that some row must satisfy: those that name one column for sure (no fallbacks, no holes)."""
    columns = source.map
    fields = [columns.fields] if isinstance(columns.fields, str) else [*columns.fields.values()]
    single = [*columns.image] if len(columns.image) == 1 else []
    single += [*columns.audio] if len(columns.audio) == 1 else []
    single += [*columns.video] if len(columns.video) == 1 else []
    named = [columns.id, columns.group, columns.split, columns.lang, columns.license, columns.source, *fields, *single]
    for ask in source.ask:
        named += [ask.labels, ask.each] if ask.each is None else [ask.each]
        if ask.each is None:
            named += [ask.label, ask.number, ask.answer, ask.text, ask.context]
    return {s for s in named if s and not is_template(s)}


def _entries(ask: Ask, row: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """(key, what templates see) per record to make of `row`; None where there is nothing to ask."""
    if ask.each is None:
        yield "", row
        return
    values = find(row, ask.each)
    held = values[0] if len(values) == 1 and isinstance(values[0], dict | list) else values
    pairs = [(str(k), v) for k, v in (held.items() if isinstance(held, dict) else enumerate(held))]
    if ask.keep is not None:
        chosen = dict(pairs)
        pairs = [(key, chosen[key]) for key in ask.keep if key in chosen]
    if not pairs:
        yield "", None
    for key, value in pairs:
        yield key, {**row, "key": key, "value": value, "name": ask.names.get(key, key)}


def _value_text(template: str, scope: dict[str, Any], literal: bool = False) -> str | None:
    """The text that a template or selector stands for; `literal`: without holes it is the text itself."""
    if is_template(template):
        text = fill(template, scope)
        return text if text and text.strip() else None
    return template if literal else as_text(next(iter(find(scope, template)), None))


def _target(ask: Ask, scope: dict[str, Any]) -> Target:
    label = as_label(_value_text(ask.label, scope)) if ask.label else None
    labels: tuple[str, ...] | None = None
    if ask.labels:
        found = find(scope, ask.labels)
        labels = as_labels(found[0] if len(found) == 1 else found) if found else None
    number = as_number(next(iter(find(scope, ask.number)), None)) if ask.number else None
    answer = _value_text(ask.answer, scope) if ask.answer else None
    asked = {"label": (ask.label, label), "labels": (ask.labels, labels), "number": (ask.number, number)}
    for what, (selector, value) in asked.items():
        if selector and value is None:
            raise RefuseError("no_target", f"no {what} at `{selector}`")
    if ask.answer and answer is None:
        raise RefuseError("no_target", f"no answer at `{ask.answer}`")
    return Target(label, labels, number, answer)


def _plain(value: Any) -> Any:
    """A row as JSON values, for its hash."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, bytes):
        return sha256_bytes(value)
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
