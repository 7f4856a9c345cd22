"""verify, of a ShardSet that lies on S3 or Google Cloud Storage: each shard is read once, as a stream."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from mmlm import artifacts, remote
from mmlm.errors import ArtifactError, DataError
from mmlm.progress import Progress
from mmlm.shards.mirror import stopping_pool
from mmlm.shards.verify import TABLES, not_listed, verify_shard, verify_tables
from mmlm.stores import blank

SMALL = 256 << 20
"""Bytes of the largest table or index that is read whole."""


def verify_remote(uri: str, workers: int = 4) -> list[str]:
    """Every problem of the ShardSet at the address `uri`, as `verify` tells them of a folder.

    Raises ArtifactError when there is no finished ShardSet.
    """
    uri = uri.rstrip("/")
    there = {name.removeprefix(uri + "/") for name in remote.below(uri + "/")}
    there = {name for name in there if "/" not in name}  # below it lie sets of their own
    with tempfile.TemporaryDirectory() as folder:
        for name in (artifacts.NAME, *TABLES):
            if name in there:
                Path(folder, name).write_bytes(_small(f"{uri}/{name}"))
        try:
            problems, rows = verify_tables(Path(folder))
        except ArtifactError as error:
            where = blank(uri)
            raise ArtifactError(error.found.replace(folder, where), wanted=error.wanted, cure=error.cure) from None
    if rows is None:
        return problems
    shards = [row for row in rows if row["path"]]
    with stopping_pool(workers) as pool, Progress("verify", len(shards), "shards") as progress:
        for found in pool.map(lambda row: _verify_shard(uri, row, there), shards):
            problems += found
            progress.add(1)
    return [*problems, *not_listed(there, shards)]


def _verify_shard(uri: str, row: dict[str, Any], there: set[str]) -> list[str]:
    name = row["path"]
    index = name.removesuffix(".tar") + ".index.parquet"
    try:
        tar = remote.stream(f"{uri}/{name}") if name in there else None
        return verify_shard(row, tar, lambda: _small(f"{uri}/{index}") if index in there else None)
    except DataError as error:
        return [f"{name}: {error}"]


def _small(uri: str) -> bytes:
    size = remote.stat(uri).size
    if size > SMALL:
        raise ArtifactError(f"{blank(uri)} has {size:,} bytes", wanted=f"at most {SMALL:,}")
    return b"".join(remote.stream(uri))
