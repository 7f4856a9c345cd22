from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mmlm.cli import main
from mmlm.errors import ArtifactError, ConfigError
from mmlm.shards.shard import shard
from mmlm.shards.verify import rebuild, verify
from tests.shards.conftest import CONFIG, make_records, write_manifest


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("verify")
    manifest = write_manifest(root / "manifest", make_records(root / "data", 30))
    return shard(CONFIG, manifest, data=root / "data", out=root / "shards").path


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "shards"))


def flip(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


def test_a_sound_shard_set_has_no_problem(good: Path) -> None:
    assert verify(good) == []


@pytest.mark.parametrize("at", [0.0, 0.33, 0.999])
def test_one_flipped_bit_is_found_and_named(copy: Path, at: float) -> None:
    tar = sorted(copy.glob("*.tar"))[1]
    flip(tar, at)
    problems = verify(copy)
    assert len(problems) == 1
    assert problems[0].startswith(tar.name)


@pytest.mark.parametrize("name", ["manifest.parquet", "feature_spec.json", "tokenizer.json"])
def test_a_flipped_bit_in_a_table_or_spec_is_found(copy: Path, name: str) -> None:
    flip(copy / name, 0.5)
    assert any(name in problem for problem in verify(copy))


def test_what_is_missing_cut_or_too_much_is_named(copy: Path) -> None:
    first, second, third = sorted(copy.glob("*.tar"))[:3]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-512])
    shutil.copy(third, copy / "train-00042-0badcafe.tar")
    flip(third.with_suffix(".index.parquet"), 0.5)
    problems = "\n".join(verify(copy))
    assert f"{first.name}: missing" in problems
    assert second.name in problems
    assert "train-00042-0badcafe.tar: not in the manifest" in problems
    assert third.with_suffix(".index.parquet").name in problems


def test_a_missing_quarantine_is_named(copy: Path) -> None:
    (copy / "quarantine.parquet").unlink()
    assert verify(copy) == ["quarantine.parquet is missing"]


def test_what_is_no_shard_set_is_refused(tmp_path: Path, good: Path) -> None:
    for path in (tmp_path, tmp_path / "gone", good.parent / "manifest"):
        with pytest.raises(ArtifactError):
            verify(path)


def test_shards_made_again_have_the_same_bytes(tmp_path: Path) -> None:
    data = tmp_path / "data"
    manifest = write_manifest(tmp_path / "manifest", make_records(data))
    made = shard(CONFIG, manifest, data=data, out=tmp_path / "shards")
    assert rebuild(made.path, manifest.path, data, 99) == ([], len(list(made.path.glob("*.tar"))))
    (data / "0.png").write_bytes((data / "3.png").read_bytes())  # changed since the scan
    problems, _ = rebuild(made.path, manifest.path, data, 99)
    assert len(problems) == 1 and "train-00000" in problems[0]
    with pytest.raises(ConfigError, match="--data"):
        rebuild(made.path, manifest.path, tmp_path / "nowhere", 1)
    other = write_manifest(tmp_path / "other", make_records(data, 12))
    with pytest.raises(ArtifactError, match="give the manifest"):
        rebuild(made.path, other.path, data, 1)


def test_the_command_tells_how_many_shards_it_made_again_and_which(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_manifest(tmp_path / "manifest", make_records(tmp_path / "raw", 30))
    made = shard(CONFIG, manifest, data=tmp_path / "raw", out=tmp_path / "shards")
    several = f"and {len(list(made.path.glob('*.tar')))} shards made again"
    told = []
    for _ in range(2):
        assert main(["verify", str(made.path), "--rebuild", "99"]) == 0
        told.append(capsys.readouterr().out)
        assert several in told[-1]
    assert told[0] != told[1]  # another seed
    assert main(["verify", str(made.path), "--rebuild", "1", "--seed", "7"]) == 0
    assert "and 1 shards made again (--seed 7) have the same bytes" in capsys.readouterr().out
    for count in ("-1", "0"):
        assert main(["verify", str(made.path), "--rebuild", count]) == 2
        assert f"--rebuild {count}; wanted the number of shards" in capsys.readouterr().err
