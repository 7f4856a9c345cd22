"""Small real files (pictures, sounds, tables) and a scanned corpus with what is in it."""

from __future__ import annotations

import io
import json
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from mmlm.artifacts import Artifact
from mmlm.corpus.records import Record, read_records


def png(value: int, size: int = 8) -> bytes:
    """A picture of its own for every value."""
    pixels = np.random.default_rng(value).integers(0, 256, (size, size), dtype=np.uint8)
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, "PNG")
    return held.getvalue()


def wav(value: int, frames: int = 800) -> bytes:
    held = io.BytesIO()
    with wave.open(held, "wb") as f:
        f.setnchannels(1)
        f.setsampwidth(2)
        f.setframerate(8000)
        f.writeframes(np.full(frames, value, dtype="<i2").tobytes())
    return held.getvalue()


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    return path


class Scanned:
    """A manifest made in a test, with what is in it."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.counts = artifact.counts
        self.records: dict[str, Record] = {r.id: r for r in read_records(artifact.path)}
        self.refused = pq.read_table(artifact.path / "refused.parquet").to_pylist()
        assert self.counts["found"] == self.counts["kept"] + self.counts["refused"]
        assert self.counts["kept"] == len(self.records)
        assert self.counts["refused"] == len(self.refused)
        assert self.counts["kept"] == sum(self.counts[s] for s in ("train", "val", "test"))

    @property
    def reasons(self) -> dict[str, str]:
        """where → reason."""
        return {r["source"]: r["reason"] for r in self.refused}

    @property
    def bytes(self) -> bytes:
        return (self.artifact.path / "records-00000.parquet").read_bytes()


Scan = Callable[..., Scanned]
