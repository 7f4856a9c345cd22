"""Which records make which shard: a pure function of the manifest and the recipe.

A Unit is a run of records of one split, in order of id. Its id covers the records and everything that turns them into
bytes (the recipe), so a finished shard is known again by its name, and what is not known again is made anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import features as pillow

from mmlm.corpus.records import SPLITS, read_rows
from mmlm.errors import DataError
from mmlm.features.spec import FeatureSpec
from mmlm.shards.config import ShardConfig
from mmlm.storage import sha256_bytes, sha256_json

RECIPE = 1
"""Bump when the code changes the bytes of shards."""
OVERHEAD = 4096
"""Estimated bytes of a sample beside its media: headers, padding, JSON, tokens."""


@dataclass(frozen=True)
class Unit:
    """One shard to be: `rows` of the manifest, in order of id."""

    unit_id: str
    split: str
    index: int
    rows: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """`train-00003-1a2b3c4d`: the shard's file name without its ending."""
        return f"{self.split}-{self.index:05d}-{self.unit_id[:8]}"


def codec_versions() -> dict[str, str]:
    """Versions of all that decodes, resamples or encodes."""
    libraries = {name: version(name) for name in ("pillow", "soundfile", "soxr", "resvg_py", "numpy")}
    native = {name: str(pillow.version(name)) for name in ("zlib", "webp", "jpg")}
    return {**libraries, **native, "libsndfile": str(soundfile.__libsndfile_version__), "numpy": np.__version__}


def recipe_digest(config: ShardConfig, spec: FeatureSpec) -> str:
    """Hash of everything that changes the bytes of a shard, the records themselves aside."""
    return sha256_json(
        {
            "recipe": RECIPE,
            "features": config.features.model_dump(mode="json"),
            "spec": spec.digest,
            "image_codec": config.image_codec,
            "versions": codec_versions(),
        }
    )


def plan_units(manifest: Path, config: ShardConfig, spec: FeatureSpec) -> Iterator[Unit]:
    """All units of a manifest, in a fixed order; holds at most one unfinished unit of each split in memory."""
    recipe = recipe_digest(config, spec)
    open_rows: dict[str, list[dict[str, Any]]] = {}
    open_bytes: dict[str, int] = {}
    index: dict[str, int] = {}

    def close(split: str) -> Unit:
        rows = open_rows.pop(split)
        open_bytes.pop(split)
        at = index.get(split, 0)
        index[split] = at + 1
        return Unit(_unit_id(rows, split, recipe), split, at, rows)

    last = ""
    for row in read_rows(manifest):
        if row["id"] <= last and last:
            raise DataError(f"{manifest} is not sorted by id at {row['id']!r}, or has it twice", cure="scan again")
        last, split = row["id"], row["split"] or "train"
        if split not in SPLITS:
            raise DataError(
                f"the record {row['id']!r} has the split {split!r}", wanted=" or ".join(SPLITS), cure="scan again"
            )
        size = _estimate(row, spec)
        if split in open_rows and open_bytes[split] + size > config.shard_bytes:
            yield close(split)
        open_rows.setdefault(split, []).append(row)
        open_bytes[split] = open_bytes.get(split, 0) + size
        if len(open_rows[split]) >= config.shard_records:
            yield close(split)
    for split in SPLITS:
        if split in open_rows:
            yield close(split)


def _estimate(row: dict[str, Any], spec: FeatureSpec) -> int:
    """An upper estimate of a record's bytes, in a shard and on its way there."""
    size = OVERHEAD
    for part in row["parts"]:
        size += len(part["text"] or "") * 6 + len(part["data"] or b"")
        if part["kind"] == "image" and spec.image:
            size += spec.image.size**2 * spec.image.channels
        elif part["kind"] == "audio" and spec.audio:
            size += spec.audio.max_frames * spec.audio.n_mels * 2
    return size


def _unit_id(rows: list[dict[str, Any]], split: str, recipe: str) -> str:
    return sha256_json({"recipe": recipe, "split": split, "rows": [_identity(row) for row in rows]})


def _identity(row: dict[str, Any]) -> dict[str, Any]:
    """What of a row decides the bytes of its sample. Where media lie does not, once their content has a hash."""
    hashed = bool(row["content_hash"])
    parts = [
        {
            **part,
            "uri": None if hashed else part["uri"],
            "data": None if part["data"] is None else sha256_bytes(part["data"]),
        }
        for part in row["parts"]
    ]
    return {**row, "parts": parts}
