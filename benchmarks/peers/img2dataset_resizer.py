"""img2dataset 1.47.0: its Resizer and its WebDataset writer, called as its downloader calls them once a file is there.

The files are read from the disk instead of the network; no thread pool, no process pool, no image statistics.
"""

# mypy: disable-error-code="import-not-found,import-untyped"

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

from clock import Watch, contest, files


def work(source: Path, out: Path, options: dict[str, Any], watch: Watch) -> dict[str, Any]:
    import pyarrow as pa
    from img2dataset.resizer import Resizer
    from img2dataset.writer import WebDatasetSampleWriter

    names = ("caption", "url", "key", "status", "error_message", "width", "height", "original_width",
             "original_height", "sha256")  # fmt: skip
    numbers = ("width", "height", "original_width", "original_height")
    schema = pa.schema([(name, pa.int32() if name in numbers else pa.string()) for name in names])
    found = files(source, ".jpg")
    with watch.lap("work"):
        resizer = Resizer(
            image_size=options["size"], resize_mode="border", resize_only_if_bigger=False,
            encode_quality=options["quality"], encode_format="jpg",
        )  # fmt: skip
        for shard, start in enumerate(range(0, len(found), options["per_shard"])):
            writer = WebDatasetSampleWriter(shard, str(out), True, 5, schema, "jpg")
            for at, path in enumerate(found[start : start + options["per_shard"]], start):
                stream = io.BytesIO(path.read_bytes())
                image, width, height, original_width, original_height, error = resizer(stream)
                if error is not None:
                    raise RuntimeError(error)
                stream.seek(0)
                meta = {
                    "caption": path.parent.name, "url": str(path), "key": f"{at:09d}", "status": "success",
                    "error_message": None, "width": width, "height": height, "original_width": original_width,
                    "original_height": original_height, "sha256": hashlib.sha256(stream.read()).hexdigest(),
                }  # fmt: skip
                writer.write(image, meta["key"], meta["caption"], meta)
            writer.close()
    return {"items": len(found)}


if __name__ == "__main__":
    contest(work)
