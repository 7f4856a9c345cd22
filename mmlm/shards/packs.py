"""Pack plans at rest: what `mmlm.data` leaves beside the shards that it packs. Here only so that they are checked and
swept with the shards; how they are made stands in `mmlm/data/plan.py`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmlm.storage import sha256_bytes, sha256_json

FOLDER = "packs"
"""Folder below a shard set, a file for each plan."""
META = b"mmlm.pack"
"""Key of the metadata of the Parquet file."""


def content_digest(table: pa.Table, told: Mapping[str, Any]) -> str:
    """Hash of what a plan says; not of the file, whose bytes another version of Parquet would lay out otherwise."""
    columns = {
        name: sha256_bytes(np.ascontiguousarray(table[name].to_numpy()).astype("<i8").tobytes())
        for name in table.column_names
    }
    return sha256_json({**told, "columns": columns})


def verify_packs(path: Path, digest: str, samples: int) -> list[str]:
    """Problems of the pack plans of the shard set in `path`, whose digest is `digest` and which has `samples` samples."""
    problems = []
    for file in sorted((path / FOLDER).glob("*.parquet")):
        name = f"{FOLDER}/{file.name}"
        try:
            table = pq.read_table(file)
            told = json.loads(table.schema.metadata[META])
            found = content_digest(table, {key: value for key, value in told.items() if key != "digest"})
            if found != told["digest"]:
                problems.append(f"{name}: other content than its digest says")
            elif told["shards"] != digest:
                problems.append(f"{name}: of other shards than these; remove it, it is made anew when it is wanted")
            elif (
                table.num_rows and not 0 <= pc.min(table["sample"]).as_py() <= pc.max(table["sample"]).as_py() < samples
            ):
                problems.append(f"{name}: names samples that are not there")
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            problems.append(f"{name}: cannot be read ({error})")
    return problems


def sweep_packs(path: Path) -> None:
    """Remove the plans of a shard set that is being made: they were of another one."""
    shutil.rmtree(path / FOLDER, ignore_errors=True)
