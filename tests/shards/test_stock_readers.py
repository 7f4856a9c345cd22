"""Readers that nobody here wrote read the shards: the same keys, the same bytes as by our own index."""

from __future__ import annotations

import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmlm.artifacts import Artifact
from mmlm.config import parse
from mmlm.data.config import DataConfig
from mmlm.data.loader import Loader
from mmlm.data.reader import ShardReader
from mmlm.shards.shard import shard
from mmlm.shards.verify import verify
from mmlm.world import World
from tests.shards.conftest import CONFIG, make_records, write_manifest

Read = dict[str, dict[str, bytes]]
"""key → ending → bytes."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Artifact:
    root = tmp_path_factory.mktemp("stock")
    manifest = write_manifest(root / "manifest", make_records(root / "data"))
    return shard(CONFIG, manifest, data=root / "data", out=root / "shards")


def ours(shards: Path) -> Read:
    """By manifest and index, as our loader reads."""
    found: Read = {}
    for row in pq.read_table(shards / "manifest.parquet").to_pylist():
        data = (shards / row["path"]).read_bytes()
        index = pq.read_table((shards / row["path"]).with_suffix(".index.parquet")).to_pylist()
        for entry in index:
            found.setdefault(entry["key"], {})[entry["ext"]] = data[entry["offset"] : entry["offset"] + entry["size"]]
    return found


def tars(shards: Artifact) -> list[str]:
    return [str(path) for path in sorted(shards.path.glob("*.tar"))]


def test_webdataset_reads_the_same(shards: Artifact) -> None:
    webdataset = pytest.importorskip("webdataset")
    theirs: Read = {}
    for sample in webdataset.WebDataset(tars(shards), shardshuffle=False):
        theirs[sample["__key__"]] = {k: v for k, v in sample.items() if not k.startswith("__")}
    assert theirs == ours(shards.path)


def test_a_complete_shard_that_the_manifest_does_not_name_is_read_by_nobody(shards: Artifact, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    folder = Path(shutil.copytree(shards.path, tmp_path / "shards"))
    config = parse(DataConfig, {"batch": 4}, "test")

    def read() -> tuple[list[str], list[list[str]], list[str]]:
        """Ids by our reader and by our loader, and keys by the stock reader, given the names in the manifest."""
        named = [str(folder / name) for name in pq.read_table(folder / "manifest.parquet")["path"].to_pylist() if name]
        loader = Loader(folder, config, 0, World(0, 1), steps=20)
        theirs = [sample["__key__"] for sample in webdataset.WebDataset(named, shardshuffle=False)]
        return [s.id for s in ShardReader(folder)], [list(loader.batch(step).ids) for step in range(20)], theirs

    before = read()
    records = [replace(r, id=f"stray/{r.id}", split="train") for r in make_records(tmp_path / "data", 6)]
    other = shard(CONFIG, write_manifest(tmp_path / "m", records), data=tmp_path / "data", out=tmp_path / "other")
    (made,) = other.path.glob("*.tar")
    for name in ("train-00000-0badcafe", "train-00099-0badcafe"):
        for ending in (".tar", ".index.parquet"):
            shutil.copy(made.with_suffix(ending), folder / f"{name}{ending}")
    assert len(before[0]) == 30 and len(before[2]) == 45
    assert read() == before
    assert verify(folder) == [f"train-{n}-0badcafe.tar: not in the manifest" for n in ("00000", "00099")]


def test_hf_datasets_reads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    # this loader wants the same members in every sample of a set
    records = [record for record in make_records(tmp_path / "data") if len(record.parts) == 3]
    uniform = shard(CONFIG, write_manifest(tmp_path / "m", records), data=tmp_path / "data", out=tmp_path / "shards")
    stream = datasets.load_dataset("webdataset", data_files={"train": tars(uniform)}, split="train", streaming=True)
    plain = {name: _undecoded(datasets, feature) for name, feature in stream.features.items()}
    expected = ours(uniform.path)
    seen = 0
    for row in stream.cast(datasets.Features(plain)):
        mine = expected[row["__key__"]]
        theirs = {name: value for name, value in row.items() if not name.startswith("__")}
        assert theirs.keys() == mine.keys()
        for name, value in theirs.items():
            if name == "json":
                assert _told(value) == _told(json.loads(mine[name]))
            elif name.endswith(".npy"):  # decoded by that loader, with pickles refused
                assert np.array_equal(np.asarray(value), np.load(io.BytesIO(mine[name])))
            else:  # a picture
                assert value["bytes"] == mine[name]
        seen += 1
    assert seen == len(expected) == 15


def _undecoded(datasets: Any, feature: Any) -> Any:
    return datasets.Image(decode=False) if isinstance(feature, datasets.Image) else feature


def _told(value: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in value.items() if v is not None}


@pytest.mark.slow
def test_ray_data_reads_the_same(shards: Artifact) -> None:
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="error")
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = ray.data.read_webdataset(tars(shards), decoder=None).take_all()
    finally:
        ray.shutdown()
    theirs = {
        r["__key__"]: {k: v for k, v in r.items() if isinstance(v, bytes) and not k.startswith("__")} for r in rows
    }
    assert theirs == ours(shards.path)
