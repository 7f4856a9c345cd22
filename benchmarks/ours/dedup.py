"""The verb `scan` with the curation step `near_text`, on a table of texts (lap `work`); and that step alone (`step`)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from benchmarks.ours.text import megabytes, scanning
from benchmarks.peers.clock import Watch, contest
from mmlm.corpus.curation.config import CurateConfig, NearTextConfig
from mmlm.corpus.curation.set_steps import find_drops
from mmlm.corpus.records import read_rows
from mmlm.corpus.scan import scan


def work(source: Path, out: Path, options: dict[str, Any], watch: Watch) -> dict[str, Any]:
    near = NearTextConfig(ngram=options["ngram"], buckets=options["buckets"], rows=options["rows"], threshold=0.7)
    curate = CurateConfig(near_text=near)
    with watch.lap("work"):
        made = scan(scanning(curate), data=source, out=out / "manifest")
    plain = scan(scanning(), data=source, out=out / "plain")
    with watch.lap("step"):
        find_drops(lambda: read_rows(plain.path), curate, lambda uri, most: b"", out / "step")
    kept = [
        hashlib.sha256(part["text"].encode()).hexdigest()[:16]
        for row in read_rows(made.path)
        for part in row["parts"]
        if part["kind"] == "text"
    ]
    found = made.counts["found"]
    return {"items": found, "dropped": found - len(kept), "kept_hashes": kept, "megabytes": megabytes(source)}


if __name__ == "__main__":
    contest(work)
