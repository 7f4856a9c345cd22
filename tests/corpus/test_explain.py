"""`mmlm scan --explain`: what it says is what the scan then does, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from mmlm import scaffold
from mmlm.cli import main
from mmlm.config import parse
from mmlm.corpus import explain, explain_words
from mmlm.corpus.config import ScanConfig
from tests.corpus.samples import Scan, png, wav, write_lines
from tests.corpus.test_folders import fill


def animals(folder: Path) -> Path:
    """A table of 12 rows with pictures (one of them broken), sounds in some, Chinese, and a column of no use."""
    fill(folder, {f"m/{i}.png": png(i, 16) for i in range(11)} | {f"m/{i}.wav": wav(i + 1) for i in range(4)})
    fill(folder, {"m/11.png": b"\x89PNG broken"})
    rows = [
        {"id": f"r{i}", "file": f"m/{i}.png", "names": {"en": f"animal {i}", "zh": f"动物{i}"}, "kind": "狗猫"[i % 2],
         "sounds": [{"lang": "en", "path": f"m/{i}.wav"}] if i < 4 else [], "made": "now", "set": "test" if i == 3 else ""}
        for i in range(12)
    ]  # fmt: skip
    return write_lines(folder / "t.jsonl", rows)


SOURCE: dict[str, Any] = {
    "kind": "table",
    "files": "t.jsonl",
    "map": {"id": "id", "image": "file", "audio": "sounds[lang=en].path", "split": "set"},
    "ask": [
        {"task": "kind", "question": "Which of {names.en}?", "label": "kind"},
        {"task": "name", "each": "names", "lang": "{key}", "question": "Name?", "answer": "{value}"},
    ],
}


def explained(folder: Path, *sources: dict[str, Any], **settings: Any) -> dict[str, Any]:
    found = explain.explain(parse(ScanConfig, {"sources": list(sources), **settings}, "test"), folder)
    json.dumps(found)  # JSON values and nothing else
    shown = explain_words.words(found)
    assert max(cell_len(line) for line in shown.splitlines()) <= explain_words.WIDTH
    return found


def column(source: dict[str, Any], name: str) -> dict[str, Any]:
    return next(c for c in source["columns"] + source["unused"] if c["column"] == name)


def test_columns_with_their_roles(tmp_path: Path) -> None:
    animals(tmp_path)
    (source,) = explained(tmp_path, SOURCE)["sources"]
    assert (source["files"]["count"], source["rows"]) == (1, 12)
    assert source["files"]["bytes"] == (tmp_path / "t.jsonl").stat().st_size
    roles = {c["column"]: c["keys"] for c in source["columns"]}
    assert roles == {
        "id": ["map.id"], "set": ["map.split"], "file": ["map.image"], "sounds[lang=en].path": ["map.audio"],
        "kind": ["ask[0].label"], "names.en": ["ask[0].question"], "names": ["ask[1].each"],
    }  # fmt: skip
    assert column(source, "kind") | {"how": ""} == {
        "column": "kind", "example": "狗", "filled": 1.0, "distinct": 2, "keys": ["ask[0].label"], "how": "",
    }  # fmt: skip
    assert column(source, "sounds[lang=en].path")["filled"] == pytest.approx(4 / 12, abs=1e-3)
    assert [c["column"] for c in source["unused"]] == ["sounds[].lang", "made"]


def test_records_are_those_of_the_scan_and_so_are_refusals(tmp_path: Path, scanned: Scan) -> None:
    animals(tmp_path)
    (source,) = explained(tmp_path, SOURCE)["sources"]
    made = scanned(tmp_path, SOURCE)
    assert source["tried"] == made.counts["found"] == 36
    assert source["refused"]["reasons"] == {"unreadable_image": 3} == made.counts["refused_reasons"]
    assert source["refused"]["examples"][0]["source"] == "t.jsonl:12"
    assert [r["task"] for r in source["records"]] == ["kind", "name", "name"]
    for record in source["records"]:
        real = made.records[record["id"]]
        assert (record["group"], record["lang"], record["task"]) == (real.group, real.lang, real.task)
        assert [p["kind"] for p in record["parts"]] == [p.kind for p in real.parts]
        assert record["target"] == {k: v for k, v in (("label", real.target.label), ("text", real.target.text)) if v}
    picture, sound, _ = source["records"][0]["parts"]
    assert (picture["size"], picture["format"], sound["seconds"], sound["rate"]) == ([16, 16], "png", 0.1, 8000)


def test_how_the_split_is_decided(tmp_path: Path, scanned: Scan) -> None:
    write_lines(tmp_path / "t.jsonl", [{"id": i, "text": f"text {i}", "label": "ab"[i % 2]} for i in range(60)])
    ask = {"task": "label", "text": "text", "label": "label"}
    source = {"kind": "table", "files": "t.jsonl", "map": {"id": "id"}, "ask": [ask]}
    records = explained(tmp_path, source)["sources"][0]["records"]
    made = scanned(tmp_path, source)
    assert [r["split"] for r in records] == [made.records[r["id"]].split for r in records]
    assert all("hash of its group" in r["split_by"] for r in records)
    (record, *_) = explained(tmp_path, source | {"split": "val"})["sources"][0]["records"]
    assert (record["split"], record["split_by"]) == ("val", "the data give it")


def test_a_column_that_is_not_there_stops_the_scan_and_is_told(tmp_path: Path) -> None:
    animals(tmp_path)
    wrong = SOURCE | {"map": SOURCE["map"] | {"group": "goup"}}
    found = explained(tmp_path, wrong)
    assert column(found["sources"][0], "goup")["filled"] == 0
    assert "no row of t.jsonl has anything at `goup`" in found["sources"][0]["stops"]
    assert "never" in explain_words.words(found)


def test_class_folders_and_chat(tmp_path: Path) -> None:
    fill(tmp_path, {f"p/{s}/{c}/{i}.png": png(i) for s in ("train", "test") for c in ("猫", "狗") for i in range(3)})
    fill(tmp_path, {"p/train/猫/x.json": b"{}"})
    rows = [{"messages": [{"role": "user", "content": f"问 {i}"}, {"role": "assistant", "content": "答"}], "n": i}
            for i in range(5)]  # fmt: skip
    write_lines(tmp_path / "c.jsonl", rows)
    folders, chat = explained(tmp_path, {"kind": "folders", "path": "p"}, {"kind": "chat", "files": "c.jsonl"})[
        "sources"
    ]
    assert column(folders, "class folder")["distinct"] == 2
    assert column(folders, "topmost folder")["keys"] == ["split"]
    assert column(folders, "files .png")["distinct"] == 12
    assert folders["refused"]["reasons"] == {"unknown_format": 1}
    assert [c["column"] for c in chat["columns"]] == ["messages"]
    assert [c["column"] for c in chat["unused"]] == ["n"]
    assert chat["records"][1]["target"] == {"text": "答"}


def test_the_built_in_corpus_is_made_elsewhere(tmp_path: Path) -> None:
    found = explained(tmp_path / "raw", {"kind": "keypad"})
    assert not (tmp_path / "raw").exists()
    (source,) = found["sources"]
    assert source["tried"] == explain.KEYPAD_DIGITS and source["refused"]["count"] == 0
    assert {p["kind"] for p in source["records"][0]["parts"]} == {"image", "audio", "text"}


def files_below(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_the_command_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = animals(tmp_path / "data")
    scaffold.write_story(tmp_path / "story", data)
    monkeypatch.chdir(tmp_path)
    before = files_below(tmp_path)
    for what in ("story", "data", "data/t.jsonl", "demo"):
        assert main(["scan", what, "--explain"]) == 0
        text = capsys.readouterr().out
        assert "map.image" in text and "nothing was" in text
        assert max(map(cell_len, text.splitlines())) <= explain_words.WIDTH
        assert ("mmlm new" in text) == what.startswith("data")
        assert main(["scan", what, "--explain", "--json"]) == 0
        assert len(json.loads(capsys.readouterr().out)["sources"][0]["records"]) == 3
    assert files_below(tmp_path) == before
    assert main(["scan", "stamps", "--explain", "--data", str(tmp_path)]) == 2
    assert "there is no file" in capsys.readouterr().err


def test_media_inside_rows_are_told_by_their_size(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"image": {"bytes": png(i), "path": None}, "label": "ab"[i % 2]} for i in range(20)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    found = explain.explain_files(tmp_path / "t.parquet")
    (source,) = found["sources"]
    assert column(source, "image")["distinct"] == 20
    assert source["records"][0]["parts"][0]["bytes"] == len(png(0))
    assert found["inferred"]["tasks"] == {"label": ["a", "b"]}


def test_names_that_are_not_utf8_are_shown_escaped(tmp_path: Path) -> None:
    fill(tmp_path, {f"{c}/{i}.png": png(i) for c in "ab" for i in range(3)})
    (tmp_path / "a" / "\udcb9.png").write_bytes(png(9))
    (source,) = explained(tmp_path, {"kind": "folders"})["sources"]
    assert source["refused"]["reasons"] == {"bad_name": 1}
    explain_words.words({"data": "", "sources": [source]}).encode()


def test_wide_characters_and_long_values_fit(tmp_path: Path) -> None:
    rows = [{"编号": i, "文本": f"很长的评论，{'真的非常长' * 60}{i}", "一个名字特别特别特别长的列": i, "情感": "正负"[i % 2]}
            for i in range(20)]  # fmt: skip
    shown = explain_words.words(explain.explain_files(write_lines(tmp_path / "t.jsonl", rows)))
    assert max(map(cell_len, shown.splitlines())) <= explain_words.WIDTH
    assert "ask[0].text" in shown and "→ label     正" in shown
