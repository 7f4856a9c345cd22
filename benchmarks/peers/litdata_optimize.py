"""LitData 0.2.76: `optimize` with one worker and chunks of 64 MB, as in its docs; pictures by Pillow."""

# mypy: disable-error-code="import-not-found,import-untyped"

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from clock import Watch, contest, files
from pillow_shardwriter import shrink


def one(path: str, size: int, quality: int) -> dict[str, Any]:
    return {"image": shrink(Path(path).read_bytes(), size, quality), "label": Path(path).parent.name}


def work(source: Path, out: Path, options: dict[str, Any], watch: Watch) -> dict[str, Any]:
    import litdata

    found = [str(path) for path in files(source, ".jpg")]
    with watch.lap("work"):
        litdata.optimize(
            fn=functools.partial(one, size=options["size"], quality=options["quality"]),
            inputs=found, output_dir=str(out / "optimized"), num_workers=1, chunk_bytes="64MB",
        )  # fmt: skip
    return {"items": len(found)}


if __name__ == "__main__":
    contest(work)
