"""The verbs `scan` (lap `scan`) and `shard` (lap `work`) on a table of texts, with a given tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.ours.pictures import ALONE
from benchmarks.peers.clock import Watch, contest
from mmlm.corpus.config import Ask, ScanConfig, SplitConfig, TableMap, TableSource
from mmlm.corpus.curation.config import CurateConfig
from mmlm.corpus.scan import scan
from mmlm.features.config import FeaturesConfig, TokenizerConfig
from mmlm.shards.config import ShardConfig
from mmlm.shards.shard import shard


def scanning(curate: CurateConfig | None = None) -> ScanConfig:
    """The table docs.jsonl with columns id, text, label; all of it for training."""
    return ScanConfig(
        sources=[
            TableSource(
                kind="table", files=["docs.jsonl"], split="train", map=TableMap(id="id"),
                ask=[Ask(task="parity", text="text", label="label")],
            )
        ],
        split=SplitConfig(val=0, test=0, fill=False), curate=curate or CurateConfig(),
    )  # fmt: skip


def megabytes(source: Path) -> float:
    """UTF-8 bytes of the texts, in millions."""
    with (source / "docs.jsonl").open(encoding="utf-8") as file:
        return sum(len(json.loads(line)["text"].encode()) for line in file) / 1e6


def work(source: Path, out: Path, options: dict[str, Any], watch: Watch) -> dict[str, Any]:
    features = FeaturesConfig(max_len=1 << 20, tokenizer=TokenizerConfig(file=str(source / "tokenizer.json")))
    sharding = ShardConfig(features=features, shard_records=options["per_shard"], ray_from=ALONE)
    with watch.lap("scan"):
        manifest = scan(scanning(), data=source, out=out / "manifest")
    with watch.lap("work"):
        made = shard(sharding, manifest, data=source, out=out / "shards")
    return {"items": made.counts["samples"], "megabytes": megabytes(source), "tokens": made.counts["tokens"]}


if __name__ == "__main__":
    contest(work)
