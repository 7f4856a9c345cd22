"""Rows sorted by key in bounded memory: sorted runs on disk, then one merge."""

from __future__ import annotations

import heapq
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


class Sorter:
    """`add` rows of `schema`, then iterate `rows()` in order of `key`. Holds at most `limit` rows at a time."""

    def __init__(
        self, folder: Path, schema: pa.Schema, key: Callable[[dict[str, Any]], Any], limit: int = 50_000
    ) -> None:
        self.folder, self.schema, self.key, self.limit = folder, schema, key, limit
        self.held: list[dict[str, Any]] = []
        self.runs: list[Path] = []
        self.count = 0

    def add(self, row: dict[str, Any]) -> None:
        self.held.append(row)
        self.count += 1
        if len(self.held) >= self.limit:
            self._spill()

    def _spill(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"run-{len(self.runs):05d}.parquet"
        self.held.sort(key=self.key)
        with pq.ParquetWriter(path, self.schema) as writer:
            for at in range(0, len(self.held), 1024):
                writer.write_table(pa.Table.from_pylist(self.held[at : at + 1024], schema=self.schema))
        self.runs.append(path)
        self.held = []

    def rows(self) -> Iterator[dict[str, Any]]:
        self.held.sort(key=self.key)
        if not self.runs:
            return iter(self.held)
        return heapq.merge(*[_read(run) for run in self.runs], iter(self.held), key=self.key)

    def close(self) -> None:
        self.held = []
        shutil.rmtree(self.folder, ignore_errors=True)


def _read(path: Path) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(path) as f:
        for batch in f.iter_batches(512):
            yield from batch.to_pylist()
