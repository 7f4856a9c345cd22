"""datatrove 0.10.1: JsonlReader → DocumentTokenizer, one task, no shuffling (which would be a second pass)."""

# mypy: disable-error-code="import-not-found,import-untyped"

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clock import Watch, contest


def megabytes(source: Path) -> float:
    with (source / "docs.jsonl").open(encoding="utf-8") as file:
        return sum(len(json.loads(line)["text"].encode()) for line in file) / 1e6


def work(source: Path, out: Path, options: dict[str, Any], watch: Watch) -> dict[str, Any]:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    with watch.lap("work"):
        stats = LocalPipelineExecutor(
            pipeline=[
                JsonlReader(str(source), glob_pattern="docs.jsonl"),
                DocumentTokenizer(
                    str(out / "tokens"), tokenizer_name_or_path=str(source / "tokenizer.json"),
                    eos_token="<|endoftext|>", shuffle_documents=False,
                ),
            ],
            tasks=1, workers=1, logging_dir=str(out / "logs"),
        ).run()  # fmt: skip
    steps = json.loads(stats.to_json())
    tokens = sum(step["stats"].get("tokens", {}).get("total", 0) for step in steps)
    documents = max(step["stats"].get("documents", {}).get("total", 0) for step in steps)
    return {"items": documents, "tokens": tokens, "megabytes": megabytes(source)}


if __name__ == "__main__":
    contest(work)
