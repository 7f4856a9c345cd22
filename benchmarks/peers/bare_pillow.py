"""Pillow alone: decode, resize, JPEG again, nothing written."""

# mypy: disable-error-code="import-not-found,import-untyped"

from __future__ import annotations

from pathlib import Path
from typing import Any

from clock import Watch, contest, files
from pillow_shardwriter import shrink


def work(source: Path, out: Path, options: dict[str, Any], watch: Watch) -> dict[str, Any]:
    found = files(source, ".jpg")
    with watch.lap("work"):
        for path in found:
            shrink(path.read_bytes(), options["size"], options["quality"], options["way"])
    return {"items": len(found)}


if __name__ == "__main__":
    contest(work)
