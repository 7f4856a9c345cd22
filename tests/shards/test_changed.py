"""A file that changes between scan and shard is noticed, whatever its size and its date say."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmlm.artifacts import Artifact
from mmlm.corpus.config import Ask, ScanConfig, SplitConfig, TableMap, TableSource
from mmlm.corpus.records import Part, read_records
from mmlm.corpus.scan import scan
from mmlm.errors import DataError
from mmlm.features.failures import SampleError
from mmlm.shards.shard import shard
from mmlm.shards.write import read_part
from mmlm.storage import sha256_bytes
from tests.shards.conftest import CONFIG, write_wav

SCAN = ScanConfig(
    sources=[
        TableSource(
            kind="table", files=["sounds.csv"], split="train", map=TableMap(id="id", audio=["sound"]),
            ask=[Ask(task="kind", question="What is it?", label="label")],
        )
    ],
    split=SplitConfig(val=0, test=0, fill=False),
)  # fmt: skip


def make_corpus(data: Path) -> Artifact:
    rng = np.random.default_rng(0)
    data.mkdir()
    for number in range(8):
        write_wav(data / f"{number}.wav", rng.uniform(-0.5, 0.5, 4000))
    (data / "sounds.csv").write_text(
        "id,sound,label\n" + "".join(f"{n},{n}.wav,{'ab'[n % 2]}\n" for n in range(8)), encoding="utf-8"
    )
    return scan(SCAN, data=data, out=data.parent / "manifest")


def test_a_manifest_says_what_its_files_were(tmp_path: Path) -> None:
    manifest, data = make_corpus(tmp_path / "data"), tmp_path / "data"
    for record in read_records(manifest.path):
        [sound] = [part for part in record.parts if part.kind == "audio"]
        content = (data / str(sound.uri)).read_bytes()
        assert (sound.size, sound.sha256) == (len(content), sha256_bytes(content))


def test_changed_files_go_to_quarantine(tmp_path: Path) -> None:
    manifest, data = make_corpus(tmp_path / "data"), tmp_path / "data"
    whole = (data / "0.wav").read_bytes()
    (data / "0.wav").write_bytes(whole[:-2] + b"xx")  # the same size
    stamp = os.stat(data / "1.wav")
    with (data / "1.wav").open("r+b") as file:  # the same size and date
        file.seek(100)
        file.write(b"another sound")
    os.utime(data / "1.wav", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    (data / "2.wav").write_bytes(whole[:2000])
    (data / "3.wav").write_bytes((data / "3.wav").read_bytes())  # written again, and the same
    (data / "4.wav").unlink()
    (data / "4.wav").symlink_to(data / "5.wav")
    config = CONFIG.model_copy(update={"error_budget": 1.0})
    made = shard(config, manifest, data=data, out=tmp_path / "shards")
    rows = pq.read_table(made.path / "quarantine.parquet").to_pylist()
    assert {row["source"]: row["reason"] for row in rows} == dict.fromkeys(
        ("0.wav", "1.wav", "2.wav", "4.wav"), "changed"
    )
    assert all("scan again" in row["detail"] for row in rows)
    assert made.counts["samples"] == 4


def test_a_folder_that_was_swapped_for_an_older_one_is_noticed(tmp_path: Path) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    noise = np.random.default_rng(1).uniform(-0.5, 0.5, 4000)
    other.mkdir()
    for number in range(8):
        write_wav(other / f"{number}.wav", noise)
    manifest = make_corpus(data)
    shutil.copy(data / "sounds.csv", other)
    data.rename(tmp_path / "aside")
    other.rename(data)  # sizes, names and times of change of its files tell nothing
    with pytest.raises(DataError, match="`changed`"):
        shard(CONFIG, manifest, data=data, out=tmp_path / "shards")


def test_size_and_content_are_compared(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"old")
    assert read_part(Part("audio", uri="a.wav", size=3, sha256=sha256_bytes(b"old")), str(tmp_path)) == b"old"
    assert read_part(Part("audio", uri="a.wav"), str(tmp_path)) == b"old"  # manifests of before say neither
    for size, content in ((3, b"new"), (4, b"old")):
        with pytest.raises(SampleError) as caught:
            read_part(Part("audio", uri="a.wav", size=size, sha256=sha256_bytes(content)), str(tmp_path))
        assert caught.value.reason == "changed"
