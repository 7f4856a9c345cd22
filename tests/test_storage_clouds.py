"""A corpus gives the same shards wherever it lies, and each of its files is read once."""

from __future__ import annotations

import csv
import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mmlm import asking, cli, remote
from mmlm.config import parse
from mmlm.corpus.config import ScanConfig
from mmlm.corpus.scan import scan
from mmlm.errors import DataError
from mmlm.shards.shard import shard
from mmlm.storage import read_uri, resolve
from tests import clouds
from tests.shards.conftest import CONFIG, make_records, shas

SOURCES = [
    {
        "kind": "table",
        "files": ["tables/*.csv"],
        "root": "media",
        "map": {"id": "id", "audio": "audio"},
        "ask": [{"task": "tone", "question": "哪个音？", "label": "label"}],
    },
    {"kind": "folders", "path": "shapes", "task": "shape"},
    {"kind": "sidecar", "path": "pairs", "task": "pair"},
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(asking, "FIRST_WAIT", 0.002)
    remote.forget()
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table over pictures and tones, class folders, and captions beside their pictures."""
    root = tmp_path_factory.mktemp("raw")
    make_records(root / "media", 12)
    (root / "tables").mkdir()
    for part in range(2):
        with (root / "tables" / f"{part}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "text", "audio", "label"])
            writer.writerows([f"r{i}", "哪个音？", f"{i}.wav", f"t{i % 3}"] for i in range(part, 12, 2) if i % 3 != 2)
    for i in (0, 3, 6, 9):
        for folder, name in (("shapes", f"{'ab'[i % 2]}/{i}.png"), ("pairs", f"p{i}.png")):
            (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (root / folder / name).write_bytes((root / "media" / f"{i}.png").read_bytes())
        (root / "pairs" / f"p{i}.txt").write_text(f"number {i}", encoding="utf-8")
    return root


@pytest.fixture(scope="module", params=["s3", "gcs"])
def cloud(request: pytest.FixtureRequest) -> Iterator[clouds.Cloud]:
    with getattr(clouds, request.param)() as running:
        yield running


def run(data: Path | str, out: Path) -> tuple[dict[str, str], str]:
    """Scan and shard; returns the hashes of the shard set's files, and the manifest's digest."""
    config = parse(ScanConfig, {"sources": SOURCES, "split": {"val": 0.0, "test": 0.0}}, "test")
    manifest = scan(config, data=data, out=out / "manifest")
    made = shard(CONFIG, manifest, data=data, out=out / "shards")
    assert made.counts["quarantined"] == 0
    return shas(made.path), manifest.digest


def test_the_same_bytes_from_disk_and_from_a_store(cloud: clouds.Cloud, raw: Path, tmp_path: Path) -> None:
    here = run(raw, tmp_path / "local")
    uri = cloud.upload(raw, "raw")
    bodies: Counter[str] = Counter()

    class Counting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if found := re.search(r"GET (/corpus/raw/\S+) HTTP", record.getMessage()):
                bodies[found[1]] += 1

    handler, logger = Counting(), logging.getLogger("werkzeug")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        there = run(uri, tmp_path / "remote")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert there == here
    if cloud.root.startswith("s3"):  # the other server runs in a process of its own
        used = {
            p.relative_to(raw).as_posix()
            for p in raw.rglob("*")
            if p.is_file() and (p.suffix != ".png" or p.parent.name != "media")
        }
        used = {name for name in used if not name.startswith("media/") or int(Path(name).stem) % 3 != 2}
        assert bodies == Counter(f"/corpus/raw/{name}" for name in used)  # scan and shard together: once each


def test_a_file_added_to_the_store_is_seen(cloud: clouds.Cloud, raw: Path, tmp_path: Path) -> None:
    uri = cloud.upload(raw / "shapes", "grows")
    config = parse(
        ScanConfig, {"sources": [{"kind": "folders", "path": "."}], "split": {"val": 0.0, "test": 0.0}}, "test"
    )
    first = scan(config, data=uri, out=tmp_path / "1")
    assert scan(config, data=uri, out=tmp_path / "1").fingerprint == first.fingerprint
    cloud.put("grows/c/9.png", (raw / "shapes" / "b" / "9.png").read_bytes())
    second = scan(config, data=uri, out=tmp_path / "2")
    assert (first.counts["kept"], second.counts["kept"]) == (4, 5)
    assert first.fingerprint != second.fingerprint


@pytest.mark.slow
def test_the_command_takes_a_store_as_data(cloud: clouds.Cloud, raw: Path, tmp_path: Path) -> None:
    uri = cloud.upload(raw / "shapes", "story-data")
    assert cli.main(["new", str(tmp_path / "story"), "--data", str(raw / "shapes")]) == 0
    flags = [
        "--out",
        str(tmp_path / "out"),
        "--data",
        uri,
        "--tracking-uri",
        f"sqlite:///{tmp_path}/mlflow.db",
        "--quiet",
    ]
    assert cli.main(["scan", str(tmp_path / "story"), *flags]) == 0
    assert cli.main(["shard", str(tmp_path / "story"), *flags, "--mirror", f"{cloud.root}/made"]) == 0
    assert cli.main(["verify", f"{cloud.root}/made"]) == 0
    assert cli.main(["verify", str(tmp_path / "out/shards"), "--rebuild", "1", "--data", uri]) == 0
    assert cli.main(["new", str(tmp_path / "other"), "--data", uri]) == 0
    rows = pq.read_table(tmp_path / "out" / "shards" / "manifest.parquet").to_pylist()
    assert sum(row["samples"] for row in rows) == 4
    assert "s3://" not in (tmp_path / "out" / "manifest" / "artifact.json").read_text()


def test_addresses_below_a_store() -> None:
    assert resolve("./a/b.png", "s3://bucket/data/") == "s3://bucket/data/a/b.png"
    assert resolve("gs://other/x", "s3://bucket/data") == "gs://other/x"
    with pytest.raises(DataError, match="climbs out"):
        resolve("../secret", "s3://bucket/data")


def test_a_piece_of_an_object_is_read_alone(cloud: clouds.Cloud) -> None:
    cloud.put("pieces/a.tar", bytes(range(256)) * 10)
    assert read_uri("a.tar#bytes=300+5", f"{cloud.root}/pieces") == bytes(range(44, 49))
    assert read_uri("a.tar#bytes=300+5#t=1,2", f"{cloud.root}/pieces") == bytes(range(44, 49))
    with pytest.raises(DataError, match="the file ends before them"):
        read_uri("a.tar#bytes=2558+5", f"{cloud.root}/pieces")
    with pytest.raises(DataError, match="larger than 1,000 bytes"):
        read_uri("a.tar", f"{cloud.root}/pieces", limit=1000)
