"""Hugging Face data sets on disk, written here as `datasets` 5.2 writes them, read without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmlm.config import parse
from mmlm.corpus.config import ScanConfig
from mmlm.corpus.guess import look
from mmlm.corpus.readers.hf import read_features
from mmlm.corpus.scan import scan
from mmlm.errors import ArtifactError, DataError
from tests.corpus.samples import Scan, png, wav

FEATURES: dict[str, Any] = {
    "picture": {"_type": "Image"}, "label": {"names": ["cat", "狗"], "_type": "ClassLabel"},
    "text": {"dtype": "string", "_type": "Value"},
}  # fmt: skip
SOURCE = {"kind": "hf"}


def rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"picture": {"bytes": png(first + i), "path": None}, "label": i % 2, "text": f"text {first + i}"}
        for i in range(count)
    ]


def save(folder: Path, table: pa.Table, features: dict[str, Any], shards: int = 1) -> None:
    """What `Dataset.save_to_disk` writes."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    step = -(-len(table) // shards)
    for i, name in enumerate(names):
        with pa.OSFile(str(folder / name), "wb") as f, pa.ipc.new_stream(f, table.schema) as writer:
            writer.write_table(table.slice(i * step, step), max_chunksize=4)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names], "_split": None}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))


def test_a_dictionary_of_splits(tmp_path: Path, scanned: Scan) -> None:
    save(tmp_path / "d/train", pa.Table.from_pylist(rows(10)), FEATURES, 2)
    save(tmp_path / "d/validation", pa.Table.from_pylist(rows(4, 50)), FEATURES)
    save(tmp_path / "d/test", pa.Table.from_pylist([*rows(3, 90), {**rows(1, 99)[0], "label": -1}]), FEATURES)
    (tmp_path / "d/dataset_dict.json").write_text('{"splits": ["train", "validation", "test"]}')
    made = scanned(tmp_path, {**SOURCE, "path": "d"})
    assert {s: made.counts[s] for s in ("train", "val", "test")} == {"train": 10, "val": 4, "test": 3}
    assert list(made.reasons.values()) == ["no_label"]  # -1: a class that is not told
    record = next(r for r in made.records.values() if any(p.text == "text 1" for p in r.parts))
    assert (record.task, record.target.label) == ("label", "狗")
    assert [p.kind for p in record.parts] == ["image", "text", "text"] and record.parts[0].data == png(1)


def test_sounds_captions_lists_of_classes_and_answers(tmp_path: Path, scanned: Scan) -> None:
    string = {"dtype": "string", "_type": "Value"}
    spoken = [{"audio": {"bytes": wav(i + 1), "path": "x.wav"}, "sentence": f"s{i}"} for i in range(3)]
    save(tmp_path / "a", pa.Table.from_pylist(spoken), {"audio": {"_type": "Audio"}, "sentence": string})
    made = scanned(tmp_path, {**SOURCE, "path": "a"})
    assert {(r.task, r.target.text) for r in made.records.values()} == {("transcript", f"s{i}") for i in range(3)}
    tagged = [{"text": "a", "tags": [0, 1]}, {"text": "b", "tags": [1]}, {"text": "c", "tags": [7]}]
    tags = {"feature": {"names": ["x", "y"], "_type": "ClassLabel"}, "_type": "List"}
    save(tmp_path / "b", pa.Table.from_pylist(tagged), {"text": string, "tags": tags})
    made = scanned(tmp_path, {**SOURCE, "path": "b"})
    assert {r.target.labels for r in made.records.values()} == {("x", "y"), ("y",)}
    assert list(made.reasons.values()) == ["bad_value"]
    asked = pa.table({"context": ["c"], "question": ["q?"], "answer": ["a"]})
    save(tmp_path / "c", asked, dict.fromkeys(("context", "question", "answer"), string))
    record = next(iter(scanned(tmp_path, {**SOURCE, "path": "c"}).records.values()))
    assert [(p.role, p.text) for p in record.parts] == [("context", "c"), ("user", "q?")]
    pair = [{"x": {"bytes": png(1), "path": None}, "y": {"bytes": png(2), "path": None}, "text": "same?"}]
    save(tmp_path / "e", pa.Table.from_pylist(pair), {"x": {"_type": "Image"}, "y": {"_type": "Image"}, "text": string})
    record = next(iter(scanned(tmp_path, {**SOURCE, "path": "e"}).records.values()))
    assert [p.data for p in record.parts[:2]] == [png(1), png(2)] and record.target.text == "same?"


STRING = {"dtype": "string", "_type": "Value"}


def read_in(made: Any) -> list[tuple[str, str]]:
    """(role, text) of the first record by its texts."""
    return min([(p.role, p.text) for p in r.parts if p.text] for r in made.records.values())


def test_names_of_rows_are_not_read_and_a_second_text_stands_beside_the_first(tmp_path: Path, scanned: Scan) -> None:
    label = {"names": ["x", "y"], "_type": "ClassLabel"}
    number = {"dtype": "int64", "_type": "Value"}
    told = {"guid": STRING, "headline": STRING, "label": label, "words": number, "label_text": STRING}
    news = [
        {"guid": f"g{i}", "headline": f"h{i}", "label": i % 2, "words": 2, "label_text": "xy"[i % 2]} for i in range(4)
    ]
    save(tmp_path / "a", pa.Table.from_pylist(news), told)
    ask = [("user", "h0"), ("user", "Which label is this?")]
    assert read_in(scanned(tmp_path, {**SOURCE, "path": "a", "lang": "en"})) == ask
    assert "Not used: `guid`, `label_text`, `words`." in look(tmp_path / "a").says
    pairs = [{"hypothesis": f"h{i}", "premise": f"p{i}", "pairID": str(i), "label": i % 2} for i in range(4)]
    save(tmp_path / "b", pa.Table.from_pylist(pairs), dict.fromkeys(pairs[0], STRING) | {"label": label})
    made = scanned(tmp_path, {**SOURCE, "path": "b", "lang": "en"})
    assert read_in(made) == [("context", "h0"), ("user", "p0"), *ask[1:]]
    pictures = [{"image_id": f"i{i}", "file_name": "x.png", "image": {"bytes": png(i), "path": None}} for i in range(4)]
    named = {"image_id": STRING, "file_name": STRING, "image": {"_type": "Image"}}
    save(tmp_path / "c", pa.Table.from_pylist([{**p, "label": 1} for p in pictures]), {**named, "label": label})
    assert [p[1] for p in read_in(scanned(tmp_path, {**SOURCE, "path": "c", "lang": "en"}))] == ["Which label is this?"]
    save(
        tmp_path / "d",
        pa.Table.from_pylist([{**p, "caption": "a cat"} for p in pictures]),
        {**named, "caption": STRING},
    )
    made = scanned(tmp_path, {**SOURCE, "path": "d"})
    assert {r.target.text for r in made.records.values()} == {"a cat"}
    alpaca = [{"input": "i" if i else None, "instruction": "do", "output": f"o{i}"} for i in range(2)]
    save(tmp_path / "e", pa.Table.from_pylist(alpaca), dict.fromkeys(alpaca[0], STRING))
    made = scanned(tmp_path, {**SOURCE, "path": "e"})
    assert sorted([p.text for p in r.parts] for r in made.records.values()) == [["do"], ["i", "do"]]


def test_a_data_set_of_names_and_labels_alone_is_told(tmp_path: Path, scanned: Scan) -> None:
    label = {"names": ["x", "y"], "_type": "ClassLabel"}
    save(tmp_path / "d", pa.table({"guid": ["1", "2"], "label": [0, 1]}), {"guid": STRING, "label": label})
    with pytest.raises(DataError, match="names and labels alone"):
        scanned(tmp_path, {**SOURCE, "path": "d"})
    save(tmp_path / "e", pa.table({"url": ["a.b", "c.d"], "label": [0, 1]}), {"url": STRING, "label": label})
    assert scanned(tmp_path, {**SOURCE, "path": "e"}).counts["kept"] == 2


def test_rows_that_are_marked_as_unlabelled_stop_no_scan(tmp_path: Path) -> None:
    label = {"names": ["x", "y"], "_type": "ClassLabel"}
    table = pa.table({"text": [f"t{i}" for i in range(12)], "label": [i % 3 - 1 for i in range(12)]})
    save(tmp_path / "raw", table, {"text": STRING, "label": label})
    config = parse(ScanConfig, {"sources": [SOURCE]}, "scan.yaml")
    made = scan(config, data=tmp_path / "raw", out=tmp_path / "out")
    assert (made.counts["kept"], made.counts["refused_reasons"]) == (8, {"no_label": 4})
    refused = pq.read_table(made.path / "refused.parquet").to_pylist()
    assert all("`label` is -1" in row["detail"] for row in refused)


def test_map_and_ask_win(tmp_path: Path, scanned: Scan) -> None:
    save(tmp_path / "d", pa.Table.from_pylist(rows(4)), FEATURES)
    ask = [{"task": "say", "question": "Class {label}?", "answer": "text"}]
    made = scanned(tmp_path, {**SOURCE, "path": "d", "map": {"id": "text"}, "ask": ask})
    assert [p.text for p in made.records["text 1"].parts] == [None, "Class 狗?"]


def test_a_picture_that_a_column_names_is_seen_to_change(tmp_path: Path) -> None:
    string = {"dtype": "string", "_type": "Value"}
    named = [{"file": f"{i}.png", "label": i % 2} for i in range(4)]
    save(tmp_path / "raw/d", pa.Table.from_pylist(named), {"file": string, "label": FEATURES["label"]})
    for i in range(4):
        (tmp_path / f"raw/d/{i}.png").write_bytes(png(i))
    source = {
        **SOURCE,
        "path": "d",
        "map": {"image": "file"},
        "ask": [{"task": "t", "question": "?", "label": "label"}],
    }
    config = parse(ScanConfig, {"sources": [source]}, "scan")
    made = scan(config, data=tmp_path / "raw", out=tmp_path / "out")
    assert made.counts["kept"] == 4
    (tmp_path / "raw/d/2.png").write_bytes(png(9))
    with pytest.raises(ArtifactError):
        scan(config, data=tmp_path / "raw", out=tmp_path / "out")


def test_a_repository_of_parquet_files(tmp_path: Path, scanned: Scan) -> None:
    (tmp_path / "data").mkdir()
    table = pa.Table.from_pylist(rows(6))
    told = {b"huggingface": json.dumps({"info": {"features": FEATURES}}).encode()}
    pq.write_table(table.replace_schema_metadata(told), tmp_path / "data/train-00000-of-00001.parquet")
    pq.write_table(pa.Table.from_pylist(rows(3, 30)), tmp_path / "data/test-00000-of-00001.parquet")
    made = scanned(tmp_path, SOURCE)
    assert {r.target.label for r in made.records.values()} == {"cat", "狗"}
    assert {(r.split, r.source.split("/")[1][:4]) for r in made.records.values()} <= {
        ("train", "trai"), ("val", "trai"), ("test", "test"),
    }  # fmt: skip
    readme = """---
configs:
- config_name: small
  data_files: [{split: train, path: data/test-*}]
- config_name: big
  data_files: [{split: test, path: data/*}]
---
"""
    (tmp_path / "README.md").write_text(readme)
    assert scanned(tmp_path, {**SOURCE, "config": "small", "split": ""}).counts["found"] == 3
    with pytest.raises(DataError, match="small, big"):
        scanned(tmp_path, SOURCE)
    (tmp_path / "README.md").write_text(readme.replace("data/test-*", "../../*"))
    with pytest.raises(DataError, match="outside its folder"):
        scanned(tmp_path, {**SOURCE, "config": "small"})


def test_classes_that_only_the_readme_tells(tmp_path: Path, scanned: Scan) -> None:
    pq.write_table(pa.Table.from_pylist(rows(6)), tmp_path / "train.parquet")
    features = (
        "  - {name: picture, dtype: image}\n  - name: label\n    dtype: {class_label: {names: {'0': cat, '1': dog}}}\n"
    )
    (tmp_path / "README.md").write_text(f"---\ndataset_info:\n  features:\n{features}---\n")
    assert {r.target.label for r in scanned(tmp_path, SOURCE).records.values()} == {"cat", "dog"}


def test_hostile_and_broken_folders(tmp_path: Path, scanned: Scan) -> None:
    save(tmp_path / "d", pa.Table.from_pylist(rows(20)), FEATURES, 2)
    arrow = tmp_path / "d/data-00001-of-00002.arrow"
    whole = arrow.read_bytes()
    arrow.write_bytes(whole[: len(whole) // 2])
    made = scanned(tmp_path, {**SOURCE, "path": "d"})
    assert 10 <= made.counts["kept"] < 20 and set(made.reasons.values()) == {"bad_table"}
    # the offsets of a column of text point far beyond its bytes
    table = pa.table({"text": ["ok", "xx"], "label": [0, 1]})
    with pa.OSFile(str(arrow), "wb") as f, pa.ipc.new_stream(f, table.schema) as writer:
        writer.write_table(table)
    whole = arrow.read_bytes()
    assert whole.count(b"\2\0\0\0\4\0\0\0") == 1
    arrow.write_bytes(whole.replace(b"\2\0\0\0\4\0\0\0", b"\2\0\0\0\0\0\0\x7f"))
    made = scanned(tmp_path, {**SOURCE, "path": "d"})
    assert [r for w, r in made.reasons.items() if "00001" in w] == ["bad_row"]
    (tmp_path / "d/state.json").write_text('{"_data_files": [{"filename": "../../etc/passwd"}]}')
    with pytest.raises(DataError, match="outside its folder"):
        scanned(tmp_path, {**SOURCE, "path": "d"})
    (tmp_path / "d/state.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="nested too deeply"):
        scanned(tmp_path, {**SOURCE, "path": "d"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="save_to_disk"):
        scanned(tmp_path, {**SOURCE, "path": "empty"})


def test_what_cannot_be_inferred_is_asked_for(tmp_path: Path, scanned: Scan) -> None:
    save(tmp_path / "d", pa.table({"text": ["a"]}), {"text": {"dtype": "string", "_type": "Value"}})
    with pytest.raises(DataError, match="say in `ask`"):
        scanned(tmp_path, {**SOURCE, "path": "d"})


def test_features_in_old_and_new_forms() -> None:
    label = {"names": ["a"], "_type": "ClassLabel"}
    for told in ({"feature": label, "_type": "Sequence"}, {"feature": label, "_type": "List"}, [label]):
        assert read_features({"x": told}).many == {"x"}
    assert not read_features({"x": None, "y": {"_type": "Array2D"}, "z": []})
    assert not read_features(["x"])


@pytest.mark.parametrize("ending", ["arrow", "parquet"])
def test_a_file_that_is_broken_is_told_and_not_the_lack_of_columns(ending: str, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / f"train.{ending}").write_bytes(b"nothing of the kind")
    if ending == "arrow":
        (tmp_path / "d" / "state.json").write_text('{"_data_files": [{"filename": "train.arrow"}]}')
    config = parse(ScanConfig, {"sources": [{**SOURCE, "path": "d"}]}, "scan.yaml")
    with pytest.raises(DataError, match=r"refused.*bad_table"):
        scan(config, data=tmp_path, out=tmp_path / "out")


@pytest.mark.parametrize("ending", ["arrow", "parquet"])
def test_names_of_columns_that_are_not_utf8_make_a_refusal(ending: str, tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b"], "label": ["x", "y"], "heading": ["1", "2"]})
    save(tmp_path / "d", table, {})
    path = tmp_path / "d" / "data-00000-of-00001.arrow"
    if ending == "parquet":
        path.unlink()
        (tmp_path / "d" / "state.json").unlink()
        (tmp_path / "d" / "dataset_info.json").unlink()
        path = tmp_path / "d" / "train.parquet"
        pq.write_table(table, path)
    path.write_bytes(path.read_bytes().replace(b"heading", b"h\xe1ading"))
    config = parse(ScanConfig, {"sources": [{**SOURCE, "path": "d"}]}, "scan.yaml")
    with pytest.raises(DataError, match=r"refused.*(bad_table|bad_encoding)"):
        scan(config, data=tmp_path, out=tmp_path / "out")


def test_names_of_columns_that_are_no_selectors_are_told(tmp_path: Path) -> None:
    save(tmp_path / "d", pa.table({"text[": ["a"], "label": ["x"]}), {})
    config = parse(ScanConfig, {"sources": [{**SOURCE, "path": "d"}]}, "scan.yaml")
    with pytest.raises(DataError, match="cannot be read as selectors"):
        scan(config, data=tmp_path, out=tmp_path / "out")
