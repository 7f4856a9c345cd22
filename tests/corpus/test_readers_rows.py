"""Tables in their harder forms: JSON that is larger than memory should be, deep JSON, partitions, broken Parquet."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmlm.corpus.drafts import Refusal
from mmlm.corpus.readers import delimited, rows
from mmlm.corpus.readers.rows import read_rows
from mmlm.errors import DataError
from tests.corpus.samples import Scan, png, write_lines


def read(path: Path) -> list[Any]:
    """Rows, and the reasons of what is refused."""
    return [r.reason if isinstance(r, Refusal) else r[1] for r in read_rows(path, path.name)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"a": 1}, {"a": "猫]"}]', [{"a": 1}, {"a": "猫]"}]),
        ("[]", []),
        ("{}", [{}]),
        ("[1, 23, null, 4.5e3]", [1, 23, None, 4500.0]),
        ('{"n": 3, "data": [{"a": 1}, {"a": 2}], "more": {"x": [5]}}', [{"a": 1}, {"a": 2}]),
        ('{"x": [1], "y": [2]}', [{"x": [1], "y": [2]}]),
        ('{"a": 1}\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
        ('{"a": 1}\nrubbish\n{"a": 2}', [{"a": 1}, "bad_json", {"a": 2}]),
        ('{\n "a": [\n  {"b": 1},\n  {"b": 2}\n ]\n}', [{"b": 1}, {"b": 2}]),
        ('[{"a": 1}, {"a": 2', [{"a": 1}, "bad_json"]),
        ('[{"a": 1} {"a": 2}]', [{"a": 1}, "bad_json"]),
        ('[{"a": 1}] trailing', [{"a": 1}, "bad_json"]),
        ("", ["bad_json"]),
        ("[" * 100_000, ["bad_json"]),
        ('[{"a": 1}, ' + "[" * 100_000, [{"a": 1}, "bad_json"]),
    ],
)
@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_json_in_any_form_and_any_chunk(
    text: str, expected: list[Any], chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "_CHUNK", chunk)
    (tmp_path / "t.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read(tmp_path / "t.json") == expected


def test_json_of_too_many_values_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    path, more = tmp_path / "t.jsonl", rows.MAX_VALUES + 1
    text = '[{":,}]\\"\\\\' * (more // 2)  # in a text such marks are none, whatever is escaped there
    good = [{"text": text, "floats": [0.5] * (more // 2)}, {"text": "\\"}]
    bad = [
        '{"a": [' + "[]," * more + "1]}",
        '{"a": [0' + ",0" * more + "]}",
        '{"a": "\\\\", "b": [' + "{}," * more + "1]}",
    ]
    path.write_text("".join(line + "\n" for line in [json.dumps(good[0]), *bad, json.dumps(good[1])]))
    assert read(path) == [good[0], "too_large", "too_large", "too_large", good[1]]
    path = tmp_path / "t.json"
    path.write_text("[" + json.dumps(good[0]) + "," + bad[0] + "]")
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, path.stat().st_size
    assert read(path) == [good[0], "bad_json"]
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 20 * began


def test_json_that_is_no_utf8_or_no_rows(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(b'[{"a": 1}, {"a": "\xff"}]')
    assert read(tmp_path / "t.json") == ["bad_json"]
    (tmp_path / "t.json").write_bytes(b'"text"')
    with pytest.raises(DataError, match="holds a str"):
        read(tmp_path / "t.json")


def test_a_large_list_is_never_held_whole(tmp_path: Path) -> None:
    with (tmp_path / "t.json").open("w") as f:
        f.write("[" + ",\n".join(json.dumps({"id": i, "text": "x" * 1000}) for i in range(40_000)) + "]")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(1 for _ in read_rows(tmp_path / "t.json", "t.json")) == 40_000
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < (tmp_path / "t.json").stat().st_size / 4


def test_a_csv_file_that_is_one_line_is_never_held_whole(tmp_path: Path) -> None:
    with (tmp_path / "t.csv").open("wb") as f:
        f.truncate(600 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read(tmp_path / "t.csv") == ["too_large"]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 450 << 20


def test_a_long_line_of_chinese_is_looked_at_in_little_memory(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"a,b\n1," + "猫狗".encode("gbk") * (6 << 20) + b"\n")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert delimited.csv_encoding(tmp_path / "t.csv") == "gb18030"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 8 * (tmp_path / "t.csv").stat().st_size


def test_a_csv_row_is_bounded_over_all_its_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited, "MAX_LINE", 100)
    monkeypatch.setattr(delimited, "MAX_OVER_LINES", 100)
    long, lines = "x" * 101, "\n".join(["x" * 9] * 10)
    (tmp_path / "t.csv").write_text(f'a,b\n1,{long}\n2,y\n3,"{lines}"\n4,"{"x" * 90}\n"\n', newline="")
    refused = [r for r in read_rows(tmp_path / "t.csv", "t.csv") if isinstance(r, Refusal)]
    assert [(r.source, r.reason) for r in refused[:2]] == [("t.csv:2", "too_large"), ("t.csv:4", "too_large")]
    assert [(r.source, r.reason) for r in refused[2:]] == [(f"t.csv:{n}", "bad_row") for n in range(5, 14)]
    assert [r["a"] for r in read(tmp_path / "t.csv") if isinstance(r, dict)] == ["2", "4"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_unicode_text_of_a_spreadsheet(tmp_path: Path, encoding: str) -> None:
    text = "\ufeffid\t名\r\n1\t猫 🐸\r\n"
    expected = [{"id": "1", "名": "猫 🐸"}]
    for name in ("t.csv", "t.tsv"):
        (tmp_path / name).write_bytes(text.encode(encoding))
        assert read(tmp_path / name) == expected
    (tmp_path / "t.csv").write_bytes((text + "2\t\ud800\r\n").encode(encoding, "surrogatepass"))
    assert read(tmp_path / "t.csv") == [*expected, "bad_encoding"]
    (tmp_path / "t.csv").write_bytes(text.encode(encoding) + b"x")
    assert read(tmp_path / "t.csv") == [*expected, "bad_encoding"]


def test_rows_nested_deeply_are_refused_alone(tmp_path: Path, scanned: Scan) -> None:
    deep = '{"text": "x", "label": "y", "d": ' + "[" * 600 + "]" * 600 + "}\n"
    write_lines(tmp_path / "t.jsonl", [{"text": "a", "label": "b"}, deep])
    made = scanned(
        tmp_path, {"kind": "table", "files": "t.jsonl", "ask": [{"task": "t", "text": "text", "label": "label"}]}
    )
    assert (made.counts["kept"], made.reasons) == (1, {"t.jsonl:2": "bad_json"})


def test_hive_partitions_are_columns(tmp_path: Path, scanned: Scan) -> None:
    for lang, year, text in (
        ("en", "2024", "a cat"),
        ("zh", "__HIVE_DEFAULT_PARTITION__", "一只猫"),
        ("a%2Fb", "1", "x"),
    ):
        folder = tmp_path / f"corpus/lang={lang}/year={year}"
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"id": [text], "text": [text], "label": ["cat"]}), folder / "part-0.parquet")
    source = {
        "kind": "table", "files": "corpus", "map": {"id": "id", "lang": "lang", "fields": {"year": "year"}},
        "ask": [{"task": "t", "text": "text", "label": "label"}],
    }  # fmt: skip
    made = scanned(tmp_path, source)
    assert {r.id: r.lang for r in made.records.values()} == {"a cat": "en", "一只猫": "zh", "x": "a/b"}
    fields = {r.id: [p.fields for p in r.parts if p.fields] for r in made.records.values()}
    assert fields == {"a cat": [{"year": 2024.0}], "一只猫": [], "x": [{"year": 1.0}]}


def test_broken_parquet_loses_only_what_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    table = pa.table({"text": [f"{i} " + "x" * 2000 for i in range(2000)]})
    pq.write_table(table, path, row_group_size=500, compression="snappy", use_dictionary=False)
    group = pq.read_metadata(path).row_group(2).column(0)
    raw = bytearray(path.read_bytes())
    raw[group.data_page_offset : group.data_page_offset + 200] = b"\xff" * 200
    path.write_bytes(raw)
    found = read(path)
    assert [f for f in found if isinstance(f, str)] == ["bad_table"]
    assert len(found) == 1501
    assert found[-1]["text"].startswith("1999 ")
    bad = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"ok\xff\xfe")]
    )
    pq.write_table(pa.table({"text": bad}), path)
    assert read(path) == [{"text": "ok"}, "bad_encoding"]


def test_pictures_and_videos_inside_parquet(tmp_path: Path, scanned: Scan) -> None:
    rows = [
        {"id": str(i), "p": {"bytes": png(i), "path": "x.png"}, "v": b"\0\0\0 ftypisom", "l": "a"} for i in range(5)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    source = {
        "kind": "table", "files": "t.parquet", "map": {"id": "id", "image": "p", "video": "v"},
        "ask": [{"task": "t", "label": "l"}],
    }  # fmt: skip
    made = scanned(tmp_path, source)
    assert [[p.kind for p in r.parts] for r in made.records.values()] == [["image", "video"]] * 5
    assert made.artifact.extra["media"]["formats"] == {"mp4": 5, "png": 5}


def test_halves_of_surrogate_pairs_and_names_of_columns_that_are_no_text(tmp_path: Path, scanned: Scan) -> None:
    ask = [{"task": "t", "text": "text", "label": "label"}]
    (tmp_path / "t.csv").write_bytes(b"te\xffxt,text,label\n1,x,y\n")
    assert scanned(tmp_path, {"kind": "table", "files": "t.csv", "ask": ask}).counts["kept"] == 1
    row = {"text": "x", "label": "y"}
    lines = [json.dumps(one) + "\n" for one in ({**row, "more": "\ud800"}, {**row, "text": "\ud800"}, row)]
    (tmp_path / "t.jsonl").write_text("".join(lines))
    made = scanned(tmp_path, {"kind": "table", "files": "t.jsonl", "ask": ask})
    assert made.reasons == {"t.jsonl:1": "bad_encoding", "t.jsonl:2": "bad_encoding"}
    line = '{"messages": [{"role": "user", "content": "%s"}], "label": "x"}\n'
    (tmp_path / "c.jsonl").write_text(line % "\\ud800" + line % "hi")
    assert scanned(tmp_path, {"kind": "chat", "files": "c.jsonl"}).reasons == {"c.jsonl:1": "bad_encoding"}
