"""`mmlm new`, `scan --explain` and saved data sets, of a bucket: the same as of a folder, and little is fetched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mmlm import cli, object_cache, remote
from mmlm.config import parse
from mmlm.corpus.config import ScanConfig
from mmlm.corpus.explain import explain, explain_files
from mmlm.corpus.guess import look
from mmlm.corpus.scan import scan
from mmlm.errors import DataError
from tests import clouds
from tests.corpus.samples import Scan, png, write_lines
from tests.corpus.test_folders import fill
from tests.corpus.test_readers_hf import FEATURES, rows, save
from tests.corpus.test_readers_webdataset import tar
from tests.web import serving


@pytest.fixture(scope="module")
def bucket() -> Iterator[clouds.Cloud]:
    with clouds.s3() as running:
        yield running


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses of the objects that were fetched whole, as they come."""
    monkeypatch.setenv("MMLM_CACHE", str(tmp_path / "cache"))
    remote.forget()
    seen: list[str] = []
    download = object_cache._download

    def noting(uri: str, *more: Any) -> None:
        seen.append(uri)
        download(uri, *more)

    monkeypatch.setattr(object_cache, "_download", noting)
    return seen


def corpus(folder: Path, form: str) -> Path:
    if form == "folders":
        fill(folder, {f"{'cat' if i % 2 else 'dog'}/{i:03d}.png": png(i, 40) for i in range(300)})
    elif form == "table":
        fill(folder, {f"media/{i}.png": png(i, 40) for i in range(300)})
        write_lines(
            folder / "t.jsonl", [{"id": str(i), "file": f"media/{i}.png", "label": "ab"[i % 2]} for i in range(300)]
        )
    elif form == "sidecar":
        fill(
            folder,
            {f"a/{i}.png": png(i, 32) for i in range(12)} | {f"a/{i}.txt": f"a cat {i}".encode() for i in range(12)},
        )
    elif form == "webdataset":
        for k in range(2):
            cats = [
                (f"{i:03d}.{e}", d)
                for i in range(8)
                for e, d in (("png", png(8 * k + i, 24)), ("cls", b"01"[i % 2 :][:1]))
            ]
            fill(folder, {f"s-{k}.tar": tar(cats)})
    elif form == "hf":
        save(folder / "train", pa.Table.from_pylist(rows(30)), FEATURES, 2)
        save(folder / "test", pa.Table.from_pylist(rows(6, 50)), FEATURES)
        (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    else:
        sentence = "The first sentence is short. The second one follows it. And a third one ends it.\n\n"
        fill(folder, {f"notes/{i}.md": f"# Note {i}\n\n{sentence * 3}".encode() for i in range(80)})
    return folder


FORMS = ("folders", "table", "sidecar", "webdataset", "hf", "documents")


@pytest.mark.parametrize("form", FORMS)
def test_a_bucket_is_seen_as_the_folder_is(form: str, tmp_path: Path, bucket: clouds.Cloud, fetched: list[str]) -> None:
    here = corpus(tmp_path / "here", form)
    uri = bucket.upload(here, f"look-{form}")
    local, there = look(here), look(uri)
    assert (there.form, there.scan, there.tasks, there.modalities) == (
        local.form,
        local.scan,
        local.tasks,
        local.modalities,
    )
    assert (there.sizes, there.counts, there.data) == (local.sizes, local.counts, uri)
    assert [line.replace(uri, str(here)) for line in there.says] == local.says
    files = sum(path.is_file() for path in here.rglob("*"))
    assert len(fetched) <= {"folders": 200, "table": 201, "documents": 60}.get(form, files)
    config = parse(ScanConfig, there.scan, "test")
    for ours, theirs in zip(explain(config, here)["sources"], explain(config, uri)["sources"], strict=True):
        assert theirs == ours
    assert len(fetched) <= files  # each at most once
    assert [s["files"] for s in explain_files(uri)["sources"]] == [s["files"] for s in explain_files(here)["sources"]]


def test_a_saved_data_set_is_scanned_where_it_lies(
    tmp_path: Path, bucket: clouds.Cloud, fetched: list[str], scanned: Scan
) -> None:
    here = corpus(tmp_path / "here", "hf")
    (here / "other.bin").write_bytes(b"not of the set")
    uri = bucket.upload(here, "saved/set")
    local = scanned(here, {"kind": "hf"})
    for made in (
        scan_of(uri, {"kind": "hf"}, tmp_path / "a"),
        scan_of(uri.rpartition("/")[0], {"kind": "hf", "path": "set"}, tmp_path / "b"),
        scan_of(tmp_path, {"kind": "hf", "path": uri}, tmp_path / "c"),
    ):
        assert made["kept"] == local.counts["kept"] == 36
        assert (made["train"], made["val"], made["test"]) == tuple(local.counts[s] for s in ("train", "val", "test"))
    assert len(fetched) == len(set(fetched)) == 8 and f"{uri}/other.bin" not in fetched
    bucket.put("saved/set/test/data-00000-of-00001.arrow", b"rubbish")
    remote.forget()
    assert scan_of(uri, {"kind": "hf"}, tmp_path / "d")["refused_reasons"] == {"bad_table": 1}
    with pytest.raises(DataError, match="nothing at"):
        scan_of(f"{bucket.root}/nowhere", {"kind": "hf"}, tmp_path / "e")


def scan_of(data: Path | str, source: dict[str, Any], out: Path) -> dict[str, Any]:
    config = parse(ScanConfig, {"error_budget": 1.0, "sources": [source]}, "test")
    return scan(config, data=data, out=out).counts


def test_the_commands_take_addresses(
    tmp_path: Path, bucket: clouds.Cloud, fetched: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    uri = bucket.upload(corpus(tmp_path / "here", "table"), "commands")
    story = tmp_path / "story"
    assert cli.main(["new", str(story), "--data", uri]) == 0
    assert f"data: {uri}" in (story / "story.yaml").read_text()
    capsys.readouterr()
    assert cli.main(["scan", str(story), "--explain", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["data"] == uri and told["sources"][0]["refused"]["count"] == 0
    assert cli.main(["scan", uri, "--explain"]) == 0
    assert "t.jsonl" in capsys.readouterr().out
    assert cli.main(["new", str(tmp_path / "file"), "--data", f"{uri}/t.jsonl"]) == 0
    assert cli.main(["new", str(tmp_path / "none"), "--data", f"{uri}/nothing"]) == 2
    with serving() as site:
        site.files["/reviews.csv"] = "\n".join(
            ["text,label", *(f"text number {i},{'ab'[i % 2]}" for i in range(40))]
        ).encode()
        assert cli.main(["new", str(tmp_path / "web"), "--data", f"{site.url}/reviews.csv"]) == 0
        assert f"data: {site.url}" in (tmp_path / "web/story.yaml").read_text()
        capsys.readouterr()
        assert (
            cli.main(["new", str(tmp_path / "signed"), "--data", f"{site.url}/reviews.csv?X-Amz-Signature=secret"]) == 2
        )
        assert "secret" not in "".join(capsys.readouterr())


def test_media_named_by_whole_addresses_are_seen_to_change(
    tmp_path: Path, bucket: clouds.Cloud, fetched: list[str]
) -> None:
    with serving() as site:
        site.files["/w.png"] = png(500)
        pictures = [bucket.put(f"seen/{i}.png", png(i)) for i in range(60)] + [f"{site.url}/w.png"]
        write_lines(tmp_path / "t.jsonl", [{"id": str(i), "p": p, "l": "ab"[i % 2]} for i, p in enumerate(pictures)])
        source = {
            "kind": "table",
            "files": "t.jsonl",
            "map": {"id": "id", "image": "p"},
            "ask": [{"task": "t", "label": "l"}],
        }
        config = parse(ScanConfig, {"sources": [source], "allow_remote": True}, "test")

        def fingerprint() -> str:
            remote.forget()
            return scan(config, data=tmp_path, out=tmp_path / f"m{len(list(tmp_path.iterdir()))}").fingerprint

        first = fingerprint()
        assert fingerprint() == first
        bucket.put("seen/7.png", png(1000))
        second = fingerprint()
        site.files["/w.png"] = png(501, 16)
        assert len({first, second, fingerprint()}) == 3
        asked = len(site.asked)
        untrusted = parse(ScanConfig, {"sources": [source], "error_budget": 1.0}, "test")
        with pytest.raises(DataError, match="all 61 records were refused"):
            scan(untrusted, data=tmp_path, out=tmp_path / "no")
        assert len(site.asked) == asked  # nobody is asked about what is not fetched
