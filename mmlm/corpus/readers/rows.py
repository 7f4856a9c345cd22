"""Rows of a table file, one at a time with where they stand: JSON lines, a JSON list, CSV, TSV, Parquet."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmlm.corpus.drafts import Refusal
from mmlm.corpus.readers.delimited import MAX_LINE, read_csv
from mmlm.errors import DataError

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
BATCH_BYTES = 64 << 20
"""Bytes of rows with pictures in them that are held at a time."""
_CHUNK, _MOST_AT_ONCE = 1 << 20, 8 << 20
MAX_VALUES = 1_000_000
"""Brackets, commas and colons outside of texts in a row of JSON: `[],` is three bytes, and in memory seventy."""
_STRUCTURE = (b"[", b"{", b",", b":")
_IS_MARK = np.isin(np.arange(256), np.frombuffer(b"".join(_STRUCTURE), np.uint8))
_HIVE = re.compile(r"([^/=]+)=([^/]*)/")
_NULL = "__HIVE_DEFAULT_PARTITION__"

BROKEN_TABLE = (pa.ArrowException, OSError, MemoryError, ValueError, OverflowError)
"""What pyarrow raises on rubbish; the last two where names of columns are not UTF-8, or numbers beyond all bounds."""
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
            yield from read_csv(path, shown)
        elif ending == ".parquet":
            yield from parquet_rows(path, shown)
        else:
            raise DataError(
                f"{shown} ends in {ending or 'nothing'}", wanted="one of " + " ".join(ENDINGS), cure="convert it"
            )
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror or error}", cure="check the path and its rights"
        ) from None


class TooManyValuesError(ValueError):
    """A JSON text holds more than MAX_VALUES values."""


def parse_json(text: bytes) -> Any:
    """JSON, or ValueError in one short sentence."""
    _require_few_values(text)
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
            except TooManyValuesError as error:
                yield Refusal(where, "", "too_large", str(error))
            except ValueError as error:
                yield Refusal(where, "", "bad_json", str(error))


def _require_few_values(text: bytes) -> None:
    """Raise TooManyValuesError where JSON has more brackets, commas and colons outside of texts than MAX_VALUES."""
    if len(text) <= MAX_VALUES or sum(map(text.count, _STRUCTURE)) <= MAX_VALUES:
        return
    # marks inside texts do not count; a quote behind a backslash begins and ends none
    plain = np.frombuffer(text.replace(rb"\\", b"").replace(rb"\"", b""), np.uint8)
    found, inside = 0, False
    for start in range(0, len(plain), _CHUNK):
        piece = plain[start : start + _CHUNK]
        within = np.logical_xor.accumulate(piece == ord('"')) ^ inside
        found += int(np.count_nonzero(_IS_MARK[piece] & ~within))
        inside = bool(within[-1])
    if found > MAX_VALUES:
        raise TooManyValuesError(f"more than {MAX_VALUES:,} brackets, commas and colons in a row")


class _JsonStream:
    """The values of a JSON text one after another, in memory for one of them.

    Its methods raise ValueError, in one short sentence, where it is no JSON.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.text, self.at, self.ended = file, "", 0, False
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.scanner = json.JSONDecoder()

    def more(self) -> None:
        """Read on: as much again as is held, so that a long value is not tried too often, but never much at once: what is
        held behind one value may be a bomb."""
        self.text = self.text[self.at :]
        self.at = 0
        data = self.file.read(max(_CHUNK, min(len(self.text), _MOST_AT_ONCE)))
        self.ended = not data
        try:
            self.text += self.decoder.decode(data, self.ended)
        except UnicodeDecodeError:
            raise ValueError("not UTF-8") from None

    def peek(self) -> str:
        """The next character that is no blank, or "" at the end."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in " \t\r\n":
                    return self.text[self.at]
                self.at += 1
            if self.ended:
                return ""
            self.more()

    def take(self, wanted: str) -> str:
        found = self.peek()
        if not found or found not in wanted:
            raise ValueError(f"{found!r} where one of {wanted!r} is wanted" if found else "it ends too early")
        self.at += 1
        return found

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self.scanner.raw_decode(self.text, self.at)
                # a number might go on, and of `4e-` no more than `4` was taken
                if len(self.text) - end > (2 if isinstance(value, int | float) else -1) or self.ended:
                    self.require_bounds(end)
                    self.at = end
                    return value
            except RecursionError:
                raise ValueError("nested too deeply") from None
            except json.JSONDecodeError as error:
                if self.ended:
                    raise ValueError(error.msg) from None
            self.require_bounds(len(self.text))
            self.more()

    def require_bounds(self, end: int) -> None:
        """Raise ValueError when the value that begins here, and goes on to `end` at least, is too large."""
        if end - self.at <= min(MAX_LINE, MAX_VALUES):
            return
        begins = f"{self.text[self.at : self.at + 40]!r} is broken or"
        if end - self.at > MAX_LINE:
            raise ValueError(f"{begins} longer than {MAX_LINE:,} characters")
        try:
            _require_few_values(self.text[self.at : end].encode("utf-8", "surrogatepass"))
        except TooManyValuesError as error:
            raise ValueError(f"{begins} has {error}") from None

    def items(self) -> Iterator[Any]:
        """The items of the list that begins here."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            yield self.value()
            if self.take(",]") == "]":
                return

    def keys(self) -> Iterator[str]:
        """The keys of the object that begins here; the caller must take each value before it asks for the next."""
        self.take("{")
        if self.peek() == "}":
            self.take("}")
            return
        while True:
            key = self.value()
            if not isinstance(key, str):
                raise ValueError(f"{str(key)[:40]!r} as a key")
            self.take(":")
            yield key
            if self.take(",}") == "}":
                return


def _json_list(path: Path, shown: str) -> Iterator[Row | Refusal]:
    """Rows of a JSON list, of the only list in an object, or the object as one row; never all of it in memory.

    Many people call JSON lines `.json`, so these are read too.
    """
    try:
        with path.open("rb") as f:
            stream = _JsonStream(f)
            first = stream.peek()
            if first not in ("[", "{"):
                value = stream.value()
                raise DataError(
                    f"{shown} holds a {type(value).__name__}", wanted="a list of rows", cure="check the file"
                )
        if first == "{" and _first_line_is_all(path):
            yield from _json_lines(path, shown)
            return
        only = _only_list(path) if first == "{" else None
    except ValueError as error:
        if _some_line_is_a_row(path):
            yield from _json_lines(path, shown)
        else:
            yield Refusal(shown, "", "bad_json", str(error))
        return
    number = 0
    with path.open("rb") as f:
        stream = _JsonStream(f)
        try:
            if first == "{" and only is None:
                yield f"{shown}:1", stream.value()
                return
            if only is not None:
                for at, _ in enumerate(stream.keys()):
                    if at == only:
                        break
                    stream.value()
            for number, row in enumerate(stream.items(), 1):
                yield f"{shown}:{number}", row
            if only is None and stream.peek():
                raise ValueError("something follows the list")
        except ValueError as error:
            where = f"{shown}:{number + 1}" if number else shown
            yield Refusal(where, "", "bad_json", f"{error}; the rest is not read")


def _only_list(path: Path) -> int | None:
    """Which value of the object in `path` is its only list; None when there are none or several. Raises ValueError."""
    lists = []
    with path.open("rb") as f:
        stream = _JsonStream(f)
        for at, _ in enumerate(stream.keys()):
            if stream.peek() == "[":
                lists.append(at)
                for _ in stream.items():
                    pass
            else:
                stream.value()
        if stream.peek():
            raise ValueError("something follows the object")
    return lists[0] if len(lists) == 1 else None


def _first_line_is_all(path: Path) -> bool:
    """Whether the first line is a whole object and something follows it."""
    with path.open("rb") as f:
        line = b"\n"
        while line and not line.strip(b" \t\r\n\xef\xbb\xbf"):
            line = f.readline(MAX_LINE)
        return _is_row(line) and any(more.strip() for more in iter(lambda: f.read(_CHUNK), b""))


def _some_line_is_a_row(path: Path) -> bool:
    with path.open("rb") as f:
        lines = [f.readline(MAX_LINE) for _ in range(20)]
    return sum(1 for line in lines if line.strip()) > 1 and any(_is_row(line) for line in lines)


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False


def parquet_rows(path: Path, shown: str) -> Iterator[Row | Refusal]:
    """Rows of a Parquet file; the `key=value` folders above it (Hive partitions) are columns of every row.

    A row group that cannot be read is one Refusal, and the next one is read all the same.
    """
    partitions = {unquote(k): None if v == _NULL else unquote(v) for k, v in _HIVE.findall(shown)}
    try:
        opened = pq.ParquetFile(path)
    except BROKEN_TABLE as error:
        yield Refusal(shown, "", "bad_table", f"no Parquet file: {str(error)[:120]}")
        return
    before = 0
    with opened as f:
        for at in range(f.num_row_groups):
            group, number = f.metadata.row_group(at), before
            try:
                most = rows_at_a_time(group.total_byte_size, group.num_rows)
                for batch in f.iter_batches(most, row_groups=[at], use_threads=False):
                    for outcome in rows_of_batch(batch, shown, number):
                        if isinstance(outcome, Refusal):
                            yield outcome
                        else:
                            yield outcome[0], {**partitions, **outcome[1]}
                    number += batch.num_rows
            except BROKEN_TABLE as error:
                detail = f"{str(error)[:120]}; the rest of its {group.num_rows:,} rows is not read"
                yield Refusal(f"{shown}:{number + 1}", "", "bad_table", f"row group {at + 1}: {detail}")
            before += group.num_rows


def rows_at_a_time(size: int, rows: int) -> int:
    """How many rows to hold, where `rows` of them have `size` bytes."""
    return max(1, min(256, BATCH_BYTES * max(1, rows) // max(1, size)))


def rows_of_batch(batch: pa.RecordBatch, shown: str, before: int) -> Iterator[Row | Refusal]:
    """Rows of an Arrow batch as mappings; `before` rows of the file come before it.

    A row whose values cannot be had (text that is not UTF-8, a date beyond all calendars) is refused alone.
    """
    try:
        batch.validate(full=True)  # offsets that lie would read beyond the file
        rows = batch.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):
        rows = None
    if rows is not None:
        yield from ((f"{shown}:{number}", row) for number, row in enumerate(rows, before + 1))
        return
    for at in range(batch.num_rows):
        where = f"{shown}:{before + at + 1}"
        try:
            one = batch.slice(at, 1)
            one.validate(full=True)
            row = one.to_pylist()[0]
        except UnicodeDecodeError:
            yield Refusal(where, "", "bad_encoding", "not UTF-8")
        except (ValueError, OverflowError, pa.ArrowException) as error:
            reason = "bad_encoding" if "UTF8" in str(error) else "bad_row"
            yield Refusal(where, "", reason, str(error)[:120])
        else:
            yield where, row
