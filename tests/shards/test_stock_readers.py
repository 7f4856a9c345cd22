"""Readers that nobody here wrote read the shards: the same keys, the same bytes as by our own index."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmlm.artifacts import Artifact
from mmlm.shards.shard import shard
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
