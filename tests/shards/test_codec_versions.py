"""The versions of what decodes and encodes are part of a shard's recipe: another version makes other shards."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import PIL.features
import pytest
import soundfile

from mmlm import artifacts
from mmlm.artifacts import Artifact, ArtifactConflict
from mmlm.cli import main
from mmlm.errors import ArtifactError, DataError
from mmlm.features.spec import VideoSpec
from mmlm.features.text import Tokenizer
from mmlm.shards.plan import codec_versions, recipe_digest
from mmlm.shards.shard import shard
from mmlm.shards.spec import make_spec
from mmlm.shards.verify import rebuild, verify
from tests.shards.conftest import CONFIG, make_records, shas, write_manifest

CODECS = ("pillow", "simplejpeg", "opencv-python-headless", "soundfile", "soxr", "resvg_py", "scipy")


@contextmanager
def installed(folder: Path, name: str, version: str) -> Iterator[None]:
    """While inside, Python finds this version of a package installed: by its metadata, before all others."""
    told = folder / name / f"{name.replace('-', '_')}-{version}.dist-info"
    told.mkdir(parents=True)
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    sys.path.insert(0, str(told.parent))
    codec_versions.cache_clear()
    try:
        yield
    finally:
        sys.path.remove(str(told.parent))
        codec_versions.cache_clear()


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    root = tmp_path_factory.mktemp("versions")
    return write_manifest(root / "manifest", make_records(root / "raw", 12))


@pytest.fixture(scope="module")
def here(manifest: Artifact) -> Artifact:
    raw = manifest.path.parent / "raw"
    return shard(CONFIG, manifest, data=raw, out=manifest.path.parent / "shards")


@pytest.fixture(scope="module")
def other(manifest: Artifact, here: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The same set, made where another resvg is installed; it takes over what it can."""
    raw = manifest.path.parent / "raw"
    with installed(tmp_path_factory.mktemp("packages"), "resvg_py", "0.4.9"):
        return shard(CONFIG, manifest, data=raw, out=manifest.path.parent / "other", earlier=here)


@pytest.mark.parametrize("name", CODECS)
def test_the_version_of_every_codec_is_in_the_recipe(
    name: str, manifest: Artifact, here: Artifact, tmp_path: Path
) -> None:
    spec = make_spec(manifest, CONFIG.features, Tokenizer.load(here.path))
    before = recipe_digest(CONFIG, spec)
    with installed(tmp_path, name, "0.0.1"):
        assert codec_versions()[name] == "0.0.1"
        assert recipe_digest(CONFIG, spec) != before
    assert recipe_digest(CONFIG, spec) == before


def test_what_the_packages_bring_along_is_in_the_recipe_too(manifest: Artifact, here: Artifact) -> None:
    told = codec_versions()
    assert told["numpy"] == np.__version__ and told["libsndfile"] == soundfile.__libsndfile_version__
    for native in ("jpg", "zlib", "webp", "littlecms2"):
        assert told[native] == PIL.features.version(native)
    assert "av" not in told and here.extra["codecs"] == told
    filmed = codec_versions(video=True)["av"]
    assert av.__version__ in filmed and str(av.library_versions["libavcodec"]) in filmed
    spec = make_spec(manifest, CONFIG.features, Tokenizer.load(here.path))
    assert recipe_digest(CONFIG, spec.model_copy(update={"video": VideoSpec()})) != recipe_digest(CONFIG, spec)


def test_no_shard_of_another_version_is_taken_over(here: Artifact, other: Artifact) -> None:
    assert other.extra["codecs"]["resvg_py"] == "0.4.9"
    assert "taken_over" not in other.counts
    assert not {path.name for path in here.path.glob("*.tar")} & {path.name for path in other.path.glob("*.tar")}
    assert verify(other.path) == []


def test_a_set_of_another_version_is_left_alone_and_the_versions_are_named(manifest: Artifact, other: Artifact) -> None:
    before = shas(other.path)
    with pytest.raises(ArtifactConflict, match=r"resvg_py 0\.4\.9 → .*--replace"):
        shard(CONFIG, manifest, data=manifest.path.parent / "raw", out=other.path)
    assert shas(other.path) == before


def test_a_set_that_another_version_began_is_not_finished_by_this_one(manifest: Artifact, tmp_path: Path) -> None:
    raw, picky = tmp_path / "raw", CONFIG.model_copy(update={"error_budget": 0.0})
    mine = write_manifest(tmp_path / "manifest", make_records(raw, 12))
    whole = (raw / "11.png").read_bytes()
    (raw / "11.png").write_bytes(b"broken")
    with installed(tmp_path / "packages", "resvg_py", "0.4.9"), pytest.raises(DataError, match="failed so far"):
        shard(picky, mine, data=raw, out=tmp_path / "shards")
    assert list((tmp_path / "shards").glob("*.tar"))
    (raw / "11.png").write_bytes(whole)
    with pytest.raises(ArtifactConflict):
        shard(picky, mine, data=raw, out=tmp_path / "shards")


def test_shards_are_made_again_by_the_same_versions_only(
    other: Artifact, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["verify", str(other.path), "--rebuild", "9"]) == 2
    said = capsys.readouterr().err
    assert f"resvg_py 0.4.9 → {codec_versions()['resvg_py']}" in said
    assert "wanted the same versions; install those versions" in said and "Traceback" not in said
    with installed(tmp_path, "resvg_py", "0.4.9"):
        assert main(["verify", str(other.path), "--rebuild", "9"]) == 0
    told = json.loads((other.path / artifacts.NAME).read_text())
    codecs = {**codec_versions(), "libjxl": "0.1"}  # this one has gone since
    (tmp_path / "set").mkdir()
    for file in other.path.iterdir():
        (tmp_path / "set" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "set" / artifacts.NAME).write_text(json.dumps({**told, "extra": {**told["extra"], "codecs": codecs}}))
    with pytest.raises(ArtifactError, match=r"\(libjxl 0\.1 → None\)"):
        rebuild(tmp_path / "set", other.path.parent / "manifest", other.path.parent / "raw", 1)
