"""Corpora that lie elsewhere: a web server, and a bucket of a real S3 server on loopback."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmlm import asking, remote
from mmlm.corpus.config import DocumentsSource
from mmlm.corpus.drafts import RefuseError, media_root, media_uri
from mmlm.corpus.readers.sources import files_of
from mmlm.errors import DataError
from mmlm.storage import read_uri
from tests import clouds
from tests.corpus.samples import Scan, png, wav
from tests.corpus.test_folders import fill
from tests.corpus.test_readers_webdataset import tar
from tests.web import Site, serving

ASK = [{"task": "t", "label": "l"}]
TABLE: dict[str, Any] = {"kind": "table", "map": {"id": "id", "image": "p"}, "ask": ASK}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(asking, "FIRST_WAIT", 0.002)
    remote.forget()


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as site:
        yield site


@pytest.fixture(scope="module")
def bucket() -> Iterator[clouds.Cloud]:
    with clouds.s3() as running:
        yield running


def test_a_table_on_the_web_with_its_pictures(tmp_path: Path, site: Site, scanned: Scan) -> None:
    rows = [
        "id,p,l",
        "1,pics/1.png,a",
        "2,pics/gone.png,a",
        "3,../secret.png,a",
        "4,/etc/passwd,a",
        "5,http://127.0.0.1:1/x,a",
    ]
    site.files |= {"/c/t.csv": "\n".join(rows).encode(), "/c/pics/1.png": png(1)}
    made = scanned(tmp_path / "nowhere", {**TABLE, "files": f"{site.url}/c/t.csv"})
    assert made.records["1"].parts[0].uri == f"{site.url}/c/pics/1.png"
    assert {w.rpartition(":")[2]: r for w, r in made.reasons.items()} == {
        "3": "unreadable_file", "4": "unsafe_path", "5": "unsafe_path", "6": "remote_uri",
    }  # fmt: skip
    assert len(site.gets("/c/t.csv")) == 1  # read twice by a scan, fetched once


def test_tars_and_documents_on_the_web(tmp_path: Path, site: Site, scanned: Scan) -> None:
    for i in range(2):
        site.files[f"/s-{i}.tar"] = tar([("k.png", png(i)), ("k.txt", b"caption")])
    site.files["/page.html"] = b"<p>One sentence. And another sentence."
    made = scanned(tmp_path, {"kind": "webdataset", "files": f"{site.url}/s-{{0..1}}.tar"})
    uris = sorted(r.parts[0].uri or "" for r in made.records.values())
    assert [u.partition("#")[0] for u in uris] == [f"{site.url}/s-{i}.tar" for i in range(2)]
    assert read_uri(uris[1]) == png(1)
    made = scanned(tmp_path, {"kind": "documents", "files": f"{site.url}/page.html?id=3"})
    assert [r.target.text for r in made.records.values()] == ["And another sentence."]
    with pytest.raises(DataError, match="gone"):
        scanned(tmp_path, {"kind": "documents", "files": f"{site.url}/gone.html"})


def test_folders_and_patterns_in_a_bucket(tmp_path: Path, bucket: clouds.Cloud, scanned: Scan) -> None:
    files = {
        "f/train/cat/1.png": png(1), "f/train/dog/2.wav": wav(2), "f/test/cat/3.png": png(3), "f/test/dog/note": png(4),
        "f/train/cat/.hidden.png": png(5), "s/x.png": png(6), "s/x.txt": b"a caption", "s/y.png": png(7),
        "d/a.txt": b"One sentence. And another.", "d/b.txt.gz": gzip.compress(b"x"),
        "c.jsonl": b'{"id": 1, "p": "s/x.png", "l": "a"}',
    }  # fmt: skip
    fill(tmp_path / "up", files)
    (tmp_path / "up/h/lang=en").mkdir(parents=True)
    pq.write_table(pa.table({"id": ["1"], "l": ["a"], "text": ["x"]}), tmp_path / "up/h/lang=en/part-0.parquet")
    root = bucket.upload(tmp_path / "up", "some")
    made = scanned(tmp_path, {"kind": "folders", "path": f"{root}/f"})
    assert {i.removeprefix(f"{root}/f/"): (r.target.label, r.split) for i, r in made.records.items() if "test" in i} == {
        "test/cat/3.png": ("cat", "test"), "test/dog/note": ("dog", "test"),
    }  # fmt: skip
    assert made.counts["found"] == made.counts["kept"] == 4
    made = scanned(tmp_path, {"kind": "sidecar", "path": f"{root}/s"})
    assert (list(made.records), made.reasons) == ([f"{root}/s/x"], {f"{root}/s/y.png": "no_partner"})
    made = scanned(tmp_path, {"kind": "documents", "files": f"{root}/d/"})
    assert list(made.records) == [f"{root}/d/a.txt#0001"]
    assert not files_of(DocumentsSource(kind="documents", files=["d/a.txt"]), root)[0][1].name
    for all_of_them in (".", "d", "d/"):  # the same words as for a folder of this machine
        found = files_of(DocumentsSource(kind="documents", files=[all_of_them]), root)
        assert "d/a.txt" in [name for name, _ in found]
    made = scanned(tmp_path, {**TABLE, "files": f"{root}/*.jsonl"})
    assert made.records["1"].parts[0].uri == f"{root}/s/x.png"
    table = {
        "kind": "table",
        "files": f"{root}/h/",
        "map": {"id": "id", "lang": "lang"},
        "ask": [{**ASK[0], "text": "text"}],
    }
    assert scanned(tmp_path, table).records["1"].lang == "en"
    with pytest.raises(DataError, match="nothing at"):
        scanned(tmp_path, {**TABLE, "files": f"{root}/none/*.jsonl"})
    with pytest.raises(DataError, match="do not say what is to be answered"):
        scanned(tmp_path, {"kind": "hf", "path": f"{root}/h"})


def test_where_relative_paths_lead() -> None:
    assert media_root("", "s3://b/c/t.csv") == "s3://b/c"
    assert media_root("pics/", "https://h/c/t.csv?x=a/b") == "https://h/c/pics"
    assert media_root("s3://other", "t.csv") == "s3://other"
    assert media_root("pics", "t.csv") == "pics"
    assert media_uri("a/./1.png", "s3://b/c") == "s3://b/c/a/1.png"
    with pytest.raises(RefuseError, match="climbs"):
        media_uri("a/../../1.png", "s3://b/c")
