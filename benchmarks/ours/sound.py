"""The verbs `scan` (lap `scan`) and `shard` (lap `work`) on a table of clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.ours.pictures import ALONE
from benchmarks.peers.clock import Watch, contest, files
from mmlm.corpus.config import Ask, ScanConfig, SplitConfig, TableMap, TableSource
from mmlm.corpus.scan import scan
from mmlm.features.config import FeaturesConfig
from mmlm.features.spec import AudioSpec
from mmlm.shards.config import ShardConfig
from mmlm.shards.shard import shard


def work(source: Path, out: Path, options: dict[str, Any], watch: Watch) -> dict[str, Any]:
    import soundfile

    clips = files(source, f".{options['ending']}")
    scanning = ScanConfig(
        sources=[
            TableSource(
                kind="table", files=["clips.jsonl"], split="train",
                map=TableMap(id="id", audio=["sound"]), ask=[Ask(task="kind", question="What is it?", label="label")],
            )
        ],
        split=SplitConfig(val=0, test=0, fill=False),
    )  # fmt: skip
    sharding = ShardConfig(
        features=FeaturesConfig(max_len=512, audio=AudioSpec(n_mels=80, scale=options.get("scale", "relative"))),
        shard_records=options["per_shard"], ray_from=ALONE,
    )  # fmt: skip
    with watch.lap("scan"):
        manifest = scan(scanning, data=source, out=out / "manifest")
    with watch.lap("work"):
        made = shard(sharding, manifest, data=source, out=out / "shards")
    seconds = sum(soundfile.info(str(clip)).duration for clip in clips)
    return {"items": made.counts["samples"], "audio_seconds": seconds}


if __name__ == "__main__":
    contest(work)
