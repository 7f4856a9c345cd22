"""The one committer of a shard set: publishes without replacing, journals, resumes, and closes the books.

A unit is published in this order: index, tar (both by hard link from their temporary names, which never replaces
anything), row in the journal, each flushed to the disk. Whatever a kill leaves behind without a journal row is swept
away at the next start and made again, with the same bytes.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmlm.errors import ArtifactError, DataError
from mmlm.shards.faultpoints import point
from mmlm.shards.packs import sweep_packs
from mmlm.shards.write import QUARANTINE as QUARANTINED
from mmlm.shards.write import TEMPORARY, Written
from mmlm.storage import atomic_write, fsync_folder, sha256_file

JOURNAL = ".journal.jsonl"
MANIFEST = "manifest.parquet"
QUARANTINE = "quarantine.parquet"
SHARDS = pa.schema(
    [
        ("path", pa.string()),
        ("unit_id", pa.string()),
        ("split", pa.string()),
        *((name, pa.int64()) for name in ("generation", "index")),
        ("first_id", pa.string()),
        ("last_id", pa.string()),
        ("sha256", pa.string()),
        ("index_sha256", pa.string()),
        *((name, pa.int64()) for name in ("bytes", "samples", "records", "quarantined")),
        *((name, pa.int64()) for name in ("images", "sounds", "tokens", "cut_sounds", "left_out")),
        *((name, pa.int64()) for name in ("image_bytes", "audio_bytes", "audio_frames")),
    ]
)
"""A row per unit; `path` is "" for a unit of which no sample was left."""


class Committer:
    """Owns the visible files of a shard set in `out`. One at a time: the artifact's lock sees to that."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.done: dict[str, dict[str, Any]] = {}
        """unit_id → journal row of every unit that is published."""

    def resume(self, planned: dict[str, str]) -> None:
        """Take up what an earlier run published of `planned` (unit_id → name) and remove everything else."""
        sweep_packs(self.out)
        (self.out / TEMPORARY).mkdir(exist_ok=True)
        for row in _read_journal(self.out / JOURNAL):
            if planned.get(row["unit_id"]) == row["name"] and self._is_there(row):
                self.done[row["unit_id"]] = row
        self._rewrite_journal()
        listed = {row["name"] for row in self.done.values() if row["samples"]}
        for path in [*self.out.glob("*.tar"), *self.out.glob("*.index.parquet")]:
            if path.name.removesuffix(".tar").removesuffix(".index.parquet") not in listed:
                path.unlink()
        for path in [*(self.out / TEMPORARY).iterdir(), *self.out.glob(".*.tmp")]:
            path.unlink(missing_ok=True)  # a worker of a killed run may still be there and tidy up after itself

    def adopt(self, earlier: Path, planned: dict[str, str]) -> int:
        """Take from the finished shard set in `earlier` what is the same here, by hard link; returns how many units.

        A shard whose bytes are not those that its manifest tells is left there, and made anew here.
        """
        count = 0
        for row in read_published(earlier):
            name = planned.get(row["unit_id"])
            if name is None or row["unit_id"] in self.done:
                continue
            if row["samples"]:
                files = {".index.parquet": row["index_sha256"], ".tar": row["sha256"]}
                if not all(_has(earlier / (row["name"] + ending), digest) for ending, digest in files.items()):
                    continue
                for ending, digest in files.items():
                    _publish(earlier / (row["name"] + ending), self.out / (name + ending), digest)
            row["name"], row["index"] = name, int(name.split("-")[1])
            self.done[row["unit_id"]] = row
            count += 1
        fsync_folder(self.out)
        self._rewrite_journal()
        return count

    def _is_there(self, row: dict[str, Any]) -> bool:
        if not row["samples"]:
            return True
        tar, index = self.out / f"{row['name']}.tar", self.out / f"{row['name']}.index.parquet"
        if not (tar.is_file() and index.is_file() and tar.stat().st_size == row["bytes"]):
            return False
        return sha256_file(tar) == row["sha256"] and sha256_file(index) == row["index_sha256"]

    def commit(self, written: Written) -> None:
        """Publish one unit. Raises ArtifactError when another shard of that name is there."""
        row = written.row()
        row["index_sha256"] = ""
        if written.temporary:
            index, tar = f"{written.temporary}.index.parquet", f"{written.temporary}.tar"
            row["index_sha256"] = sha256_file(Path(index))
            _publish(Path(index), self.out / f"{written.name}.index.parquet", row["index_sha256"])
            _publish(Path(tar), self.out / f"{written.name}.tar", written.sha256)
            fsync_folder(self.out)
            point("after_publish")
        self._append(row)
        self.done[written.unit_id] = row
        if written.temporary:
            Path(index).unlink()
            Path(tar).unlink()

    def _append(self, row: dict[str, Any]) -> None:
        with (self.out / JOURNAL).open("ab") as file:
            file.write(_line(row))
            file.flush()
            os.fsync(file.fileno())

    def _rewrite_journal(self) -> None:
        with atomic_write(self.out / JOURNAL) as file:
            file.writelines(_line(row) for row in self.done.values())

    def forget_failures(self) -> None:
        """Leave units with failed samples out of the journal, so that the next run tries them again."""
        self.done = {unit_id: row for unit_id, row in self.done.items() if not row["quarantine"]}
        self._rewrite_journal()

    def rows(self) -> list[dict[str, Any]]:
        """The published units in the order of the manifest table."""
        return sorted(self.done.values(), key=lambda row: (row["split"], row["index"]))

    def write_quarantine(self) -> None:
        rows = sorted((q for row in self.done.values() for q in row["quarantine"]), key=lambda q: q["id"])
        _write_table(rows, QUARANTINED, self.out / QUARANTINE)

    def close(self) -> None:
        """Write the tables that readers trust. Their bytes depend on the units only, not on the order of the work."""
        point("before_manifest")
        rows = [
            {
                **{name: row.get(name) for name in SHARDS.names},
                "path": f"{row['name']}.tar" if row["samples"] else "",
                "quarantined": len(row["quarantine"]),
            }
            for row in self.rows()
        ]
        self.write_quarantine()
        _write_table(rows, SHARDS, self.out / MANIFEST)

    def clear(self) -> None:
        """Remove what only an unfinished shard set needs."""
        (self.out / JOURNAL).unlink(missing_ok=True)
        shutil.rmtree(self.out / TEMPORARY, ignore_errors=True)


def read_published(folder: Path) -> list[dict[str, Any]]:
    """The units of a finished shard set as journal rows. Raises ArtifactError when its tables are missing or broken."""
    failed: dict[str, list[dict[str, str]]] = {}
    for lost in _read_table(folder / QUARANTINE, ["reason"]):
        failed.setdefault(lost.get("unit_id") or "", []).append(lost)
    rows = []
    for row in _read_table(folder / MANIFEST, ["path", "unit_id", "split", "generation", "index", "last_id"]):
        name = row["path"].removesuffix(".tar") or f"{row['split']}-{row['index']:05d}-{row['unit_id'][:8]}"
        rows.append({**row, "name": name, "quarantine": failed.get(row["unit_id"], [])})
    return rows


def _read_table(path: Path, columns: list[str]) -> list[dict[str, Any]]:
    try:
        table = pq.read_table(path)
        found = f"has no column {missing[0]!r}" if (missing := sorted({*columns} - {*table.column_names})) else ""
    except FileNotFoundError:
        found = "is missing"
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the disk, not the file; Arrow's own have no number
            raise
        found = f"cannot be read ({' '.join(str(error).split())[:200]})"
    if found:
        raise ArtifactError(
            f"{path} {found}", wanted="the table that the shard set was finished with",
            cure=f"bring the file back, or remove {path.parent} and run shard again",
        )  # fmt: skip
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def reopen(folder: Path, reason: str) -> int:
    """Turn a finished shard set back into an unfinished one that lacks the units with samples lost to `reason`.

    The next run makes those units again. Returns the number of such samples. Raises DataError when there is none.
    """
    rows = read_published(folder)
    reasons = Counter(lost["reason"] for row in rows for lost in row["quarantine"])
    if not reasons:
        raise DataError(f"no sample of {folder} was lost: there is nothing to retry")
    if reason != "all" and not reasons[reason]:
        listed = ", ".join(f"{name} ({count})" for name, count in reasons.most_common())
        raise DataError(f"no sample of {folder} was lost to {reason!r}", wanted=f"one of: {listed}, or all")
    kept = [row for row in rows if not any(reason in ("all", lost["reason"]) for lost in row["quarantine"])]
    with atomic_write(folder / JOURNAL) as file:
        file.writelines(_line(row) for row in kept)
    return reasons.total() if reason == "all" else reasons[reason]


def _has(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_file(path) == sha256


def _publish(temporary: Path, final: Path, sha256: str) -> None:
    """Give `temporary` its final name; an equal file may already be there, another one may not."""
    try:
        os.link(temporary, final)
    except FileExistsError:
        if sha256_file(final) != sha256:
            raise ArtifactError(
                f"{final} holds other bytes than this run made", cure="remove the unfinished shard set and run again"
            ) from None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS, errno.EXDEV) or final.exists():
            raise
        _copy(temporary, final)  # a file system without hard links; the lock keeps every other committer away


def _copy(temporary: Path, final: Path) -> None:
    half = final.with_name(f".{final.name}.tmp")
    with temporary.open("rb") as source, half.open("wb") as target:
        while block := source.read(1 << 20):
            target.write(block)
        target.flush()
        os.fsync(target.fileno())
    half.replace(final)


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n").encode()


def _read_journal(path: Path) -> Iterable[dict[str, Any]]:
    """The whole rows of a journal; a kill may have torn the last one."""
    if not path.exists():
        return
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "unit_id" in row:
            yield row


def _write_table(rows: list[dict[str, Any]], schema: pa.Schema, path: Path) -> None:
    with atomic_write(path) as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), file, compression="zstd")
