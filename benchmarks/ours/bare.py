"""simplejpeg and OpenCV alone: decode, resize by area, JPEG again, nothing written. Our own ceiling.

Two ways: decoded at twice the wanted size at least, as our shards are (`scale` 2), and at the wanted size (`scale` 1),
which is as fast as it gets and shows it at edges.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.peers.clock import Watch, contest, files


def work(source: Path, out: Path, options: dict[str, Any], watch: Watch) -> dict[str, Any]:
    import cv2
    import simplejpeg

    cv2.setNumThreads(1)
    found, size = files(source, ".jpg"), options["size"]
    wanted = options["scale"] * size
    with watch.lap("work"):
        for path in found:
            pixels = simplejpeg.decode_jpeg(path.read_bytes(), "RGB", min_height=wanted, min_width=wanted, min_factor=1)
            small = cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA)
            simplejpeg.encode_jpeg(small, options["quality"], "RGB", "420")
    return {"items": len(found)}


if __name__ == "__main__":
    contest(work)
