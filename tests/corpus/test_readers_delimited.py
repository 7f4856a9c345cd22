"""CSV and TSV files as people write them: stray quotes, doubtful separators, columns of one name."""

from __future__ import annotations

import csv
import resource
import time
from pathlib import Path
from typing import Any

import pytest

from mmlm.corpus.drafts import Refusal
from mmlm.corpus.readers.rows import read_rows
from mmlm.errors import DataError
from tests.corpus.samples import Scan


def read(path: Path, text: str | bytes) -> list[Any]:
    """The cells of each row of a table that is `text`, and `LINE: REASON` of what is refused."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    rows = read_rows(path, path.name)
    return [f"{r.source.split(':')[1]}: {r.reason}" if isinstance(r, Refusal) else [*r[1].values()] for r in rows]


def test_stray_quotes_in_a_tsv_are_quotes(tmp_path: Path, scanned: Scan) -> None:
    texts = [f"text {i}" for i in range(200)]
    texts[50], texts[150] = '"Great film was all he said', '"Shark" is what it is called'
    path = tmp_path / "t.tsv"
    lines = [f"{i}\t{text}\t{'ab'[i % 2]}" for i, text in enumerate(texts)]
    rows = read(path, "id\ttext\tlabel\n" + "\n".join(lines) + "\n")
    assert [row[1] for row in rows] == texts
    ask = [{"task": "t", "text": "text", "label": "label"}]
    made = scanned(tmp_path, {"kind": "table", "files": "t.tsv", "map": {"id": "id"}, "ask": ask})
    assert (made.counts["kept"], made.counts["refused"]) == (200, 0)
    assert made.records["50"].parts[0].text == texts[50]


@pytest.mark.parametrize("closing", ['lovely"', '"', '"lovely"'])
def test_a_quote_in_a_tsv_takes_in_no_row(closing: str, tmp_path: Path) -> None:
    lines = ['"Come here.\t1\ta', "a text\t2\tb", f"{closing}\t3\ta", "end\t4\tb"]
    rows = read(tmp_path / "t.tsv", "text\tid\tlabel\n" + "\n".join(lines))
    assert [row[1:] for row in rows] == [["1", "a"], ["2", "b"], ["3", "a"], ["4", "b"]]
    assert (rows[0][0], rows[2][0]) == ('"Come here.', closing.strip('"') if closing == '"lovely"' else closing)


def test_quoted_cells_of_a_tsv_are_read_as_a_spreadsheet_writes_them(tmp_path: Path) -> None:
    rows = [["two\nlines", "a"], ["a\ttab", "b"], ['say "hi"', "c"], ["x", "two\nlines, too"], ["", ""]]
    path = tmp_path / "t.tsv"
    with path.open("w", newline="") as f:
        csv.writer(f, delimiter="\t").writerows([["text", "label"], *rows])
    assert read(path, path.read_bytes()) == rows


def test_a_csv_row_with_broken_quotes_is_refused_alone(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    assert read(path, 'text,label\na,x\n"Great film,x\nb,y\n"Shark" is it,x\nc,"y"\n') == [
        ["a", "x"], "3: bad_row", ["b", "y"], "5: bad_row", ["c", "y"],
    ]  # fmt: skip
    later = [[f"text {i}", "x"] for i in range(5000)]
    lines = "".join(f"{text},{label}\n" for text, label in later)
    assert read(path, 'text,label\na,"never closed\n' + lines) == ["2: bad_row", *later]
    assert read(path, 'text,label\r\n"a\r\nb,x\r\n\r\nc,y') == ["2: bad_row", ["b", "x"], ["c", "y"]]


def test_rows_between_a_stray_opening_and_a_stray_closing_quote_are_read(tmp_path: Path) -> None:
    lines = ["0,a,y", "1,a,x", '2,"I do not know,x', "3,he said,y", "4,at last,y", '5,Now.",x', "6,b,x"]
    rows = read(tmp_path / "t.csv", "id,text,label\n" + "\n".join(lines))
    assert rows == ["4: bad_row" if "know" in line else line.split(",") for line in lines]


def test_quoted_cells_of_a_csv_go_over_lines(tmp_path: Path) -> None:
    cells = [
        "two\nlines", "Hello, world\nBye", "a,b\nc,d\ne", "\n\n", 'a "b"\nc, d', "x\r\ny\rz", "a, b\nc, d\ne, f\ng",
        'a,b\nc,"d"\ne,f\ng', "a,b\nc,d\ne,f\ng,h\ni,j", "1,2\n" * 40,
    ]  # fmt: skip
    path = tmp_path / "t.csv"
    for at in (0, 1):
        rows = [[cell, "x"] if at == 0 else ["x", cell] for cell in cells]
        with path.open("w", newline="", encoding="utf-8") as f:
            csv.writer(f).writerows([["text", "label"], *rows])
        assert read(path, path.read_bytes()) == rows
    assert read(path, 'text,label\n"over\nlines",x,more\nb,y\n') == ["2: bad_row", "3: bad_row", ["b", "y"]]


def test_every_line_end_and_encoding_at_the_border_of_a_piece(tmp_path: Path) -> None:
    for end in ("\n", "\r\n", "\r"):
        for encoding in ("utf-8-sig", "utf-16"):
            rows = [[f"{i} 猫🐸" + "x" * (i % 7), f"two{end}lines"] for i in range(60_000)]
            text = f"text,label{end}" + "".join(f'{a},"{b}"{end}' for a, b in rows)
            assert read(tmp_path / "t.csv", text.encode(encoding)) == rows


def test_rubbish_that_leaves_every_quote_open_is_read_in_time_and_memory(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"a,b\n" + b'x","y\n' * 200_000)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    assert {r.reason for r in read_rows(path, "t.csv") if isinstance(r, Refusal)} == {"bad_row"}
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert time.monotonic() - began < 120  # about 5 s; reading on to the end each time would take a day
    assert grown < 400 << 20


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name, first;label\nSmith, Jo;a\nDoe, Ann;b\n", [["Smith, Jo", "a"], ["Doe, Ann", "b"]]),
        ("name,first;label\nSmith,Jo;a\nMadonna;b\n", [["Smith,Jo", "a"], ["Madonna", "b"]]),
        ('"a;b;c;d",label\nx,y\n', [["x", "y"]]),
        ("sep=;\na,b;label\nx,y;1\n", [["x,y", "1"]]),
        ('"sep=|"\r\na;b|c\r\nx|y\r\n', [["x", "y"]]),
        ("a;b;c\n1,5;2,5;3\n", [["1,5", "2,5", "3"]]),
        ("text\nHello, world\n", ["2: bad_row"]),
        ("a,b,c\n1,2,3\n", [["1", "2", "3"]]),
    ],
)
def test_what_separates_the_cells(text: str, expected: list[Any], tmp_path: Path) -> None:
    assert read(tmp_path / "t.csv", text) == expected
    assert read(tmp_path / "t.csv", text.encode("utf-16")) == expected


def test_a_tsv_of_commas_is_read_by_them(tmp_path: Path) -> None:
    assert read(tmp_path / "t.tsv", "text,label\na,x\nb,y\n") == [["a", "x"], ["b", "y"]]
    assert read(tmp_path / "t.tsv", "a,b\tc,d\nx\ty\n") == [["x", "y"]]


def test_two_columns_of_one_name_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t\.csv has 2 columns that are called `label`.*name of its own"):
        read(tmp_path / "t.csv", "text,label, label\nx,a,b\n")
    assert read(tmp_path / "t.csv", "text,,\nx,a,b\n") == [["x", "a", "b"]]
    with pytest.raises(DataError, match=r"t\.csv:1: its quotes are not well formed"):
        read(tmp_path / "t.csv", 'text,"label\nx,a\n')


def test_lines_like_rows_in_a_file_of_careful_quoting_are_text(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    doubtful, careful = ["Two of them,x\nand more", "x"], ['say "hi", please', "x"]
    for rows, kept in (([careful, doubtful], True), ([["a", "x"], doubtful], False)):
        with path.open("w", newline="") as f:
            csv.writer(f, lineterminator="\n").writerows([["text", "label"], *rows])
        expected = rows if kept else [rows[0], "3: bad_row", ['and more"', "x"]]
        assert read(path, path.read_bytes()) == expected
