"""datatrove 0.10.1: the four stages of its MinHash example (signatures, buckets, clusters, filter), one worker."""

# mypy: disable-error-code="import-not-found,import-untyped"

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

from clock import Watch, contest
from datatrove_tokenizer import megabytes


def work(source: Path, out: Path, options: dict[str, Any], watch: Watch) -> dict[str, Any]:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.typeshelper import Languages

    config = MinhashConfig(n_grams=options["ngram"], num_buckets=options["buckets"], hashes_per_bucket=options["rows"])
    signatures, buckets, removed = (str(out / name) for name in ("signatures", "buckets", "removed"))

    def reader() -> Any:
        return JsonlReader(str(source), glob_pattern="docs.jsonl")

    stages = [
        ([reader(), MinhashDedupSignature(signatures, config=config, language=Languages.english)], 1),
        ([MinhashDedupBuckets(signatures, buckets, config=config)], config.num_buckets),
        ([MinhashDedupCluster(buckets, removed, config=config)], 1),
        ([reader(), MinhashDedupFilter(removed), JsonlWriter(str(out / "kept"))], 1),
    ]
    with watch.lap("work"):
        for number, (pipeline, tasks) in enumerate(stages):
            logs = str(out / f"logs{number}")
            LocalPipelineExecutor(pipeline=pipeline, tasks=tasks, workers=1, logging_dir=logs).run()
    kept = []
    for path in sorted((out / "kept").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            kept += [hashlib.sha256(json.loads(line)["text"].encode()).hexdigest()[:16] for line in file]
    with (source / "docs.jsonl").open(encoding="utf-8") as file:
        found = sum(1 for _ in file)
    return {"items": found, "dropped": found - len(kept), "kept_hashes": kept, "megabytes": megabytes(source)}


if __name__ == "__main__":
    contest(work)
