"""The pack plan: which records make which sequence. Made once, by one process, beside the shards, and then read by all.

`<shards>/packs/<key>.parquet` (below the cache of shards where that cannot be written) has a row for each piece, in order of
streams and sequences; its metadata tell the streams, the counts and the digest. The key covers the shards, the settings and
the recipe. A lock keeps the other ranks waiting while one makes it; it appears whole or not at all. Records whose bytes are
damaged are left out; a plan names them, and is made anew once one of them can be read again. The old one stays beside the new
one, as `<key>-<digest>.parquet`, for trainings that were begun on it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmlm.data.bestfit import BestFit
from mmlm.data.config import BestFitPacking, By, NaturalMixture, NoPacking, PackConfig
from mmlm.data.objects import cache_folder
from mmlm.data.order import stand_ins
from mmlm.data.reader import ShardReader
from mmlm.errors import ArtifactError, ConfigError, DataError
from mmlm.progress import Progress, tell
from mmlm.shards.packs import FOLDER, META, content_digest
from mmlm.storage import atomic_write, sha256_json, write_bytes

RECIPE = 1
"""Bumped when the same shards and settings give another plan."""
WHOLE = -1
"""`last` of a record that is not split."""
KEPT_OPEN = 1 / 64
"""Share of a sequence with less room than which it is not offered to the next window."""
SCHEMA = pa.schema(
    [
        ("sequence", pa.int64()),
        ("sample", pa.int64()),
        *((name, pa.int32()) for name in ("first", "last", "length")),
    ]
)


@dataclass(frozen=True)
class Plan:
    """The plan in memory. Sequence s holds the rows `starts[s]` to `starts[s + 1]`."""

    starts: np.ndarray
    """(sequences + 1,) int64."""
    sample: np.ndarray
    """(rows,) int64; number of the sample in the training split."""
    first: np.ndarray
    last: np.ndarray
    """(rows,) int32; the tokens of the piece, from first to before last; WHOLE for a whole record."""
    opened: np.ndarray
    """(rows,) int32; positions that the piece takes."""
    streams: dict[str, dict[str, int]]
    """stream → its sequences, records, pieces, tokens; in the order of their sequences."""
    counts: dict[str, int]
    """records, sequences, split, pieces, refused, damaged, positions (of all sequences) and tokens (that are no padding)."""
    length: int | None
    """Positions of every sequence, or None when they are padded to the longest of their batch."""
    digest: str
    damaged: tuple[int, ...] = ()
    """Samples that could not be read when it was made, and are in no sequence."""

    @property
    def sizes(self) -> dict[str, int]:
        """stream → sequences."""
        return {name: counts["sequences"] for name, counts in self.streams.items()}

    def padding(self, taken: Sequence[int] | None = None) -> float:
        """Share of positions that hold nothing, when each stream gives `taken` sequences (by default all it has, once) and
        no modality is dropped; 0 where sequences have no length of their own."""
        held = [s["tokens"] / s["sequences"] if s["sequences"] else 0.0 for s in self.streams.values()]
        counts = list(self.sizes.values()) if taken is None else taken
        positions = sum(counts) * (self.length or 0)
        return 1 - sum(h * n for h, n in zip(held, counts, strict=True)) / positions if positions else 0.0

    def rows(self, sequence: int) -> range:
        return range(int(self.starts[sequence]), int(self.starts[sequence + 1]))


def find_plan(reader: ShardReader, pack: PackConfig, by: By | None, digest: str | None = None) -> Plan:
    """The plan for the samples of `reader`, read if it is there, else made. `by` None: one stream of everything. The one
    with `digest` is taken where it is there, though records that it leaves out can be read again.

    Raises DataError when no record is left, or a damaged one and all that would stand in for it cannot be read; ConfigError
    when a sequence is shorter than the settings allow.
    """
    if isinstance(pack, BestFitPacking) and (pack.length or reader.spec.max_len) < 8:
        raise ConfigError(f"sequences of {reader.spec.max_len}", wanted="at least 8 positions")
    if digest and (plan := named_plan(reader, pack, by, digest)):
        return plan
    told = _asked(reader, pack, by)
    folder, name = reader.path / FOLDER, f"{_key(told)}.parquet"
    if not os.access(reader.path, os.W_OK):  # shards that are only lent
        if plan := _kept(reader, folder / name):
            return plan
        folder = cache_folder() / FOLDER
    path = folder / name
    if plan := _kept(reader, path):
        return plan
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if plan := _kept(reader, path):  # while we waited, another process made it
            return plan
        made = _make(reader, pack, by)
        if path.exists():
            old = read_plan(path)
            tell(f"pack: {_stale(reader, old)}; the plan is made anew")
            write_bytes(_aside(path, old.digest), path.read_bytes())
        _write(path, told, *made)
    return read_plan(path)


def named_plan(reader: ShardReader, pack: PackConfig, by: By | None, digest: str) -> Plan | None:
    """The plan with `digest`, the present one or an old one, where it is there."""
    name = f"{_key(_asked(reader, pack, by))}.parquet"
    for folder in (reader.path / FOLDER, cache_folder() / FOLDER):
        # the present one first: it is copied aside before another takes its place
        for path in (folder / name, _aside(folder / name, digest)):
            if path.exists() and (plan := read_plan(path)).digest == digest:
                return plan
    return None


def _asked(reader: ShardReader, pack: PackConfig, by: By | None) -> dict[str, Any]:
    """What a plan is made from."""
    return {
        "recipe": RECIPE, "shards": reader.artifact.digest, "splits": list(reader.splits),
        "pack": pack.model_dump(mode="json"), "by": by,
    }  # fmt: skip


def _key(asked: Mapping[str, Any]) -> str:
    return sha256_json(asked)[:16]


def _aside(path: Path, digest: str) -> Path:
    """Where the plan in file `path` lies once another took its place."""
    return path.with_name(f"{path.stem}-{digest[:16]}.parquet")


def _kept(reader: ShardReader, path: Path) -> Plan | None:
    """The plan in file `path`; None when there is none, or when it is to be made anew."""
    plan = read_plan(path) if path.exists() else None
    return None if plan and _stale(reader, plan) else plan


def _stale(reader: ShardReader, plan: Plan) -> str:
    """Why `plan` is to be made anew; empty when it is not."""
    if plan.counts["damaged"] != len(plan.damaged):
        return "an earlier version did not write down which records it left out"
    if any(reader.glance(i) is not None for i in plan.damaged):
        return "records that were damaged can be read again"
    return ""


def needs_plan(reader: ShardReader, pack: PackConfig, by: By | None) -> bool:
    """Whether sequences are anything but the records in their order."""
    return not isinstance(pack, NoPacking) or by is not None or _keeps_long(reader)


def _keeps_long(reader: ShardReader) -> bool:
    return bool(reader.artifact.config.get("features", {}).get("on_long") == "keep")


def read_plan(path: Path) -> Plan:
    """The plan in file `path`. Raises ArtifactError when it cannot be read."""
    try:
        table = pq.read_table(path, memory_map=True)
        told = json.loads(table.schema.metadata[META])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"the pack plan {path} cannot be read ({error})", cure="remove it: it is made anew"
        ) from None
    columns = {name: table[name].to_numpy() for name in SCHEMA.names}
    sequence = columns["sequence"]
    count = int(told["counts"]["sequences"])
    return Plan(
        np.searchsorted(sequence, np.arange(count + 1)), columns["sample"], columns["first"], columns["last"],
        columns["length"], told["streams"], told["counts"], told["length"], told["digest"], tuple(told.get("damaged", ())),
    )  # fmt: skip


def _write(path: Path, told: dict[str, Any], table: pa.Table, made: dict[str, Any]) -> None:
    meta = {**told, **made, "digest": content_digest(table, {**told, **made})}
    table = table.replace_schema_metadata({META: json.dumps(meta, sort_keys=True, ensure_ascii=False)})
    with atomic_write(path) as file:
        pq.write_table(table, file, compression="zstd", row_group_size=1 << 20)


@dataclass
class _Rows:
    """Pieces of a window, or of all windows: columns of SCHEMA without `sequence`."""

    sample: np.ndarray
    first: np.ndarray
    last: np.ndarray
    length: np.ndarray

    @staticmethod
    def joined(parts: list[_Rows]) -> _Rows:
        return _Rows(*(np.concatenate([getattr(p, n) for p in parts]) for n in ("sample", "first", "last", "length")))


class _Stream:
    """The sequences of one stream so far."""

    def __init__(self, pack: PackConfig, length: int) -> None:
        self.fit = BestFit(length) if isinstance(pack, BestFitPacking) else None
        self.least = max(2, int(length * KEPT_OPEN))
        self.parts: list[_Rows] = []
        self.rows = 0
        self.sequences: list[list[int]] = []
        """Of each the numbers of its rows within the stream."""
        self.records = self.split = 0

    def add(self, rows: _Rows) -> None:
        numbers = np.arange(self.rows, self.rows + len(rows.sample))
        self.parts.append(rows)
        self.rows += len(numbers)
        if self.fit:
            self.fit.add(numbers, rows.length)
            self.sequences += self.fit.take(self.least)
        else:
            self.sequences += [[number] for number in numbers.tolist()]

    def close(self) -> tuple[_Rows, np.ndarray]:
        """All rows in order of sequences, and how many each sequence has."""
        if self.fit:
            self.sequences += self.fit.take()
        sizes = np.array([len(s) for s in self.sequences], np.int64)
        order = np.fromiter((n for s in self.sequences for n in s), np.int64, self.rows)
        rows = _Rows.joined(self.parts)
        return _Rows(rows.sample[order], rows.first[order], rows.last[order], rows.length[order]), sizes


def _make(reader: ShardReader, pack: PackConfig, by: By | None) -> tuple[pa.Table, dict[str, Any]]:
    """The table of the plan, and what its metadata tell."""
    length = (pack.length if isinstance(pack, BestFitPacking) else None) or reader.spec.max_len
    may_split = isinstance(pack, BestFitPacking) and pack.on_long == "split"
    streams: dict[str, _Stream] = {}
    counts = {"records": 0, "refused": 0, "damaged": 0}
    damaged: list[int] = []
    for names, samples, tokens, lengths in _windows(reader, pack, by, damaged):
        for name in sorted(set(names.tolist())):
            mine = names == name
            stream = streams.setdefault(name, _Stream(pack, length))
            fits = lengths <= length
            splits = ~fits & (tokens == lengths) & may_split
            whole = np.flatnonzero(mine & fits)
            none = np.zeros(len(whole), np.int32)
            parts = [_Rows(samples[whole], none, none + WHOLE, lengths[whole])]
            parts += [_pieces(int(samples[i]), int(tokens[i]), length) for i in np.flatnonzero(mine & splits)]
            stream.records += len(whole) + len(parts) - 1
            stream.split += len(parts) - 1
            counts["refused"] += int((mine & ~fits & ~splits).sum())
            stream.add(_Rows.joined(parts))
    counts["records"] = sum(s.records for s in streams.values())
    counts["split"] = sum(s.split for s in streams.values())
    counts["damaged"] = len(damaged)
    _give_up_if(reader, damaged)
    if not counts["records"]:
        raise DataError(
            f"no training record of {reader.path} fits into a sequence of {length}", cure="raise data.pack.length"
        )
    table, made = _table(streams, counts, length, isinstance(pack, BestFitPacking))
    return table, {**made, "damaged": damaged} if damaged else made


def _give_up_if(reader: ShardReader, damaged: Sequence[int]) -> None:
    """Raise DataError when what would stand in for a damaged sample is damaged, too: a loader without a plan gives up
    shards then."""
    lost = set(damaged)
    for i in damaged:
        if lost.issuperset(stand_ins(i, len(reader))):
            raise DataError(
                f"{reader.damage(i)}, and so is what would stand in for it; {len(lost):,} of {len(reader):,} records "
                "cannot be read", cure="run `mmlm verify` on the shard set",
            )  # fmt: skip


def _table(
    streams: Mapping[str, _Stream], counts: dict[str, int], length: int, packed: bool
) -> tuple[pa.Table, dict[str, Any]]:
    tables, told, base = [], {}, 0
    for name in sorted(streams):
        rows, sizes = streams[name].close()
        sequence = base + np.repeat(np.arange(len(sizes)), sizes)
        base += len(sizes)
        columns = (sequence, rows.sample, rows.first, rows.last, rows.length)
        arrays = [pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)]
        tables.append(pa.Table.from_arrays(arrays, schema=SCHEMA))
        told[name] = {
            "sequences": len(sizes), "records": streams[name].records, "pieces": int((rows.last != WHOLE).sum()),
            "tokens": int(rows.length.sum(dtype=np.int64)),
        }  # fmt: skip
    tokens = sum(t["tokens"] for t in told.values())
    counts |= {
        "sequences": base, "pieces": sum(t["pieces"] for t in told.values()), "tokens": tokens,
        "positions": base * length if packed else tokens,
    }  # fmt: skip
    table = pa.concat_tables(tables).combine_chunks()
    return table, {"streams": told, "counts": counts, "length": length if packed else None}


def _pieces(sample: int, tokens: int, length: int) -> _Rows:
    """A long record cut so that each piece but the last fills a sequence; neighbours share a token."""
    first = np.arange(0, tokens - 1, length - 1, dtype=np.int32)
    last = np.minimum(first + length, tokens).astype(np.int32)
    return _Rows(np.full(len(first), sample, np.int64), first, last, last - first)


def _windows(
    reader: ShardReader, pack: PackConfig, by: By | None, damaged: list[int]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """(streams, samples, tokens, lengths) of some shards at a time. Samples that cannot be read are added to `damaged`."""
    names: list[str] = []
    numbers: list[tuple[int, int, int]] = []
    window = pack.window if isinstance(pack, BestFitPacking) else 16
    with Progress("pack", len(reader), "records") as progress:
        for shard, samples in enumerate(reader.shards()):
            for sample in samples:
                seen = reader.glance(sample)
                if seen is None:
                    damaged.append(sample)
                    continue
                names.append(_stream(seen.source, seen.task, by))
                numbers.append((sample, seen.tokens, seen.length))
            progress.add(len(samples))
            if (shard + 1) % window == 0 and names:
                yield np.array(names, object), *np.array(numbers, np.int64).T
                names, numbers = [], []
        if names:
            yield np.array(names, object), *np.array(numbers, np.int64).T


def _stream(source: str, task: str, by: By | None) -> str:
    return {"source": source, "task": task, "source/task": f"{source}/{task}", None: "all"}[by]


def by_of(mixture: Any) -> By | None:
    """What tells the streams of `mixture` apart."""
    return None if isinstance(mixture, NaturalMixture) else mixture.by
