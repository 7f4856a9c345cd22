"""pyvips alone: `thumbnail_buffer` and JPEG again, nothing written."""

# mypy: disable-error-code="import-not-found,import-untyped"

from __future__ import annotations

from pathlib import Path
from typing import Any

from clock import Watch, contest, files


def work(source: Path, out: Path, options: dict[str, Any], watch: Watch) -> dict[str, Any]:
    import pyvips

    found, size = files(source, ".jpg"), options["size"]
    with watch.lap("work"):
        for path in found:
            small = pyvips.Image.thumbnail_buffer(path.read_bytes(), size, height=size)
            small.jpegsave_buffer(Q=options["quality"])
    return {"items": len(found)}


if __name__ == "__main__":
    contest(work)
