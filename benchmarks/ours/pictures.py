"""The verbs `scan` (lap `scan`) and `shard` (lap `work`) on class folders of pictures, stored as JPEG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.peers.clock import Watch, contest
from mmlm.corpus.config import FolderSource, ScanConfig, SplitConfig
from mmlm.corpus.scan import scan
from mmlm.features.config import FeaturesConfig
from mmlm.features.spec import ImageSpec
from mmlm.shards.config import ShardConfig
from mmlm.shards.shard import shard

ALONE = 1 << 62
"""`ray_from` that is never reached."""


def work(source: Path, out: Path, options: dict[str, Any], watch: Watch) -> dict[str, Any]:
    scanning = ScanConfig(
        sources=[FolderSource(kind="folders", split="train")], split=SplitConfig(val=0, test=0, fill=False)
    )
    with watch.lap("scan"):
        manifest = scan(scanning, data=source, out=out / "manifest")
    workers = options.get("workers")
    per_shard = options["per_shard"]
    if workers:  # in the warm-up every worker has something to do, so that the imports of all are paid for
        per_shard = max(1, min(per_shard, manifest.counts["kept"] // (2 * workers)))
    sharding = ShardConfig(
        features=FeaturesConfig(max_len=512, image=ImageSpec(size=options["size"], patch=16, channels=3)),
        shard_records=per_shard, image_codec="jpeg", image_quality=options["quality"],
        ray_from=0 if workers else ALONE,
    )  # fmt: skip
    with _session(workers, bool(options.get("warm_ray")), watch), watch.lap("work"):
        made = shard(sharding, manifest, data=source, out=out / "shards", workers=workers)
    return {"items": made.counts["samples"]}


def _session(workers: int | None, warm: bool, watch: Watch) -> Any:
    """Ray, started before the clock is; it stays for the timed run."""
    import contextlib

    if workers and warm:
        import ray

        if not ray.is_initialized():
            ray.init(address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False)
    return contextlib.nullcontext()


if __name__ == "__main__":
    contest(work)
