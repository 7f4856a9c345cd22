"""A corpus that grows: nothing is renumbered, only what is new is sharded, and the samples are those of all at once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmlm import artifacts
from mmlm import story as stories
from mmlm.artifacts import Artifact
from mmlm.config import parse
from mmlm.corpus.config import ScanConfig
from mmlm.corpus.records import read_rows
from mmlm.corpus.scan import scan
from mmlm.data.reader import ShardReader
from mmlm.errors import DataError
from mmlm.shards.shard import shard
from mmlm.shards.verify import verify
from tests.shards.conftest import CONFIG

SCAN = parse(
    ScanConfig,
    {
        "sources": [
            {
                "kind": "table", "files": ["*.jsonl"], "map": {"id": "id", "image": "image"},
                "ask": [{"task": "digit", "question": "Which number is it?", "label": "label"}],
            }
        ]
    },
    "scan.yaml",
)  # fmt: skip


def write(data: Path, name: str, numbers: range) -> None:
    data.mkdir(exist_ok=True)
    lines = []
    for i in numbers:
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (24, 24), np.uint8)).save(data / f"{i}.png")
        # ids of later files fall between those of earlier ones
        lines.append(json.dumps({"id": f"{i * 7919 % 1000:04d}", "image": f"{i}.png", "label": str(i % 10)}))
    (data / name).write_text("\n".join(lines))


def grow(data: Path, out: Path) -> tuple[Artifact, Artifact]:
    """Scan and shard as a run does: what stands in the way is set aside."""
    manifest = stories.settle(
        lambda: scan(SCAN, data=data, out=out / "manifest", earlier=artifacts.predecessor(out / "manifest"))
    )
    made = stories.settle(
        lambda: shard(CONFIG, manifest, data=data, out=out / "shards", earlier=artifacts.predecessor(out / "shards"))
    )
    return manifest, made


def files(shards: Artifact) -> dict[str, str]:
    return {row["path"]: row["sha256"] for row in pq.read_table(shards.path / "manifest.parquet").to_pylist()}


def samples(shards: Artifact) -> dict[str, bytes]:
    """id → the stored picture: what does not depend on the tokenizer."""
    return {s.id: s.images[0].tobytes() for s in ShardReader(shards.path, ("train", "val", "test"))}


def test_added_files_renumber_nothing_and_only_they_are_sharded(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    write(data, "a.jsonl", range(100))
    first_manifest, first = grow(data, out)
    tokenizer, before = (first.path / "tokenizer.json").read_bytes(), files(first)
    write(data, "b.jsonl", range(100, 130))
    manifest, second = grow(data, out)
    assert manifest.counts["unchanged"] == 100 and manifest.counts["added"] == 30
    assert first_manifest.digest in manifest.extra["history"]
    assert before.items() <= files(second).items()
    assert second.counts["taken_over"] == len(before)
    new = [row for row in pq.read_table(second.path / "manifest.parquet").to_pylist() if row["path"] not in before]
    assert sum(row["records"] for row in new) == 30 and {row["generation"] for row in new} == {1}
    assert (second.path / "tokenizer.json").read_bytes() == tokenizer
    assert verify(second.path) == []

    write(data, "c.jsonl", range(130, 140))
    _, third = grow(data, out)
    assert files(second).items() <= files(third).items()

    at_once = grow(data, tmp_path / "fresh")
    assert samples(at_once[1]) == samples(third)
    splits = {row["id"]: row["split"] for row in read_rows(at_once[0].path)}
    assert splits == {row["id"]: row["split"] for row in read_rows(out / "manifest")}


def test_a_changed_and_a_removed_record_touch_their_own_shards_only(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    write(data, "a.jsonl", range(100))
    _, first = grow(data, out)
    Image.new("L", (24, 24), 7).save(data / "50.png")
    lines = (data / "a.jsonl").read_text().splitlines()
    (data / "a.jsonl").write_text("\n".join(lines[:20] + lines[21:]))
    manifest, second = grow(data, out)
    assert (manifest.counts["unchanged"], manifest.counts["added"]) == (98, 1)
    kept = set(files(first)) & set(files(second))
    assert len(files(first)) - len(kept) <= 2
    assert samples(second) == samples(grow(data, tmp_path / "fresh")[1])


def test_samples_that_failed_are_tried_again_when_asked(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    write(data, "a.jsonl", range(60))
    manifest = scan(SCAN, data=data, out=out / "manifest")
    pictures = {name: (data / name).read_bytes() for name in ("3.png", "4.png", "5.png")}
    for name in pictures:
        (data / name).unlink()
    made = shard(CONFIG, manifest, data=data, out=out / "shards")
    assert made.counts["quarantine_reasons"] == {"missing_file": 3}
    with pytest.raises(DataError, match=r"no sample .* lost to 'bomb'.*missing_file \(3\)"):
        shard(CONFIG, manifest, data=data, out=out / "shards", retry="bomb")
    assert verify(made.path) == []
    for name, content in pictures.items():
        if name != "5.png":
            (data / name).write_bytes(content)
    again = shard(CONFIG, manifest, data=data, out=out / "shards", retry="missing_file")
    assert again.counts["quarantine_reasons"] == {"missing_file": 1}
    assert again.counts["samples"] == 59 and verify(again.path) == []
    (data / "5.png").write_bytes(pictures["5.png"])
    done = shard(CONFIG, manifest, data=data, out=out / "shards", retry="all")
    assert files(done) == files(shard(CONFIG, manifest, data=data, out=tmp_path / "whole"))
    with pytest.raises(DataError, match="nothing to retry"):
        shard(CONFIG, manifest, data=data, out=out / "shards", retry="all")


def test_a_shard_taken_over_with_its_failures_is_tried_again_too(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    write(data, "a.jsonl", range(100))
    first = scan(SCAN, data=data, out=out / "manifest")
    lost = (data / "3.png").read_bytes()
    (data / "3.png").unlink()
    before = files(shard(CONFIG, first, data=data, out=out / "shards"))
    (data / "3.png").write_bytes(lost)
    write(data, "b.jsonl", range(100, 110))
    manifest, grown = grow(data, out)
    then = files(grown)
    assert grown.counts["taken_over"] == len(before) and grown.counts["quarantined"] == 1
    again = shard(
        CONFIG, manifest, data=data, out=out / "shards", earlier=artifacts.predecessor(out / "shards"),
        retry="missing_file",
    )  # fmt: skip
    assert again.counts["quarantined"] == 0 and again.counts["samples"] == 110
    changed = files(again).items() - then.items()
    assert len(changed) == 1 and verify(again.path) == []
