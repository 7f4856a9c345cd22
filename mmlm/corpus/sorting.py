"""Rows sorted by key in bounded memory: sorted runs on disk, then one merge."""

from __future__ import annotations

import heapq
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

PIECE_ROWS, PIECE_BYTES = 512, 1 << 20
MERGED = 128
"""Runs that are open at a time: each costs a file handle, of which a process often has 1,024, and a row group."""


class Sorter:
    """`add` rows of `schema`, then iterate `rows()` in order of `key`.

    Holds at most `limit` rows and `limit_bytes` of text and inline media (`text_bytes`, `inline_bytes`) at a time.
    """

    def __init__(
        self, folder: Path, schema: pa.Schema, key: Callable[[dict[str, Any]], Any], limit: int = 50_000,
        limit_bytes: int = 256 << 20,
    ) -> None:  # fmt: skip
        self.folder, self.schema, self.key, self.limit, self.limit_bytes = folder, schema, key, limit, limit_bytes
        self.held: list[dict[str, Any]] = []
        self.held_bytes = 0
        self.runs: list[Path] = []
        self.count = self.written = 0

    def add(self, row: dict[str, Any]) -> None:
        self.held.append(row)
        self.count += 1
        self.held_bytes += _size(row)
        if len(self.held) >= self.limit or self.held_bytes >= self.limit_bytes:
            self._spill()

    def _spill(self) -> None:
        self.held.sort(key=self.key)
        self._write(self.held)
        self.held, self.held_bytes = [], 0

    def _write(self, rows: Iterable[dict[str, Any]]) -> None:
        """Sorted `rows` as one more run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"run-{self.written:05d}.parquet"
        with pq.ParquetWriter(path, self.schema) as writer:
            for piece in _pieces(rows):
                writer.write_table(pa.Table.from_pylist(piece, schema=self.schema))
        self.runs.append(path)
        self.written += 1

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows, in order; may be asked for again."""
        while len(self.runs) > MERGED:
            some, self.runs = self.runs[:MERGED], self.runs[MERGED:]
            self._write(heapq.merge(*map(_read, some), key=self.key))
            for run in some:
                run.unlink()
        self.held.sort(key=self.key)
        if not self.runs:
            return iter(self.held)
        return heapq.merge(*[_read(run) for run in self.runs], iter(self.held), key=self.key)

    def close(self) -> None:
        self.held = []
        shutil.rmtree(self.folder, ignore_errors=True)


def _size(row: dict[str, Any]) -> int:
    size: int = row.get("text_bytes", 0) + row.get("inline_bytes", 0)
    return size


def _pieces(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """`rows` cut into row groups; one of each run is in memory while they are merged."""
    piece: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        piece.append(row)
        size += _size(row)
        if len(piece) == PIECE_ROWS or size >= PIECE_BYTES:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def _read(path: Path) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(path) as f:
        for number in range(f.num_row_groups):
            yield from f.read_row_group(number).to_pylist()
