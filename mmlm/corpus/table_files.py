"""Which tables of a folder belong together."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from typing import Any

from mmlm.corpus.column_names import ANSWER, LABEL, last_of
from mmlm.corpus.columns import drawn_rows
from mmlm.corpus.drafts import SPLIT_NAMES, Refusal
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


def sources(groups: list[tuple[str, str]], source: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {**{k: v for k, v in source.items() if k == "kind"}, "files": name, **({"split": split} if split else {}),
         **{k: v for k, v in source.items() if k != "kind"}}
        for name, split in groups
    ]  # fmt: skip


def split_words(groups: list[tuple[str, str]], column: str | None) -> str:
    if column:
        return f"`{column}` says the split; it is kept."
    if any(split for _, split in groups):
        return "The files' names say the split; it is kept."
    return "No split is given: 10 % for validation and 10 % for test, by a hash."
