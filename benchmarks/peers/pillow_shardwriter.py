"""The loop that everybody writes first: Pillow and webdataset's ShardWriter, one process."""

# mypy: disable-error-code="import-not-found,import-untyped"

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from clock import Watch, contest, files


def shrink(data: bytes, size: int, quality: int, way: str = "thumbnail") -> bytes:
    """`thumbnail` is what Pillow's manual says: decoded at twice the size or more, then bicubic. `draft` is faster and
    less exact: decoded at the size or more, then bilinear."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:
        if way == "draft":
            picture.draft("RGB", (size, size))
            small = picture.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        else:
            picture.thumbnail((size, size))
            small = picture.convert("RGB")
    out = io.BytesIO()
    small.save(out, "JPEG", quality=quality)
    return out.getvalue()


def work(source: Path, out: Path, options: dict[str, Any], watch: Watch) -> dict[str, Any]:
    import webdataset

    found = files(source, ".jpg")
    with (
        watch.lap("work"),
        webdataset.ShardWriter(str(out / "%05d.tar"), maxcount=options["per_shard"], verbose=0) as writer,
    ):
        for at, path in enumerate(found):
            jpeg = shrink(path.read_bytes(), options["size"], options["quality"], options["way"])
            writer.write({"__key__": f"{at:09d}", "jpg": jpeg, "json": {"label": path.parent.name, "url": str(path)}})
    return {"items": len(found)}


if __name__ == "__main__":
    contest(work)
