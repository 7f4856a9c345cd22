"""The columns of somebody's table, looked at: which one is what."""

from __future__ import annotations

import contextlib
import math
import os
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmlm.corpus.column_names import (
    ANSWERS_BELOW,
    GROUP,
    ID,
    LANG,
    LANGUAGE,
    SPLIT,
    TEXT,
    TEXTS_BELOW,
    is_id,
    last_of,
    name_of,
    parent_of,
)  # fmt: skip
from mmlm.corpus.drafts import SPLIT_NAMES, Refusal, RefuseError, as_text, media_part, media_uri
from mmlm.corpus.select import check_selector, find
from mmlm.corpus.sniff import AUDIO_ENDINGS, IMAGE_ENDINGS, sniff
from mmlm.errors import DataError

ROWS = 2_000
"""Rows of a table that are looked at, drawn from all of it."""
MOST_HELD = 256 << 20
"""Bytes of rows that are held while a table is looked at."""
LEAST = 50
"""Rows that are looked at however large they are."""
MOST_CLASSES = 200
LEAST_GROUPS = 10
"""Groups that a column must tell apart: of fewer no validation and test splits can be made."""
WELL_FILLED = 0.9
"""Share of the rows that must have a value in a column which is to be answered: rows without one are refused."""


class Columns:
    """The columns of tables that belong together (nested ones by their selectors) and what each of them is.

    `tables` are the rows that are looked at of each. `free` are those without a role yet; `odd` those that are never used:
    numbers of rows, and names that are no selectors.
    """

    def __init__(
        self, data: Path, groups: list[tuple[str, str]], tables: list[list[dict[str, Any]]], total: int
    ) -> None:
        self.data, self.groups, self.tables, self.total = data, groups, tables, total
        self.rows = rows = [row for table in tables for row in table]
        self.values = {c: [v for r in rows for v in find(r, c)[:1]] for c in flat_columns(rows)}
        self.values = {c: [v for v in vs if v != ""] for c, vs in self.values.items()}
        self.values = {c: vs for c, vs in self.values.items() if vs}
        self.free = [c for c in self.values if _can_be_written(c) and not self.numbers_rows(c)]
        self.odd = [c for c in self.values if c not in self.free]
        self.among_answers = {c for c in self.values if parent_of(c) in ANSWERS_BELOW}
        self.leaking: list[str] = []
        self.root = ""
        self.roots = [""] * len(groups)

    def other_answers(self) -> list[str]:
        """Free columns that stand among answers."""
        return [c for c in self.free if c in self.among_answers]

    def filled(self, column: str) -> float:
        """Share of the rows that have a value."""
        return len(self.values[column]) / max(1, len(self.rows))

    def take(self, column: str | None) -> str | None:
        if column:
            self.free.remove(column)
        return column

    def named(self, names: set[str] | tuple[str, ...]) -> list[str]:
        """Free columns whose name (its last part) is one of `names`, in the order of a tuple."""
        found = [c for c in self.single() if last_of(c) in names]
        return sorted(found, key=lambda c: names.index(last_of(c))) if isinstance(names, tuple) else found

    def texts(self, column: str) -> list[str]:
        found = []
        for value in self.values[column]:
            try:
                found.append(as_text(value) or "")
            except RefuseError:
                return []
        return found

    def distinct(self, column: str) -> set[str]:
        return set(self.texts(column))

    def media(self, kind: str) -> str | None:
        endings = IMAGE_ENDINGS if kind == "image" else AUDIO_ENDINGS
        for column in self.free:
            values = self.values[column][:200]
            hits = sum(_is_media(v, kind, endings) for v in values)
            if hits * 2 > len(values):
                return self.take(column)
        return None

    def find_root(self, columns: list[str]) -> None:
        """Choose the folder that most media paths are relative to; `roots` are those of each table."""
        self._find_root(columns)
        self.roots = [self.root] * len(self.groups)
        own = [os.path.dirname(name) for name, _ in self.groups]
        if len(set(own)) > 1 and all(self._lie_below(*one, columns) for one in zip(own, self.tables, strict=True)):
            self.roots = own  # such as train/metadata.jsonl and test/metadata.jsonl with their pictures beside them

    def _lie_below(self, root: str, rows: list[dict[str, Any]], columns: list[str]) -> bool:
        """Whether most media paths of a table are relative to the folder `root`."""
        paths = [v for r in rows[:100] for c in columns for v in find(r, c)[:1] if isinstance(v, str) and v]
        return 2 * sum(self._lies(p, root) for p in paths) > len(paths)

    def _find_root(self, columns: list[str]) -> None:
        paths = [v for c in columns for v in self.values[c][:100] if isinstance(v, str) and not v.startswith("data:")]
        paths += [
            w for c in columns for v in self.values[c][:100] if isinstance(v, list) for w in v[:1] if isinstance(w, str)
        ]
        if not paths:
            return
        own = list(dict.fromkeys(os.path.dirname(name) for name, _ in self.groups))
        here = own[0]
        below = [e.name for e in os.scandir(self.data / here) if e.is_dir() and not e.name.startswith(".")]
        roots = ["", *filter(None, own), *sorted(os.path.join(here, b) for b in below)]
        there = {root: sum(self._lies(p, root) for p in paths) for root in roots}
        self.root = max(roots, key=lambda r: there[r])
        if not there[self.root] and (above := self._above(paths)):
            # such as corpora/stamps/manifest.jsonl with paths relative to corpora/
            self.groups = [(os.path.relpath(self.data / name, above), split) for name, split in self.groups]
            self.data, self.root = above, ""
        elif not there[self.root]:
            raise DataError(
                f"`{columns[0]}` names files such as {paths[0]!r}, but they are not below {self.data}",
                wanted="paths relative to the table's folder",
                cure="give the folder that holds the table and its media",
            )  # fmt: skip

    def _lies(self, path: str, root: str) -> bool:
        """Whether there is a file where a scan would look for it, or would refuse to."""
        with contextlib.suppress(RefuseError):
            path, root = media_uri(path, root, str(self.data.absolute())), ""
        return os.path.isfile(os.path.join(self.data, root, path))

    def _above(self, paths: list[str]) -> Path | None:
        """One of the two folders above the data, if the media paths are relative to it."""
        for folder in list(self.data.absolute().parents)[:2]:
            if any(os.path.isfile(folder / p) for p in paths):
                return folder
        return None

    def roles(self) -> dict[str, str]:
        """map key → column, for the columns that are about the row itself."""
        found: dict[str, str] = {}
        for kind in ("image", "audio"):
            if column := self.media(kind):
                found[kind] = column
        self.find_root([found[k] for k in ("image", "audio") if k in found])
        for key, names in (("split", SPLIT), ("lang", LANG), ("license", {"license", "licence"}), ("group", GROUP)):
            for column in self.named(names):
                ok = {v.strip().lower() for v in self.distinct(column)}
                if key == "split" and not ok <= set(SPLIT_NAMES):
                    continue
                if key == "lang" and max(map(len, ok), default=99) > 12:
                    continue
                if key == "group" and len(ok) < LEAST_GROUPS:
                    continue
                found[key] = column
                self.take(column)
                break
        for column in [*self.named(ID), *(c for c in self.single() if is_id(c))]:
            if "id" not in found and len(self.distinct(column)) == len(self.rows):
                found["id"] = self.take(column) or ""
            elif self.unique(column):  # such as numbers that begin anew in each table
                self.odd.append(self.take(column) or "")
        return found

    def unique(self, column: str) -> bool:
        """Whether no table has a value of the column twice, as it is with names and numbers of the rows."""
        for rows in self.tables:
            values = [str(v) for row in rows for v in find(row, column)[:1] if v != ""]
            if len(set(values)) < len(values):
                return False
        return True

    def is_number(self, column: str) -> bool:
        texts = [t for t in self.texts(column) if t]
        return bool(texts) and all(
            re.fullmatch(r"\s*[-+]?(\d++(\.\d*)?|\.\d+)([eE][-+]?\d+)?\s*", t) for t in texts[:500]
        )

    def is_class(self, column: str) -> bool:
        """Few values, each of them several times."""
        n, kinds = len(self.texts(column)), len(self.distinct(column))
        fractions = self.is_number(column) and self.has_fractions(column)
        return 2 <= kinds <= min(MOST_CLASSES, max(2, n // 2)) and not fractions

    def numbers(self, column: str) -> list[float]:
        """The different numbers in a column; behind the rows that `is_number` looks at something else may stand."""
        found = []
        for text in self.distinct(column):
            with contextlib.suppress(ValueError):
                found.append(float(text))
        return [number for number in found if math.isfinite(number)]

    def has_fractions(self, column: str) -> bool:
        return any(not number.is_integer() for number in self.numbers(column))

    def numbers_rows(self, column: str) -> bool:
        """Whether a column without a name of its own counts the rows, such as the index that pandas writes."""
        return bool(re.fullmatch(r"column_\d+|unnamed: ?\d+", column.strip().lower())) and (
            self.is_number(column) and self.unique(column)
        )

    def is_text_by_name(self, column: str) -> bool:
        """Whether a column's name, or that of the mapping it lies in, says that it is text to be read."""
        above = parent_of(column)
        return (last_of(column) in TEXT and above not in ANSWERS_BELOW) or above in TEXTS_BELOW

    def size(self, column: str) -> float:
        """Mean length of a column's texts in UTF-8 bytes: a Chinese word is short in characters."""
        texts = self.texts(column) or [""]
        return sum(len(t.encode("utf-8", "replace")) for t in texts) / len(texts)

    def text(self) -> str | None:
        """The column of texts: one whose name says so however short it is, else that of the longest."""
        most = max((len(self.values[c]) for c in self.free), default=0)
        words = [c for c in self.inputs() if not self.is_number(c) and len(self.distinct(c)) > 2]
        words = [c for c in words if 2 * len(self.values[c]) >= most]
        named = [c for c in words if self.is_text_by_name(c)]
        long = [c for c in words if self.size(c) >= 12]
        for found in (set(named) & set(long), {c for c in named if not self.is_class(c)}, long, named):
            if found:
                return self.take(self.in_common_language(max(sorted(found), key=self.size), words))
        return None

    def in_common_language(self, column: str, words: list[str]) -> str:
        """Of a text that is there in several languages the one that most rows have, English or Chinese before others."""
        mapping, _, own = column.rpartition(".")
        said = [c for c in words if c.rpartition(".")[0] == mapping and LANGUAGE.fullmatch(c.rpartition(".")[2])]
        if not LANGUAGE.fullmatch(own) or parent_of(column) not in TEXTS_BELOW or len(said) < 2:
            return column
        first = ("en", "zh", "zh_cn", "zh_hans", "en_us", "en_gb")
        known = {c: first.index(last_of(c)) if last_of(c) in first else len(first) for c in said}
        return min(said, key=lambda c: (-round(self.filled(c), 2), known[c], -self.size(c)))

    def any_text(self) -> str | None:
        """The longest column of words, where nothing else could be read."""
        words = [c for c in self.inputs() if not self.is_number(c) and len(self.distinct(c)) > 1]
        return self.take(max(words, key=self.size)) if words else None

    def fields(self, label: str | None) -> tuple[dict[str, str], list[str]]:
        """(name → column of the numbers and categories, names of those left out since they give the label away)."""
        found = {name_of(c): c for c in self.inputs() if self.is_number(c) or self.is_class(c)}
        given_away = [n for n, c in found.items() if label and self.tells(c, label)]
        if len(given_away) == len(found):  # there is nothing else to learn from: a number that decides is an honest one
            given_away = [n for n in given_away if not self.is_number(found[n])]
        return {n: c for n, c in found.items() if n not in given_away}, given_away

    def single(self) -> list[str]:
        return [c for c in self.free if "[" not in c]

    def inputs(self) -> list[str]:
        """Free columns that may be given to the model: not those that stand among answers, such as `labels.colour`, nor
        those that are called as numbers of rows are."""
        return [c for c in self.single() if c not in self.among_answers and last_of(c) not in ID]

    def tells(self, column: str, label: str) -> bool:
        """Whether a column gives the label away: each of its values goes with one label only, or each label with one
        of its values (as a coarser class does). Of numbers only whole ones that repeat are asked."""
        forth: dict[str, set[str]] = {}
        back: dict[str, set[str]] = {}
        for row in self.rows:
            pair = [str(v[0]) for c in (column, label) if (v := find(row, c)) and v[0] != ""]
            if len(pair) == 2:
                forth.setdefault(pair[0], set()).add(pair[1])
                back.setdefault(pair[1], set()).add(pair[0])
        if len(forth) < 2 or (self.is_number(column) and not self.is_class(column)):
            return False
        return any(all(len(s) == 1 for s in seen.values()) for seen in (forth, back))

    def one_of_many(self) -> tuple[str, list[str]] | None:
        """(a mapping, its columns) where every row has one text under a key of its own, such as its language."""
        below: dict[str, list[str]] = {}
        for column in self.single():
            if "." in column and column not in self.among_answers:
                below.setdefault(column.rpartition(".")[0], []).append(column)
        for mapping, columns in below.items():
            spoken = last_of(mapping) in TEXTS_BELOW or all(LANGUAGE.fullmatch(c.rpartition(".")[2]) for c in columns)
            held = [sum(bool(find(r, c)) for c in columns) for r in self.rows]
            some = [n for n in held if n]
            fullest = max(self.filled(c) for c in columns)
            if (
                spoken
                and len(some) >= WELL_FILLED * len(held)
                and sum(some) < 1.5 * len(some)
                and fullest < WELL_FILLED
            ):
                return mapping, columns
        return None

    def items(self, column: str | None, kind: str) -> tuple[list[Any], list[RefuseError]]:
        """(bytes or absolute paths of the media in a column, why others of it are refused)."""
        found: list[Any] = []
        refused: list[RefuseError] = []
        rooted = [(root, row) for root, rows in zip(self.roots, self.tables, strict=True) for row in rows]
        for root, row in rooted if column else []:
            for value in find(row, column or "")[:1]:
                one = value[0] if isinstance(value, list) and value else value
                if one in ("", []):
                    continue
                try:
                    part = media_part(kind, one, root)
                except RefuseError as error:
                    refused.append(error)
                else:
                    found.append(part.data if part.uri is None else self.data / part.uri)
        return found, refused


def drawn_rows(rows: Iterable[tuple[str, Any] | Refusal]) -> tuple[list[dict[str, Any]], int]:
    """(at most ROWS of `rows` in their order, how many there are, those included that are no mapping of columns).

    Drawn from all of them by a fixed seed (a reservoir): tables are often sorted by class, so their first rows tell
    little; and every n-th row could be of one class. Fewer are held where rows are large, as with pictures inside.
    """
    rng = random.Random(0)
    drawn: list[tuple[int, dict[str, Any]]] = []
    total = whole = held = 0
    most = ROWS
    for row in rows:
        total += 1
        if isinstance(row, Refusal) or not isinstance(row[1], dict):
            continue
        whole += 1
        at = len(drawn) if len(drawn) == whole - 1 < most else rng.randrange(whole)
        if at >= most:
            continue
        if at < len(drawn):
            held -= _held_bytes(drawn[at][1])
            drawn[at] = (whole, row[1])
        else:
            drawn.append((whole, row[1]))
        held += _held_bytes(row[1])
        if held > MOST_HELD and most > LEAST:
            most = max(LEAST, len(drawn) // 2)
            rng.shuffle(drawn)
            del drawn[most:]
            held = sum(_held_bytes(r) for _, r in drawn)
    return [row for _, row in sorted(drawn, key=lambda item: item[0])], total


def _held_bytes(row: dict[str, Any]) -> int:
    """Bytes of the texts and media inside a row, roughly."""
    cells = [inner for v in row.values() for inner in (v.values() if isinstance(v, dict) else [v])]
    return sum(len(v) for v in cells if isinstance(v, bytes | str))


def _can_be_written(column: str) -> bool:
    """Whether a column's name can stand in scan.yaml as a selector."""
    try:
        column.encode()
        check_selector(column)
    except ValueError:  # also a name that is not UTF-8
        return False
    return "{" not in column and "}" not in column and column.isprintable()


def flat_columns(rows: list[dict[str, Any]]) -> list[str]:
    """Selectors of all leaves in the first rows, two levels deep, in order of appearance."""
    found: dict[str, None] = {}
    for row in rows:
        for key, value in row.items():
            if isinstance(value, dict) and "bytes" not in value and len(value) <= 100:
                found |= {f"{key}.{inner}": None for inner, v in value.items() if not isinstance(v, dict | list)}
            elif isinstance(value, list) and value and isinstance(value[0], dict):
                found |= {f"{key}[].{inner}": None for inner, v in value[0].items() if isinstance(v, str)}
            else:
                found[str(key)] = None
    return list(found)


def _is_media(value: Any, kind: str, endings: tuple[str, ...]) -> bool:
    if isinstance(value, list):
        return bool(value) and _is_media(value[0], kind, endings)
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return sniff(value[:4096])[0] == kind
    return isinstance(value, str) and (value.lower().endswith(endings) or value.startswith(f"data:{kind}/"))
