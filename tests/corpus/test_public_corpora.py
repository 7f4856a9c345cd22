"""Public corpora as they are found: `new`, `scan` and `shard` take them with no code or setting of their own.

Runs on what lies in the folder that MMLM_CORPORA names: `NAME/manifest.jsonl`, one JSON object a line with `id`,
`group`, `split` (train, val, test); media paths relative to that folder. Others are skipped.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mmlm import scaffold
from mmlm.corpus.explain import explain
from mmlm.corpus.records import SPLITS
from mmlm.corpus.scan import scan
from mmlm.shards.shard import shard
from mmlm.story import load
from tests.corpus.samples import Scanned

CORPORA = Path(os.environ.get("MMLM_CORPORA", "corpora-are-nowhere"))
NAMES = (
    "stamps", "openclipart", "emoji-twitter", "fashion-mnist", "ivr-en", "ivr-es", "letters", "newsgroups",
    "rotten-tomatoes", "articles", "abc-tunes", "dialogue", "digits8", "ivr-fr", "fillets-cs", "drums", "verse",
)  # fmt: skip
BROKEN = {"too_many_pixels", "bomb", "unreadable_image", "unreadable_audio", "unsafe_svg", "empty_sound"}
"""Reasons that are the media's own fault."""

pytestmark = pytest.mark.slow


@dataclass
class Told:
    """What a corpus says of itself."""

    splits: dict[str, str]
    """id → split."""
    groups: dict[str, str]
    """id → group."""

    @classmethod
    def read(cls, path: Path) -> Told:
        with path.open(encoding="utf-8") as f:
            rows = [json.loads(line) for line in f]
        return cls({r["id"]: r["split"] for r in rows}, {r["id"]: r["group"] for r in rows})

    @property
    def torn(self) -> set[str]:
        """Groups that the corpus itself puts into several splits."""
        seen: dict[str, set[str]] = {}
        for name, group in self.groups.items():
            seen.setdefault(group, set()).add(self.splits[name])
        return {group for group, splits in seen.items() if len(splits) > 1}


@pytest.fixture(params=NAMES)
def corpus(request: pytest.FixtureRequest) -> str:
    if not (CORPORA / request.param / "manifest.jsonl").is_file():
        pytest.skip(f"{request.param} is not below MMLM_CORPORA")
    return str(request.param)


def test_counts_are_those_of_the_corpus(corpus: str, tmp_path: Path) -> None:
    path = CORPORA / corpus / "manifest.jsonl"
    told = Told.read(path)
    for line in scaffold.write_story(tmp_path / "story", path):
        print(line)
    story = load(str(tmp_path / "story"))
    data = Path(story.about.data or "")
    manifest = Scanned(scan(story.scan, data=data, out=tmp_path / "manifest"))
    counts = manifest.counts
    assert counts["found"] == len(told.splits)
    assert set(counts["refused_reasons"]) <= BROKEN
    assert counts["refused"] <= 0.001 * counts["found"]
    given = Counter(told.splits.values())
    refused = Counter(told.splits[r["id"].partition("#")[0]] for r in manifest.refused)
    assert {s: counts[s] for s in SPLITS} == {s: given[s] - refused[s] for s in SPLITS}

    splits: dict[str, set[str]] = {}
    for name, record in manifest.records.items():
        own = name.partition("#")[0]
        assert record.group == told.groups[own]
        assert record.split == told.splits[own]
        splits.setdefault(record.group, set()).add(record.split)
    assert {group for group, held in splits.items() if len(held) > 1} == told.torn

    made = shard(story.shard, manifest.artifact, data=data, out=tmp_path / "shards", workers=1)
    quarantine = pq.read_table(made.path / "quarantine.parquet").to_pylist()
    assert made.counts["samples"] + len(quarantine) == counts["kept"]
    assert {q["reason"] for q in quarantine} <= BROKEN | {"too_long"}


def test_what_explain_says_of_a_corpus(corpus: str, tmp_path: Path) -> None:
    path = CORPORA / corpus / "manifest.jsonl"
    scaffold.write_story(tmp_path / "story", path)
    story = load(str(tmp_path / "story"))
    (source,) = explain(story.scan, Path(story.about.data or ""))["sources"]
    roles = {key for c in source["columns"] for key in c["keys"]}
    assert {"map.id", "map.group", "map.split"} <= roles
    assert "stops" not in source and set(source["refused"]["reasons"]) <= BROKEN
    told = Told.read(path)
    for record in source["records"]:
        assert record["split"] == told.splits[record["id"].partition("#")[0]]


def test_a_picture_too_large_to_decode_is_set_aside_by_its_header(tmp_path: Path) -> None:
    """The 231-megapixel picture of openclipart, alone."""
    path = CORPORA / "openclipart" / "manifest.jsonl"
    if not path.is_file():
        pytest.skip("openclipart is not below MMLM_CORPORA")
    scaffold.write_story(tmp_path / "story", path)
    story = load(str(tmp_path / "story"))
    manifest = Scanned(scan(story.scan, data=CORPORA, out=tmp_path / "manifest"))
    reasons = {r["id"]: (r["reason"], r["detail"]) for r in manifest.refused}
    reason, detail = reasons["clipart/computer/microchip_v.2_havok_redh_01"]
    assert reason == "too_many_pixels" and "231424000 pixels" in detail
