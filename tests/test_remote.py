from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mmlm import asking, object_cache, remote
from mmlm.config import unsigned
from mmlm.errors import DataError, LaunchError
from tests import clouds
from tests.web import Site, serving

BYTES = random.Random(7).randbytes(3 << 20)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, quick retries, and nothing remembered of another test's store."""
    monkeypatch.setenv("MMLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(asking, "FIRST_WAIT", 0.002)
    remote.forget()
    return tmp_path / "cache"


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as site:
        site.files["/a.bin"] = BYTES
        yield site


@pytest.fixture(scope="module", params=["s3", "gcs"])
def cloud(request: pytest.FixtureRequest) -> Iterator[clouds.Cloud]:
    with getattr(clouds, request.param)() as running:
        yield running


def kept(cache: Path) -> list[Path]:
    return sorted(path for path in cache.glob("??/*"))


# ---------------------------------------------------------------- a web server that misbehaves


def test_a_store_like_s3_that_tells_no_version_is_read_all_the_same(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("ENDPOINT_URL", site.url), ("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b")):
        monkeypatch.setenv(f"AWS_{name}", value)
    site.files["/b/x.bin"], site.etags = BYTES, False
    assert remote.read("s3://b/x.bin") == BYTES
    assert site.gets("/b/x.bin")


def test_an_object_is_fetched_once_whoever_asks(site: Site, cache: Path) -> None:
    uri = f"{site.url}/a.bin"
    with ThreadPoolExecutor(4) as pool:
        assert all(data == BYTES for data in pool.map(lambda _: remote.read(uri), range(8)))
    path = remote.fetch(uri)
    assert path.read_bytes() == BYTES and path.suffix == ".bin"
    assert remote.read_range(uri, 100, 50) == BYTES[100:150]
    assert site.gets("/a.bin") == [""]
    assert kept(cache) == [path]
    remote.forget()  # as another process would: it asks whether the object is still the same
    assert remote.read(uri) == BYTES
    assert [method for method, *_ in site.asked].count("GET") == 1


def test_what_is_fetched_ahead_is_fetched_side_by_side_and_once(site: Site) -> None:
    site.files |= {f"/{n}.bin": bytes([n]) * 200_000 for n in range(8)}
    site.slow = 0.05  # a piece: four for each file
    uris = [f"{site.url}/{n}.bin" for n in range(8)]
    started = time.monotonic()
    remote.prefetch([*uris, *uris, f"{site.url}/gone.bin"])
    assert time.monotonic() - started < 8 * 4 * site.slow
    assert [remote.read(uri)[0] for uri in uris] == list(range(8))
    assert all(site.gets(f"/{n}.bin") == [""] for n in range(8))
    site.faults = ["503"] * 20
    with pytest.raises(LaunchError):
        remote.prefetch([f"{site.url}/a.bin"])


def test_a_broken_download_goes_on_where_it_stopped(site: Site) -> None:
    site.faults = ["cut:1000000", "503", "cut:500000", "429"]
    assert remote.read(f"{site.url}/a.bin") == BYTES
    assert site.gets("/a.bin") == ["", *["bytes=1000000-"] * 2, *["bytes=1500000-"] * 2]
    assert site.sent["/a.bin"] == len(BYTES)  # not a byte twice


def test_a_short_answer_is_noticed_and_completed(site: Site) -> None:
    site.faults = ["short:2000000"]
    assert remote.read(f"{site.url}/a.bin") == BYTES
    assert site.gets("/a.bin") == ["", "bytes=2000000-"]


@pytest.mark.parametrize("setting", ["ranges", "etags"])
def test_without_ranges_or_without_versions_it_begins_anew(site: Site, setting: str) -> None:
    setattr(site, setting, False)
    site.faults = ["cut:1000000"]
    assert remote.read(f"{site.url}/a.bin") == BYTES
    assert site.gets("/a.bin") == ["", "bytes=1000000-" if setting == "ranges" else ""]


def test_a_server_that_refuses_head_is_asked_for_a_byte(site: Site) -> None:
    site.head = False
    assert remote.stat(f"{site.url}/a.bin").size == len(BYTES)
    assert remote.read(f"{site.url}/a.bin") == BYTES
    site.files["/empty"] = b""
    assert remote.read(f"{site.url}/empty") == b""


def test_a_server_that_lies_about_the_size_is_given_up(site: Site) -> None:
    site.lie = 10  # and closes the connection before them
    with pytest.raises((DataError, LaunchError)) as told:
        remote.read(f"{site.url}/a.bin")
    assert "changed while it was read, 3 times" in str(told.value)
    remote.forget()
    site.lie = -10
    site.asked.clear()
    site.md5 = True
    with pytest.raises(DataError):  # as many bytes as told, but not those of the checksum
        remote.read(f"{site.url}/a.bin")


def test_wrong_bytes_are_fetched_again_and_then_refused(site: Site, cache: Path) -> None:
    site.md5, site.faults = True, ["flip"]
    assert remote.read(f"{site.url}/a.bin") == BYTES
    site.files["/b.bin"], site.faults = BYTES[::-1], ["flip"] * 3
    with pytest.raises(DataError, match="other bytes than its store's checksum tells, 3 times"):
        remote.read(f"{site.url}/b.bin")
    assert len(kept(cache)) == 1


def test_a_store_that_stays_away_stops_the_work_and_what_came_stays(site: Site, cache: Path) -> None:
    site.faults = ["cut:1000", *["503"] * 9]
    with pytest.raises(LaunchError, match=r"tried 6 times.*run the same command again"):
        remote.read(f"{site.url}/a.bin")
    assert [path.suffix for path in kept(cache)] == [".part"]
    site.faults = []
    assert remote.read(f"{site.url}/a.bin") == BYTES
    assert site.sent["/a.bin"] == len(BYTES)


def test_what_is_not_there_is_said_at_once_and_without_the_secret(site: Site) -> None:
    secret = f"{site.url.replace('://', '://me:hunter2@')}/gone.png?X-Amz-Signature=deadbeef"
    with pytest.raises(DataError, match="there is no object") as told:
        remote.read(secret)
    assert "hunter2" not in str(told.value) and "deadbeef" not in str(told.value) and "gone.png" in str(told.value)
    assert len(site.asked) == 2  # HEAD and, since some servers know no HEAD, GET
    site.faults = ["403"]
    site.head = False
    with pytest.raises(DataError, match=r"no access.*signed address"):
        remote.read(f"{site.url}/a.bin?sig=deadbeef")


def test_an_object_over_the_limit_is_not_fetched(site: Site, cache: Path) -> None:
    with pytest.raises(DataError, match="larger than 1,000 bytes"):
        remote.read(f"{site.url}/a.bin", limit=1000)
    assert site.gets("/a.bin") == [] and kept(cache) == []


def test_an_object_that_changed_is_fetched_anew(site: Site) -> None:
    uri = f"{site.url}/a.bin"
    assert remote.read(uri) == BYTES
    site.files["/a.bin"] = b"new"
    assert remote.stat(uri).size == 3  # as the listing of the next scan does
    assert remote.read(uri) == b"new"
    site.files["/a.bin"] = b"newer"  # between being looked at and being read
    assert remote.read(uri) == b"new"
    remote.forget()
    remote.stat(uri)
    site.files["/a.bin"] = b"newest!"
    assert remote.read(uri) == b"newest!"


def test_a_killed_download_is_resumed_by_the_next_process(site: Site, cache: Path) -> None:
    site.slow = 0.02
    code = f"from mmlm import remote; remote.read({site.url + '/a.bin'!r})"
    child = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size > 500_000 for path in kept(cache)):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    (part,) = kept(cache)
    there = part.stat().st_size
    assert part.suffix == ".part" and 500_000 < there < len(BYTES)
    site.slow = 0
    assert remote.read(f"{site.url}/a.bin") == BYTES
    assert site.gets("/a.bin")[1] == f"bytes={there}-"
    assert len(kept(cache)) == 1


def _read_in_child(uri: str) -> str:
    return hashlib.sha256(remote.read(uri)).hexdigest()


def test_several_processes_fetch_an_object_once(site: Site) -> None:
    site.slow = 0.005
    assert remote.stat(f"{site.url}/a.bin").size == len(BYTES)  # the parent has a connection when it forks
    with multiprocessing.get_context("fork").Pool(3) as pool:
        found = pool.map(_read_in_child, [f"{site.url}/a.bin"] * 3, chunksize=1)
    assert set(found) == {hashlib.sha256(BYTES).hexdigest()}
    assert site.gets("/a.bin") == [""]


def test_the_cache_stays_within_its_limit_and_spares_what_is_used(
    site: Site, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(8):
        site.files[f"/{number}.bin"] = bytes([number]) * 100_000
    used = remote.fetch(f"{site.url}/0.bin")
    os.utime(used, (1, 1))  # by its time, it would go first
    for number in range(1, 8):
        remote.read(f"{site.url}/{number}.bin")
        time.sleep(0.002)
    assert len(kept(cache)) == 8
    assert remote.evict(cache, 350_000) == 500_000
    assert used.read_bytes() == bytes(100_000)
    left = [object_cache.Cache().path(f"{site.url}/{n}.bin", remote.known(f"{site.url}/{n}.bin")) for n in range(8)]
    assert [path.exists() for path in left] == [True, *[False] * 5, True, True]
    monkeypatch.setenv("MMLM_CACHE_BYTES", "100000")
    remote.read(f"{site.url}/a.bin")  # more than the whole limit: it is read all the same
    assert used.exists() and len(kept(cache)) == 2  # that and the one it just read


def test_what_no_store_is_meant_by_is_refused() -> None:
    for uri in ("memory://x", "file::memory://x", "simplecache::s3://b/x", "ftp://h/x", "github://a:b@c/x"):
        with pytest.raises(DataError, match="of no store that is read"):
            remote.read(uri)
    with pytest.raises(DataError, match=r"credentials in it.*AWS_ACCESS_KEY_ID") as told:
        remote.read("s3://key:hunter2@bucket/x")
    assert "hunter2" not in str(told.value)


def test_a_cache_that_cannot_be_written_is_named(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("MMLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(LaunchError, match="MMLM_CACHE"):
        remote.read(f"{site.url}/a.bin")
    with open(
        "/dev/full", "wb", buffering=0
    ) as full:  # a disk without space: it stops the work, and is not the store's fault
        told = remote.stat(f"{site.url}/a.bin")
        with pytest.raises(OSError, match="No space left"):
            object_cache._fill(f"{site.url}/a.bin", told, full, 0, None)
    assert len(site.gets("/a.bin")) == 1


@pytest.mark.parametrize(
    ("signed", "name"),
    [
        ("https://h/t.csv?X-Amz-Signature=a&X-Amz-Expires=1", "https://h/t.csv"),
        ("https://h/get?file=a&sig=z&se=2026&sp=r", "https://h/get?file=a"),
        ("https://h/get?file=a&size=3", "https://h/get?file=a&size=3"),
        ("s3://b/what?sig=1", "s3://b/what?sig=1"),
    ],
)
def test_a_name_carries_no_signature(signed: str, name: str) -> None:
    assert unsigned(signed) == name


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(DataError, match=r'pip install "mmlm-workflows\[s3\]"'):
        asking.open_store("s3")


def test_missing_credentials_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"no credentials.*AWS_ACCESS_KEY_ID"):
        remote.read("s3://bucket/x")


# ---------------------------------------------------------------- object stores


def test_a_store_gives_what_was_put_there(cloud: clouds.Cloud) -> None:
    uri = cloud.put("some/名 #1?%41.bin", BYTES)
    assert remote.read(uri) == BYTES
    assert remote.read_range(uri, 5, 7) == BYTES[5:12]
    told = remote.stat(uri)
    assert (told.size, told.md5) == (len(BYTES), hashlib.md5(BYTES).hexdigest())
    assert b"".join(remote.stream(uri)) == BYTES
    assert remote.read(cloud.put("some/empty", b"")) == b""
    for missing in (f"{cloud.root}/gone", cloud.root + "-of-nobody/gone"):
        with pytest.raises(DataError, match="there is no"):
            remote.read(missing)


def test_patterns_are_expanded_sorted(cloud: clouds.Cloud) -> None:
    names = ["p/b.csv", "p/a.csv", "p/x/c.csv", "p/x/y/d.csv", "p/[z].txt", "q/e.csv"]
    for name in names:
        cloud.put(name, name.encode())
    found = {
        p: remote.expand(f"{cloud.root}/{p}")
        for p in ("p/*.csv", "p/**/*.csv", "p/[ab].csv", "p/", "p/?/c.csv", "p/gone")
    }
    assert {p: [u.removeprefix(cloud.root + "/") for u in uris] for p, uris in found.items()} == {
        "p/*.csv": ["p/a.csv", "p/b.csv"],
        "p/**/*.csv": ["p/a.csv", "p/b.csv", "p/x/c.csv", "p/x/y/d.csv"],
        "p/[ab].csv": ["p/a.csv", "p/b.csv"],
        "p/": ["p/[z].txt", "p/a.csv", "p/b.csv", "p/x/c.csv", "p/x/y/d.csv"],
        "p/?/c.csv": ["p/x/c.csv"],
        "p/gone": ["p/gone"],
    }
    assert remote.expand("https://example.org/a*.csv") == ["https://example.org/a*.csv"]


def test_nothing_is_ever_replaced(cloud: clouds.Cloud, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(BYTES)
    digest = hashlib.sha256(BYTES).hexdigest()
    uri = f"{cloud.root}/put/名 1.tar"
    assert remote.put(uri, path, digest) is True
    assert remote.stat(uri).sha256 == digest and remote.read(uri) == BYTES
    path.write_bytes(b"other")
    assert remote.put(uri, path, hashlib.sha256(b"other").hexdigest()) is False
    assert remote.read(uri) == BYTES


def test_an_object_replaced_in_the_store_is_seen(cloud: clouds.Cloud) -> None:
    uri = cloud.put("replaced", b"one")
    assert remote.read(uri) == b"one"
    cloud.put("replaced", b"two!")
    remote.forget()
    assert remote.read(uri) == b"two!"
    remote.stat(uri)
    cloud.put("replaced", b"three")  # after it was looked at
    assert remote.read(uri) in (b"two!", b"three")
    cloud.put("other", b"a" * 10)
    remote.stat(f"{cloud.root}/other")
    cloud.put("other", b"b" * 11)
    assert remote.read(f"{cloud.root}/other") == b"b" * 11
