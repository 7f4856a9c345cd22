"""verify: is a ShardSet what its manifest says, bit by bit?"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmlm import artifacts
from mmlm.features import spec as feature_spec
from mmlm.features.text import FILE as TOKENIZER
from mmlm.shards.commit import MANIFEST, QUARANTINE
from mmlm.shards.tar import members
from mmlm.storage import sha256_file, sha256_json


def verify(path: Path | str) -> list[str]:
    """Every problem of the ShardSet in folder `path`, one line each, naming the file; empty when it is sound.

    Raises ArtifactError when there is no finished ShardSet.
    """
    path = Path(path)
    artifact = artifacts.read(path, "shards")
    problems = [
        f"{name} is missing"
        for name in (MANIFEST, QUARANTINE, feature_spec.FILE, TOKENIZER)
        if not (path / name).is_file()
    ]
    if problems:
        return problems
    names = [MANIFEST, feature_spec.FILE, TOKENIZER]
    if sha256_json({name: sha256_file(path / name) for name in sorted(names)}) != artifact.digest:
        problems.append(f"{', '.join(names)}: not the bytes that artifact.json was written for")
    try:
        rows = pq.read_table(path / MANIFEST).to_pylist()
        problems += _verify_counts(rows, artifact.counts)
        quarantined = pq.read_table(path / QUARANTINE).num_rows
    except (pa.ArrowException, KeyError, OSError) as error:
        return [*problems, f"{MANIFEST} or {QUARANTINE} cannot be read ({error})"]
    if quarantined != sum(row["quarantined"] for row in rows):
        problems.append(
            f"{QUARANTINE}: {quarantined} rows, the manifest counts {sum(row['quarantined'] for row in rows)}"
        )
    for row in rows:
        if row["path"]:
            problems += _verify_shard(path, row)
    listed = {row["path"] for row in rows}
    problems += [f"{tar.name}: not in the manifest" for tar in sorted(path.rglob("*.tar")) if tar.name not in listed]
    return problems


def _verify_counts(rows: list[dict[str, Any]], counts: dict[str, Any]) -> list[str]:
    problems = []
    for key in ("records", "samples", "quarantined"):
        found = sum(row[key] for row in rows)
        if found != counts.get(key):
            problems.append(f"{MANIFEST}: {found} {key}, artifact.json says {counts.get(key)}")
    return problems


def _verify_shard(path: Path, row: dict[str, Any]) -> list[str]:
    """Problems of one tar and its index; the first that is found decides, for what follows would only repeat it."""
    name = row["path"]
    tar, index = path / name, (path / name).with_suffix(".index.parquet")
    if not tar.is_file():
        return [f"{name}: missing"]
    with tar.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != row["sha256"]:
        size = tar.stat().st_size
        other = f", {size:,} bytes instead of {row['bytes']:,}" if size != row["bytes"] else ""
        return [f"{name}: sha256 {found[:16]} instead of {row['sha256'][:16]}{other}"]
    if not index.is_file():
        return [f"{index.name}: missing"]
    if sha256_file(index) != row["index_sha256"]:
        return [f"{index.name}: other bytes than the manifest says"]
    try:
        with tar.open("rb") as file:
            inside = [(*member.partition(".")[::2], offset, size) for member, offset, size in members(file)]
    except ValueError as error:
        return [f"{name}: {error}"]
    listed = pq.read_table(index).to_pydict()
    if inside != list(zip(listed["key"], listed["ext"], listed["offset"], listed["size"], strict=True)):
        return [f"{index.name}: its offsets are not those of the tar"]
    if len({key for key, *_ in inside}) != row["samples"]:
        return [f"{name}: {len({key for key, *_ in inside})} samples instead of {row['samples']}"]
    return []
