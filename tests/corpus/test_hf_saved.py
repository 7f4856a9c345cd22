"""Data sets that `datasets` itself wrote, read without it: what it reads back is what becomes records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.corpus.samples import Scan, png, wav

KINDS = ["猫", "dog", "owl"]


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    module = pytest.importorskip("datasets")
    module.disable_progress_bars()
    return module


def test_a_dictionary_of_splits_with_pictures_and_classes(datasets: Any, tmp_path: Path, scanned: Scan) -> None:
    for number in range(10):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    features = datasets.Features(
        {
            "image": datasets.Image(decode=False),
            "label": datasets.ClassLabel(names=KINDS),
            "note": datasets.Value("string"),
        }
    )
    sizes = {"train": range(6), "validation": range(6, 8), "test": range(8, 10)}
    columns = {
        split: {
            # files are taken into the data set when it is saved; bytes are there already
            "image": [str(tmp_path / f"{n}.png") if n % 2 else {"bytes": png(n), "path": None} for n in numbers],
            "label": [n % 3 for n in numbers], "note": [f"note {n}" for n in numbers],
        }
        for split, numbers in sizes.items()
    }  # fmt: skip
    made = datasets.DatasetDict(
        {split: datasets.Dataset.from_dict(c, features=features) for split, c in columns.items()}
    )
    made.save_to_disk(str(tmp_path / "data/d"), num_shards={"train": 3, "validation": 1, "test": 1})
    for number in range(10):
        (tmp_path / f"{number}.png").unlink()
    found = scanned(tmp_path / "data", {"kind": "hf", "path": "d"})
    assert found.reasons == {}
    assert {split: found.counts[split] for split in ("train", "val", "test")} == {"train": 6, "val": 2, "test": 2}
    assert len(list((tmp_path / "data/d/train").glob("*.arrow"))) == 3
    theirs = {
        (row["image"]["bytes"], KINDS[row["label"]], row["note"])
        for split in datasets.load_from_disk(str(tmp_path / "data/d")).values()
        for row in split
    }
    ours = {
        (next(p.data for p in r.parts if p.kind == "image"), r.target.label, p.text)
        for r in found.records.values()
        for p in r.parts
        if p.text and p.text.startswith("note")
    }
    assert ours == theirs and len(theirs) == 10


def test_sounds_with_their_transcripts(datasets: Any, tmp_path: Path, scanned: Scan) -> None:
    rows = {
        "audio": [{"bytes": wav(n + 1), "path": f"{n}.wav"} for n in range(5)],
        "text": [f"s {n}" for n in range(5)],
    }
    made = datasets.Dataset.from_dict(rows).cast_column("text", datasets.Value("large_string"))
    made = made.cast_column("audio", datasets.Audio(decode=False))  # a column of that kind is made by torchcodec
    made.filter(lambda row: row["text"] != "s 3").save_to_disk(str(tmp_path / "d"))
    found = scanned(tmp_path, {"kind": "hf", "path": "d"})
    assert {(r.parts[0].data, r.target.text) for r in found.records.values()} == {
        (wav(n + 1), f"s {n}") for n in (0, 1, 2, 4)
    }


def test_classes_in_lists_and_numbers(datasets: Any, tmp_path: Path, scanned: Scan) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "tags": datasets.List(datasets.ClassLabel(names=["x", "y"]))}
    )
    made = datasets.Dataset.from_dict({"text": ["a", "b"], "tags": [[0, 1], [1]]}, features=features)
    made.save_to_disk(str(tmp_path / "d"))
    found = scanned(tmp_path, {"kind": "hf", "path": "d"})
    assert {(r.parts[0].text, r.target.labels) for r in found.records.values()} == {("a", ("x", "y")), ("b", ("y",))}


def test_a_parquet_file_that_it_exports_says_the_same(datasets: Any, tmp_path: Path, scanned: Scan) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=KINDS)})
    made = datasets.Dataset.from_dict({"text": [f"t{n}" for n in range(6)], "label": [0, 1, 2] * 2}, features=features)
    (tmp_path / "p").mkdir()
    made.to_parquet(str(tmp_path / "p/train.parquet"))
    made.save_to_disk(str(tmp_path / "d"))
    told = [
        {(r.parts[0].text, r.target.label) for r in scanned(tmp_path, {"kind": "hf", "path": path}).records.values()}
        for path in ("p", "d")
    ]
    assert told[0] == told[1] == {(f"t{n}", KINDS[n % 3]) for n in range(6)}
