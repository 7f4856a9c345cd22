"""Shard sets that lie elsewhere: fetched once, whole, into a cache of bounded size."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmlm.artifacts import Artifact
from mmlm.config import parse
from mmlm.data.files import folder_of, open_files
from mmlm.data.objects import Objects
from mmlm.data.published import DIGEST_OF, view
from mmlm.data.reader import ShardReader
from mmlm.errors import ArtifactError
from mmlm.shards.mirror import mirror
from mmlm.storage import sha256_file, sha256_json
from tests.clouds import Cloud, s3
from tests.data.test_loader import PACKED, loader, rows
from tests.web import serving


@pytest.fixture(scope="module")
def cloud() -> Iterator[Cloud]:
    with s3() as running:
        yield running


@pytest.fixture(scope="module")
def published(cloud: Cloud, mixed: Artifact) -> str:
    mirror(mixed.path, f"{cloud.root}/sets/mixed")
    return f"{cloud.root}/sets/mixed"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMLM_SHARD_CACHE", str(tmp_path / "shards"))
    monkeypatch.setenv("MMLM_CACHE", str(tmp_path / "objects"))
    return tmp_path / "shards"


def size_of(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.glob("??/*"))


def test_batches_from_elsewhere_are_those_from_here(published: str, mixed: Artifact, cache: Path):
    here, there = loader(mixed.path, PACKED), loader(Path(view(published)), PACKED)
    assert here.state() == there.state()
    for step in (0, 5):
        assert rows(here.batch(step)) == rows(there.batch(step))
    shards = [r for r in pq.read_table(mixed.path / "manifest.parquet").to_pylist() if r["split"] == "train"]
    assert {p.name for p in cache.glob("??/*")} == {r[k] for r in shards for k in ("sha256", "index_sha256")}


def test_what_is_fetched_needs_no_store(cloud: Cloud, published: str, cache: Path, monkeypatch: pytest.MonkeyPatch):
    folder = view(published)
    wanted = [s.id for s in ShardReader(folder)]
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert [s.id for s in ShardReader(folder)] == wanted


def bytes_of(shards: Path) -> list[int]:
    return [r["bytes"] for r in pq.read_table(shards / "manifest.parquet").to_pylist() if r["split"] == "train"]


def test_the_cache_keeps_to_its_limit_though_nothing_is_closed(
    published: str, mixed: Artifact, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    sizes = bytes_of(mixed.path)
    limit = sum(sizes) // 2
    monkeypatch.setenv("MMLM_SHARD_CACHE_BYTES", str(limit))
    readers = [ShardReader(view(published)) for _ in range(2)]
    ids, indexes = [], sum(p.stat().st_size for p in mixed.path.glob("*.index.parquet"))
    for i in [*range(len(readers[0])), *range(len(readers[0]))]:
        ids.append(readers[0][i].id)
        assert readers[1][len(readers[1]) - 1 - i % len(readers[1])].id
        assert size_of(cache) <= limit + indexes
        assert all(len(reader._maps) <= max(1, limit // 8 // min(sizes)) for reader in readers)
    assert ids == 2 * [s.id for s in ShardReader(mixed.path)]


def test_a_training_keeps_the_cache_to_its_limit(
    published: str, mixed: Artifact, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    wanted = loader(mixed.path, PACKED)
    sizes = bytes_of(mixed.path)
    limit = sum(sizes) // 2
    monkeypatch.setenv("MMLM_SHARD_CACHE_BYTES", str(limit))
    ranks = [loader(Path(view(published)), PACKED, rank, 2) for rank in (0, 1)]
    for step in range(4):
        assert [i for one in ranks for i in one.batch(step).ids] == list(wanted.batch(step).ids)
        for one in ranks:
            one.reader._fetching.shutdown()  # type: ignore[union-attr]
            one.reader._fetching = None
        assert size_of(cache) <= limit + max(sizes)


def test_a_cache_that_suffices_fetches_nothing_again(
    published: str, cloud: Cloud, mixed: Artifact, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    limit = sum(p.stat().st_size for p in mixed.path.glob("train-*")) * 10 // 9 + 1
    monkeypatch.setenv("MMLM_SHARD_CACHE_BYTES", str(limit))
    readers = [ShardReader(view(published)) for _ in range(3)]
    wanted = [s.id for s in readers[0]]
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for reader in readers:
        assert [reader[i].id for i in reversed(range(len(reader)))] == wanted[::-1]
    assert len(readers[0]._maps) < len(bytes_of(mixed.path))


def test_what_is_read_is_not_evicted(published: str, mixed: Artifact, cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MMLM_SHARD_CACHE_BYTES", "1")
    reader = ShardReader(view(published))
    for i in range(len(reader)):
        assert reader[i].id
        (shard,) = reader._maps
        row = reader._rows.slice(shard, 1).to_pylist()[0]
        assert row["sha256"] in {p.name for p in cache.glob("??/*")}
        assert size_of(cache) <= 2 * max(bytes_of(mixed.path))


def test_several_processes_fetch_a_shard_once(mixed: Artifact, cache: Path):
    code = (
        "import sys; from mmlm.data.published import view; from mmlm.data.reader import ShardReader;"
        "print(len([s.id for s in ShardReader(view(sys.argv[1]))]))"
    )
    files = {f"/set/{path.name}": path.read_bytes() for path in mixed.path.iterdir() if path.is_file()}
    with serving() as site:
        site.files, site.slow = files, 0.02
        readers = [
            subprocess.Popen(
                [sys.executable, "-c", code, f"{site.url}/set"], stdout=subprocess.PIPE, text=True, env={**os.environ}
            )
            for _ in range(3)
        ]
        counts = {reader.communicate(timeout=120)[0] for reader in readers}
    assert len(counts) == 1 and int(counts.pop()) > 100
    assert not list(cache.glob("??/*.part")) and not list(cache.glob("sets/.making-*"))
    train = [r for r in pq.read_table(mixed.path / "manifest.parquet").to_pylist() if r["split"] == "train"]
    assert train and all(site.sent[f"/set/{row['path']}"] == row["bytes"] for row in train)


READ = """
import hashlib, random, sys
from mmlm.data.published import view
from mmlm.data.reader import ShardReader
reader, found = ShardReader(view(sys.argv[1])), {}
order = list(range(len(reader)))
random.Random(int(sys.argv[2])).shuffle(order)
for i in order:
    found[i] = [hashlib.sha256(repr(sorted(reader.members(i).items())).encode()).hexdigest()]
print([found[i] for i in range(len(reader))])
"""


def test_what_one_process_evicts_harms_no_other_that_reads(mixed: Artifact, cache: Path):
    """The cache has room for nothing, so each of them throws out whatever no one has open."""
    reader = ShardReader(mixed.path)
    members = [repr(sorted(reader.members(i).items())).encode() for i in range(len(reader))]
    wanted = str([[hashlib.sha256(each).hexdigest()] for each in members])
    environment = {**os.environ, "MMLM_SHARD_CACHE_BYTES": "1"}
    with serving() as site:
        site.files = {f"/set/{path.name}": path.read_bytes() for path in mixed.path.iterdir() if path.is_file()}
        readers = [
            subprocess.Popen(
                [sys.executable, "-c", READ, f"{site.url}/set", str(seed)], stdout=subprocess.PIPE, text=True,
                env=environment,
            )
            for seed in range(3)
        ]  # fmt: skip
        assert [one.communicate(timeout=120)[0].strip() for one in readers] == [wanted] * 3
    assert [one.returncode for one in readers] == [0] * 3
    tars = [row for row in pq.read_table(mixed.path / "manifest.parquet").to_pylist() if row["split"] == "train"]
    assert sum(site.sent[f"/set/{row['path']}"] for row in tars) > 6 * sum(row["bytes"] for row in tars)


def test_shards_are_fetched_before_they_are_wanted(
    cloud: Cloud, published: str, mixed: Artifact, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    """What the next step reads is here when the store is gone."""
    there, here = loader(Path(view(published)), PACKED), loader(mixed.path, PACKED)
    there.batch(0)
    fetching = there.reader._fetching
    assert fetching is not None
    fetching.shutdown()  # waits for what was begun
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    there.reader._fetching = None
    assert rows(there.batch(1)) == rows(here.batch(1))


def test_a_download_is_taken_up_and_a_damaged_rest_is_not_believed(published: str, mixed: Artifact, cache: Path):
    row = next(r for r in pq.read_table(mixed.path / "manifest.parquet").to_pylist() if r["split"] == "train")
    data = (mixed.path / row["path"]).read_bytes()
    objects = Objects(cache, 1 << 30)
    for left in (data[:1000], b"x" * 1000, data, data + b"too much"):
        path = objects.path(row["sha256"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.with_name(path.name + ".part").write_bytes(left)
        with objects.get(f"{published}/{row['path']}", row["sha256"]) as opened:
            assert opened.path.read_bytes() == data


def test_another_content_elsewhere_stops_the_job(cloud: Cloud, mixed: Artifact, tmp_path: Path):
    folder = Path(shutil.copytree(mixed.path, tmp_path / "copy"))
    shard = sorted(folder.glob("train-*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    uri = cloud.upload(folder, "broken")
    with pytest.raises(ArtifactError, match=f"{shard.name} has sha256 .*; wanted"):
        list(ShardReader(view(uri)))
    shard.unlink()
    uri = cloud.upload(folder, "missing")
    with pytest.raises(ArtifactError, match=shard.name):
        list(ShardReader(view(uri)))
    (folder / "manifest.parquet").write_bytes(b"other")
    with pytest.raises(ArtifactError, match="are not those"):
        view(cloud.upload(folder, "tables"))
    with pytest.raises(ArtifactError, match="no finished shard set"):
        view(f"{cloud.root}/nothing")


def test_the_flag_that_names_a_published_set(published: str, mixed: Artifact, tmp_path: Path):
    from mmlm.story import Places, noun

    places = Places(out=tmp_path, data=tmp_path, launch=print, tracker=None, shards=published)
    assert noun(places, "shard").digest == mixed.digest


OUTSIDE = "no shard at all"


@pytest.mark.parametrize("column", ["path", "sha256", "index_sha256"])
@pytest.mark.parametrize("how", ["absolute", "upwards"])
def test_a_hostile_manifest_opens_no_file_of_this_machine(
    cloud: Cloud, mixed: Artifact, tmp_path: Path, column: str, how: str
):
    secret = tmp_path / "secret"
    secret.write_text(OUTSIDE)
    folder = Path(shutil.copytree(mixed.path, tmp_path / "hostile"))
    table = pq.read_table(folder / "manifest.parquet")
    there = {"absolute": str(secret), "upwards": os.path.relpath(secret, tmp_path / "shards/??")}[how]
    told = [there] * len(table)
    table = table.set_column(table.column_names.index(column), column, pa.array(told, table.schema.field(column).type))
    if column == "path":  # so that a folder of this machine would be read as well
        table = table.set_column(table.column_names.index("bytes"), "bytes", pa.array([len(OUTSIDE)] * len(table)))
    pq.write_table(table, folder / "manifest.parquet")
    (row, *_) = table.to_pylist()
    for files in [open_files(_signed(folder, cloud))] + [open_files(folder)] * (column == "path"):
        for read in (
            (files.tar, files.index) if column == "path" else (files.tar,) if column == "sha256" else (files.index,)
        ):
            with pytest.raises(ArtifactError, match=re.escape(repr(there))):
                read(row)


def _signed(folder: Path, cloud: Cloud) -> str:
    """The set with a digest that fits its tables, as whoever publishes it can make it; its address."""
    told = json.loads((folder / "artifact.json").read_text())
    told["digest"] = sha256_json({name: sha256_file(folder / name) for name in sorted(DIGEST_OF)})
    (folder / "artifact.json").write_text(json.dumps(told))
    return cloud.upload(folder, "hostile")


def test_a_digest_that_is_a_path_is_refused(cloud: Cloud, tmp_path: Path):
    uri = f"{cloud.root}/elsewhere"
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / ".origin").write_text(uri)
    cloud.put("elsewhere/artifact.json", json.dumps({"digest": "../../planted"}).encode())
    with pytest.raises(ArtifactError, match=r"a hash '\.\./\.\./planted'"):
        view(uri)


def test_a_set_that_was_published_anew_is_not_the_one_that_ranks_were_sent_for(
    published: str, mixed: Artifact, cache: Path
):
    assert folder_of(published, mixed.digest) == view(published)
    with pytest.raises(ArtifactError, match=f"digest {mixed.digest[:12]}.*as it was started with"):
        folder_of(published, "0" * 64)


@pytest.mark.parametrize("verb", ["train", pytest.param("distill", marks=pytest.mark.slow)])
def test_ranks_of_another_node_have_a_cache_of_their_own(
    published: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
):
    from mmlm.compress.config import DistillConfig
    from mmlm.compress.distill import distill
    from mmlm.launch.local import ranks
    from mmlm.story import Places, noun
    from mmlm.tracking import NullTracker
    from mmlm.train.config import TrainConfig
    from mmlm.train.train import train

    def elsewhere(target: str, arguments: dict[str, Any], *, log: Path) -> None:
        shutil.move(cache, tmp_path / "not-on-that-node")
        monkeypatch.setenv("MMLM_SHARD_CACHE", str(tmp_path / "there"))
        ranks(1)(target, arguments, log=log)

    config = {"steps": 2, "model": {"width": 32, "layers": 1, "heads": 2}, "data": {"batch": 4}}
    places = Places(out=tmp_path / "out", data=tmp_path, launch=elsewhere, tracker=NullTracker(), shards=published)
    told: dict[str, Any] = {"out": places.out, "launch": places.launch, "tracker": places.tracker}
    if verb == "train":
        made = train(parse(TrainConfig, config, "test"), noun(places, "shard"), **told)
    else:
        made = distill(parse(DistillConfig, config, "test"), noun(places, "shard"), None, **told)
    assert made.counts["parameters"] > 0 and list((tmp_path / "there").glob("??/*")) and not cache.exists()
