"""Tables of every form become records by their mapping."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmlm.config import parse
from mmlm.corpus.config import ScanConfig
from mmlm.corpus.drafts import media_uri
from mmlm.corpus.records import Target
from mmlm.corpus.scan import scan
from mmlm.errors import ConfigError, DataError
from tests.corpus.samples import Scan, png, wav, write_lines

ROWS = [{"id": str(i), "text": f"text {i}", "label": ("good", "bad")[i % 2], "age": str(i / 2)} for i in range(30)]
SIMPLE: dict[str, Any] = {
    "kind": "table",
    "map": {"id": "id", "fields": {"age": "age"}},
    "ask": [{"task": "mood", "text": "text", "label": "label"}],
}


def write_table(path: Path, rows: list[dict[str, str]]) -> None:
    if path.suffix == ".jsonl":
        write_lines(path, rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as f:
            writer = csv.DictWriter(f, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ";")
            writer.writeheader()
            writer.writerows(rows)


def test_every_form_of_table_gives_the_same_records(tmp_path: Path, scanned: Scan) -> None:
    hashes = []
    for ending in (".jsonl", ".json", ".csv", ".tsv", ".parquet"):
        write_table(tmp_path / f"t{ending}", ROWS)
        made = scanned(tmp_path, {**SIMPLE, "files": f"t{ending}"})
        assert made.counts["kept"] == 30
        assert made.records["3"].target == Target("bad")
        assert made.records["3"].parts[0].fields == {"age": 1.5}
        assert made.records["3"].parts[1].text == "text 3"
        hashes.append({i: (r.content_hash, r.split) for i, r in made.records.items()})
    assert all(h == hashes[0] for h in hashes)


def test_the_order_of_lines_and_files_does_not_matter(tmp_path: Path, scanned: Scan) -> None:
    write_table(tmp_path / "a/t.jsonl", ROWS)
    write_table(tmp_path / "b/t.jsonl", ROWS[::-1])
    source = {**SIMPLE, "map": {**SIMPLE["map"]}}
    one = scanned(tmp_path / "a", {**source, "files": "t.jsonl"})
    other = scanned(tmp_path / "b", {**source, "files": "*.jsonl"})
    assert one.bytes == other.bytes
    assert one.artifact.digest == other.artifact.digest


@pytest.mark.parametrize(
    ("path", "data", "expected"),
    [
        ("/mnt/x.png", "/", "mnt/x.png"),
        ("/mnt/x.png", "/mnt", "x.png"),
        ("/mnt/x.png", "/mnt/", "x.png"),
        ("/mntx/x.png", "/mnt", "/mntx/x.png"),
        ("/mnt/x.png", "", "/mnt/x.png"),
        ("file:///mnt/a//./x.png", "/mnt", "a/x.png"),
    ],
)
def test_absolute_paths_below_the_data_are_kept_relative_to_it(path: str, data: str, expected: str) -> None:
    assert media_uri(path, "", data) == expected


def test_a_row_without_an_id_in_two_sources_is_two_records(tmp_path: Path, scanned: Scan) -> None:
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(200)]
    write_table(tmp_path / "train.csv", rows[:150])
    write_table(tmp_path / "test.csv", rows[120:180])
    ask = [{"task": "t", "text": "text", "label": "label"}]
    train, test = ({"kind": "table", "files": f"{s}.csv", "split": s, "ask": ask} for s in ("train", "test"))
    alone, both = scanned(tmp_path, train), scanned(tmp_path, train, test, error_budget=0.0)
    assert both.counts["kept"] == 210 and both.counts["train_copies_of_held_out"] == 30
    for name, record in alone.records.items():  # what is added renames nothing
        assert both.records[name].content_hash == record.content_hash and both.records[name].source == "train.csv"
    assert sum(r.split == "test" for r in both.records.values()) == 60
    lines = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}]
    for name in ("a", "b"):
        write_lines(tmp_path / f"{name}.jsonl", lines)
    chats = [{"kind": "chat", "files": f"{name}.jsonl", "split": "train"} for name in ("a", "b")]
    assert scanned(tmp_path, *chats).counts["kept"] == 2


def test_rows_without_ids_are_named_by_content_and_repeats_stay_together(tmp_path: Path, scanned: Scan) -> None:
    rows = [{"text": f"text {i % 20}", "label": "ab"[i % 2]} for i in range(40)]
    source = {"kind": "table", "files": "t.jsonl", "ask": [{"task": "t", "text": "text", "label": "label"}]}
    write_lines(tmp_path / "x/t.jsonl", rows)
    write_lines(tmp_path / "y/t.jsonl", rows[::-1])
    made = scanned(tmp_path / "x", source)
    assert made.counts["kept"] == 40
    splits: dict[str, set[str]] = {}
    for record in made.records.values():
        splits.setdefault(record.content_hash, set()).add(record.split)
    assert len(splits) == 20
    assert all(len(s) == 1 for s in splits.values())
    assert scanned(tmp_path / "y", source).bytes == made.bytes


def test_what_is_missing_is_a_missing_part_or_a_typed_refusal(tmp_path: Path, scanned: Scan) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "bad.png").write_bytes(b"\x89PNG broken")
    (tmp_path / "none.wav").write_bytes(wav(1, 0))
    (tmp_path / "pipe").mkdir()
    good = {"text": "what", "image": "a.png", "label": "x"}
    rows: list[Any] = [
        {**good, "id": "whole"},
        {**good, "id": "no picture", "image": None},
        {**good, "id": "no label", "label": ""},
        {**good, "id": "broken", "image": "bad.png"},
        {**good, "id": "gone", "image": "gone.png"},
        {**good, "id": "above", "image": "../../etc/passwd"},
        {**good, "id": "nul", "image": "a\0.png"},
        {**good, "id": "folder", "image": "pipe"},
        {**good, "id": "far", "image": "http://127.0.0.1:1/a.png"},
        {**good, "id": "silent", "audio": "none.wav"},
        {**good, "id": "odd split", "split": "nowhere"},
        {**good, "id": "number", "image": 7},
        {**good, "id": "whole", "text": "again"},
        {"id": "nothing", "label": "x"},
        {**good, "id": "half", "text": "\ud800"},
        '{"id": "torn", "text": \n',
        "[1, 2]\n",
        "\n",
        '{"id": "\xff"}\n',
    ]
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"".join((r if isinstance(r, str) else json.dumps(r) + "\n").encode("latin-1") for r in rows))
    source = {
        "kind": "table", "files": "t.jsonl", "map": {"id": "id", "image": "image", "audio": "audio", "split": "split"},
        "ask": [{"task": "t", "text": "text", "label": "label"}],
    }  # fmt: skip
    made = scanned(tmp_path, source)
    assert set(made.records) == {"whole", "no picture"}
    assert {k.removeprefix("t.jsonl:"): v for k, v in made.reasons.items()} == {
        "3": "no_target", "4": "unreadable_image", "5": "missing_file", "6": "unsafe_path", "7": "unsafe_path",
        "8": "unreadable_file", "9": "remote_uri", "10": "empty_sound", "11": "bad_split", "12": "bad_value",
        "13": "duplicate_id", "14": "no_parts", "15": "bad_encoding", "16": "bad_json", "17": "bad_row",
        "19": "bad_json",
    }  # fmt: skip
    details = {r["id"]: r["detail"] for r in made.refused}
    assert "bad.png" in details["broken"]
    assert made.counts["refused_reasons"]["unsafe_path"] == 2


def test_a_broken_part_may_be_dropped_instead(tmp_path: Path, scanned: Scan) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG broken")
    (tmp_path / "good.wav").write_bytes(wav(3))
    rows = [{"id": str(i), "image": "bad.png", "audio": "good.wav", "label": "x"} for i in range(4)]
    rows[3]["audio"] = ""
    write_lines(tmp_path / "t.jsonl", rows)
    ask = [{"task": "t", "question": "What?", "label": "label"}]
    source = {"kind": "table", "files": "t.jsonl", "map": {"id": "id", "image": "image", "audio": "audio"}, "ask": ask}
    made = scanned(tmp_path, source, on_bad_part="drop_part")
    assert made.counts["dropped_parts"] == 3
    assert [p.kind for p in made.records["0"].parts] == ["audio", "text"]
    assert made.reasons == {"t.jsonl:4": "unreadable_image"}
    dropped = pq.read_table(made.artifact.path / "dropped.parquet").to_pylist()
    assert {(d["id"], d["reason"]) for d in dropped} == {(str(i), "unreadable_image") for i in range(3)}


def test_several_questions_of_a_row_and_one_per_entry(tmp_path: Path, scanned: Scan) -> None:
    for name in ("en", "fr", "noise"):
        (tmp_path / f"{name}.wav").write_bytes(wav(len(name) * 7))
    row = {
        "id": "frog", "group": "g", "kind": "animal", "lang": None,
        "texts": {"en": "A frog.", "fr": "Une grenouille.", "xx": "?"},
        "audio": [{"path": "noise.wav", "kind": "sound"}, {"path": "fr.wav", "kind": "speech", "lang": "fr"}],
    }  # fmt: skip
    write_lines(tmp_path / "t.jsonl", [row, {**row, "id": "toad", "texts": {}}])
    ask = [
        {
            "task": "category", "question": {"en": "Which kind?", "zh": "哪一类？"}, "context": "texts.en",
            "label": "kind",
        },
        {
            "task": "name", "each": "texts", "keep": ["en", "fr", "de"], "names": {"fr": "French"}, "lang": "{key}",
            "question": {"fr": "En {name} ?", "other": "In {name}?"}, "answer": "{value}",
            "audio": ["audio[kind=speech,lang={key}].path", "audio[].path"],
        },
    ]  # fmt: skip
    source = {"kind": "table", "files": "t.jsonl", "map": {"id": "id", "group": "group"}, "ask": ask}
    made = scanned(tmp_path, source)
    assert set(made.records) == {"frog#category", "frog#name.en", "frog#name.fr"}
    french, english = made.records["frog#name.fr"], made.records["frog#name.en"]
    assert (french.target.text, french.lang, french.group) == ("Une grenouille.", "fr", "g")
    assert [(p.kind, p.uri or p.text) for p in french.parts] == [("audio", "fr.wav"), ("text", "En French ?")]
    assert [(p.kind, p.uri or p.text) for p in english.parts] == [("audio", "noise.wav"), ("text", "In en?")]
    category = made.records["frog#category"]
    assert category.lang in ("en", "zh")
    assert category.parts[-1].text == {"en": "Which kind?", "zh": "哪一类？"}[category.lang]
    assert category.parts[-2].modality == "context"
    assert [(r["id"], r["reason"]) for r in made.refused] == [("toad#category", "no_parts"), ("toad#name", "no_target")]


def test_a_column_that_no_row_has_stops_the_scan_with_a_suggestion(tmp_path: Path, scanned: Scan) -> None:
    write_table(tmp_path / "t.csv", ROWS)
    ask = [{"task": "mood", "text": "txt", "label": "label"}]
    with pytest.raises(DataError, match="did you mean `text`"):
        scanned(tmp_path, {**SIMPLE, "files": "t.csv", "ask": ask})


def test_rows_of_another_width_are_refused(tmp_path: Path, scanned: Scan) -> None:
    (tmp_path / "t.csv").write_bytes(b'id,text,label\n1,"a, b",x\n2,b\n3,c,x,y\n4,"two\nlines",x\n5,\xff\xfe,x\n')
    ask = [{"task": "t", "text": "text", "label": "label"}]
    made = scanned(tmp_path, {"kind": "table", "files": "t.csv", "map": {"id": "id"}, "ask": ask})
    assert set(made.records) == {"1", "4"}
    assert made.reasons == {"t.csv:3": "bad_row", "t.csv:4": "bad_row", "t.csv:7": "bad_encoding"}


def test_lists_bytes_and_data_uris(tmp_path: Path, scanned: Scan) -> None:
    import base64

    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    inline = "data:image/png;base64," + base64.b64encode(png(5)).decode()
    rows = [
        {"id": "a", "image": ["0.png", "1.png"], "label": "x"},
        {"id": "b", "image": inline, "label": "x"},
        {"id": "c", "image": "data:image/png;base64,@@", "label": "x"},
        {"id": "d", "image": str(tmp_path / "0.png"), "label": "x"},
    ]
    write_lines(tmp_path / "t.jsonl", rows)
    source = {"kind": "table", "files": "t.jsonl", "map": {"id": "id", "image": "image", "many": "all"}}
    made = scanned(tmp_path, {**source, "ask": [{"task": "t", "label": "label"}]})
    assert [p.uri for p in made.records["a"].parts] == ["0.png", "1.png"]
    assert made.records["b"].parts[0].data == png(5)
    assert made.records["d"].parts[0].uri == "0.png"
    assert made.reasons == {"t.jsonl:3": "bad_data_uri"}
    pq.write_table(
        pa.Table.from_pylist([{"id": i, "image": {"bytes": png(i), "path": None}, "label": i % 2} for i in range(9)]),
        tmp_path / "t.parquet",
    )
    made = scanned(tmp_path, {**source, "files": "t.parquet", "ask": [{"task": "t", "label": "label"}]})
    assert made.records["3"].parts[0].data == png(3)
    assert made.records["3"].target.label == "1"


def test_fields_statistics_and_categories(tmp_path: Path, scanned: Scan) -> None:
    rows = [
        {"id": str(i), "meta": {"age": i, "sex": "mf"[i % 2], "code": i % 3, "odd": "NA"}, "label": "x"}
        for i in range(60)
    ]
    write_lines(tmp_path / "t.jsonl", rows)
    columns = {"id": "id", "fields": "meta", "categories": ["code"]}
    made = scanned(
        tmp_path, {"kind": "table", "files": "t.jsonl", "map": columns, "ask": [{"task": "t", "label": "label"}]}
    )
    fields = made.artifact.extra["fields"]
    train = [r for r in made.records.values() if r.split == "train"]
    ages = np.array([(r.parts[0].fields or {})["age"] for r in train], dtype=float)
    assert fields["numbers"] == {"age": pytest.approx([ages.mean(), ages.std()])}
    assert fields["categories"] == {"code": ["0", "1", "2"], "sex": ["f", "m"]}


def test_config_problems_are_told_together() -> None:
    with pytest.raises(ConfigError) as error:
        parse(
            ScanConfig,
            {"sources": [{"kind": "table", "files": "x", "map": {"imgae": "a", "id": "a["}, "ask": [{"task": "t"}]}]},
            "scan.yaml",
        )
    text = str(error.value)
    assert "did you mean `image`" in text
    assert "no selector" in text
    assert "target" in text


def test_rows_that_share_a_picture_share_a_split(tmp_path: Path, scanned: Scan) -> None:
    """No group is given, ids differ, and the copies have other names: the content joins them."""
    rows = []
    for k in range(40):
        for copy in range(3):
            (tmp_path / f"{k}-{copy}.png").write_bytes(png(k))
            rows.append({"id": f"{copy}-{k}", "picture": f"{k}-{copy}.png", "label": "ab"[k % 2]})
    write_lines(tmp_path / "t.jsonl", rows)
    source = {
        "kind": "table", "files": "t.jsonl", "map": {"id": "id", "image": "picture"}, "ask": [{"task": "x", "label": "label"}],
    }  # fmt: skip
    made = scanned(tmp_path, source)
    splits = [{made.records[f"{copy}-{k}"].split for copy in range(3)} for k in range(40)]
    assert all(len(s) == 1 for s in splits)
    assert set.union(*splits) == {"train", "val", "test"}
    assert made.artifact.counts["groups_joined_by_media"] == 120
    assert {r.group for r in made.records.values()} == {row["id"] for row in rows}


def test_what_given_splits_leave_in_train_and_test_is_told(
    tmp_path: Path, scanned: Scan, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"id": str(i), "picture": f"{i}.png", "label": "ab"[i % 2], "split": ("train", "test")[i % 4 == 3]}
        for i in range(12)
    ]
    for i in range(12):
        (tmp_path / f"{i}.png").write_bytes(png({7: 5, 11: 0}.get(i, i)))  # 7 is 5 again, and 11 has the picture of 0
    write_lines(tmp_path / "t.jsonl", rows)
    source = {
        "kind": "table", "files": "t.jsonl", "map": {"id": "id", "image": "picture", "split": "split"},
        "ask": [{"task": "x", "label": "label"}],
    }  # fmt: skip
    counts = scanned(tmp_path, source, split={"val": 0}).counts
    assert (counts["media_in_two_splits"], counts["train_copies_of_held_out"]) == (2, 1)
    assert "groups_joined_by_media" not in counts
    told = capsys.readouterr().err
    assert "media_in_two_splits: 2 " in told and "train_copies_of_held_out: 1 " in told
    for step in ("exact", "contamination"):
        curate: dict[str, Any] = {step: {}}
        cured = scan(parse(ScanConfig, {"sources": [source], "split": {"val": 0}, "curate": curate}, ""), data=tmp_path,
                     out=tmp_path / "made" / step)  # fmt: skip
        assert "train_copies_of_held_out" not in cured.counts
