"""Rows of a table file, one at a time with where they stand: JSON lines, a JSON list, CSV, TSV, Parquet."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmlm.corpus.drafts import Refusal
from mmlm.errors import DataError

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
MAX_LINE = 64 << 20
"""Bytes of the longest JSON line that is read."""
MAX_JSON = 1 << 30
"""Bytes of the largest JSON list that is read; it is held in memory whole. JSON lines are not."""

Row = tuple[str, Any]
"""(`file:line`, the row)."""


def read_rows(path: Path, shown: str) -> Iterator[Row | Refusal]:
    """Rows of the table `path`; `shown` names it in refusals. Raises DataError when the file is no table at all."""
    ending = path.suffix.lower()
    try:
        if ending in (".jsonl", ".ndjson"):
            yield from _json_lines(path, shown)
        elif ending == ".json":
            yield from _json_list(path, shown)
        elif ending in (".csv", ".tsv"):
            yield from _csv(path, shown)
        elif ending == ".parquet":
            yield from _parquet(path, shown)
        else:
            raise DataError(
                f"{shown} ends in {ending or 'nothing'}", wanted="one of " + " ".join(ENDINGS), cure="convert it"
            )
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror or error}", cure="check the path and its rights"
        ) from None


def parse_json(text: bytes) -> Any:
    """JSON, or ValueError in one short sentence."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at column {error.colno}") from None


def _json_lines(path: Path, shown: str) -> Iterator[Row | Refusal]:
    with path.open("rb") as f:
        number = 0
        while line := f.readline(MAX_LINE + 1):
            number += 1
            where = f"{shown}:{number}"
            if len(line) > MAX_LINE:
                while line and not line.endswith(b"\n"):
                    line = f.readline(MAX_LINE)
                yield Refusal(where, "", "too_large", f"a line of more than {MAX_LINE:,} bytes")
                continue
            if not line.strip():
                continue
            try:
                yield where, parse_json(line)
            except ValueError as error:
                yield Refusal(where, "", "bad_json", str(error))


def _json_list(path: Path, shown: str) -> Iterator[Row | Refusal]:
    if path.stat().st_size > MAX_JSON:
        raise DataError(f"{shown} is larger than {MAX_JSON:,} bytes", wanted="JSON lines", cure="convert it to .jsonl")
    try:
        data = parse_json(path.read_bytes())
    except ValueError as error:
        # Many people call JSON lines `.json`.
        rows = list(_json_lines(path, shown))
        if len(rows) > 1 and not all(isinstance(r, Refusal) for r in rows):
            yield from rows
            return
        yield Refusal(shown, "", "bad_json", str(error))
        return
    if isinstance(data, dict):
        lists = [v for v in data.values() if isinstance(v, list)]
        data = lists[0] if len(lists) == 1 else [data]
    if not isinstance(data, list):
        raise DataError(f"{shown} holds a {type(data).__name__}", wanted="a list of rows", cure="check the file")
    for number, row in enumerate(data, 1):
        yield f"{shown}:{number}", row


def _csv(path: Path, shown: str) -> Iterator[Row | Refusal]:
    csv.field_size_limit(min(sys.maxsize, MAX_LINE))
    with path.open(encoding=csv_encoding(path), errors="surrogateescape", newline="") as f:
        head = f.readline()
        f.seek(0)
        delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t|", key=head.count)
        reader = csv.reader(f, delimiter=delimiter)
        try:
            header = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{shown}: {error}", wanted="a CSV file", cure="check its first line") from None
        if not header:
            return
        header = [name.strip() or f"column_{number}" for number, name in enumerate(header, 1)]
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield Refusal(f"{shown}:{reader.line_num}", "", "bad_row", str(error))
                continue
            if cells is None:
                return
            where = f"{shown}:{reader.line_num}"
            if not cells:
                continue
            if len(cells) != len(header):
                yield Refusal(where, "", "bad_row", f"{len(cells)} cells under {len(header)} columns")
            elif any(not cell.isascii() and not _encodable(cell) for cell in cells):
                yield Refusal(where, "", "bad_encoding", "not UTF-8")
            else:
                yield where, dict(zip(header, cells, strict=True))


def csv_encoding(path: Path) -> str:
    """`gb18030` (which includes GBK) when the file is Chinese text in it, else `utf-8-sig`.

    That it decodes is not enough, since so does much Latin-1 and broken UTF-8: hardly a line with other than ASCII
    may be UTF-8, and most characters must be common ones (GB 2312). Raises OSError.
    """
    utf8 = other = characters = common = 0
    with path.open("rb") as f:
        while line := f.readline(MAX_LINE):
            if line.isascii():
                continue
            try:
                line.decode()
                utf8 += 1
                continue
            except UnicodeDecodeError:
                other += 1
            try:
                beyond = [c for c in line.decode("gb18030") if not c.isascii()]
            except UnicodeDecodeError:
                return "utf-8-sig"
            characters += len(beyond)
            common += len("".join(beyond).encode("gb2312", "ignore")) // 2
    return "gb18030" if other > 10 * utf8 and common >= 0.8 * characters else "utf-8-sig"


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet(path: Path, shown: str) -> Iterator[Row | Refusal]:
    try:
        with pq.ParquetFile(path) as f:
            number = 0
            for batch in f.iter_batches(256):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{shown}:{number}", row
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{shown} is no Parquet file: {str(error)[:120]}", cure="check the file") from None
