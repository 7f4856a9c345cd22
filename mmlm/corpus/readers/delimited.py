"""Rows of CSV and TSV files: what separates the cells, and where a quoted one ends.

A row whose quotes are not well formed is refused alone, and the line after it begins a row of its own: an opening quote
that nobody meant must not take the rows behind it into one cell.
"""

from __future__ import annotations

import codecs
import csv
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from mmlm.corpus.drafts import Refusal, other_encoding, storable
from mmlm.errors import DataError

MAX_LINE = 64 << 20
"""Bytes of the longest JSON line that is read, and characters of the longest item of a JSON list or row of a CSV file."""
MAX_OVER_LINES = 16 << 20
"""Characters of the longest row of a CSV file that goes over several lines."""
_CHUNK, _MOST_AT_ONCE = 1 << 20, 8 << 20
_SEPARATORS = ",;\t|"
_SAMPLE = 50
"""Lines that are looked at to tell what separates the cells."""
_REMEMBERED = 1000
"""Rows whose values are remembered, to tell rows from a text that looks like some."""
_NUMBER = re.compile(r"-?\d+(\.\d+)?", re.ASCII)
_LINE_END = re.compile(r"\r\n?|\n")
_NAMED = re.compile(r'"?sep=([^"\r\n])"?\s*', re.IGNORECASE)
"""The line by which a spreadsheet says what separates the cells."""


def read_csv(path: Path, shown: str) -> Iterator[tuple[str, Any] | Refusal]:
    """(`file:line`, {column: cell}) of every row; `shown` names the file.

    Raises DataError when its first line names no columns, or two alike, and OSError.
    """
    csv.field_size_limit(min(sys.maxsize, MAX_LINE))
    with path.open("rb") as f:
        lines = _Lines(f, csv_encoding(path))
        try:
            yield from _Reader(lines, shown, path.suffix.lower() == ".tsv").rows()
        except UnicodeDecodeError as error:
            where = f"{shown}:{lines.number + 1}"
            yield Refusal(where, "", "bad_encoding", f"not {error.encoding.upper()}; the rest is not read")


def csv_encoding(path: Path) -> str:
    """`utf-16` when the file begins with its mark, as "Unicode text" of a spreadsheet does, `gb18030` (which includes GBK) when
    it is Chinese text in it, `cp1252` when it is Western European text in that, else `utf-8-sig`. Raises OSError."""
    with path.open("rb") as f:
        if f.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return "utf-16"
        f.seek(0)
        return other_encoding(iter(lambda: f.readline(MAX_LINE), b"")) or "utf-8-sig"


class _TooLarge(Exception):
    """A row is longer than MAX_LINE, or MAX_OVER_LINES. It comes out of the csv reader, which then begins a new row."""


class _Lines:
    """The lines of a file for the csv reader, which asks for more of them as long as a quote is open.

    Of the row that is being read everything but its first line is held, so that it can be given back. Raises _TooLarge
    where a row has too many characters, and UnicodeDecodeError where a row begins that cannot be decoded.
    """

    def __init__(self, file: BinaryIO, encoding: str) -> None:
        # half a surrogate pair comes through and its row is refused, as what is not UTF-8 is
        errors = "surrogatepass" if encoding == "utf-16" else "surrogateescape"
        self.file, self.decoder = file, codecs.getincrementaldecoder(encoding)(errors)
        self.encoding = "UTF-16" if encoding == "utf-16" else "UTF-8"
        self.text, self.at, self.ended = "", 0, False
        self.broken: UnicodeDecodeError | None = None
        self.number = self.first = 0
        self.line, self.second, self.length = (
            "",
            0,
            0,
        )  # of the row: its first line, where the second begins, characters
        self.decoded = self.again = 0  # characters that were read, and that were given back

    def sample(self) -> list[str]:
        """The first lines, as far as they stand in the first piece of the file; they are not passed over."""
        self._more()
        lines = _LINE_END.split(self.text, _SAMPLE)
        return lines[:-1] if len(lines) > 1 and not self.ended else lines

    def begin_row(self) -> None:
        self.length, self.first = 0, self.number + 1

    @property
    def several(self) -> bool:
        """Whether the row stands on more than one line."""
        return self.number > self.first

    def give_back(self) -> None:
        """Go back behind the first line of the row."""
        self.again += self.at - self.second
        self.at, self.number = self.second, self.first

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        # rubbish could have every row read on to the end of the file
        if self.length and self.again + self.at - self.second > MAX_OVER_LINES + self.decoded:
            raise csv.Error("a quote is open at the end of the line")
        end = self._end()
        if end == self.at or (self.broken and end == len(self.text) and self.text[-1] not in "\r\n"):
            if self.broken and not self.length:
                raise self.broken
            raise StopIteration
        self.number += 1
        self.length += end - self.at
        if self.length > (MAX_OVER_LINES if self.several else MAX_LINE):
            if self.several:
                raise _TooLarge(f"a quoted cell makes a row of more than {MAX_OVER_LINES:,} characters")
            self._pass_over()
            raise _TooLarge(f"a row of more than {MAX_LINE:,} characters")
        line = self.text[self.at : end]
        self.at = end
        if not self.several:
            self.line, self.second = line, end
        return line

    def _end(self) -> int:
        """Where the line at `at` ends, or what is held of one that is too long; `at` at the end of the file."""
        looked = 0  # characters of the line in which no end was found
        while True:
            found = _LINE_END.search(self.text, self.at + looked)
            # a line feed may follow
            if found and (found.end() < len(self.text) or found[0] != "\r" or self.ended):
                return found.end()
            looked = (found.start() if found else len(self.text)) - self.at
            if self.ended or looked > MAX_LINE:
                return len(self.text)
            self._more()

    def _more(self) -> None:
        kept = min(self.at, self.second) if self.length else self.at
        self.text = self.text[kept:]
        self.at, self.second = self.at - kept, self.second - kept
        data = self.file.read(max(_CHUNK, min(len(self.text), _MOST_AT_ONCE)))
        self.ended = not data
        try:
            new = self.decoder.decode(data, self.ended)
        except UnicodeDecodeError as error:
            sound = error.start - (len(error.object) - len(data))  # some bytes may have waited in the decoder
            new = self.decoder.decode(data[: max(0, sound)])
            self.broken, self.ended = error, True
        self.text += new
        self.decoded += len(new)

    def _pass_over(self) -> None:
        """Go to the end of a line that is too long."""
        while True:
            found = _LINE_END.search(self.text, self.at)
            self.at = found.end() if found else len(self.text)
            self.second = self.at
            if found or self.ended:
                return
            self._more()


class _Reader:
    """Reads the rows of one file. `tabs`: its name says that tabs separate the cells."""

    def __init__(self, lines: _Lines, shown: str, tabs: bool) -> None:
        self.lines, self.shown = lines, shown
        sample = lines.sample()
        named = _NAMED.fullmatch(sample[0])
        if named:
            next(lines)
        self.separator = named[1] if named else separator_of(sample, tabs)
        self.reader = csv.reader(lines, delimiter=self.separator, strict=True)
        self.seen: list[set[str]] = []  # the values of each column in the first rows
        self.read, self.careful = 0, False

    def rows(self) -> Iterator[tuple[str, Any] | Refusal]:
        header = self.header()
        if isinstance(header, Refusal):
            yield header
            return
        while header:
            cells = self.row(len(header))
            if cells is None:
                return
            where = f"{self.shown}:{self.lines.number}"
            if isinstance(cells, Refusal):
                yield cells
            elif any(not cell.isascii() and not storable(cell) for cell in cells):
                yield Refusal(where, "", "bad_encoding", f"not {self.lines.encoding}")
            elif cells:
                self.note(cells)
                yield where, dict(zip(header, cells, strict=True))

    def note(self, cells: list[str]) -> None:
        if self.read < _REMEMBERED:
            self.read += 1
            self.seen = self.seen or [set() for _ in cells]
            for seen, cell in zip(self.seen, cells, strict=True):
                if len(cell) <= 100:
                    seen.add(cell)
                # only a program that doubles quotes inside of cells writes these, and such a one leaves no stray ones
                self.careful |= '"' in cell and (self.separator in cell or "\n" in cell)

    def header(self) -> list[str] | Refusal:
        """The names of the columns; none where the file is empty. Raises DataError when they are no names."""
        found = self.row(0)
        if isinstance(found, Refusal):
            if found.reason == "too_large":
                detail = f"{found.detail} where the names of the columns stand; nothing is read"
                return Refusal(found.source, "", found.reason, detail)
            raise DataError(f"{found.source}: {found.detail}", wanted="the names of the columns", cure="mend that line")
        # what is not UTF-8 in a name is escaped, since the cells under it may be sound
        names = [name.encode("utf-8", "backslashreplace").decode() for name in found or []]
        names = [name.strip() or f"column_{number}" for number, name in enumerate(names, 1)]
        twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
        if twice is not None:
            raise DataError(
                f"{self.shown} has {names.count(twice)} columns that are called `{twice}`",
                wanted="a name of its own for each column",
                cure="rename them in its first line, or put a line of names above it if it is a row already",
            )  # fmt: skip
        return names

    def row(self, columns: int) -> list[str] | Refusal | None:
        """The cells of the next row, none for a blank line; None at the end. `columns` is how many are wanted; 0: any."""
        self.lines.begin_row()
        reason, detail = "bad_row", ""
        try:
            cells = next(self.reader, None)
            if not cells or (len(cells) == (columns or len(cells)) and not self.swallows(cells)):
                return cells
            detail = f"{len(cells)} cells under {columns} columns"
            if len(cells) == (columns or len(cells)):
                detail = "an opening quote takes in whole rows"
        except _TooLarge as error:
            reason, detail = "too_large", str(error)
        except csv.Error as error:
            detail = f"its quotes are not well formed: {error}"
        self.lines.give_back()
        if self.separator == "\t" and reason == "bad_row":  # where quotes are often no more than that
            plain = self.lines.line.rstrip("\r\n").split("\t")
            if len(plain) == (columns or len(plain)):
                return plain
        return Refusal(f"{self.shown}:{self.lines.number}", "", reason, detail)

    def swallows(self, cells: list[str]) -> bool:
        """Whether a cell over several lines is rather rows that a stray opening quote and a stray closing one, in the same
        column of a later row, took in.

        With tabs, a tab in it is enough, since hardly a text holds any. Commas are common in texts: there every line must
        make a row, whose other cells hold what these columns held so far, and no cell so far may show careful quoting.
        """
        if not self.lines.several:
            return False
        mark = self.separator
        over = [at for at, cell in enumerate(cells) if "\n" in cell or "\r" in cell]
        if mark == "\t":
            return any(mark in cells[at] for at in over)
        if self.careful or len(over) != 1 or len(cells) == 1 or '"' in cells[over[0]]:
            return False
        rows = [line.split(mark) for line in _LINE_END.split(mark.join(cells))]
        if any(len(row) != len(cells) for row in rows):
            return False
        told = [self.told(at, [row[at] for row in rows]) for at in range(len(cells)) if at != over[0]]
        return None not in told and True in told

    def told(self, at: int, values: list[str]) -> bool | None:
        """Whether column `at` would hold just these values: those it held before, or numbers that count on; None where
        it would not. False where nothing is known but that all are numbers."""
        seen = self.seen[at] if self.seen else set()
        if seen.issuperset(values):
            return True
        if not all(_NUMBER.fullmatch(value) for value in (*values, *seen)):
            return None
        return all(float(b) - float(a) == 1 for a, b in pairwise(values))


def separator_of(lines: list[str], tabs: bool = False) -> str:
    """What separates the cells of a table that begins with `lines`: of comma, semicolon, tab and bar the one that parts
    the first line and, outside quotes, most others into as many cells; of several the one that no blank follows, then
    the one that makes more cells. `tabs`: a tab, if there is any."""
    if tabs and any("\t" in line for line in lines):
        return "\t"
    lines = [line for line in lines if line.strip()]

    def fit(mark: str) -> tuple[float, bool, int]:
        counts = [len(next(csv.reader([line[:MAX_LINE]], delimiter=mark), [])) for line in lines]
        if not counts or counts[0] < 2:
            return 0.0, False, 0
        alike = sum(n == counts[0] for n in counts) / len(counts)
        return alike, not any(f"{mark} " in line for line in lines), counts[0]

    return max(_SEPARATORS, key=fit)
