from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest
import webdataset

from mmlm import asking, cli, remote
from mmlm.artifacts import Artifact
from mmlm.errors import ArtifactError, DataError
from mmlm.shards.mirror import mirror
from mmlm.shards.shard import shard
from mmlm.shards.verify import verify
from mmlm.shards.verify_remote import verify_remote
from mmlm.storage import is_remote
from tests import clouds
from tests.shards.conftest import CONFIG, make_records, write_manifest


def problems_of(uri: str) -> list[str]:
    """What `mmlm verify` says of a folder or an address."""
    return verify_remote(uri) if is_remote(uri) else verify(uri.removeprefix("file://"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(asking, "FIRST_WAIT", 0.002)
    remote.forget()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    root = tmp_path_factory.mktemp("mirror")
    manifest = write_manifest(root / "manifest", make_records(root / "data", 30))
    return shard(CONFIG, manifest, data=root / "data", out=root / "shards")


@contextmanager
def folder() -> Iterator[clouds.Cloud]:
    """A local folder where a store is wanted."""
    import tempfile

    with tempfile.TemporaryDirectory() as path:
        yield clouds.Cloud(f"file://{path}", {})


@pytest.fixture(scope="module", params=["s3", "gcs", "folder"])
def cloud(request: pytest.FixtureRequest) -> Iterator[clouds.Cloud]:
    running: Callable = {"s3": clouds.s3, "gcs": clouds.gcs, "folder": folder}[request.param]
    with running() as store:
        yield store


def content(uri: str) -> dict[str, bytes]:
    """Name → bytes of all objects below `uri`."""
    if uri.startswith("file://"):
        return {path.name: path.read_bytes() for path in Path(uri.removeprefix("file://")).iterdir() if path.is_file()}
    below = [name for name in remote.below(uri + "/") if "/" not in name.removeprefix(uri + "/")]
    return {name.rpartition("/")[2]: remote.read(name) for name in below}


def overwrite(cloud: clouds.Cloud, name: str, data: bytes) -> None:
    if cloud.root.startswith("file://"):
        Path(cloud.root.removeprefix("file://"), name).write_bytes(data)
    else:
        cloud.put(name, data)
    remote.forget()


def test_a_mirror_holds_the_set_and_a_rerun_uploads_nothing(cloud: clouds.Cloud, made: Artifact) -> None:
    uri = f"{cloud.root}/a"
    place, counts = mirror(made.path, uri)
    assert place == uri.removeprefix("file://")
    assert counts["objects"] == counts["uploaded"] == 2 * made.counts["shards"] + 5
    ours = content(f"file://{made.path}")
    theirs = content(uri)
    assert theirs == {name: ours[name] for name in theirs} and len(theirs) == counts["objects"]
    assert problems_of(uri) == []
    _, again = mirror(made.path, uri + "/")
    assert (again["uploaded"], again["bytes"]) == (0, 0)


def test_webdataset_reads_a_mirrored_shard(cloud: clouds.Cloud, made: Artifact) -> None:
    uri = f"{cloud.root}/wds"
    mirror(made.path, uri)
    name = sorted(name for name in content(uri) if name.endswith(".tar"))[0]
    stream = (
        fsspec.open(f"{uri}/{name}", "rb").open() if not uri.startswith("gs") else cloud.files.open(f"{uri}/{name}")
    )
    with stream:
        opened = webdataset.tariterators.tar_file_expander([{"stream": stream, "url": name}])
        samples = list(webdataset.tariterators.group_by_keys(opened))
    local = list(webdataset.WebDataset(str(made.path / name), shardshuffle=False))
    assert len(local) == 10
    for ours, theirs in zip(local, samples, strict=True):
        assert {k: v for k, v in ours.items() if k[0] != "_" or k == "__key__"} == {
            k: v for k, v in theirs.items() if k[0] != "_" or k == "__key__"
        }


def test_another_object_in_the_way_is_never_replaced(cloud: clouds.Cloud, made: Artifact, tmp_path: Path) -> None:
    uri = f"{cloud.root}/way"
    shards = Path(shutil.copytree(made.path, tmp_path / "shards"))
    mirror(shards, uri)
    tar = sorted(shards.glob("*.tar"))[0]
    overwrite(cloud, f"way/{tar.name}", b"not that")
    with pytest.raises(ArtifactError, match=f"another {tar.name}.*nothing is ever replaced"):
        mirror(shards, uri)
    assert content(uri)[tar.name] == b"not that"
    overwrite(cloud, f"way/{tar.name}", tar.read_bytes())  # by other means, with no sha256 beside it: it is read
    assert mirror(shards, uri)[1]["uploaded"] == 0
    told = json.loads((shards / "artifact.json").read_text())
    (shards / "artifact.json").write_text(json.dumps({**told, "seconds": 99.0, "created": "another day"}))
    assert mirror(shards, uri)[1]["uploaded"] == 0  # the same content, made again
    (shards / "artifact.json").write_text(json.dumps({**told, "fingerprint": "0" * 64}))
    with pytest.raises(ArtifactError, match=r"another artifact\.json"):
        mirror(shards, uri)


def test_after_a_retry_the_set_lies_beside_the_old_one(cloud: clouds.Cloud, tmp_path: Path) -> None:
    data, uri = tmp_path / "data", f"{cloud.root}/retry"
    manifest = write_manifest(tmp_path / "manifest", make_records(data, 30))
    gone = [sorted(data.glob("*.png"))[at] for at in (3, 17)]
    held = {path: path.read_bytes() for path in gone}
    config = CONFIG.model_copy(update={"error_budget": 0.5})
    for path in gone:
        path.unlink()
    lost = shard(config, manifest, data=data, out=tmp_path / "shards")
    assert lost.counts["quarantined"] == 2
    mirror(lost.path, uri)
    old, places = content(uri), []
    for path in gone:  # what comes back, comes back one by one
        path.write_bytes(held[path])
        better = shard(config, manifest, data=data, out=tmp_path / "shards", retry="all")
        place, counts = mirror(better.path, uri)
        places.append(place if is_remote(place) else f"file://{place}")
        # of three shards one was made again, each time another one; two and their indexes are there already
        assert (counts["taken_over"], counts["uploaded"]) == (4, counts["objects"] - 4)
        assert counts["bytes"] < sum(map(len, content(places[-1]).values())) - sum(map(len, old.values())) / 2
        assert mirror(better.path, uri) == (place, {**counts, "uploaded": 0, "bytes": 0, "taken_over": 0})
        assert content(places[-1]) == {name: (better.path / name).read_bytes() for name in content(places[-1])}
    assert [place.rpartition("/")[2][:8] for place in places] == ["retry-1-", "retry-2-"]
    assert {name: data for name, data in content(uri).items() if name in old} == old
    assert [problems_of(place) for place in (uri, *places)] == [[], [], []]
    assert better.counts["quarantined"] == 0


def test_every_kind_of_damage_is_found_and_named(cloud: clouds.Cloud, made: Artifact) -> None:
    uri = f"{cloud.root}/damage"
    mirror(made.path, uri)
    first, second, third = sorted(made.path.glob("*.tar"))[:3]
    flipped = bytearray(first.read_bytes())
    flipped[len(flipped) // 3] ^= 1
    overwrite(cloud, f"damage/{first.name}", bytes(flipped))
    overwrite(cloud, f"damage/{second.name}", second.read_bytes()[:-512])
    index = third.with_suffix(".index.parquet")
    overwrite(cloud, f"damage/{index.name}", index.read_bytes() + b" ")
    overwrite(cloud, "damage/train-00042-0badcafe.tar", third.read_bytes())
    problems = problems_of(uri)
    assert len(problems) == 4
    for problem, said in zip(
        sorted(problems),
        sorted(
            [
                f"{first.name}: sha256",
                f"{second.name}: sha256",
                f"{index.name}: other bytes",
                "train-00042-0badcafe.tar: not",
            ]
        ),
        strict=True,
    ):
        assert problem.startswith(said)
    overwrite(cloud, "damage/feature_spec.json", b"{}")
    assert any("feature_spec.json" in problem for problem in problems_of(uri))
    with pytest.raises(ArtifactError, match="finished shard set"):
        problems_of(f"{cloud.root}/nothing-here")


def test_a_mirroring_that_broke_off_is_taken_up(cloud: clouds.Cloud, made: Artifact, tmp_path: Path) -> None:
    """A tar of the second shard goes away while the first is published."""
    uri, here = f"{cloud.root}/broken-off", Path(shutil.copytree(made.path, tmp_path / "shards"))
    away = sorted(here.glob("*.tar"))[1]
    away.rename(tmp_path / away.name)
    with pytest.raises(OSError, match=away.name):
        mirror(here, uri, workers=1)
    (tmp_path / away.name).rename(away)
    with pytest.raises(ArtifactError):  # unfinished: nobody takes it for a set
        problems_of(uri)
    there = len(content(uri))
    assert 1 < there < 2 * made.counts["shards"]
    assert mirror(here, uri)[1]["uploaded"] == 2 * made.counts["shards"] + 5 - there
    assert problems_of(uri) == []


def test_a_killed_mirroring_is_taken_up(made: Artifact, tmp_path: Path) -> None:
    with clouds.s3() as cloud:
        uri = f"{cloud.root}/killed"
        code = (
            "import sys, time; from pathlib import Path; from mmlm import remote; from mmlm.shards.mirror import mirror\n"
            "put = remote.put\n"
            "def slow(*a):\n    time.sleep(0.2); print('put', flush=True); return put(*a)\n"
            f"remote.put = slow; mirror(Path({str(made.path)!r}), {uri!r}, workers=1)"
        )
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=dict(os.environ))
        assert child.stdout
        for _ in range(4):
            child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        child.wait()
        there = len(remote.below(uri + "/"))
        assert there in (3, 4)
        assert mirror(made.path, uri)[1]["uploaded"] == 2 * made.counts["shards"] + 5 - there
        assert problems_of(uri) == []


@pytest.mark.slow
def test_two_at_once_publish_one_set(made: Artifact) -> None:
    with clouds.s3() as cloud:
        uri = f"{cloud.root}/twice"
        code = f"from pathlib import Path; from mmlm.shards.mirror import mirror; mirror(Path({str(made.path)!r}), {uri!r})"
        both = [subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ)) for _ in range(2)]
        assert [child.wait(60) for child in both] == [0, 0]
        assert problems_of(uri) == []


def test_what_cannot_be_published_is_refused(made: Artifact, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing is published"):
        mirror(made.path, "https://example.org/x")
    with pytest.raises(ArtifactError):
        mirror(tmp_path, str(tmp_path / "to"))
    broken = Path(shutil.copytree(made.path, tmp_path / "shards"))
    tar = sorted(broken.glob("*.tar"))[0]
    tar.write_bytes(tar.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="mmlm verify"):
        mirror(broken, str(tmp_path / "to"))


def test_the_command_verifies_what_lies_elsewhere(made: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    with clouds.s3() as cloud:
        mirror(made.path, f"{cloud.root}/set")
        assert cli.main(["verify", f"{cloud.root}/set"]) == 0
        assert "every checksum and count holds" in capsys.readouterr().out
        cloud.put("set/manifest.parquet", b"x")
        remote.forget()
        assert cli.main(["verify", f"{cloud.root}/set"]) == 2
        assert cli.main(["verify", "s3://someone:hunter2@corpus/set"]) == 2
        assert "hunter2" not in "".join(capsys.readouterr())
