"""The verb: counts, idempotence, what makes it run again, what stops it."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mmlm.artifacts import ArtifactConflict
from mmlm.config import parse, read_yaml
from mmlm.corpus import sorting
from mmlm.corpus.config import ScanConfig
from mmlm.corpus.counts import Tally
from mmlm.corpus.records import REFUSED, SCHEMA, Part, Record, Target
from mmlm.corpus.scan import counts_table, scan
from mmlm.corpus.sorting import Sorter
from mmlm.errors import DataError
from tests.corpus.samples import Scan, png, write_lines

SOURCE: dict[str, Any] = {
    "kind": "table", "files": "t.jsonl", "map": {"id": "id", "image": "image", "group": "group"},
    "ask": [{"task": "t", "question": {"en": "What?", "zh": "什么？"}, "label": "label"}],
}  # fmt: skip


def corpus(folder: Path, n: int = 40) -> Path:
    for i in range(n):
        (folder / "media").mkdir(parents=True, exist_ok=True)
        (folder / f"media/{i}.png").write_bytes(png(i))
    write_lines(
        folder / "t.jsonl",
        [{"id": f"r{i:03d}", "group": f"g{i // 2}", "image": f"media/{i}.png", "label": "ab"[i % 2]} for i in range(n)],
    )
    return folder


def config(**settings: Any) -> ScanConfig:
    return parse(ScanConfig, {"sources": [SOURCE], **settings}, "test")


def test_a_manifest_says_what_is_in_it(tmp_path: Path, scanned: Scan) -> None:
    made = scanned(corpus(tmp_path / "data"), SOURCE)
    assert pq.read_schema(made.artifact.path / "records-00000.parquet").equals(SCHEMA)
    assert pq.read_schema(made.artifact.path / "refused.parquet").equals(REFUSED)
    assert list(made.records) == sorted(made.records)
    assert made.counts["tasks"] == {"t": 40}
    assert made.counts["modalities"] == {"image": 40, "text": 40}
    assert sum(made.counts["langs"].values()) == 40
    assert set(made.counts["langs"]) == {"en", "zh"}
    (task,) = made.artifact.extra["tasks"]
    assert task["labels"] == ["a", "b"]
    assert sorted(task["questions"]) == ["What?", "什么？"]
    assert made.artifact.extra["media"]["image_side"]["median"] == 8
    for a, b in zip(list(made.records.values())[::2], list(made.records.values())[1::2], strict=True):
        assert a.split == b.split
    assert "<td>kept</td>" in counts_table(made.counts)
    assert not [p.name for p in made.artifact.path.iterdir() if p.name.startswith(".") and p.name != ".lock"]


def test_it_runs_again_only_when_something_changed(tmp_path: Path) -> None:
    data, out = corpus(tmp_path / "data"), tmp_path / "manifest"
    first = scan(config(), data=data, out=out)
    stamp = (out / "records-00000.parquet").stat().st_mtime_ns
    assert scan(config(), data=data, out=out).fingerprint == first.fingerprint
    assert (out / "records-00000.parquet").stat().st_mtime_ns == stamp
    (data / "media/3.png").write_bytes(png(1003))
    with pytest.raises(ArtifactConflict):
        scan(config(), data=data, out=out)
    other = scan(config(), data=data, out=tmp_path / "other")
    assert other.digest != first.digest


def test_the_data_folder_is_no_part_of_the_content(tmp_path: Path) -> None:
    one = scan(config(), data=corpus(tmp_path / "here"), out=tmp_path / "a")
    other = scan(config(), data=corpus(tmp_path / "there"), out=tmp_path / "b")
    assert one.digest == other.digest


def test_too_much_refused_stops_it_and_leaves_the_table_of_reasons(tmp_path: Path) -> None:
    data, out = corpus(tmp_path / "data"), tmp_path / "manifest"
    for i in range(6):
        (data / f"media/{i}.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(DataError, match=r"6 of 40 records \(15\.0 %\).*unreadable_image.*refused\.parquet"):
        scan(config(), data=data, out=out)
    assert pq.read_table(out / "refused.parquet").num_rows == 6
    assert not (out / "artifact.json").exists()
    assert scan(config(error_budget=0.2), data=data, out=tmp_path / "again").counts["kept"] == 34


def test_nothing_to_train_on_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("\n")
    with pytest.raises(DataError, match="empty"):
        scan(config(), data=tmp_path, out=tmp_path / "a")
    (tmp_path / "t.jsonl").write_text("{broken\n")
    with pytest.raises(DataError, match="all 1 records were refused"):
        scan(config(), data=tmp_path, out=tmp_path / "b")
    ask = [{"task": "t", "text": "x", "label": "y"}]
    write_lines(tmp_path / "t.jsonl", [{"x": "a", "y": "b", "s": "test"}])
    source = {"kind": "table", "files": "t.jsonl", "map": {"split": "s"}, "ask": ask}
    with pytest.raises(DataError, match="training split"):
        scan(parse(ScanConfig, {"sources": [source]}, "t"), data=tmp_path, out=tmp_path / "c")


def test_a_corpus_that_is_not_there_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    for data in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(DataError, match="--data must point"):
            scan(config(), data=data, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for path in ("/etc/passwd", "../x.jsonl"):
        with pytest.raises(DataError, match="leaves the data folder"):
            scan(config(sources=[{**SOURCE, "files": path}]), data=tmp_path, out=tmp_path / "out")


def test_a_killed_scan_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmlm.corpus import scan as module

    data, out = corpus(tmp_path / "data"), tmp_path / "manifest"
    wanted = scan(config(), data=data, out=tmp_path / "whole")
    monkeypatch.setattr(module, "Tally", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scan(config(), data=data, out=out)
    monkeypatch.undo()
    assert scan(config(), data=data, out=out).digest == wanted.digest


def test_the_questions_that_are_counted_take_little_memory_however_long_they_are() -> None:
    tally = Tally()
    tracemalloc.start()
    for i in range(400):
        text = f"{i} " + "x" * (1 << 20)
        tally.add(Record(f"r{i}", (Part("text", text=text),), "t", Target(label="a"), "train", f"{i}"))
    tally.add(Record("z", (Part("text", text="Which?"),), "t", Target(label="a"), "train", "z"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 48 << 20  # of 400 MB
    [task] = tally.tasks()
    assert len(task["questions"]) == 32 and "Which?" in task["questions"]


@pytest.mark.parametrize("merged", [3, 128])
def test_the_sorter_spills_and_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merged: int) -> None:
    monkeypatch.setattr(sorting, "MERGED", merged)  # a process may not open all runs of a large corpus at once
    sorter = Sorter(tmp_path / "spool", REFUSED, lambda r: r["id"], limit=7)
    names = [f"{i * 37 % 100:03d}" for i in range(100)]
    for name in names:
        sorter.add({"source": "s", "id": name, "reason": "r", "detail": "d"})
    assert [r["id"] for r in sorter.rows()] == sorted(names)
    assert [r["id"] for r in sorter.rows()] == sorted(names)
    assert len(sorter.runs) <= merged
    sorter.close()
    assert not (tmp_path / "spool").exists()


def test_spilling_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = corpus(tmp_path / "data")
    whole = scan(config(), data=data, out=tmp_path / "a")
    monkeypatch.setattr(Sorter.__init__, "__defaults__", (7, 1 << 30))
    assert scan(config(), data=data, out=tmp_path / "b").digest == whole.digest


def test_the_tracker_is_told(tmp_path: Path) -> None:
    told: dict[str, Any] = {}

    class Run:
        def __enter__(self) -> Run:
            return self

        def __exit__(self, *_: object) -> None:
            told["closed"] = True

        def params(self, values: dict[str, Any]) -> None:
            told["params"] = values

        def metrics(self, values: dict[str, float]) -> None:
            told["metrics"] = values

        def text(self, name: str, content: str) -> None:
            told[name] = content

        def artifact(self, path: Path) -> None:
            told["artifact"] = path.name

    class Tracker:
        def run(self, name: str, config: object, work: object) -> Run:
            told["name"] = name
            return Run()

    data = corpus(tmp_path / "data")
    for _ in range(2):
        scan(config(), data=data, out=tmp_path / "m", tracker=Tracker())
    assert told["name"] == "scan"
    assert told["metrics"]["kept"] == 40
    assert told["closed"]
    assert told["artifact"] == "refused.parquet"


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[2].glob("jobs/configs/*/scan.yaml")), ids=lambda p: p.parent.name
)
def test_the_configs_parse(path: Path) -> None:
    written = read_yaml(path)
    assert len(parse(ScanConfig, written, str(path)).sources) == len(written["sources"]) > 0
