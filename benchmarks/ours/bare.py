"""simplejpeg and OpenCV alone: decode, resize by area, JPEG again, nothing written. Our own ceiling.

Decoded at twice the wanted size at least (`scale` 2), or at the wanted size (`scale` 1), which is as fast as it gets and
shows it at edges. `kept`: as our shards are made, decoded at twice the size, shrunk linearly to a multiple and then by area,
with freed memory kept: the ceiling at that quality.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.peers.clock import Watch, contest, files
from mmlm.heap import keep_freed_memory
from mmlm.shards.write import KEPT


def work(source: Path, out: Path, options: dict[str, Any], watch: Watch) -> dict[str, Any]:
    import cv2
    import simplejpeg

    cv2.setNumThreads(1)
    found, size = files(source, ".jpg"), options["size"]
    wanted, kept = options["scale"] * size, options.get("kept", False)
    if kept:
        keep_freed_memory(KEPT)
    with watch.lap("work"):
        for path in found:
            pixels = simplejpeg.decode_jpeg(path.read_bytes(), "RGB", min_height=wanted, min_width=wanted, min_factor=1)
            if kept:
                pixels = cv2.resize(pixels, (wanted, wanted), interpolation=cv2.INTER_LINEAR)
            small = cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA)
            simplejpeg.encode_jpeg(small, options["quality"], "RGB", "420")
    return {"items": len(found)}


if __name__ == "__main__":
    contest(work)
