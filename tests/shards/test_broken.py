"""Files that are missing or cut: told by name, before anything is made of what is left."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmlm import artifacts
from mmlm.artifacts import Artifact
from mmlm.cli import main
from mmlm.corpus.records import REFUSED, SCHEMA, read_records, to_row
from mmlm.errors import ArtifactError
from mmlm.shards.mirror import mirror
from mmlm.shards.shard import shard
from mmlm.shards.verify import rebuild, verify
from tests.shards.conftest import CONFIG, TASKS, ByHand, make_records, write_manifest

FILES = 4


def in_files(folder: Path, data: Path) -> Artifact:
    """A manifest of 30 records in FILES files."""
    rows = [to_row(record) for record in make_records(data, 30)]
    work = artifacts.begin(folder, "manifest", recipe=1, config=ByHand(listing="four files"))
    names = [f"records-{number:05d}.parquet" for number in range(FILES)]
    for number, name in enumerate(names):
        part = rows[number * 30 // FILES : (number + 1) * 30 // FILES]
        pq.write_table(pa.Table.from_pylist(part, schema=SCHEMA), folder / name)
    pq.write_table(pa.Table.from_pylist([], schema=REFUSED), folder / "refused.parquet")
    return work.finish(counts={"kept": len(rows)}, digest_of=names, extra={"tasks": TASKS})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Path]:
    root = tmp_path_factory.mktemp("broken")
    return in_files(root / "manifest", root / "data"), root / "data"


@pytest.fixture
def manifest(corpus: tuple[Artifact, Path], tmp_path: Path) -> Artifact:
    return artifacts.read(shutil.copytree(corpus[0].path, tmp_path / "manifest"), "manifest")


def lossy(root: Path) -> tuple[Artifact, dict[Path, bytes]]:
    """A shard set whose test split is wholly lost, and the pictures that it lacked."""
    made_of = write_manifest(root / "manifest", make_records(root / "data", 30))
    lost = {path: path.read_bytes() for i in range(2, 30, 3) for path in [root / "data" / f"{i}.png"]}
    for path in lost:
        path.unlink()
    config = CONFIG.model_copy(update={"error_budget": 0.9})
    made = shard(config, made_of, data=root / "data", out=root / "shards")
    assert made.counts["quarantined"] == 10
    return made, lost


@pytest.mark.parametrize("number", range(FILES))
def test_a_manifest_without_one_of_its_files_is_not_sharded(
    corpus: tuple[Artifact, Path], manifest: Artifact, tmp_path: Path, number: int
) -> None:
    gone = manifest.path / f"records-{number:05d}.parquet"
    gone.unlink()
    with pytest.raises(ArtifactError, match=f"{gone.name} is missing") as error:
        shard(CONFIG, manifest, data=corpus[1], out=tmp_path / "shards")
    assert "scan again" in str(error.value)
    assert not (tmp_path / "shards" / artifacts.NAME).exists()


def test_a_file_too_many_is_told(corpus: tuple[Artifact, Path], manifest: Artifact, tmp_path: Path) -> None:
    shutil.copy(manifest.path / "records-00003.parquet", manifest.path / "records-00004.parquet")
    with pytest.raises(ArtifactError, match="hold 38 records; wanted 30"):
        shard(CONFIG, manifest, data=corpus[1], out=tmp_path / "shards")


@pytest.mark.parametrize("left", [0, 3, 2000, -1])
def test_a_cut_file_of_a_manifest_is_named(
    corpus: tuple[Artifact, Path], manifest: Artifact, tmp_path: Path, left: int
) -> None:
    cut = manifest.path / "records-00001.parquet"
    cut.write_bytes(cut.read_bytes()[:left])
    with pytest.raises(ArtifactError, match=f"{cut.name} cannot be read"):
        shard(CONFIG, manifest, data=corpus[1], out=tmp_path / "shards")


def test_a_file_rotten_within_is_named(manifest: Artifact) -> None:
    rotten = manifest.path / "records-00002.parquet"
    data = bytearray(rotten.read_bytes())
    data[4 : len(data) // 3] = bytes(len(data) // 3 - 4)
    rotten.write_bytes(data)
    with pytest.raises(ArtifactError, match=rotten.name):
        list(read_records(manifest.path))


def test_a_set_is_not_made_again_from_half_a_manifest(
    corpus: tuple[Artifact, Path], manifest: Artifact, tmp_path: Path
) -> None:
    made = shard(CONFIG, manifest, data=corpus[1], out=tmp_path / "shards")
    (manifest.path / "records-00003.parquet").unlink()
    with pytest.raises(ArtifactError, match=r"records-00003\.parquet is missing"):
        rebuild(made.path, manifest.path, corpus[1], 1)


def test_a_retry_without_the_whole_manifest_leaves_the_set_finished(tmp_path: Path) -> None:
    made, _ = lossy(tmp_path)
    (tmp_path / "manifest" / "records-00000.parquet").unlink()
    config, source = CONFIG.model_copy(update={"error_budget": 0.9}), artifacts.read(tmp_path / "manifest")
    with pytest.raises(ArtifactError, match=r"records-00000\.parquet is missing"):
        shard(config, source, data=tmp_path / "data", out=made.path, retry="all")
    assert verify(made.path) == []


@pytest.mark.parametrize("name", ["quarantine.parquet", "manifest.parquet"])
@pytest.mark.parametrize("left", [None, 0, 100])
def test_a_broken_table_is_named_by_a_retry(tmp_path: Path, name: str, left: int | None) -> None:
    made, _ = lossy(tmp_path)
    table = made.path / name
    if left is None:
        table.unlink()
    else:
        table.write_bytes(table.read_bytes()[:left])
    config, source = CONFIG.model_copy(update={"error_budget": 0.9}), artifacts.read(tmp_path / "manifest")
    with pytest.raises(ArtifactError, match=f"{name} (is missing|cannot be read)"):
        shard(config, source, data=tmp_path / "data", out=made.path, retry="all")
    assert artifacts.read(made.path).digest == made.digest


def test_a_table_of_other_columns_is_named(tmp_path: Path) -> None:
    made, _ = lossy(tmp_path)
    pq.write_table(pa.table({"a": [1]}), made.path / "manifest.parquet")
    config, source = CONFIG.model_copy(update={"error_budget": 0.9}), artifacts.read(tmp_path / "manifest")
    with pytest.raises(ArtifactError, match=r"manifest\.parquet has no column 'generation'"):
        shard(config, source, data=tmp_path / "data", out=made.path, retry="all")


def test_a_mirror_with_a_retried_set_beside_it_is_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, lost = lossy(tmp_path)
    to = str(tmp_path / "mirror")
    mirror(first.path, to)
    for path, data in lost.items():
        path.write_bytes(data)
    config, source = CONFIG.model_copy(update={"error_budget": 0.9}), artifacts.read(tmp_path / "manifest")
    second = shard(config, source, data=tmp_path / "data", out=first.path, retry="all")
    assert second.counts["quarantined"] == 0
    beside, _ = mirror(second.path, to)
    assert Path(beside).parent == Path(to)
    assert (verify(to), verify(beside)) == ([], [])
    assert main(["verify", to]) == 0
    stray = shutil.copy(next(Path(beside).glob("test-*.tar")), Path(to) / "test-00007-0badcafe.tar")
    assert verify(to) == [f"{Path(stray).name}: not in the manifest"]
    capsys.readouterr()
