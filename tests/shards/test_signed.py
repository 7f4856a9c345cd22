"""Tars at signed addresses: the signature is in the address that is fetched, and in nothing that tells of a record."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mmlm.artifacts import Artifact
from mmlm.config import parse
from mmlm.corpus.config import ScanConfig
from mmlm.corpus.records import read_records
from mmlm.corpus.scan import scan
from mmlm.shards.shard import shard
from tests.corpus.samples import png
from tests.corpus.test_readers_webdataset import tar
from tests.shards.conftest import CONFIG
from tests.web import serving


def test_a_renewed_signature_makes_no_record_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMLM_CACHE", str(tmp_path / "cache"))
    members = [(f"k{i}.{end}", data) for i in range(24) for end, data in (("png", png(i)), ("cls", b"%d" % (i % 2)))]
    (tmp_path / "data").mkdir()
    manifest: Artifact | None = None
    shards: Artifact | None = None
    with serving() as site:
        site.files["/c/a.tar"] = tar([*members, ("bad.png", b"rubbish"), ("bad.cls", b"1")])
        for number, signature in enumerate(("SECRET1", "SECRET2")):
            address = f"{site.url}/c/a.tar?X-Amz-Signature={signature}&X-Amz-Expires=9"
            given = {"sources": [{"kind": "webdataset", "files": address}], "error_budget": 0.5}
            manifest = scan(
                parse(ScanConfig, given, "test"), data=tmp_path / "data", out=tmp_path / f"m{number}", earlier=manifest
            )
            records = list(read_records(manifest.path))
            assert [r.id for r in records] == sorted(f"{site.url}/c/a.tar/k{i}" for i in range(24))
            assert {r.source for r in records} == {f"{site.url}/c/a.tar"}
            assert all(signature in (part.uri or "") for r in records for part in r.parts if part.kind == "image")
            refused = pq.read_table(manifest.path / "refused.parquet").to_pylist()
            assert [row["reason"] for row in refused] == ["unreadable_image"]
            stored = (manifest.path / "artifact.json").read_text() + str(refused)
            assert "SECRET" not in stored and "X-Amz" not in stored
            shards = shard(CONFIG, manifest, data=tmp_path / "data", out=tmp_path / f"s{number}", earlier=shards)
    assert manifest is not None and shards is not None
    assert (manifest.counts["unchanged"], manifest.counts["added"]) == (24, 0)
    assert shards.counts["taken_over"] == shards.counts["shards"] >= 2
