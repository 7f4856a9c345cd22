"""Scans and shards the hostile corpora in a process of its own and prints what it took, as JSON.

    python -m tests.hostile.run DATA OUT

The process limits itself nothing: the test reads the peak of its memory and caps its time.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from mmlm.corpus.config import (
    Ask,
    ChatSource,
    DocumentsSource,
    FolderSource,
    HfSource,
    ScanConfig,
    SidecarSource,
    Source,
    TableMap,
    TableSource,
    WebDatasetSource,
)
from mmlm.corpus.scan import scan
from mmlm.features.config import FeaturesConfig, TokenizerConfig
from mmlm.features.spec import AudioSpec, ImageSpec
from mmlm.shards.config import ShardConfig
from mmlm.shards.shard import shard

FEATURES = FeaturesConfig(
    tokenizer=TokenizerConfig(vocab_size=300),
    max_len=512,
    image=ImageSpec(size=64, patch=16, channels=3),
    audio=AudioSpec(max_seconds=2.0),
)


def sources(data: Path) -> list[Source]:
    """A source for every corpus that lies below `data`."""
    found: list[Source] = []
    if (data / "folders").is_dir():
        found.append(FolderSource(kind="folders", path="folders", question="Which class is this?"))
    if (data / "chat").is_dir():
        found.append(ChatSource(kind="chat", files=["chat/*.jsonl"], root="chat"))
    if (data / "table").is_dir():
        ask = Ask(task="yes", text="text", label="label", number="number")
        found.append(TableSource(kind="table", files=["table/*.csv"], map=TableMap(), ask=[ask]))
    if (data / "tars").is_dir():
        found.append(WebDatasetSource(kind="webdataset", files=["tars/*.tar"]))
    if (data / "documents").is_dir():
        found.append(DocumentsSource(kind="documents", files=["documents"], max_seconds=8.0))
    if (data / "sidecar").is_dir():
        found.append(SidecarSource(kind="sidecar", path="sidecar"))
    if (data / "arrow").is_dir():
        found.append(HfSource(kind="hf", path="arrow"))
    return found


def main(data: Path, out: Path) -> None:
    began, before = time.monotonic(), _peak()
    config = ScanConfig(sources=sources(data), error_budget=1.0)
    manifest = scan(config, data=data, out=out / "manifest")
    scanned, scan_peak = time.monotonic(), _peak()
    made = shard(
        ShardConfig(features=FEATURES, error_budget=1.0, ray_from=1_000_000), manifest, data=data, out=out / "shards"
    )
    print(
        json.dumps(
            {
                "scan_seconds": scanned - began, "shard_seconds": time.monotonic() - scanned,
                "start_bytes": before, "scan_peak_bytes": scan_peak, "peak_bytes": _peak(),
                "scan": manifest.counts, "shard": made.counts,
            }
        )
    )  # fmt: skip


def _peak() -> int:
    """Most memory this process ever held, bytes. Not `getrusage`, whose figure begins with the parent's."""
    told = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(told.partition("VmHWM:")[2].split()[0]) * 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
