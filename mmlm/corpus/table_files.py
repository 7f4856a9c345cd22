"""Which tables of a folder belong together."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from typing import Any

from mmlm.corpus.column_names import ANSWER, LABEL, last_of
from mmlm.corpus.columns import drawn_rows
from mmlm.corpus.drafts import SPLIT_NAMES, Refusal, RefuseError
from mmlm.corpus.elsewhere import filled
from mmlm.corpus.guess import _listed
from mmlm.corpus.readers.delimited import csv_encoding
from mmlm.corpus.readers.rows import read_rows
from mmlm.corpus.select import find
from mmlm.errors import DataError


def sampled_rows(data: Path, name: str) -> tuple[list[dict[str, Any]], int]:
    """(at most ROWS rows in their order, number of all rows)."""
    return drawn_rows(read_rows(filled(data / name), name))


def no_row(data: Path, names: list[str], shown: str) -> DataError:
    """Of tables without a single row that can be read: the reason of the first refusal, if there was one."""
    for name in names:
        for row in read_rows(filled(data / name), name):
            if isinstance(row, Refusal):
                cure = (
                    "save it as UTF-8 (a spreadsheet offers `CSV UTF-8`), or `iconv -f cp1251 -t utf-8`"
                    if row.reason == "bad_encoding"
                    else "check the file"
                )
                return DataError(f"no row of {shown} can be read: {row.source}: {row.detail}", cure=cure)
    return DataError(f"{shown} has no rows", wanted="rows with named columns", cure="check the file")


def other_encoding(path: Path) -> str | None:
    """What a table that is not UTF-8 is read as, for people."""
    names = {"utf-16": "UTF-16", "gb18030": "GB18030 (GBK)", "cp1252": "Windows-1252 (Western European)"}
    return names.get(csv_encoding(path)) if path.suffix.lower() in (".csv", ".tsv") else None


def only_in_training(groups: list[tuple[str, str]], rows: dict[str, list[dict[str, Any]]]) -> str:
    """The one column that the training table has and another lacks, as where a contest hides the answers; else ""."""
    seen = {name: {str(k) for r in rows[name] for k, v in r.items() if v not in ("", None)} for name, _ in groups}
    training = next((name for name, split in groups if split == "train"), "")
    for columns in seen.values():
        lacking = seen.get(training, columns) - columns
        if columns and len(lacking) == 1 and not {last_of(c) for c in columns} & {*LABEL, *ANSWER}:
            return next(iter(lacking))
    return ""


def with_target(
    groups: list[tuple[str, str]], rows: dict[str, list[dict[str, Any]]], target: str
) -> tuple[list[tuple[str, str]], list[str]]:
    """(the tables that have something at `target`, the names of the others). One that is left is split by hash."""
    kept = [g for g in groups if not target or any(v != "" for r in rows[g[0]] for v in find(r, target))]
    without = [g[0] for g in groups if g not in kept]
    if not kept:
        return groups, []
    return ([(kept[0][0], "")] if without and len(kept) == 1 else kept), without


def one_table(data: Path, names: list[str]) -> list[tuple[str, str]]:
    """(file, split) of the tables that belong together: one, or one per split."""
    if len(names) > 1:  # not what lies beside a table, such as a JSON file of settings
        names = [n for n in names if _row_count(data, n) >= 2] or names
    if len(names) == 1:
        return [(names[0], "")]
    found = []
    for name in names:
        words = re.split(r"[^a-z]+", Path(name).stem.lower())
        found.append((name, next((SPLIT_NAMES[w] for w in words if w in SPLIT_NAMES), "")))
    above = [SPLIT_NAMES.get(Path(name).parent.name.lower(), "") for name in names]
    if not any(s for _, s in found) and len({*above} - {""}) == len(names):  # such as train/metadata.jsonl
        found = list(zip(names, above, strict=True))
    with_split = [(n, s) for n, s in found if s]
    if {"train"} <= {s for _, s in with_split}:
        return with_split
    raise DataError(
        f"{data} holds {len(names)} tables: {_listed(names, 6)}", wanted="one, or one per split (train, val, test)",
        cure="give the file itself: --data FILE",
    )  # fmt: skip


def _row_count(data: Path, name: str) -> int:
    """Rows with columns among the first two."""
    return sum(
        not isinstance(r, Refusal) and isinstance(r[1], dict) for r in islice(read_rows(filled(data / name), name), 2)
    )


def sources(
    groups: list[tuple[str, str]],
    source: dict[str, Any],
    roots: list[str],
    spelling: dict[str, dict[str, str]] | None = None,
) -> list[dict[str, Any]]:
    """A source of scan.yaml for each of `groups` ((file, split)), whose media lie below `roots`; `spelling`: see
    `spelled_alike`."""
    found = []
    for (name, split), root in zip(groups, roots, strict=True):
        rest = {k: _spelled(v, (spelling or {}).get(name, {})) for k, v in source.items() if k != "kind"}
        given = {"files": name, "split": split, "root": root}
        found.append({"kind": source["kind"], **{k: v for k, v in given.items() if v}, **rest})
    return found


def spelled_alike(
    groups: list[tuple[str, str]], rows: dict[str, list[dict[str, Any]]]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, str]]]:
    """(the rows with columns as the training table spells them, file → column as it is there → as that file spells it).

    Columns that differ in case or blanks only are taken for the same, such as `Label` and `label`.
    """
    training = next((name for name, split in groups if split == "train"), groups[0][0])
    wanted = {_plain(c): c for c in _names(rows[training])}
    spelling: dict[str, dict[str, str]] = {}
    for name, _ in groups:
        own = _names(rows[name])
        strange = [c for c in own if _plain(c) in wanted and c not in wanted.values()]
        other = {wanted[_plain(c)]: c for c in strange if wanted[_plain(c)] not in own}
        if other:
            spelling[name] = other
            there = {c: known for known, c in other.items()}
            rows = {**rows, name: [{there.get(k, k): v for k, v in r.items()} for r in rows[name]]}
    return rows, spelling


def spelling_words(name: str, other: dict[str, str]) -> str:
    own, known = ([f"`{c}`" for c in columns] for columns in (other.values(), other))
    return f"{name} writes {_listed(own)} for {_listed(known)}; they are taken for the same."


def _names(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(str(k) for r in rows for k in r))


def _plain(column: str) -> str:
    return re.sub(r"[\s_-]+", "", column).casefold()


def _spelled(value: Any, spelling: dict[str, str]) -> Any:
    """What stands in scan.yaml, with the columns in it (never its keys) as `spelling` says."""
    if isinstance(value, dict):
        return {k: v if k in ("task", "question") else _spelled(v, spelling) for k, v in value.items()}
    if isinstance(value, list):
        return [_spelled(v, spelling) for v in value]
    if not isinstance(value, str):
        return value
    first = re.split(r"[.\[]", value)[0]
    return spelling.get(value) or spelling.get(first, first) + value[len(first) :]


_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")
_LONG_NAME = 40
"""Characters of a first cell that is hardly the name of a column."""


def no_header(name: str, rows: list[dict[str, Any]]) -> DataError | None:
    """What to say where the first line of a CSV file is rather a row than names: every name looks like a value."""
    names = _names(rows)
    if not name.lower().endswith((".csv", ".tsv")) or not rows or not names:
        return None
    if all(_NUMBER.fullmatch(c) for c in names) and [float(c) - float(names[0]) for c in names] == [*range(len(names))]:
        return None  # a program counted the columns
    rows = [
        r for r in rows if any(r.get(c) != c for c in names)
    ]  # where tables were joined, their names stand below, too
    likeness = [_like_a_value(c, [str(r.get(c, "")) for r in rows]) for c in names]
    if 0 in likeness or max(likeness) < 2:
        return None
    shown = ", ".join(f"`{c[:_LONG_NAME]}`" for c in names[:4])
    return DataError(
        f"the first line of {name} looks like a row: {shown}", wanted="the names of the columns in the first line",
        cure="put such a line above it, such as `label,text`; without it that row is lost",
    )  # fmt: skip


def _like_a_value(column: str, values: list[str]) -> int:
    """2: the name of a column is like what stands under it; 1: it is rather a sentence; 0: neither."""
    values = [v for v in values if v]
    if _NUMBER.fullmatch(column):
        return 2 if all(_NUMBER.fullmatch(v) for v in values) else 0
    if column in values:
        return 2
    shape = re.sub(r"\d+", "0", column)
    if re.search(r"\d", column) and 2 * sum(re.sub(r"\d+", "0", v) == shape for v in values) > len(values):
        return 2
    return int(len(column) > _LONG_NAME or column.count(" ") >= 4 or bool(re.search(r"[.,;:!?] ", column)))


def refused_words(column: str, found: list[Any], refused: list[RefuseError]) -> str:
    """What to say about media of a column that a scan would refuse: how many, why, what to do."""
    every = len(found) + len(refused)
    said = f"{len(refused)} of {every} cells of `{column}` looked at cannot be read: {refused[0]}."
    if refused[0].reason == "unsafe_path":
        said += (
            " Wanted paths below the data folder. Write them as seen from a folder that holds both the table and the"
        )
        return said + " files, without `..`, and give that folder, or copy the files beside the table."
    return f"{said} Mend the column, or remove these rows."


def split_words(groups: list[tuple[str, str]], column: str | None) -> str:
    if column:
        return f"`{column}` says the split; it is kept."
    if any(split for _, split in groups):
        return "The files' names say the split; it is kept."
    return "No split is given: 10 % for validation and 10 % for test, by a hash."
