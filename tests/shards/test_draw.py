"""What stands for a whole corpus is drawn over all of it, and nothing is drawn where all of it may be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmlm.artifacts import Artifact
from mmlm.corpus.records import Part, Record, Target, read_records
from mmlm.features.config import FeaturesConfig, TokenizerConfig
from mmlm.features.text import text_bytes, train_tokenizer
from mmlm.shards.config import ShardConfig
from mmlm.shards.draw import drawn_for_report, drawn_for_training
from mmlm.shards.shard import shard
from mmlm.shards.spec import find_tokenizer, training_texts
from tests.shards.conftest import write_manifest

SAID = {"en": "Which number is it, and why?", "zh": "这是哪个数字？为什么？"}
TASKS = [{"name": "t", "labels": [], "has_text": True, "langs": ["en", "zh"], "questions": []}]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """All of English comes before all of Chinese, and then one record of French."""
    records = [
        Record(
            f"{lang}-{i:05d}", (Part("text", text=f"{SAID[lang]} {i}"),), "t", Target("7", text="seven 七"),
            split=("train", "train", "train", "test")[i % 4], group=f"{lang}{i}", lang=lang, content_hash=f"{lang}{i}",
        )
        for lang in ("en", "zh") for i in range(800)
    ]  # fmt: skip
    french = Record("zz", (Part("text", text="Pourquoi?"),), "t", Target(text="sept"), "train", "zz", "fr")
    return write_manifest(tmp_path_factory.mktemp("draw") / "manifest", [*records, french], TASKS)


def every_text(manifest: Artifact) -> list[str]:
    kept = [r for r in read_records(manifest.path) if r.split == "train"]
    return [text for r in kept for text in (r.parts[0].text, r.target.text) if text]


def test_a_tokenizer_learns_of_all_that_it_cannot_read_whole(manifest: Artifact, tmp_path: Path) -> None:
    texts = every_text(manifest)
    most = sum(map(text_bytes, texts)) // 5
    drawn = list(training_texts(manifest.path, most))
    assert 0.9 * most < sum(map(text_bytes, drawn)) <= most
    chinese = sum(SAID["zh"] in text for text in drawn) / sum("?" in text or "？" in text for text in drawn)
    assert 0.35 < chinese < 0.65
    assert drawn == list(training_texts(manifest.path, most))
    assert not [text for text in drawn if text not in texts]
    config = FeaturesConfig(tokenizer=TokenizerConfig(vocab_size=400, max_bytes=most))
    made = find_tokenizer(manifest, config, tmp_path)
    assert len(made.encode(SAID["zh"])) < 6  # of 33 bytes
    assert len(made.encode(SAID["en"])) < 10


def test_nothing_is_drawn_where_all_may_be_read(manifest: Artifact, tmp_path: Path) -> None:
    texts = every_text(manifest)
    total = sum(map(text_bytes, texts))
    assert drawn_for_training(manifest.path, total)  # labels that stand beside texts are counted, and not learnt
    for most in (total, 2 * total):
        assert list(training_texts(manifest.path, most)) == texts
    config = FeaturesConfig(tokenizer=TokenizerConfig(vocab_size=400, max_bytes=total))
    assert find_tokenizer(manifest, config, tmp_path).json == train_tokenizer(texts, config.tokenizer).json
    assert list(training_texts(manifest.path, 1)) == texts  # no record fits


def test_the_report_of_tokens_has_every_language(manifest: Artifact, tmp_path: Path) -> None:
    drawn = drawn_for_report(manifest.path, 100, 20)
    assert 100 < len(drawn) <= 121 and "zz" in drawn
    assert min(sum(name.startswith(lang) for name in drawn) for lang in SAID) > 30
    config = ShardConfig(features=FeaturesConfig(tokenizer=TokenizerConfig(vocab_size=300)), ray_from=10_000)
    made = shard(config, manifest, data=tmp_path, out=tmp_path / "shards")
    assert {row["lang"] for row in made.extra["tokens"]} == {"en", "fr", "zh"}
    assert 500 < sum(row["texts"] for row in made.extra["tokens"]) / 2 <= 551
    assert "some 500 records drawn over the whole corpus" in (made.path / "corpus.html").read_text()
